"""Pixels -> five numbers that say how a picture was exposed, coloured and focused.

All are defined at the scale where the longer side is at most LONGER_SIDE: sharpness depends on the scale at which one
looks, so a 12 MP photograph and its 1 MP copy would differ for no reason. Nothing is enlarged.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

KERNEL_VERSION = 1
LONGER_SIDE = 512  # pixels: above every tower's input (224 to 448), and a few milliseconds of work
NAMES = ("mean", "contrast", "saturation", "sharpness", "entropy")


def measure(image: Image.Image, luma: Image.Image | None = None) -> dict[str, float]:
    """RGB image -> {name: value} for NAMES. `luma`: luma_of(image), where the caller has it already.

    mean        of the luma, 0 to 255 levels
    contrast    standard deviation of the luma, 0 to 127.5 levels
    saturation  mean of HSV's S = (max - min) / max over an even grid of up to 256 x 256 pixels as they are, 0 to 1; black counts as 0
    sharpness   variance of the Laplacian of the luma (4 neighbours, kernel 0 1 0 / 1 -4 1 / 0 1 0, without the border),
                squared levels, 0 to about 10**6; 0 for a picture below 3 pixels a side
    entropy     Shannon entropy of the 256-bin luma histogram, 0 to 8 bits
    """
    assert image.mode == "RGB", image.mode
    luma = luma_of(image) if luma is None else luma
    share = np.asarray(luma.histogram(), dtype=np.float64) / (luma.width * luma.height)
    levels = np.arange(256.0)
    mean = float(share @ levels)
    present = share[share > 0]
    return {
        "mean": mean,
        "contrast": float(np.sqrt(share @ (levels - mean) ** 2)),
        "saturation": _saturation(image.resize((max(1, luma.width // 2), max(1, luma.height // 2)), Image.Resampling.NEAREST)),
        "sharpness": _sharpness(np.asarray(luma, dtype=np.int16)),
        "entropy": float(-(present @ np.log2(present))) + 0.0,  # no -0.0
    }


def luma_of(image: Image.Image) -> Image.Image:
    """RGB or L image -> its luma (ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B, rounded), mode L, reduced. Luma goes through as it is."""
    return reduced(image if image.mode == "L" else image.convert("L"))


def reduced(image: Image.Image) -> Image.Image:
    """Image -> the same, its longer side at most LONGER_SIDE; itself when it is that small already.

    Hamming's window over the whole source, no quick first step: the sharpness of one picture at 1,024 to 2,304 pixels then
    stays within 3 % (box steps: 60 %), and a mirrored picture gives the mirrored result to the bit (Pillow's box: not).
    """
    scale = LONGER_SIDE / max(image.size)
    if scale >= 1:
        return image
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.HAMMING)


def _saturation(image: Image.Image) -> float:
    red, green, blue = (np.asarray(band) for band in image.split())
    high = np.maximum(np.maximum(red, green), blue)
    spread = high - np.minimum(np.minimum(red, green), blue)
    return float((spread / np.maximum(high, 1).astype(np.float32)).mean(dtype=np.float64))


def _sharpness(luma: np.ndarray) -> float:
    """int16[h, w] -> variance. The sums are of integers below 2**53: the same on every machine."""
    if min(luma.shape) < 3:
        return 0.0
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * luma[1:-1, 1:-1]
    values = laplacian.astype(np.float64).ravel()
    return float(values @ values / values.size - (values.sum() / values.size) ** 2)
