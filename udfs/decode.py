"""Bytes -> pixels: the one decode of the system, for scoring and for training.

The first frame, turned as EXIF says, on white where it is transparent, in sRGB, 8 bit; at full size, or a JPEG scaled down as
udfs/jpeg.py says. Broken pixels are found either way: a scaled decode reads all of the file. Memory: all
decodes of a process together stay below header.MAX_DECODE_BYTES by the estimate in the header; who uses `decoding`
keeps its share until the pixels are dropped, so several threads cannot pile up big images.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from udfs import header, jpeg
from udfs.colour import to_srgb
from udfs.file_layout import Layout
from udfs.reject import Reject

KERNEL_VERSION = 1
SCALED = f"{KERNEL_VERSION}+{jpeg.CHOICE}"  # the version of what a scaled decode gives
_TURNS = {  # EXIF orientation (TIFF 6.0, tag 274) -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BIG = 64 * 2**20  # bytes of a decode (8 MP) after which memory is given back at once
_SIXTEEN = ((np.arange(65_536) + 128) // 257).astype(np.uint8)
_BAND = 256  # rows that are scaled at once: 16-bit pictures in numpy need 12 bytes a pixel


class Decoded(NamedTuple):
    """`image`: RGB, upright. `colour`: what became of the ICC profile: none (there is none), srgb (it is sRGB), applied, invalid."""

    image: Image.Image
    colour: str


class _Room:
    """So many bytes for all decodes of this process. First come, first served: a big image is not overtaken for ever."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._door = threading.Lock()
        self._change = threading.Condition()

    @contextmanager
    def take(self, size: int) -> Iterator[None]:
        with self._door, self._change:
            self._change.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._change:
                self._free += size
                self._change.notify_all()


_ROOM = _Room(header.MAX_DECODE_BYTES)


@contextmanager
def decoding(data: bytes, limits: Mapping[str, Any], scaled: bool = False) -> Iterator[Decoded]:
    """(bytes, limits) -> Decoded for the length of the block, after which the image is closed. Do not nest.

    scaled: a JPEG as udfs/jpeg.py scales it. Raises Reject as header.layout_of does, and decode_failed for pixels that are truncated or
    corrupt.
    """
    layout = header.layout_of(data, limits)
    by = _divisor(layout, scaled)
    needed = _share(layout, data, by)
    with _ROOM.take(needed):
        try:
            decoded = _decode(data, layout, by)
            try:
                yield decoded
            finally:
                decoded.image.close()
        finally:
            if needed > _BIG:
                _give_memory_back()


def decode(data: bytes, limits: Mapping[str, Any], scaled: bool = False) -> Decoded:
    """As `decoding`, for a caller that holds one image at a time and keeps it."""
    layout = header.layout_of(data, limits)
    by = _divisor(layout, scaled)
    with _ROOM.take(_share(layout, data, by)):
        return _decode(data, layout, by)


def _divisor(layout: Layout, scaled: bool) -> int:
    return jpeg.divisor(layout.width, layout.height) if scaled and layout.format == "JPEG" else 1


def _share(layout: Layout, data: bytes, by: int) -> int:
    """Bytes of room: at least the picture and one copy of it, which whoever uses it may make (a degraded view)."""
    pixels = layout.width * layout.height
    two = 8 * pixels // by**2 + len(data)
    if by > 1:  # the picture is small, the coefficients of a progressive JPEG are not: what Layout counts above 4 bytes a pixel
        return min(header.MAX_DECODE_BYTES, two + int((layout.bytes_per_pixel - 4) * pixels))
    return min(header.MAX_DECODE_BYTES, max(two, header.decode_bytes(layout, data)))


def _give_memory_back() -> None:
    """glibc keeps what a thread has freed for that thread: two threads that have each seen 50 MP would hold 800 MB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # another libc: nothing to do
        trim(0)


def _decode(data: bytes, layout: Layout, by: int) -> Decoded:
    try:
        return _pixels(data, layout, by)
    except header.PILLOW_ERRORS as error:
        failure = f"{layout.format}: {type(error).__name__}: {error}"
    raise Reject("decode_failed", failure)  # outside the except: the error's frames would keep the pixels alive


def _pixels(data: bytes, layout: Layout, by: int) -> Decoded:
    """Every step makes at most one new picture and drops the one before: two at a time, as Layout.bytes_per_pixel counts."""
    image: Image.Image = header.open_image(data, layout.format)
    if by > 1:
        jpeg.scale(image, by)
    image.load()
    profile = image.info.get("icc_profile")
    if layout.format == "WEBP":
        image = image.copy()  # Pillow's file object keeps two canvases of libwebp
    image = _eight_bit(image)
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = _on_white(image)
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    image, colour = to_srgb(image, profile)
    if layout.format != "TIFF" and layout.orientation in _TURNS:  # Pillow turns a TIFF while it loads
        image = image.transpose(_TURNS[layout.orientation])
    width, height = header.upright_size(layout)
    if image.size != (-(-width // by), -(-height // by)):
        raise OSError(f"decoded to {image.size}, the header says {(width, height)}{f' over {by}' if by > 1 else ''}")
    return Decoded(image, colour)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Any mode -> a mode of 8 bit a channel. 16-bit grey goes by v / 257, rounded; see _range for 32 bit and floats.

    Colour with 16 bit a channel has been cut to the high byte by Pillow's reader already.
    """
    if image.mode[0] not in "IF":
        return image
    low, high = _range(image)
    key = image.info.get("transparency")
    grey = Image.new("L", image.size)
    for top, band in _bands(image):
        levels = _SIXTEEN[band] if band.dtype.kind == "u" else _scaled(band, low, high)
        if isinstance(key, int):
            levels[band == key] = 255  # transparent, and the ground is white
        grey.paste(Image.fromarray(levels), (0, top))
    return grey


def _scaled(band: np.ndarray, low: float, high: float) -> np.ndarray:
    inside = np.clip(np.nan_to_num(band.astype(np.float64), nan=low), low, high)
    return np.rint((inside - low) * (255.0 / (high - low))).astype(np.uint8)


def _range(image: Image.Image) -> tuple[float, float]:
    """The values that become black and white. A 16-bit mode: 0 and 65535. 32-bit integers and floats name no white:
    [0, 65535] and [0, 1] where all values lie inside, else the smallest and the largest finite one."""
    white = 1.0 if image.mode == "F" else 65_535.0
    if image.mode.startswith("I;16"):
        return 0.0, white
    finite = [band[np.isfinite(band)] for _, band in _bands(image)]
    low = min((float(band.min()) for band in finite if band.size), default=0.0)
    high = max((float(band.max()) for band in finite if band.size), default=white)
    return (0.0, white) if low >= 0.0 and high <= white else (low, max(high, low + 1e-9))


def _bands(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    width, height = image.size
    for top in range(0, height, _BAND):
        yield top, np.asarray(image.crop((0, top, width, min(height, top + _BAND))))


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white
