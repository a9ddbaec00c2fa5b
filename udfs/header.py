"""Bytes -> what an image is, before any pixel is decoded; or a Reject with a code.

The order of the checks is the order of their cost: size of the file, first bytes, the structure of the header
(udfs/file_layout.py), its claims against the limits, and last Pillow's own reader of that one format. No parser of a
format that `limits` does not list ever sees the bytes, and none sees a header that claims more than the limits.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from udfs import file_layout
from udfs.ai_marks import marks
from udfs.file_layout import Layout
from udfs.reject import Reject
from udfs.tiff_tags import MAGICS as TIFF_MAGICS

KERNEL_VERSION = 2  # 2: XMP and C2PA tell of AI generation too
# What a decode may need at its peak, the file's bytes included, by the estimate of Layout.bytes_per_pixel: 50 MP of an
# ordinary JPEG or PNG, 25 MP of WebP. udfs/decode.py lets all decodes of a process together have so much, so a worker
# grows by less than 500 MB whatever limits.max_pixels says.
MAX_DECODE_BYTES = 400 * 2**20
MAX_SCANNED_PIXELS = 2_000_000_000  # pixels x scans of a progressive JPEG (10 are usual); an empty scan costs 0.8 ns a pixel
MAX_SCANS = 1_000

# Pillow's classes, not Image.open: that one turns a JPEG with a second picture (MPO) into another format, warns or
# raises at a global pixel limit that nobody here set, and puts memory addresses into its messages.
_OPENERS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
# What Pillow raises for bytes that are not what they claim. The first five were met in 500,000 mutations of the odd files
# and of Pillow's own test files, the others are what its six readers can raise by their code.
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    Image.DecompressionBombError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    MemoryError,
    ZeroDivisionError,
    RuntimeError,
    struct.error,
    zlib.error,
)

# (offset, first bytes, name): the formats read here, then those that are only recognised to be refused by name
_MAGICS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (8, b"WEBPVP8", "WEBP"),
    (8, b"CR\2\0", "CR2"),
    *((0, magic, "TIFF") for magic in TIFF_MAGICS),
    (0, b"%!PS", "EPS"), (0, b"\xc5\xd0\xd3\xc6", "EPS"), (0, b"%PDF", "PDF"), (0, b"8BPS", "PSD"), (0, b"gimp xcf", "XCF"),
    (4, b"ftyp", "AVIF, HEIC or video"), (4, b"JXL \r\n\x87\n", "JPEG XL"), (0, b"\xff\x0a", "JPEG XL"), (4, b"jP  \r\n\x87\n", "JPEG2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG2000"), (0, b"II\xbc\1", "JPEG XR"), (0, b"\0\0\1\0", "ICO"), (0, b"\0\0\2\0", "CUR"), (0, b"icns", "ICNS"),
    (0, b"DDS ", "DDS"), (0, b"qoif", "QOI"), (0, b"\x8aMNG", "MNG"), (0, b"\x8bJNG", "JNG"), (0, b"#?RADIANCE", "HDR"), (0, b"v/1\1", "EXR"),
    (0, b"\xd7\xcd\xc6\x9a", "WMF"), (40, b" EMF", "EMF"), (0, b"SIMPLE  =", "FITS"), (0, b"/* XPM */", "XPM"), (0, b"AT&TFORM", "DjVu"),
    (0, b"\x59\xa6\x6a\x95", "SUN"), (0, b"\1\xda", "SGI"), (0, b"BLP1", "BLP"), (0, b"BLP2", "BLP"), (0, b"FUJIFILMCCD-RAW", "RAF"),
)  # fmt: skip
_SVG = re.compile(
    rb"\A(?:\xef\xbb\xbf)?\s*(?:<\?xml.*?\?>|<!--.*?-->|<!DOCTYPE\s+svg.*?>|\s)*<(?:\w+:)?svg[\s>]", re.DOTALL | re.IGNORECASE
)
_PNM = re.compile(rb"\AP[1-7fF][\s#]")
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # bytes; "BM" alone is also how English texts begin


class Header(NamedTuple):
    """Width and height as seen, after the EXIF orientation. `ai_marks`: udfs/ai_marks.py."""

    format: str
    width: int
    height: int
    frames: int
    ai_marks: list[dict[str, str]]


def probe(data: bytes, limits: Mapping[str, Any]) -> Header:
    """(bytes, conf.build.Limits as a mapping) -> Header. Raises Reject: see layout_of, and header_broken where Pillow finds it so."""
    layout = layout_of(data, limits)
    try:
        opened = open_image(data, layout.format).size
    except PILLOW_ERRORS as error:
        raise Reject("header_broken", f"{layout.format}: {type(error).__name__}: {error}") from None
    width, height = upright_size(layout)
    if sorted(opened) != sorted((width, height)):
        raise Reject("header_broken", f"{layout.format}: {width} x {height} or {opened[0]} x {opened[1]} pixels, by how one reads it")
    return Header(layout.format, width, height, layout.frames, marks(layout.texts))


def layout_of(data: bytes, limits: Mapping[str, Any]) -> Layout:
    """(bytes, limits) -> Layout within the limits, without Pillow.

    Raises Reject empty, too_many_bytes, not_an_image, format_refused, header_broken, too_many_pixels, too_small,
    too_many_frames; ValueError for a format in limits that no reader here knows.
    """
    if unknown := set(limits["formats"]) - set(_OPENERS):
        raise ValueError(f"limits.formats: given {sorted(unknown)}, allowed {sorted(_OPENERS)}")
    if not data:
        raise Reject("empty")
    if len(data) > limits["max_bytes"]:
        raise Reject("too_many_bytes", f"{len(data)} bytes, limit {limits['max_bytes']}")
    name = sniff(data)
    if name is None:
        raise Reject("not_an_image", f"starts with {data[:16]!r}")
    if name not in limits["formats"]:
        raise Reject("format_refused", f"{name}; allowed {', '.join(limits['formats'])}")
    layout = file_layout.read(data, name, limits["max_frames"])
    _check(layout, data, limits)
    return layout


def open_image(data: bytes, name: str) -> ImageFile.ImageFile:
    """(bytes, format) -> Pillow's image, header parsed and pixels not. Raises any of PILLOW_ERRORS."""
    return _OPENERS[name](io.BytesIO(data), "")


