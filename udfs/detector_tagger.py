"""RGB images -> tags, characters and ratings of a WD-tagger class model: `model.onnx` and its `selected_tags.csv`.

The model: NHWC float32, blue first, values 0 to 255, outputs probabilities, one a row of the table of tags (tag_id, name, category, count;
only name and category are read). SmilingWolf's wd-*-tagger-v3 and the e621 tagger of V7 (Z3D-E621-Convnext) are such models; they differ in
files and thresholds only [read in the models' own demo code and in the public port of V7's captioner]. `resize` says how the picture becomes
the model's square: `pad-bicubic` as the models' demos do, `lanczos-pad` as V7 did for its WD tagger.

Ratings are stored whatever their probability, the rest from `keep` up; categories that are no content (artist, meta, lore) are not.
No weights come with the project: the cost is the model's.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from udfs.detection import Detection, Label, file_of
from udfs.onnx_file import open_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

KERNEL_VERSION = 1
LARGEST = 2048  # pixels of a side; a larger picture is first reduced by a whole factor: a strip as a square would take gigabytes
PREPROCESSING = f"a white square, BGR 0..255, sides over {LARGEST} reduced (box) before"
RATING = "rating"
KINDS = {"0": "general", "3": "copyright", "4": "character", "5": "species", "9": RATING}  # 3 and 5: e621's; a WD table has 0, 4 and 9
RATINGS = {"general", "sensitive", "questionable", "explicit"}


class Tagger(NamedTuple):
    """kinds: None for an output that is not stored. batch: the model's fixed batch axis, None when it takes any."""

    session: InferenceSession
    names: list[str]
    kinds: list[str | None]
    batch: int | None
    keep: float


def load(detector: Mapping[str, Any], device: str) -> Tagger:
    """(conf.enrichment.Detector as a dict, "cpu" or "cuda:1") -> tagger. Raises ValueError when files are missing, others, or do not fit."""
    who = f"detector {detector['name']!r}"
    rows = _table(detector)
    session = open_session(file_of(detector, "weights"), device)
    axis, *shape = session.get_inputs()[0].shape
    side = detector["image_size"]
    if shape != [side, side, 3]:
        raise ValueError(f"{who}: image_size: given {side}, but the model takes (n, {', '.join(map(str, shape))})")
    outputs = session.get_outputs()[0].shape[-1]
    if isinstance(outputs, int) and outputs != len(rows):
        raise ValueError(f"{who}: vocabulary: {len(rows)} tags, but the model has {outputs} outputs; take the table that came with it")
    names, kinds = [row["name"].strip() for row in rows], [KINDS.get(row["category"].strip()) for row in rows]
    rated = {name for name, kind in zip(names, kinds, strict=True) if kind == RATING}
    if rated and rated != RATINGS:
        raise ValueError(f"{who}: vocabulary: ratings {sorted(rated)}, expected {sorted(RATINGS)} or none")
    return Tagger(session, names, kinds, axis if isinstance(axis, int) else None, detector["keep"])


def _table(detector: Mapping[str, Any]) -> list[dict[str, str]]:
    with file_of(detector, "vocabulary").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"name", "category"} <= set(rows[0]):
        raise ValueError(
            f"detector {detector['name']!r}: vocabulary: expected columns name and category, found {sorted(rows[0] if rows else [])}"
        )
    return rows


def prepare(image: Image.Image, detector: Mapping[str, Any]) -> np.ndarray:
    """RGB image of any size -> uint8 (side, side, 3), blue first, the picture in the middle of a white square."""
    side = detector["image_size"]
    if side is None:
        raise ValueError(f"detector {detector['name']!r}: image_size: give the side that the model takes (448 for wd-*-tagger-v3)")
    longest = max(image.size)
    if longest > LARGEST:
        image = image.reduce(-(-longest // LARGEST))
    if detector["resize"] == "lanczos-pad":
        scale = side / max(image.size)
        inside = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
        square = _square(image.resize(inside, Image.Resampling.LANCZOS), side)
    else:
        square = _square(image, max(image.size))
        square = square if square.width == side else square.resize((side, side), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(square)[:, :, ::-1])


def _square(image: Image.Image, side: int) -> Image.Image:
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def detect(model: Tagger, batch: Sequence[np.ndarray]) -> list[Detection]:
    """Arrays of `prepare` -> the labels of each image. Raises ValueError when the model's outputs are no probabilities."""
    step = model.batch or len(batch)
    found = [_run(model, np.stack(batch[start : start + step]).astype(np.float32)) for start in range(0, len(batch), step)]
    return [{"labels": _labels(model, row), "regions": []} for row in np.concatenate(found)]


def _run(model: Tagger, images: np.ndarray) -> np.ndarray:
    """float32 (k, side, side, 3) -> (k, tags); a fixed batch axis is filled up."""
    lacking = (model.batch or len(images)) - len(images)
    filled = np.pad(images, ((0, lacking), (0, 0), (0, 0), (0, 0))) if lacking else images
    found: np.ndarray = model.session.run(None, {model.session.get_inputs()[0].name: filled})[0][: len(images)]
    if found.shape[1] != len(model.names) or np.nanmin(found) < -1e-6 or np.nanmax(found) > 1 + 1e-6:
        low, high = np.nanmin(found), np.nanmax(found)
        raise ValueError(
            f"tagger: {found.shape[1]} outputs from {low:.3g} to {high:.3g}; expected {len(model.names)} probabilities (after a sigmoid)"
        )
    return found


def _labels(model: Tagger, row: np.ndarray) -> list[Label]:
    """NaN stays: the caller refuses it."""
    labels: list[Label] = []
    for name, kind, p in zip(model.names, model.kinds, row.tolist(), strict=True):
        if kind is not None and (kind == RATING or not p < model.keep):
            labels.append({"name": name, "kind": kind, "p": p})
    return labels
