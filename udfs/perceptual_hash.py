"""Pixels -> 256 bits that stay nearly the same when a picture is resized, recompressed or slightly edited.

DCT hash after C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010) and pHash, with
four times its 64 bits so that 30M pictures rarely collide: the luma at 64 x 64, its two-dimensional DCT-II, the 16 x 16
lowest frequencies, one bit each: above their median or not. Distance is the number of bits that differ.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from udfs.pixel_statistics import luma_of

KERNEL_VERSION = 1
SIDE, FREQUENCIES = 64, 16
_SCALE = 2**14  # the cosines as integers: sums stay below 2**53, so float64 is exact and no machine rounds otherwise
_BASIS = np.rint(_SCALE * np.cos(np.pi * np.outer(np.arange(FREQUENCIES), 2 * np.arange(SIDE) + 1) / (2 * SIDE)))
_MIRROR = np.where(np.arange(FREQUENCIES) % 2, -1.0, 1.0)  # a mirrored picture has its odd horizontal frequencies negated


def phash(image: Image.Image) -> tuple[bytes, bytes]:
    """RGB image, or its luma_of -> (32 bytes, 32 bytes of the horizontally mirrored image), the second from the same transform.

    Bit 16 * i + j, counted from the most significant: vertical frequency i, horizontal frequency j.
    """
    assert image.mode in ("RGB", "L"), image.mode
    # A shape is squeezed, not cropped; the filter must treat left and right alike
    small = luma_of(image).resize((SIDE, SIDE), Image.Resampling.HAMMING)
    straight, mirrored = hash_squares(np.asarray(small)[None])
    return straight[0].tobytes(), mirrored[0].tobytes()


def hash_squares(squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lumas [n, SIDE, SIDE] -> (uint8[n, 32], uint8[n, 32] of the mirrored ones)."""
    waves = _BASIS @ squares.astype(np.float64) @ _BASIS.T
    return _bits(waves), _bits(waves * _MIRROR)


def _bits(waves: np.ndarray) -> np.ndarray:
    flat = waves.reshape(len(waves), -1)
    return np.packbits(flat > np.median(flat, axis=1, keepdims=True), axis=1)
