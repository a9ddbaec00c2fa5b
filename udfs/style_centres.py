"""Stored vectors x a set of style centres -> nearest, distance, second, margin, top 5 and state of each vector: no decode, no tower.

A set is two files: centres.safetensors (`centres` float32 [k, width], `ids` int64 [k]) and centres.json (the rest of `Centres`).
Distances are Euclidean, on the vectors as stored: V7's style feature is not normalised, and neither is it here.

Candidates come from faiss, whose rounding depends on who else is in the batch; their distances are then computed one vector at
a time, in a fixed order of additions, and a vector whose candidates lie too close for faiss to have told them apart is compared
with every centre. So a vector's result is the same in any batch; equal distances go to the lower id.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from udfs.reject import CODES

if TYPE_CHECKING:
    import faiss

KERNEL_VERSION = 1  # raise it when the numbers change
TENSORS, FACTS = "centres.safetensors", "centres.json"
FORMAT = 1  # of the two files
TOP = 5
SLACK = 3  # candidates beyond the fifth: how many near ties faiss may put in a wrong order
CHUNK = 256  # vectors whose candidates are compared at once: 256 x 8 x 768 x 4 bytes = 6 MB
SCHEMA = (
    "image_id BINARY, state STRING, cluster INT, nearest INT, distance FLOAT, second FLOAT, margin FLOAT, "
    "top ARRAY<STRUCT<cluster: INT, distance: FLOAT>>, reject STRUCT<code: STRING, detail: STRING, transient: BOOLEAN>"
)

Policy = Literal["states", "v7"]


@dataclass(frozen=True)
class Centres:
    """`ids` ascend and are never used again; `block`: ids that must not be used; `none_above`: the distance beyond which a vector has no style.

    `encoder`: fingerprint of the vectors that it was fitted on; `next_id`: what the next new centre is called; `history`: how it came to be.
    """

    centres: np.ndarray
    ids: np.ndarray
    none_above: float
    encoder: str
    digest: str
    next_id: int
    block: tuple[int, ...] = ()
    history: tuple[dict[str, Any], ...] = field(default=())

    def __post_init__(self) -> None:
        assert self.centres.dtype == np.float32 and self.centres.ndim == 2 and len(self.centres) == len(self.ids) >= 2
        assert self.ids.dtype == np.int64 and (np.diff(self.ids) > 0).all() and self.ids[0] >= 0 and self.ids[-1] < self.next_id
        assert np.isfinite(self.centres).all() and set(self.block) <= set(self.ids.tolist()), self.block

    @cached_property
    def allowed(self) -> np.ndarray:
        """-> bool [k]."""
        return ~np.isin(self.ids, self.block)

    def without_blocked(self) -> Centres:
        """-> the set as if its blocked centres were not there."""
        keep = self.allowed
        return Centres(self.centres[keep], self.ids[keep], self.none_above, self.encoder, self.digest, self.next_id)


def pack(centres: Centres) -> dict[str, bytes]:
    """-> the set's two files. The same set gives the same bytes."""
    from safetensors.numpy import save

    names = ("none_above", "encoder", "digest", "next_id", "block", "history")
    facts = {name: getattr(centres, name) for name in names} | {"format": FORMAT}
    tensors = {"centres": np.ascontiguousarray(centres.centres), "ids": centres.ids}
    return {TENSORS: save(tensors), FACTS: json.dumps(facts, indent=1, sort_keys=True).encode()}


def unpack(files: Mapping[str, bytes]) -> Centres:
    """The set's two files -> Centres."""
    from safetensors.numpy import load

    tensors, facts = load(files[TENSORS]), json.loads(files[FACTS])
    assert facts.pop("format") == FORMAT
    facts |= {"block": tuple(facts["block"]), "history": tuple(facts["history"])}
    return Centres(centres=tensors["centres"], ids=tensors["ids"], **facts)


class Found(NamedTuple):
    """Of each vector: ids and Euclidean distances of its nearest centres, the nearest first: int64 and float32 [n, top]."""

    ids: np.ndarray
    distances: np.ndarray


