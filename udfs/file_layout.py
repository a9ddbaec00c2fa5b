"""Bytes of a known format -> what its header says about the cost of decoding, in bounded time and without a decoder.

Pillow's own header readers trust the file: 64 MB of one-byte GIF comments, of empty JPEG segments or of tiny PNG chunks
hold them for minutes, and its frame counts walk the whole file. These readers follow the same structures, count as they
go, and refuse (header_broken) what no honest writer makes. Sources: PNG 3rd edition (W3C 2025), GIF89a, ITU-T T.81,
the WebP container specification, the BITMAPINFOHEADER reference, TIFF 6.0.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from udfs import provenance, tiff_tags
from udfs.reject import Reject

MAX_SEGMENTS = 2_000  # of a JPEG before the pixels: 64 MB of them are 1,000
MAX_HEAD_CHUNKS = 500  # of a PNG before the pixels; Pillow may inflate each to 1 MB, 1 ms
MAX_BLOCKS = 500_000  # PNG chunks, GIF blocks, RIFF chunks of a whole file: 64 MB of GIF are 260,000
MAX_COMMENT_BLOCKS = 4_096  # of a GIF before its first frame: Pillow joins them in quadratic time (1 MB: 0.3 s)
MAX_JUNK = 65_536  # bytes before the next JPEG marker, which Pillow reads one by one
MAX_EXIF = 4 * 2**20  # bytes; one JPEG segment is 64 KB
MAX_TEXTS, MAX_TEXT = 100, 4_096  # texts of a PNG, bytes of each
MAX_RUN_LENGTH_PIXELS, MAX_RUN_LENGTH_WIDTH = 2_000_000, 65_535  # Pillow undoes run-length BMPs in Python: 1 to 2 s
MAX_FAX_ROWS = 30_000  # of a TIFF: libtiff logs a line for every broken row, and Pillow gives no way to stop it


class Layout(NamedTuple):
    """Sizes are as stored, before the orientation. `bytes_per_pixel` is the peak of the decode: Pillow keeps RGB in 4
    bytes, udfs/decode.py holds two pictures where it converts or turns, and libraries have their own; measured to 5 %."""

    format: str
    width: int
    height: int
    bytes_per_pixel: float
    frames: int = 1
    orientation: int = 1  # EXIF: 1 to 8
    scans: int = 1  # passes over all pixels (progressive JPEG)
    texts: tuple[tuple[str, str], ...] = ()  # (`png:KEY`, `exif:Software`, or what udfs/provenance.py finds; text)


def read(data: bytes, name: str, max_frames: int) -> Layout:
    """(bytes, format that sniff found) -> Layout. Frames are counted up to max_frames + 1. Raises Reject header_broken."""
    try:
        layout = READERS[name](data, max_frames)
    except (struct.error, IndexError):
        ends = f"{name}: the file ends inside its header ({len(data)} bytes)"
    else:
        if layout.width < 1 or layout.height < 1:
            raise _broken(f"{name}: {layout.width} x {layout.height} pixels")
        return layout
    raise _broken(ends)


def _broken(detail: str) -> Reject:
    return Reject("header_broken", detail)


def _software(text: str) -> tuple[tuple[str, str], ...]:
    return (("exif:Software", text),) if text else ()


def _png(data: bytes, max_frames: int) -> Layout:
    if data[12:16] != b"IHDR":
        raise _broken("PNG: the first chunk is not IHDR")
    width, height, _, colour = struct.unpack_from(">IIBB", data, 16)
    texts: list[tuple[str, str]] = []
    blocks = provenance.Blocks()
    frames, orientation, plain = 1, 1, colour == 2
    for kind, start, length in _png_chunks(data):
        if kind == b"acTL":
            (claimed,) = struct.unpack_from(">I", data, start)
            frames = claimed if claimed <= 2**31 else 1  # beyond, the chunk is invalid and the picture is a plain PNG
        elif kind == b"tRNS":
            plain = False
        elif kind == b"eXIf" and length <= MAX_EXIF:
            orientation, software = tiff_tags.exif_facts(data[start : start + length])
            texts += _software(software)
        elif kind == b"caBX":
            blocks.add_c2pa(data[start : start + min(length, provenance.MAX_C2PA)])
        elif kind == b"iTXt" and data.startswith(provenance.PNG_XMP, start):
            blocks.add_xmp(_international(data[start : start + min(length, provenance.MAX_XMP)], blocks.xmp_room))
        elif kind in (b"tEXt", b"zTXt", b"iTXt") and len(texts) < MAX_TEXTS:
            texts.append(_png_text(kind, data[start : start + min(length, 65_536)]))
    bytes_per_pixel = 4 if plain and orientation == 1 else 8
    return Layout("PNG", width, height, bytes_per_pixel, max(1, frames), orientation, texts=(*texts, *blocks.texts()))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """-> (kind, start, length) of each chunk but those of pixels, up to the end or to what is no chunk."""
    position, pixels = 8, False
    for count in range(MAX_BLOCKS):
        length, kind = struct.unpack_from(">I4s", data, position) if position + 8 <= len(data) else (0, b"IEND")
        if kind == b"IEND" or not kind.isalpha():
            break
        if kind == b"IDAT":
            pixels = True
        elif not pixels and count > MAX_HEAD_CHUNKS:
            raise _broken(f"PNG: more than {MAX_HEAD_CHUNKS} chunks before the pixels")
        else:
            yield kind, position + 8, length
        position += 12 + length
    else:
        raise _broken(f"PNG: more than {MAX_BLOCKS} chunks")
    if not pixels:
        raise _broken("PNG: no pixels (IDAT)")


def _png_text(kind: bytes, body: bytes) -> tuple[str, str]:
    key, _, value = body.partition(b"\0")
    if kind == b"iTXt":
        text = _international(body, MAX_TEXT).decode("utf-8", "replace")
    elif kind == b"zTXt":
        text = _inflated(value[1:], MAX_TEXT).decode("latin-1")
    else:
        text = value[:MAX_TEXT].decode("latin-1")
    return f"png:{key[:79].decode('latin-1')}", text


def _international(body: bytes, limit: int) -> bytes:
    """An iTXt chunk -> at most `limit` bytes of its text: keyword, 0, compressed or not, method, language, 0, keyword again, 0, text."""
    value = body.partition(b"\0")[2]
    text = value[2:].partition(b"\0")[2].partition(b"\0")[2]
    return _inflated(text, limit) if value[:1] == b"\1" else text[:limit]


def _inflated(squeezed: bytes, limit: int) -> bytes:
    """Bounded: a text may be a bomb."""
    try:
        return zlib.decompressobj().decompress(squeezed, limit) if limit else b""  # 0 would mean no limit
    except zlib.error:
        return b""


def _gif(data: bytes, max_frames: int) -> Layout:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + _palette(flags)
    frames = blocks = 0
    while position < len(data) and frames <= max_frames and (kind := data[position]) != 0x3B:
        blocks += 1
        if kind == 0x2C and position + 10 <= len(data):
            if frames == 0:  # Pillow grows the picture to its first frame
                x, y, w, h = struct.unpack_from("<HHHH", data, position + 1)
                width, height = max(width, x + w), max(height, y + h)
            frames += 1
            position, blocks = _after_blocks(data, position + 11 + _palette(data[position + 9]), blocks, MAX_BLOCKS)
        elif kind == 0x21:
            position, blocks = _after_blocks(data, position + 2, blocks, MAX_BLOCKS if frames else MAX_COMMENT_BLOCKS)
        else:
            position += 1  # nothing known: Pillow looks at the next byte
        if blocks > (MAX_BLOCKS if frames else MAX_COMMENT_BLOCKS):
            raise _broken(f"GIF: {blocks} blocks around its {frames} frames")
    if frames == 0:
        raise _broken("GIF: no frame")
    return Layout("GIF", width, height, 8, frames)


def _after_blocks(data: bytes, position: int, blocks: int, limit: int) -> tuple[int, int]:
    """Where a chain of sub-blocks begins -> (where it ends, blocks seen so far); gives up at `limit`."""
    while position < len(data) and (size := data[position]) and blocks <= limit:
        position, blocks = position + 1 + size, blocks + 1
    return position + 1, blocks


def _palette(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _jpeg(data: bytes, max_frames: int) -> Layout:
    position, exif, frame, marker_of_frame = 2, b"", b"", 0
    blocks = provenance.Blocks()
    for _ in range(MAX_SEGMENTS):
        found = data.find(b"\xff", position, position + MAX_JUNK)
        if found < 0:
            raise _broken(f"JPEG: no marker in {min(MAX_JUNK, max(0, len(data) - position))} bytes after byte {position}")
        marker = data[found + 1]
        if marker < 0xC0 or marker == 0xC8 or 0xD0 <= marker <= 0xD9 or (marker >= 0xF0 and marker != 0xFE):
            position = found + (1 if marker == 0xFF else 2)  # no segment follows
            continue
        (length,) = struct.unpack_from(">H", data, found + 2)
        start, position = found + 4, found + 2 + max(2, length)
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xCC)) or marker == 0xDE:
            frame, marker_of_frame = data[start:position], marker
        elif marker == 0xE1 and data[start : start + 6] == b"Exif\0\0" and len(exif) <= MAX_EXIF:
            exif += data[start + 6 : position]
        elif marker == 0xE1:
            blocks.add_app1(data[start:position])
        elif marker == 0xEB:
            blocks.add_app11(data[start:position])
        elif marker == 0xDA:
            return _jpeg_frame(data, frame, marker_of_frame, exif, start, blocks.texts())
    raise _broken(f"JPEG: more than {MAX_SEGMENTS} segments before the pixels")


def _jpeg_frame(data: bytes, frame: bytes, marker: int, exif: bytes, scan: int, texts: provenance.Texts) -> Layout:
    """The frame segment's payload, where the first scan starts, what other segments tell -> Layout."""
    if len(exif) > MAX_EXIF:
        raise _broken(f"JPEG: more than {MAX_EXIF} bytes of EXIF")
    height, width, components = struct.unpack_from(">HHB", frame, 1)
    orientation, software = tiff_tags.exif_facts(exif)
    bytes_per_pixel, scans = (4.0 if components == 3 and orientation == 1 else 8.0), 1
    if marker in (0xC2, 0xC6, 0xCA, 0xCE) or data[scan] < components:  # libjpeg keeps all coefficients, 16 bit each
        areas = [(frame[i] >> 4) * (frame[i] & 15) for i in range(7, 6 + 3 * components, 3)]
        bytes_per_pixel = max(bytes_per_pixel, 4 + 2 * sum(areas) / max([1, *areas]))
        scans = 1 + data.count(b"\xff\xda", scan)
    return Layout("JPEG", width, height, bytes_per_pixel, 1, orientation, scans, (*_software(software), *texts))


