"""Stored vectors -> class, its probability and those of all classes, by a head: no decode, no tower."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from udfs import class_head
from udfs.reject import Reject

SCHEMA = (
    "image_id BINARY, class STRING, p FLOAT, probabilities ARRAY<STRUCT<class: STRING, p: FLOAT>>, "
    "reject STRUCT<code: STRING, detail: STRING, transient: BOOLEAN>"
)


def classify(frames: Iterable[pd.DataFrame], weights: bytes) -> Iterator[pd.DataFrame]:
    """Frames with image_id and vector (little-endian fp16 bytes) -> SCHEMA frames; a probability that is no number is a reject."""
    head = class_head.load(weights)
    for frame in frames:
        if len(frame) == 0:
            continue
        vectors = np.stack([np.frombuffer(vector, "<f2") for vector in frame.vector]).astype(np.float32)
        probabilities = class_head.classify_batch(vectors, head)
        rows = [_row(image_id, row, head.about) for image_id, row in zip(frame.image_id, probabilities, strict=True)]
        yield pd.DataFrame(rows, columns=["image_id", "class", "p", "probabilities", "reject"])


def _row(image_id: bytes, probabilities: class_head.Logits, about: class_head.About) -> dict[str, Any]:
    try:
        chosen, p = class_head.decide(probabilities, about)
    except Reject as reject:
        told = {"code": reject.code, "detail": reject.detail, "transient": reject.transient}
        return {"image_id": image_id, "class": None, "p": None, "probabilities": None, "reject": told}
    all_ = [{"class": name, "p": float(value)} for name, value in zip(about.classes, probabilities, strict=True)]
    return {"image_id": image_id, "class": chosen, "p": p, "probabilities": all_, "reject": None}
