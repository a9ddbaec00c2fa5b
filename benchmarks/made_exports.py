"""A kind and a number of rows -> an export like those that the Spark side writes, of made-up vectors or of copies of the sample images.

Written once and kept, the same for the same arguments: the files by the Spark side's own writer (one row group, zstd), then the manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.pictures import copy_of
from training import fit_image_model, train_scorer
from training.exports import Export, open_export
from udfs import snapshot
from udfs.opener import Opener, to_uri

SAMPLE = Path(__file__).parents[1] / "tests/data/sample/images"
WIDTH = 768  # of ViT-L/14
VIEWS = ("original", "blur:1", "noise:1", "contrast:1")  # rows of one image, which the scorer's plan keeps together
KINDS: dict[str, dict[str, str]] = {"labels": train_scorer.COLUMNS, "images": fit_image_model.COLUMNS}
FILE_ROWS = {"labels": 8_192, "images": 256}
HELD_OUT = {"labels": 1_024, "images": 64}
ARROW = {"binary": pa.binary(), "string": pa.string(), "float": pa.float32(), "int32": pa.int32()}


def make(folder: Path, kind: str, rows: int, file_rows: int | None = None) -> Export:
    """`rows` rows in bucket `train`, some others in `held_out`; a folder that is there is opened."""
    if not (folder / "manifest.json").exists():
        size = file_rows or FILE_ROWS[kind]
        parts = [("train", first, min(size, rows - first)) for first in range(0, rows, size)] + [("held_out", rows, HELD_OUT[kind])]
        lines = [_write(folder, kind, number, *part) for number, part in enumerate(parts)]
        _write_manifest(folder, kind, lines)
    return open_export(folder, kind, KINDS[kind], ("train", "held_out"))


def _write(folder: Path, kind: str, number: int, bucket: str, first: int, count: int) -> dict[str, Any]:
    columns = TABLES[kind](first, count)
    table = pa.table({name: pa.array(columns[name], ARROW[told]) for name, told in KINDS[kind].items()})
    return snapshot.write(table, bucket, f"{bucket}-{number:05d}.parquet", to_uri(str(folder)), Opener(), compression="zstd")


def _write_manifest(folder: Path, kind: str, lines: list[dict[str, Any]]) -> None:
    manifest = {
        "export": hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:12],
        "kind": kind,
        "rows": sum(line["rows"] for line in lines),
        "columns": KINDS[kind],
        "made_from": {},
        "lake": "made up",
        "encoder": {"name": "made-up", "fingerprint": "made-up", "width": WIDTH} if kind == "labels" else {},
        "files": lines,
    }
    part = folder / "manifest.part"
    part.write_text(json.dumps(manifest, indent=1))
    part.rename(folder / "manifest.json")


def _labels(first: int, count: int) -> dict[str, Any]:
    """Random vectors; an image has len(VIEWS) rows with a value each."""
    random = np.random.default_rng(first)
    vectors = random.standard_normal((count, WIDTH), np.float32)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype("<f2")
    numbers = range(first, first + count)
    views = [VIEWS[number % len(VIEWS)] for number in numbers]
    return {
        "image_id": [hashlib.sha256(b"%d" % (number // len(VIEWS))).digest() for number in numbers],
        "view": views,
        "kind": ["quality"] * count,
        "value": [1.0 - 0.25 * VIEWS.index(view) for view in views],
        "rater": ["rankiqa:1"] * count,
        "vector": [vector.tobytes() for vector in vectors],
        **{name: random.standard_normal(count).astype(np.float32) for name in train_scorer.STATISTICS},
    }


def _images(first: int, count: int) -> dict[str, Any]:
    """The sample's files in turns, each time with another comment in them, so that each has an id of its own."""
    originals = list(_sample())
    files = [copy_of(originals[n % len(originals)][0], n // len(originals)) for n in range(first, first + count)]
    sizes = [originals[n % len(originals)][1] for n in range(first, first + count)]
    return {
        "image_id": [hashlib.sha256(data).digest() for data in files],
        "bytes": files,
        "captions": [json.dumps([{"id": "a", "kind": "alt_text", "text": f"picture {n}"}]).encode() for n in range(first, first + count)],
        "score": [n % 10 for n in range(count)],
        "rating": ["safe"] * count,
        "style_cluster": [n % 12 for n in range(count)],
        "width": [width for width, _ in sizes],
        "height": [height for _, height in sizes],
    }


def _sample() -> Iterator[tuple[bytes, tuple[int, int]]]:
    for path in sorted(SAMPLE.iterdir()):
        if path.suffix in (".jpg", ".png"):
            with Image.open(path) as image:
                yield path.read_bytes(), image.size


TABLES: dict[str, Callable[[int, int], dict[str, Any]]] = {"labels": _labels, "images": _images}
