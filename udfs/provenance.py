"""Metadata blocks of a file -> the texts in them that tell how the picture was made: XMP packets and C2PA manifest stores.

Both are searched for the few names that matter, in bounded time, and not parsed: a hostile file cannot make XML or CBOR costly that
nobody reads. What is found is what the file says. The signature of a manifest is not verified, what it says of an ingredient of the
picture counts as said of the picture, and a manifest that is compressed (`brob`), encrypted or kept elsewhere says nothing here.
Sources: XMP specification part 3 (ISO 16684-1), IPTC Photo Metadata Standard, JUMBF (ISO/IEC 19566-5), C2PA 2.1 (assertions, claims
and manifest stores are CBOR in JUMBF boxes; some assertions are JSON).
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from itertools import islice

Texts = tuple[tuple[str, str], ...]

MAX_XMP = 2**20  # bytes of all packets of a file together; camera and editor packets have 2 to 60 KB
MAX_C2PA = 16 * 2**20  # bytes of the stores of a file; thumbnails of ingredients make them megabytes
MAX_FOUND = 1_000  # places in a block that are looked at
MAX_TEXTS = 50  # of a kind of block
MAX_VALUE = 400  # bytes of a value
XMP = b"http://ns.adobe.com/xap/1.0/\0"  # what an APP1 segment begins with
XMP_EXTENSION = b"http://ns.adobe.com/xmp/extension/\0"  # then 32 bytes of GUID, 4 of the whole length, 4 of the offset
PNG_XMP = b"XML:com.adobe.xmp\0"  # the keyword of an iTXt chunk
TIFF_XMP, TIFF_C2PA = 700, 52545  # tags

# <Iptc4xmpExt:DigitalSourceType>VALUE<, ...DigitalSourceType="VALUE", ...DigitalSourceType rdf:resource="VALUE"
_PROPERTY = re.compile(
    rb":(DigitalSourceType|CreatorTool|Credit)"
    rb"(?:\s{0,64}>|\s{0,64}=\s{0,64}[\"']|\s{1,64}rdf:resource\s{0,64}=\s{0,64}[\"'])([^<>\"']{1,%d})" % MAX_VALUE
)
_NAMES = {  # what is searched for -> where it is said to be from
    b"igitalSourceType": "c2pa:digitalSourceType",  # of an action, or with a capital of IPTC's assertion in JSON
    b"claim_generator_info": "c2pa:claim_generator_info",
    b"claim_generator": "c2pa:claim_generator",
    b"softwareAgent": "c2pa:softwareAgent",
}
_JSON_VALUE = re.compile(rb"\"\s{0,64}:\s{0,64}\"([^\"]{1,%d})" % MAX_VALUE)
_NAME_OF_AGENT = 128  # bytes after which a map's `name` is not looked for


class Blocks:
    """The blocks that a reader of a file comes across, up to their limits; what is beyond is passed over."""

    def __init__(self) -> None:
        self._xmp, self._c2pa = bytearray(), bytearray()
        self._box = b""  # the instance of the JUMBF box that holds the store of a JPEG

    @property
    def xmp_room(self) -> int:
        """Bytes of XMP that are still taken."""
        return MAX_XMP - len(self._xmp)

    def add_xmp(self, packet: bytes) -> None:
        self._xmp += packet[: self.xmp_room]

    def add_c2pa(self, store: bytes) -> None:
        """A manifest store: a JUMBF box (length, `jumb`) whose description box (length, `jumd`) has the type of C2PA."""
        if store[4:8] == b"jumb" and store[12:20] == b"jumdc2pa":
            self._c2pa += store[: MAX_C2PA - len(self._c2pa)]

    def add_app1(self, segment: bytes) -> None:
        """A JPEG's APP1 segment, which may hold a packet or a part of a long one."""
        if segment.startswith(XMP):
            self.add_xmp(segment[len(XMP) :])
        elif segment.startswith(XMP_EXTENSION):
            self.add_xmp(segment[len(XMP_EXTENSION) + 40 :])

    def add_app11(self, segment: bytes) -> None:
        """A JPEG's APP11 segment: `JP`, instance of the box (2 bytes), sequence number (4), the box's head, a part of the box."""
        if segment[:2] != b"JP":
            return
        if self._box and segment[2:4] == self._box:
            head = 16 if segment[8:12] == b"\0\0\0\1" else 8  # a box of 4 GB and more repeats a longer head
            self._c2pa += segment[8 + head :][: MAX_C2PA - len(self._c2pa)]
        elif segment[24:28] == b"c2pa":
            self.add_c2pa(segment[8:])
            self._box = segment[2:4]

    def texts(self) -> Texts:
        """(where, text) pairs, none twice: `xmp:` and `c2pa:` with the name of the property."""
        of_xmp, of_c2pa = dict.fromkeys(_of_xmp(bytes(self._xmp))), dict.fromkeys(_of_c2pa(bytes(self._c2pa)))
        return (*islice(of_xmp, MAX_TEXTS), *islice(of_c2pa, MAX_TEXTS))


def _of_xmp(packets: bytes) -> Iterator[tuple[str, str]]:
    for found in islice(_PROPERTY.finditer(packets), MAX_FOUND):
        if value := html.unescape(found[2].decode("utf-8", "replace")).strip():
            yield f"xmp:{found[1].decode()}", value


def _of_c2pa(stores: bytes) -> Iterator[tuple[str, str]]:
    for name, where in _NAMES.items():
        for end in islice(_ends(stores, name), MAX_FOUND):
            if stores.startswith(b"_info", end):
                continue  # of the longer name
            value = _text_at(stores, end)
            if value is None and name != b"igitalSourceType":  # a map with a `name`, or a list of such maps
                inside = stores.find(b"name", end, end + _NAME_OF_AGENT)
                value = _text_at(stores, inside + 4) if inside >= 0 else None
            if value:
                yield where, value


def _ends(data: bytes, name: bytes) -> Iterator[int]:
    """Where each occurrence of a name ends."""
    at = data.find(name)
    while at >= 0:
        yield at + len(name)
        at = data.find(name, at + len(name))


def _text_at(data: bytes, at: int) -> str | None:
    """The CBOR text (RFC 8949, major type 3, definite length), or else the JSON text, that follows a name which ends at `at`."""
    head = data[at : at + 3]
    length, size = -1, 1
    if head and 0x60 <= head[0] <= 0x77:
        length = head[0] - 0x60
    elif len(head) > 1 and head[0] == 0x78:
        length, size = head[1], 2
    elif len(head) > 2 and head[0] == 0x79:
        length, size = int.from_bytes(head[1:3], "big"), 3
    if length < 0:
        found = _JSON_VALUE.match(data, at)
        return found[1].decode("utf-8", "replace") if found else None
    return data[at + size : at + size + min(length, MAX_VALUE)].decode("utf-8", "replace")
