"""What the embed stage makes of an image, as plain functions: one work for the bare loop and for the peers, whatever feeds them.

The kernel's own decode, statistics, hashes and tower. No Spark, no torch where a graph is given: the peers' environment has neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from conf.build import Limits
from conf.settings import load_encoder
from udfs import decode, engine, perceptual_hash, pixel_statistics
from udfs.onnx_file import open_session

if TYPE_CHECKING:
    import pyarrow

STATISTICS = ("mean", "contrast", "saturation", "sharpness", "entropy")


class Prepared(NamedTuple):
    """One decoded image: what is stored of it, and what the tower reads."""

    phash: bytes
    mirror: bytes
    statistics: dict[str, float]
    tensor: np.ndarray


class ImageWork:
    """graph: the tower's ONNX file (udfs/export_tower.py), opened with `threads` threads; None: torch runs it, or it has no weights."""

    def __init__(self, encoder: str, graph: Path | None, threads: int = 1) -> None:
        self.encoder: dict[str, Any] = load_encoder(encoder).model_dump()
        self._tower = import_module(f"udfs.tower_{self.encoder['kernel']}")
        self._limits = Limits().model_dump()
        self._model: Any = (
            engine.Graph(open_session(graph, "cpu", threads=threads))
            if graph is not None
            else engine.load(self._tower, self.encoder, engine.How("cpu", threads=threads))
        )

    def prepare(self, data: bytes) -> Prepared:
        """The bytes of a file -> Prepared: one decode."""
        with decode.decoding(data, self._limits, scaled=True) as decoded:
            luma = pixel_statistics.luma_of(decoded.image)
            statistics = pixel_statistics.measure(decoded.image, luma)
            return Prepared(*perceptual_hash.phash(luma), statistics, self._tower.prepare(decoded.image, self.encoder))

    def encode(self, batch: Sequence[Prepared]) -> list[bytes]:
        """-> the fp16 vectors, as the lake stores them."""
        vectors = self._tower.encode(self._model, np.stack([one.tensor for one in batch]))
        return [vector.tobytes() for vector in vectors.astype("<f2")]


def table(paths: Sequence[str], done: Sequence[Prepared], vectors: Sequence[bytes]) -> pyarrow.Table:
    """What every pipeline writes: path, vector, hashes, statistics."""
    import pyarrow

    columns: dict[str, Any] = {
        "path": paths,
        "vector": vectors,
        "phash": [one.phash for one in done],
        "mirror": [one.mirror for one in done],
    }
    return pyarrow.table(columns | {name: [one.statistics[name] for one in done] for name in STATISTICS})
