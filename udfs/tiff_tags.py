"""TIFF structure, as a TIFF file and as EXIF -> the tags of its first directory, within bounds.

Pillow copies every tag of a directory into memory and follows what offsets say: 4,000 tags that all point at the same
60 MB, or a million strips, hold a worker for minutes. This reader looks at the directory alone and refuses such files
before Pillow sees them. Layout of the structure: TIFF 6.0 (1992) and BigTIFF (2007).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from udfs.reject import Reject

MAGICS = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")  # the middle two are wrong but exist, and Pillow reads them
WIDTH, HEIGHT, BITS, COMPRESSION, ORIENTATION, SAMPLES, SOFTWARE = 256, 257, 258, 259, 274, 277, 305
FAX = (2, 3, 4)  # compressions of bilevel scans
MAX_TAGS = 4_096  # of one directory; cameras write below 100
MAX_TAG_BYTES = 32 * 2**20  # of one directory together; more is a layered working file, or tags that overlap
MAX_NUMBERS = 200_000  # of one directory together: strip offsets and the like, each becomes a Python object
_SUB_DIRECTORIES = (34665, 34853, 40965)  # Exif, GPS, interoperability: Pillow reads these after a TIFF's pixels
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # bytes by type
_NUMBERS = {3: "H", 4: "I", 13: "I", 16: "Q"}
_BLOBS = (1, 2, 6, 7)  # types that Pillow keeps as bytes


class Tag(NamedTuple):
    kind: int
    values: int  # how many
    start: int  # of the value in the data


class Tags:
    """The tags of one directory; numbers and text on demand."""

    def __init__(self, data: bytes, order: str, tags: Mapping[int, Tag]) -> None:
        self._data, self._order, self._tags = data, order, tags

    def number(self, name: int, default: int) -> int:
        """The first value of a whole-number tag."""
        tag = self._tags.get(name)
        if tag is None or tag.kind not in _NUMBERS or tag.values < 1:
            return default
        return _unpack(self._order + _NUMBERS[tag.kind], self._data, tag.start)[0]

    def text(self, name: int) -> str:
        tag = self._tags.get(name)
        if tag is None or tag.kind != 2:
            return ""
        return self._data[tag.start : tag.start + min(tag.values, 4_096)].partition(b"\0")[0].decode("utf-8", "replace").strip()

    def blob(self, name: int, limit: int) -> bytes:
        """At most `limit` bytes of a tag that holds bytes."""
        tag = self._tags.get(name)
        return self._data[tag.start : tag.start + min(tag.values, limit)] if tag is not None and tag.kind in _BLOBS else b""


def exif_facts(exif: bytes) -> tuple[int, str]:
    """EXIF bytes (with or without their `Exif` prefix) -> (orientation 1..8, Software). EXIF that cannot be read says (1, "").

    Raises Reject header_broken when it goes beyond the bounds above.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    if not exif.startswith(MAGICS):
        return 1, ""
    try:
        tags, _ = read(exif, max_frames=0, follow=False)
        orientation = tags.number(ORIENTATION, 1)
        return (orientation if 1 <= orientation <= 8 else 1), tags.text(SOFTWARE)
    except struct.error:
        return 1, ""


def read(data: bytes, max_frames: int, follow: bool = True) -> tuple[Tags, int]:
    """Bytes that start with one of MAGICS -> (tags of the first directory, number of directories up to max_frames + 1).

    `follow` also bounds the sub-directories. Raises Reject header_broken out of bounds, struct.error where the data end.
    """
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in (data[2], data[3])
    (first,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    tags, after = _directory(data, first, order, big)
    if follow:
        for start in _sub_directories(data, tags, order):
            _directory(data, start, order, big)
    frames, seen = 1, {first}
    while after and after not in seen and after < len(data) and frames <= max_frames:
        seen.add(after)
        frames += 1
        after = _next(data, after, order, big)
    return Tags(data, order, tags), frames


def _directory(data: bytes, start: int, order: str, big: bool) -> tuple[dict[int, Tag], int]:
    (count,) = _unpack(order + ("Q" if big else "H"), data, start)
    if count > MAX_TAGS:
        raise Reject("header_broken", f"TIFF or EXIF: {count} tags in one directory, at most {MAX_TAGS} are read")
    entry = struct.Struct(order + ("HHQQ" if big else "HHII"))
    begin, inline = start + (8 if big else 2), 8 if big else 4
    tags: dict[int, Tag] = {}
    total = numbers = 0
    for position in range(begin, begin + count * entry.size, entry.size):
        name, kind, values, where = entry.unpack_from(data, position)
        size = values * _SIZES.get(kind, 0)
        if size > inline:
            total += min(size, len(data))
        numbers += values if kind in _SIZES and kind not in _BLOBS else 0
        if total > MAX_TAG_BYTES or numbers > MAX_NUMBERS:
            raise Reject("header_broken", f"TIFF or EXIF: more than {MAX_TAG_BYTES} bytes or {MAX_NUMBERS} numbers in one directory's tags")
        tags[name] = Tag(kind, values, where if size > inline else position + entry.size - inline)
    return tags, _next(data, start, order, big)


def _next(data: bytes, start: int, order: str, big: bool) -> int:
    """Where the directory after the one at `start` begins; 0 when there is none or the data end."""
    endian: Literal["little", "big"] = "little" if order == "<" else "big"
    head, entry, size = (8, 20, 8) if big else (2, 12, 4)
    end = start + head + entry * int.from_bytes(data[start : start + head], endian)
    return int.from_bytes(data[end : end + size], endian)


def _sub_directories(data: bytes, tags: Mapping[int, Tag], order: str) -> Iterator[int]:
    for name in _SUB_DIRECTORIES:
        tag = tags.get(name)
        if tag is not None and tag.kind in _NUMBERS:
            yield _unpack(order + _NUMBERS[tag.kind], data, tag.start)[0]


def _unpack(form: str, data: bytes, start: int) -> tuple[int, ...]:
    if start > len(data):  # also keeps a 64-bit offset from being an OverflowError
        raise struct.error(f"offset {start} is beyond the {len(data)} bytes")
    return struct.unpack_from(form, data, start)
