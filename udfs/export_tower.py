"""An encoder -> the ONNX file of its tower in a cache folder, made once for all workers of a machine.

The first worker exports under a file lock, in a process of its own (torch and the tower's library stay out of the worker); the others wait
and find it. A file's name is a digest of what its numbers depend on: kernel, architecture, weights and the libraries' versions. Its sha256
lies beside it and is checked whenever it is opened. The exported graph is compared with the tower before it is kept.

Cost of ViT-B/16 [measured, 2 shared AMD cores]: 10 to 20 CPU-s and 2.2 GB once, 345 MB of disk; 1.1 CPU-s a worker to open it, against 3.7 for
torch, open_clip and the weights.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from udfs.pinned import hash_file

EXPORT_VERSION = 1
OPSET = 17
INPUT, OUTPUT = "images", "vectors"
LIBRARIES = ("torch", "open_clip_torch", "transformers", "onnx", "onnxruntime")
LARGEST = 2**31 - 2**24  # bytes of an ONNX file: protobuf's limit, and some room for the graph
CLOSE = 1e-4  # largest difference to the tower in any number of a normalised vector


def exported(encoder: Mapping[str, Any], cache: str | None) -> Path:
    """(conf.enrichment.Encoder as a dict, folder or None) -> its ONNX file, exported now if it was not. Raises ValueError as the tower's load."""
    folder = _folder(cache)
    path = folder / f"{encoder['name']}-{_digest(encoder)}.onnx"
    if not _told(path).is_file():
        with _alone(folder / f"{path.name}.lock"):
            if not _told(path).is_file():  # another worker may have been first
                _export_in_a_process(encoder, path)
    found = hash_file(path)
    if found != _told(path).read_text():
        raise ValueError(
            f"{path}: sha256 {found}, and {_told(path).read_text()} when it was exported: delete both files to export it again"
        )
    return path


def _folder(cache: str | None) -> Path:
    """The cache, and by default one that only this user can write: a graph is code."""
    folder = Path(cache) if cache is not None else Path(tempfile.gettempdir()) / f"studbook-towers-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.lstat()
    if cache is None and (not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022):
        raise ValueError(f"{folder} is not a folder of this user alone; give embed.engine_cache")
    return folder


def _digest(encoder: Mapping[str, Any]) -> str:
    kernel = import_module(f"udfs.tower_{encoder['kernel']}")
    told = {key: encoder[key] for key in ("kernel", "model", "config", "pretrained", "sha256", "width", "image_size")}
    told |= {"kernel_version": kernel.KERNEL_VERSION, "export": EXPORT_VERSION, "libraries": {name: version(name) for name in LIBRARIES}}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _told(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Of all processes on this machine one at a time; the system frees the lock of one that dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _export_in_a_process(encoder: Mapping[str, Any], path: Path) -> None:
    """Raises what `export` raises."""
    importable = os.environ | {"PYTHONPATH": os.pathsep.join(place or os.getcwd() for place in sys.path)}
    command = [sys.executable, "-m", "udfs.export_tower", str(path)]
    told = subprocess.run(command, input=json.dumps(encoder), env=importable, capture_output=True, text=True, check=False)
    if told.returncode == 2:
        raise ValueError(told.stderr.strip().splitlines()[-1])
    if told.returncode != 0:
        raise RuntimeError(f"export of encoder {encoder['name']!r} ended with {told.returncode}:\n{told.stderr[-2000:]}")


def export(encoder: Mapping[str, Any], path: Path) -> None:
    """Writes the tower's graph in fp32 and its sha256. Raises ValueError for a tower that a graph cannot hold or that it does not repeat."""
    tower = import_module(f"udfs.tower_{encoder['kernel']}").load(encoder, "cpu", "fp32")
    import torch

    size = sum(weight.numel() * 4 for weight in tower.parameters())
    if size > LARGEST:
        raise ValueError(
            f"encoder {encoder['name']!r}: {size >> 20} MB of weights; an ONNX file holds {LARGEST >> 20}: set embed.engine: torch"
        )
    torch.manual_seed(0)
    images = torch.randn(3, 3, encoder["image_size"], encoder["image_size"])
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as work:
        raw, whole = Path(work) / "raw.onnx", Path(work) / "whole.onnx"
        names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT], "dynamic_axes": {INPUT: {0: "n"}, OUTPUT: {0: "n"}}}
        with _without_fused_attention():
            torch.onnx.export(tower, (images[:2],), raw, dynamo=False, opset_version=OPSET, **names)
        _simplify(raw, whole)
        _compare(tower, whole, images, encoder["name"])
        digest = Path(work) / "sha256"
        digest.write_text(hash_file(whole))
        whole.replace(path)
        digest.replace(_told(path))  # last: it says that the graph is whole


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    """That of torch's eager mode has no ONNX form."""
    import torch

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _simplify(raw: Path, whole: Path) -> None:
    """onnxruntime's optimisations that hold on every CPU, done once: they are most of a session's start."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(whole)
    onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])


def _compare(tower: Any, path: Path, images: Any, name: str) -> None:
    import torch

    from udfs.engine import Graph, normalised, vectors
    from udfs.onnx_file import open_session

    with torch.inference_mode():
        expected = normalised(tower(images).numpy())
    apart = float(np.abs(normalised(vectors(Graph(open_session(path, "cpu")), images.numpy())) - expected).max())
    if not apart <= CLOSE:
        raise ValueError(
            f"encoder {name!r}: the exported graph differs from the tower by {apart:.2g}, allowed {CLOSE}: set embed.engine: torch"
        )


def main() -> None:
    try:
        export(json.load(sys.stdin), Path(sys.argv[1]))
    except ValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
