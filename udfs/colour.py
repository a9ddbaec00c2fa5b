"""Pixels and their ICC profile -> sRGB pixels."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageCms

MAX_PROFILE = 4 * 2**20  # bytes; press profiles are up to 3 MB
_SAME = 2  # largest difference in levels at which a profile is called sRGB: rounding of the many sRGB profiles in use
_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # colour space of a profile -> the mode of pixels it describes
_GRID = np.stack(np.meshgrid(*[np.arange(0, 256, 17, dtype=np.uint8)] * 3), axis=-1).reshape(64, 64, 3)


class _Way(NamedTuple):
    mode: str  # of the pixels that go in
    transform: ImageCms.ImageCmsTransform | None  # None: the profile is sRGB


def to_srgb(image: Image.Image, profile: object) -> tuple[Image.Image, str]:
    """(L, RGB or CMYK image, ICC profile's bytes or None) -> (RGB image, none | srgb | applied | invalid).

    A profile that cannot be parsed, or is for another kind of pixels, leaves the pixels as they are: invalid. Rendering
    intent: perceptual. An RGB image is changed in place.
    """
    if not profile:
        return _rgb(image), "none"
    way = _way(profile) if isinstance(profile, bytes) and len(profile) <= MAX_PROFILE else None
    if way is None or (way.mode == "CMYK") != (image.mode == "CMYK") or (way.mode == "L" and not _is_grey(image)):
        return _rgb(image), "invalid"
    if way.transform is None:
        return _rgb(image), "srgb"
    image = image if image.mode == way.mode else image.convert(way.mode)
    if image.mode == "RGB":
        way.transform.apply_in_place(image)
        return image, "applied"
    return way.transform.apply(image), "applied"


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_grey(image: Image.Image) -> bool:
    """L, or RGB with three equal channels (grey that had transparency)."""
    if image.mode != "RGB":
        return image.mode == "L"
    red = image.getchannel("R")
    return all(ImageChops.difference(red, image.getchannel(other)).getbbox() is None for other in "GB")


@lru_cache(maxsize=8)  # a source uses few profiles; 8 x MAX_PROFILE at most
def _way(profile: bytes) -> _Way | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES[source.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError, TypeError):
        return None
    return _Way(mode, None if _changes_nothing(transform, mode) else transform)


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Asked of colours, not of the profile's name: sRGB goes by dozens of names."""
    if mode == "CMYK":
        return False
    sample = Image.fromarray(_GRID) if mode == "RGB" else Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    before = np.asarray(sample.convert("RGB")).astype(np.int16)
    return bool(np.abs(np.asarray(transform.apply(sample)).astype(np.int16) - before).max() <= _SAME)
