"""A file that torch.save wrote -> its containers and tensors, read as data: no code of the file's choosing can run.

A torch checkpoint is a zip: a pickle (`data.pkl`, read by udfs/inert_pickle.py) says which tensor lies in which member.
Lightning puts foreign objects beside the weights (hyper-parameters, callbacks): those come out as inert `Foreign` things,
which a caller that finds one where a tensor belongs refuses by name. The tensors' bytes are read when they are asked for, so
that a caller can check names and shapes first: what a file can cost is bounded by what is asked of it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from udfs import inert_pickle
from udfs.inert_pickle import Foreign, Named, Refused

if TYPE_CHECKING:
    import torch

# torch's name of a storage -> (torch's dtype, bytes an element)
STORAGES = {
    "torch.FloatStorage": ("float32", 4),
    "torch.DoubleStorage": ("float64", 8),
    "torch.HalfStorage": ("float16", 2),
    "torch.BFloat16Storage": ("bfloat16", 2),
    "torch.LongStorage": ("int64", 8),
    "torch.IntStorage": ("int32", 4),
    "torch.ShortStorage": ("int16", 2),
    "torch.CharStorage": ("int8", 1),
    "torch.ByteStorage": ("uint8", 1),
    "torch.BoolStorage": ("bool", 1),
}
PICKLE_BYTES = 16 * 2**20  # of data.pkl, which holds names and places, no weights: some hundred KB for a ViT-L with its optimizer
DIMENSIONS = 16
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6 begins with this number, pickled


class Stored(NamedTuple):
    """A tensor that is not read yet: a view (in elements) into the member data/`key` of `elements`."""

    key: str
    dtype: str
    elements: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Storage(NamedTuple):
    key: str
    dtype: str
    elements: int


class Checkpoint:
    """An open checkpoint: `top`, what was saved, with Stored for tensors; `foreign`, the names that were not looked up."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError that says what the file is instead, and what to do."""
        self.path = path
        _refuse_other_formats(path)
        try:
            self._archive = zipfile.ZipFile(path)
            self._members, self._prefix = _members(self._archive, path)
            if self._members.get("byteorder", 6) != 6 or self._read("byteorder", b"little") != b"little":
                raise ValueError(f"{path}: its numbers are big-endian; save it anew on a little-endian machine")
            self.top, foreign = inert_pickle.load(self._read("data.pkl"), CALLS, self._storage)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise ValueError(f"{path}: a broken archive: {error}") from None
        except Refused as refused:
            raise ValueError(f"{path}: data.pkl is refused: {refused}") from None
        self.foreign = [name for name in foreign if name not in STORAGES]

    def tensor(self, stored: Stored) -> torch.Tensor:
        """Reads a tensor, contiguous. Raises ValueError when it reaches beyond its storage, or its bytes are damaged."""
        import torch

        count = prod(stored.shape)
        last = stored.offset + sum((size - 1) * step for size, step in zip(stored.shape, stored.stride, strict=True))
        if count > stored.elements or (count and last >= stored.elements):
            raise ValueError(
                f"{self.path}: a tensor of shape {list(stored.shape)} in a storage of {stored.elements} elements (data/{stored.key})"
            )
        dtype = getattr(torch, stored.dtype)
        if count == 0:
            return torch.empty(stored.shape, dtype=dtype)
        try:
            data = torch.frombuffer(bytearray(self._read(f"data/{stored.key}")), dtype=dtype)
        except zipfile.BadZipFile as error:  # its checksum
            raise ValueError(f"{self.path}: data/{stored.key}: {error}") from None
        return data.as_strided(stored.shape, stored.stride, stored.offset).clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        self._archive.close()

    def _read(self, member: str, absent: bytes | None = None) -> bytes:
        if absent is not None and member not in self._members:
            return absent
        return self._archive.read(self._prefix + member)

    def _storage(self, reference: Any) -> _Storage | Foreign:
        """("storage", class, key, device, elements) -> where it lies; the member must have exactly the bytes that it says."""
        if type(reference) is not tuple or len(reference) != 5 or reference[0] != "storage" or type(reference[1]) is not Named:
            raise Refused("it refers to something outside that is no storage")
        _, kind, key, _, elements = reference
        if kind.name not in STORAGES:
            return Foreign(kind.name)
        dtype, size = STORAGES[kind.name]
        if type(key) is not str or type(elements) is not int or self._members.get(f"data/{key}") != elements * size:
            there = self._members.get(f"data/{key}") if type(key) is str else None
            raise Refused(f"a storage is said to hold {elements} x {dtype}, its member data/{key} has {there} bytes")
        return _Storage(key, dtype, elements)