def _webp(data: bytes, max_frames: int) -> Layout:
    width, height = _webp_size(data)
    frames, orientation, software, position = 0, 1, "", 12
    blocks = provenance.Blocks()
    for _ in range(MAX_BLOCKS):
        if position + 8 > len(data) or frames > max_frames:
            break
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"ANMF":
            frames += 1
        elif kind == b"EXIF" and length <= MAX_EXIF:
            orientation, software = tiff_tags.exif_facts(data[position + 8 : position + 8 + length])
        elif kind == b"XMP ":
            blocks.add_xmp(data[position + 8 : position + 8 + min(length, blocks.xmp_room)])
        elif kind == b"C2PA":
            blocks.add_c2pa(data[position + 8 : position + 8 + min(length, provenance.MAX_C2PA)])
        position += 8 + length + length % 2
    else:
        raise _broken(f"WEBP: more than {MAX_BLOCKS} chunks")
    # 16: libwebp's animation reader keeps two canvases, Pillow one as bytes and one as image
    return Layout("WEBP", width, height, 16, max(1, frames), orientation, texts=(*_software(software), *blocks.texts()))


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise _broken(f"WEBP: first chunk is {kind!r}")


def _bmp(data: bytes, max_frames: int) -> Layout:
    (header,) = struct.unpack_from("<I", data, 14)
    if header == 12:
        width, height = struct.unpack_from("<HH", data, 18)
        return Layout("BMP", width, height, 8)
    width, height, _, _, compression = struct.unpack_from("<IiHHI", data, 18)
    height = abs(height)
    if compression in (1, 2) and (width * height > MAX_RUN_LENGTH_PIXELS or width > MAX_RUN_LENGTH_WIDTH):
        raise Reject("too_many_pixels", f"BMP: {width} x {height} run-length pixels, at most {MAX_RUN_LENGTH_PIXELS} are read")
    if compression in (1, 2) and len(data) > 4 * width * height + 65_536:
        raise _broken(f"BMP: {len(data)} bytes of runs for {width} x {height} pixels")
    return Layout("BMP", width, height, 8)