def sniff(data: bytes) -> str | None:
    """First bytes -> name of the format; None when they belong to none. The file's name has no say."""
    for offset, magic, name in _MAGICS:
        if data.startswith(magic, offset):
            return name
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if _PNM.match(data):
        return "PPM"
    return "SVG" if _SVG.match(data[:4096]) else None


def upright_size(layout: Layout) -> tuple[int, int]:
    """Layout -> (width, height) as seen."""
    turned = layout.orientation >= 5
    return (layout.height, layout.width) if turned else (layout.width, layout.height)


def decode_bytes(layout: Layout, data: bytes) -> int:
    """-> about how many bytes the decode needs at its peak, those of the file included."""
    copies = 2 if layout.format == "WEBP" else 1  # libwebp keeps its own
    return int(layout.width * layout.height * layout.bytes_per_pixel) + copies * len(data)


def _check(layout: Layout, data: bytes, limits: Mapping[str, Any]) -> None:
    size, pixels = f"{layout.width} x {layout.height}", layout.width * layout.height
    if pixels > limits["max_pixels"]:
        raise Reject("too_many_pixels", f"{size} = {pixels} pixels, limit {limits['max_pixels']}")
    if (needed := decode_bytes(layout, data)) > MAX_DECODE_BYTES:
        raise Reject("too_many_pixels", f"{size} {layout.format} needs about {needed >> 20} MB to decode, limit {MAX_DECODE_BYTES >> 20}")
    if layout.scans > MAX_SCANS or layout.scans * pixels > MAX_SCANNED_PIXELS:
        raise Reject("header_broken", f"{layout.scans} scans over {pixels} pixels: a bomb")
    if min(layout.width, layout.height) < limits["min_side"]:
        raise Reject("too_small", f"{size}, shortest side allowed {limits['min_side']}")
    if layout.frames > limits["max_frames"]:
        raise Reject("too_many_frames", f"more than {limits['max_frames']} frames")