def _rebuild_tensor(storage: object, offset: object, shape: object, stride: object, *rest: object) -> Stored | Foreign:
    """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])."""
    if not isinstance(storage, _Storage):
        return Foreign(storage.name if isinstance(storage, Foreign) else "torch._utils._rebuild_tensor_v2")
    if type(shape) is not tuple or type(stride) is not tuple or len(shape) != len(stride) or len(shape) > DIMENSIONS:
        raise Refused(f"a tensor of data/{storage.key} has no shape")
    if any(type(one) is not int or not 0 <= one < 2**62 for one in (offset, *shape, *stride)):
        raise Refused(f"a tensor of data/{storage.key} has an offset, a shape or a stride that are no whole numbers from 0")
    return Stored(*storage, offset, shape, stride)  # type: ignore[arg-type]


CALLS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": lambda: {},
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch.Size": lambda sizes: sizes,
}


def _refuse_other_formats(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return
    anew = """python -c 'import torch; torch.save(torch.load("IN", map_location="cpu", weights_only=True), "OUT")'"""
    if head.startswith(LEGACY) or head[257:262] == b"ustar":
        raise ValueError(f"{path}: a checkpoint as torch wrote it before version 1.6, expected the zip format; save it anew: {anew}")
    if head[:1] == b"\x80":
        raise ValueError(f"{path}: a bare pickle, expected a file that torch.save wrote in its zip format")
    if head[8:9] == b"{":
        raise ValueError(f"{path}: a safetensors file already: there is nothing to convert")
    raise ValueError(f"{path}: no checkpoint of torch: it begins with {head[:8]!r}, expected a zip")


def _members(archive: zipfile.ZipFile, path: Path) -> tuple[Mapping[str, int], str]:
    """-> (name without the archive's one folder -> bytes, that folder). torch stores its members as they are, below one folder."""
    infos = archive.infolist()
    prefix = infos[0].filename.partition("/")[0] + "/" if infos else "/"
    members: dict[str, int] = {}
    for info in infos:
        name = info.filename.removeprefix(prefix)
        inside = info.filename.startswith(prefix) and prefix not in ("/", "./", "../") and not {"", ".", ".."} & set(name.split("/"))
        if not inside or "\\" in name or name in members:
            raise ValueError(f"{path}: member {info.filename!r}: expected distinct names below one folder, as torch.save writes them")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(
                f"{path}: member {info.filename!r} is compressed ({info.file_size} bytes from {info.compress_size}); torch compresses none"
            )
        members[name] = info.file_size
    if "constants.pkl" in members or any(name.startswith("code/") for name in members):
        raise ValueError(f"{path}: a TorchScript program, not a checkpoint; save the state dict of the module it came from")
    if "data.pkl" not in members:
        raise ValueError(f"{path}: a zip without data.pkl, which torch.save writes")
    if sum(members.values()) > path.stat().st_size or members["data.pkl"] > PICKLE_BYTES:
        raise ValueError(
            f"{path}: its members claim {sum(members.values())} bytes (data.pkl {members['data.pkl']}), more than there can be"
        )
    return members, prefix
