"""RGB images -> the mean colours of an 8 x 8 grid as a unit vector of 192: the tower without weights or torch.

The second tower of tests and benchmarks, and the shortest example of what a tower's file holds. Cost: 0.3 ms an image
of 400 x 300 [measured, 1 core].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

KERNEL_VERSION = 1
PREPROCESSING = "mean colour of 8 x 8 cells (Pillow box filter)"

GRID = 8
WIDTH = 3 * GRID * GRID


def load(encoder: Mapping[str, Any], device: str, precision: str) -> None:
    """There is no model; device and precision change nothing. Raises ValueError when the config's width is another."""
    if encoder["width"] != WIDTH:
        raise ValueError(f"encoder {encoder['name']!r}: width: given {encoder['width']}, kernel colour_grid gives {WIDTH}")


def prepare(image: Image.Image, encoder: Mapping[str, Any]) -> np.ndarray:
    """RGB image of any size -> float32 (3, 8, 8) in (0, 1]; black is 1/256, so that its vector has a direction."""
    cells = np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX), np.float32)
    return np.ascontiguousarray((cells.transpose(2, 0, 1) + 1) / 256)


def encode(model: None, batch: np.ndarray) -> np.ndarray:
    """float32 (n, 3, 8, 8) -> float32 (n, 192), rows of length 1."""
    vectors = batch.reshape(len(batch), WIDTH)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
