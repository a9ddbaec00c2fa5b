"""Stored vectors -> raw score and bin, by a head: no decode, no tower."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from udfs import score_head
from udfs.reject import Reject

SCHEMA = "image_id BINARY, raw FLOAT, bin INT, reject STRUCT<code: STRING, detail: STRING, transient: BOOLEAN>"


def score(frames: Iterable[pd.DataFrame], weights: bytes) -> Iterator[pd.DataFrame]:
    """Frames with image_id and vector (little-endian fp16 bytes) -> SCHEMA frames; a score that is no number is a reject."""
    head = score_head.load(weights)
    for frame in frames:
        if len(frame) == 0:
            continue
        vectors = np.stack([np.frombuffer(vector, "<f2") for vector in frame.vector]).astype(np.float32)
        raw = score_head.score_batch(vectors, head)
        rows = [_row(image_id, float(value)) for image_id, value in zip(frame.image_id, raw, strict=True)]
        yield pd.DataFrame(rows, columns=["image_id", "raw", "bin", "reject"])


def _row(image_id: bytes, raw: float) -> dict[str, Any]:
    try:
        return {"image_id": image_id, "raw": raw, "bin": score_head.score_bin(raw), "reject": None}
    except Reject as reject:
        told = {"code": reject.code, "detail": reject.detail, "transient": reject.transient}
        return {"image_id": image_id, "raw": None, "bin": None, "reject": told}