class Finder:
    """Nearest centres by exact distances. `threads`: of faiss; those of a Spark task are its cores."""

    def __init__(self, centres: Centres, threads: int = 1) -> None:
        import faiss

        faiss.omp_set_num_threads(threads)
        self._set = centres
        self._index: faiss.IndexFlatL2 = faiss.IndexFlatL2(centres.centres.shape[1])
        self._index.add(centres.centres)
        self._longest = float(np.square(centres.centres).sum(axis=1).max())
        self.top = min(TOP, len(centres.ids))
        self.compared_with_all = 0  # vectors so far

    def find(self, vectors: np.ndarray) -> Found:
        """float32 [n, width] -> Found."""
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        rough, places = self._index.search(vectors, min(self.top + SLACK, len(self._set.ids)))
        places.sort(axis=1)  # by id, so that equal distances keep the lower id first
        ids = np.empty((len(vectors), self.top), np.int64)
        distances = np.empty((len(vectors), self.top), np.float32)
        for start in range(0, len(vectors), CHUNK):
            part = slice(start, start + CHUNK)
            ids[part], distances[part] = self._nearest(vectors[part], places[part])
        if places.shape[1] < len(self._set.ids):
            for row in self._in_doubt(vectors, rough[:, -1], distances[:, -1]):
                self.compared_with_all += 1
                ids[row], distances[row] = self._nearest(vectors[row : row + 1], np.arange(len(self._set.ids))[None])
        return Found(ids, distances)

    def _nearest(self, vectors: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors and places of candidate centres, ascending -> ids and distances of the nearest. numpy adds each row by itself."""
        apart = self._set.centres[places]
        apart -= vectors[:, None]
        np.square(apart, out=apart)
        distances = np.sqrt(apart.sum(axis=2))
        order = np.argsort(distances, axis=1, kind="stable")[:, : self.top]
        return self._set.ids[np.take_along_axis(places, order, 1)], np.take_along_axis(distances, order, 1)

    def _in_doubt(self, vectors: np.ndarray, last: np.ndarray, fifth: np.ndarray) -> np.ndarray:
        """Rows where a centre that faiss left out may be as near as the fifth: rounding of a sum of `width` products, by its norms."""
        rounding = vectors.shape[1] * np.finfo(np.float32).eps * (np.square(vectors).sum(axis=1) + self._longest)
        return np.flatnonzero(np.square(fifth) >= last - rounding)


def assign(batches: Iterable[pa.RecordBatch], files: Mapping[str, bytes], policy: Policy, threads: int = 1) -> Iterator[pa.RecordBatch]:
    """Arrow batches with image_id and vector (little-endian fp16 bytes) -> SCHEMA batches; a vector that is not finite is a reject.

    Policy states: the nearest of all centres; `blocked` when it must not be used, `none` when it is too far, else `ok`. Policy v7, as
    released: the nearest of those that may be used, whatever the distance, always `ok`.
    """
    whole = unpack(files)
    centres = whole.without_blocked() if policy == "v7" else whole
    finder = Finder(centres, threads)
    for batch in batches:
        if batch.num_rows:
            vectors = read_vectors(batch.column("vector"), centres.centres.shape[1])
            finite = np.isfinite(vectors).all(axis=1)
            found = finder.find(np.where(finite[:, None], vectors, np.float32(0)))
            yield _rows(batch.column("image_id"), found, finite, states_of(found, centres, policy))


def states_of(found: Found, centres: Centres, policy: Policy) -> np.ndarray:
    """-> array of `ok`, `blocked`, `none`. Blocked counts first: what must not be used must not be missed for being far."""
    if policy == "v7":
        return np.full(len(found.ids), "ok", dtype=object)
    far = found.distances[:, 0] > np.float32(centres.none_above)
    return np.where(np.isin(found.ids[:, 0], centres.block), "blocked", np.where(far, "none", "ok")).astype(object)


def read_vectors(column: pa.Array, width: int) -> np.ndarray:
    """Arrow column of fp16 bytes, none NULL -> float32 [n, width], without a Python object a row."""
    return read_stored(column, width).astype(np.float32)


def read_stored(column: pa.Array, width: int) -> np.ndarray:
    """The same as it is stored: fp16, a view of the column's memory."""
    assert column.null_count == 0 and pa.types.is_binary(column.type), column.type
    if len(column) == 0:
        return np.empty((0, width), "<f2")
    offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]
    assert (np.diff(offsets) == 2 * width).all(), f"vectors of other widths than {width}"
    return np.frombuffer(column.buffers()[2], "<f2", len(column) * width, offsets[0]).reshape(-1, width)


def _rows(image_ids: pa.Array, found: Found, finite: np.ndarray, states: np.ndarray) -> pa.RecordBatch:
    n, top = found.ids.shape
    lost = ~finite
    nearest, distance, second = found.ids[:, 0].astype(np.int32), found.distances[:, 0], found.distances[:, 1]
    pairs = pa.StructArray.from_arrays([found.ids.ravel().astype(np.int32), found.distances.ravel()], ["cluster", "distance"])
    code = "not_finite"
    told = {"code": code, "detail": "the stored vector holds NaN or infinity", "transient": CODES[code][0]}
    columns: Sequence[tuple[str, pa.Array]] = [
        ("image_id", image_ids),
        ("state", pa.array(states, pa.string(), mask=lost)),
        ("cluster", pa.array(nearest, mask=lost | (states != "ok"))),
        ("nearest", pa.array(nearest, mask=lost)),
        ("distance", pa.array(distance, mask=lost)),
        ("second", pa.array(second, mask=lost)),
        ("margin", pa.array(second - distance, mask=lost)),
        ("top", pa.ListArray.from_arrays(np.arange(0, n * top + 1, top, dtype=np.int32), pairs)),
        (
            "reject",
            pa.array(
                [told if one else None for one in lost],
                pa.struct([("code", pa.string()), ("detail", pa.string()), ("transient", pa.bool_())]),
            ),
        ),
    ]
    return pa.RecordBatch.from_arrays([column for _, column in columns], [name for name, _ in columns])
