"""An image -> a copy that is worse in one named way: synthetic preferences, an image against its degraded copies.

In the manner of RankIQA (X. Liu, J. van de Weijer, A. Bagdanov, ICCV 2017), whose order of strengths needs no rater; the
kinds and factors here are ours. What a tower sees is some 224 pixels, so blur, noise, JPEG blocks and smoothing are made on the
picture reduced to pixel_statistics.LONGER_SIDE, and what they changed is added to the full-size picture: the same view
is about as bad on a 12 MP photograph as on its thumbnail, and no view differs from the original by a mere resize.
"""

from __future__ import annotations

import hashlib
import io
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageStat

from udfs.pixel_statistics import reduced

KERNEL_VERSION = 1


class Way(NamedTuple):
    """`strength` by kind:

    blur        sigma of a Gaussian, as a share of the longer side (1/256 is 2 pixels of 512)
    noise       standard deviation of additive noise, in levels of 255, each channel and (reduced) pixel by itself
    jpeg        quality of the recompression, 4:2:0
    contrast    factor about the mean luma
    saturation  factor of the distance from the pixel's own luma
    smooth      side of the window of a median filter, each channel by itself, as a share of the longer side, rounded to an odd
                number of pixels and at least 3 (1/100 is 5 pixels of 512): texture goes, edges stay, the airbrushed look
    """

    kind: Literal["blur", "noise", "jpeg", "contrast", "saturation", "smooth"]
    strength: float


VIEWS: dict[str, Way] = {
    "blur:1": Way("blur", 1 / 256),
    "blur:2": Way("blur", 1 / 80),
    "noise:1": Way("noise", 18.0),
    "noise:2": Way("noise", 50.0),
    "jpeg:1": Way("jpeg", 18.0),
    "jpeg:2": Way("jpeg", 5.0),
    "contrast:1": Way("contrast", 1.7),
    "contrast:2": Way("contrast", 3.0),
    "saturation:1": Way("saturation", 2.0),
    "saturation:2": Way("saturation", 4.0),
    "smooth:1": Way("smooth", 1 / 100),
    "smooth:2": Way("smooth", 1 / 57),  # 9 pixels of 512: .5 s of CPU, more than any other
}
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_BAND = 512  # rows of the full-size picture that change at once
_ZERO = 128  # level that stands for "no difference"


def degrade(image: Image.Image, view: str, seed: int) -> Image.Image:
    """(RGB image, name in VIEWS, seed) -> RGB image of the same size; the same three give the same pixels.

    The noise is drawn from (seed, view, pixels): two pictures never share a pattern. Raises ValueError for an unknown view.
    """
    if view not in VIEWS:
        raise ValueError(f"view: given {view!r}, allowed {sorted(VIEWS)}")
    assert image.mode == "RGB", image.mode
    way = VIEWS[view]
    if way.kind == "contrast":
        return _contrast(image, way.strength)
    if way.kind == "saturation":
        return _saturation(image, way.strength)
    small = reduced(image)
    if way.kind == "blur":
        blurred = small.filter(ImageFilter.GaussianBlur(way.strength * max(small.size)))
        return blurred if small.size == image.size else blurred.resize(image.size, Image.Resampling.BICUBIC)
    if way.kind == "smooth":
        changed = _smooth(small, way.strength)
    else:
        changed = _jpeg(small, int(way.strength)) if way.kind == "jpeg" else _noise(small, way.strength, f"{seed}/{view}")
    return changed if small.size == image.size else _add_difference(image, small, changed)


def _contrast(image: Image.Image, factor: float) -> Image.Image:
    middle = ImageStat.Stat(reduced(image).convert("L")).mean[0]
    levels = np.clip(np.rint(middle + factor * (np.arange(256) - middle)), 0, 255).astype(int).tolist()
    return image.point(levels * 3)


def _saturation(image: Image.Image, factor: float) -> Image.Image:
    matrix = factor * np.eye(3, 4)
    matrix[:, :3] += (1 - factor) * np.asarray(_LUMA)
    return image.convert("RGB", tuple(matrix.ravel().tolist()))


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return Image.open(buffer, formats=("JPEG",)).convert("RGB")


def _smooth(image: Image.Image, share: float) -> Image.Image:
    return image.filter(ImageFilter.MedianFilter(max(3, 2 * round(share * max(image.size) / 2 - 0.5) + 1)))


def _noise(image: Image.Image, deviation: float, seed: str) -> Image.Image:
    """Each value is the sum of eight random bytes: normal enough, integer, and the same with every version of numpy
    (only the raw stream of a bit generator is promised to stay)."""
    pixels = np.asarray(image)
    key = hashlib.sha256(seed.encode() + b"/" + pixels.tobytes()).digest()
    raw = np.random.PCG64(int.from_bytes(key[:16], "big")).random_raw(pixels.size)
    sums = np.asarray(raw, dtype="<u8").view(np.uint8).reshape(*pixels.shape, 8).sum(axis=-1, dtype=np.int16)
    unit = (sums - 8 * 127.5) / np.sqrt(8 * (256**2 - 1) / 12)
    return Image.fromarray(np.clip(np.rint(pixels + deviation * unit), 0, 255).astype(np.uint8))


def _add_difference(image: Image.Image, small: Image.Image, changed: Image.Image) -> Image.Image:
    """What `changed` changed in `small`, enlarged and added to `image`; in bands, so that one copy of it is all it costs."""
    difference = ImageChops.subtract(changed, small, 1.0, _ZERO)
    result = image.copy()
    scale_x, scale_y = small.width / image.width, small.height / image.height
    for top in range(0, image.height, _BAND):
        bottom = min(image.height, top + _BAND)
        source = (0.0, top * scale_y, image.width * scale_x, bottom * scale_y)
        part = difference.resize((image.width, bottom - top), Image.Resampling.BILINEAR, box=source)
        result.paste(ImageChops.add(image.crop((0, top, image.width, bottom)), part, 1.0, -_ZERO), (0, top))
    return result
