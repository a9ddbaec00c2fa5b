"""Stored vectors -> raw score and bin, by a head and a rule of bins: no decode, no tower. And stored raw scores -> the bin of another rule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from udfs import score_bins, score_head
from udfs.reject import Reject
from udfs.score_bins import V7, Bins

SCHEMA = "image_id BINARY, raw FLOAT, bin INT, reject STRUCT<code: STRING, detail: STRING, transient: BOOLEAN>"
RAW = "image_id BINARY, view STRING, raw FLOAT"


def score(frames: Iterable[pd.DataFrame], weights: bytes, bins: Bins = V7) -> Iterator[pd.DataFrame]:
    """Frames with image_id, domain and vector (little-endian fp16 bytes) -> SCHEMA frames; a score that is no number is a reject."""
    for frame, raw in _scored(frames, weights):
        yield _binned(frame, raw.tolist(), bins)


def rebin(frames: Iterable[pd.DataFrame], bins: Bins) -> Iterator[pd.DataFrame]:
    """Frames with image_id, domain and raw -> SCHEMA frames: no model."""
    for frame in frames:
        if len(frame):
            yield _binned(frame, frame.raw.tolist(), bins)


def raw(frames: Iterable[pd.DataFrame], weights: bytes) -> Iterator[pd.DataFrame]:
    """Frames with image_id, view and vector -> RAW frames."""
    for frame, raw in _scored(frames, weights):
        yield frame[["image_id", "view"]].assign(raw=raw)


def _scored(frames: Iterable[pd.DataFrame], weights: bytes) -> Iterator[tuple[pd.DataFrame, score_head.Vectors]]:
    """Frames that have rows, each with its raw scores. A worker without rows loads no head, and no torch."""
    head = None
    for frame in frames:
        if len(frame):
            head = head or score_head.load(weights)
            vectors = np.stack([np.frombuffer(vector, "<f2") for vector in frame.vector]).astype(np.float32)
            yield frame, score_head.score_batch(vectors, head)


def _binned(frame: pd.DataFrame, raw: Sequence[float], bins: Bins) -> pd.DataFrame:
    rows = [_row(*one, bins) for one in zip(frame.image_id, raw, frame.domain, strict=True)]
    return pd.DataFrame(rows, columns=["image_id", "raw", "bin", "reject"])


def _row(image_id: bytes, raw: float, domain: str | None, bins: Bins) -> dict[str, Any]:
    try:
        return {"image_id": image_id, "raw": raw, "bin": score_bins.bin_of(raw, domain, bins), "reject": None}
    except Reject as reject:
        told = {"code": reject.code, "detail": reject.detail, "transient": reject.transient}
        return {"image_id": image_id, "raw": None, "bin": None, "reject": told}