def _tiff(data: bytes, max_frames: int) -> Layout:
    tags, frames = tiff_tags.read(data, max_frames)
    orientation = tags.number(tiff_tags.ORIENTATION, 1)
    bits = tags.number(tiff_tags.BITS, 1) * tags.number(tiff_tags.SAMPLES, 1)
    width, height = tags.number(tiff_tags.WIDTH, 0), tags.number(tiff_tags.HEIGHT, 0)
    if tags.number(tiff_tags.COMPRESSION, 1) in tiff_tags.FAX and height > MAX_FAX_ROWS:
        raise _broken(f"TIFF: {height} rows of fax compression, at most {MAX_FAX_ROWS} are read")
    blocks = provenance.Blocks()
    blocks.add_xmp(tags.blob(provenance.TIFF_XMP, provenance.MAX_XMP))
    blocks.add_c2pa(tags.blob(provenance.TIFF_C2PA, provenance.MAX_C2PA))
    return Layout(
        "TIFF",
        width,
        height,
        # libtiff may unpack the whole picture as one strip, and Pillow turns it before it drops that
        max(8, 4 + bits / 8) + (4 if 2 <= orientation <= 8 else 0),
        frames,
        orientation if 1 <= orientation <= 8 else 1,
        texts=(*_software(tags.text(tiff_tags.SOFTWARE)), *blocks.texts()),
    )


READERS: dict[str, Callable[[bytes, int], Layout]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "GIF": _gif,
    "BMP": _bmp,
    "TIFF": _tiff,
}
