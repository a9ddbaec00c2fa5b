"""Candidate pairs of images -> those that are near: a hash proposes, an embedding verifies."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

SCHEMA = "image_id BINARY, leader BINARY"


def near(frames: Iterator[pd.DataFrame], bits: int) -> Iterator[pd.DataFrame]:
    """(image_id, leader, phash, phash_2) -> SCHEMA: pairs whose hashes differ in at most `bits`."""
    for frame in frames:
        one, other = (np.stack([np.frombuffer(v, np.uint8) for v in frame[name]]) for name in ("phash", "phash_2"))
        yield frame.loc[np.unpackbits(one ^ other, axis=1).sum(1) <= bits, ["image_id", "leader"]]


def alike(frames: Iterator[pd.DataFrame], cosine: float) -> Iterator[pd.DataFrame]:
    """(image_id, leader, vector, vector_2: fp16) -> SCHEMA: pairs whose vectors have at least that cosine; a zero vector has none."""
    for frame in frames:
        one, other = (np.stack([np.frombuffer(v, "<f2").astype(np.float32) for v in frame[name]]) for name in ("vector", "vector_2"))
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        yield frame.loc[(one * other).sum(1) >= np.maximum(cosine * norms, 1e-12), ["image_id", "leader"]]
