"""Pictures that say how they were made: XMP packets and C2PA manifest stores, written byte by byte as their specifications say.

XMP: ISO 16684-1; JUMBF boxes and their segments in JPEG: ISO/IEC 19566-5; manifest stores: C2PA 2.1. Nothing here is signed.
"""

from __future__ import annotations

import struct
from typing import Any

from PIL import PngImagePlugin, TiffImagePlugin

from tests.odd_images import chunk, encoded, picture

IPTC = "http://cv.iptc.org/newscodes/digitalsourcetype/"
KINDS = ("JPEG", "PNG", "WEBP", "TIFF")
_NAMESPACES = (
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
    'xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/"'
)
_TYPE = bytes.fromhex("00110010800000AA00389B71")  # what follows the four letters in a JUMBF type of C2PA
_SEGMENT = 64_000  # bytes of a box in one JPEG segment


def xmp(attributes: str = "", elements: str = "") -> bytes:
    """A packet of one description."""
    told = f'<rdf:Description rdf:about="" {_NAMESPACES} {attributes}>{elements}</rdf:Description>'
    rdf = f'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">{told}</rdf:RDF>'
    head = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    return f'{head}<x:xmpmeta xmlns:x="adobe:ns:meta/">{rdf}</x:xmpmeta>{" " * 2_000}<?xpacket end="w"?>'.encode()


def cbor(value: Any) -> bytes:
    """Texts, maps, lists, bytes and whole numbers in CBOR (RFC 8949), heads as short as they can be."""
    if isinstance(value, dict):
        return _head(5, len(value)) + b"".join(cbor(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return _head(4, len(value)) + b"".join(map(cbor, value))
    if isinstance(value, int):
        return _head(0, value)
    data = value.encode() if isinstance(value, str) else value
    return _head(3 if isinstance(value, str) else 2, len(data)) + data


def _head(major: int, length: int) -> bytes:
    if length < 24:
        return bytes([major << 5 | length])
    size = next(size for size in (1, 2, 4) if length < 256**size)
    return bytes([major << 5 | 24 + (1, 2, 4).index(size)]) + length.to_bytes(size, "big")


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


def superbox(kind: bytes, label: str, *boxes: bytes) -> bytes:
    """A JUMBF box: its description (type, `requestable` and `labelled`, label) and what it holds."""
    return box(b"jumb", box(b"jumd", kind + _TYPE + b"\x03" + label.encode() + b"\0") + b"".join(boxes))


def store(actions: list[dict[str, Any]] | None = None, claim: dict[str, Any] | None = None, *others: bytes, thumbnail: int = 0) -> bytes:
    """A manifest store of one manifest: its actions, what else it asserts, a thumbnail of so many bytes, its claim, no signature."""
    assertions = [superbox(b"c2as", "c2pa.thumbnail.claim.jpeg", box(b"bidb", bytes(thumbnail)))] if thumbnail else []
    if actions is not None:
        assertions.append(superbox(b"cbor", "c2pa.actions.v2", box(b"cbor", cbor({"actions": actions}))))
    told = {"dc:title": "picture", "instanceID": "xmp:iid:1", **(claim or {}), "alg": "sha256"}
    manifest = superbox(
        b"c2ma",
        "urn:uuid:00000000-0000-4000-8000-000000000000",
        superbox(b"c2as", "c2pa.assertions", *assertions, *others),
        superbox(b"c2cl", "c2pa.claim", box(b"cbor", cbor(told))),
        superbox(b"c2cs", "c2pa.signature", box(b"cbor", cbor(bytes(64)))),
    )
    return superbox(b"c2pa", "c2pa", manifest)


def with_xmp(kind: str, packet: bytes, zipped: bool = False) -> bytes:
    """A picture of this format with the packet where the format keeps it."""
    if kind == "JPEG":
        return _with_segments([b"\xff\xe1" + _sized(b"http://ns.adobe.com/xap/1.0/\0" + packet)])
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet.decode(), zip=zipped)
        return encoded(picture(), "PNG", pnginfo=info)
    return _with_tag(700, packet) if kind == "TIFF" else encoded(picture(), "WEBP", xmp=packet)


def with_long_xmp(packet: bytes) -> bytes:
    """A JPEG with a packet that lies in an extension of another one, in parts."""
    parts = [packet[at : at + 700] for at in range(0, len(packet), 700)]
    heads = [b"http://ns.adobe.com/xmp/extension/\0" + b"0" * 32 + struct.pack(">II", len(packet), 700 * at) for at in range(len(parts))]
    main = b"http://ns.adobe.com/xap/1.0/\0" + xmp(f'xmpNote:HasExtendedXMP="{"0" * 32}"')
    return _with_segments([b"\xff\xe1" + _sized(part) for part in (main, *(head + part for head, part in zip(heads, parts, strict=True)))])


def with_c2pa(kind: str, whole: bytes) -> bytes:
    """A picture of this format with the store where the format keeps it."""
    if kind == "JPEG":
        parts = [whole[at : at + _SEGMENT] for at in range(0, len(whole), _SEGMENT)]
        heads = [b"JP\2\x11" + struct.pack(">I", number + 1) + (whole[:8] if number else b"") for number in range(len(parts))]
        return _with_segments([b"\xff\xeb" + _sized(head + part) for head, part in zip(heads, parts, strict=True)])
    if kind == "PNG":
        plain = encoded(picture(), "PNG")
        return plain[:33] + chunk(b"caBX", whole) + plain[33:]  # after IHDR
    if kind == "TIFF":
        return _with_tag(52545, whole)
    plain = encoded(picture(), "WEBP", xmp=xmp())  # an extended file, which may have other chunks
    data = plain + b"C2PA" + struct.pack("<I", len(whole)) + whole + b"\0" * (len(whole) % 2)
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


def _sized(body: bytes) -> bytes:
    return struct.pack(">H", 2 + len(body)) + body


def _with_segments(segments: list[bytes]) -> bytes:
    plain = encoded(picture(), "JPEG")
    return plain[:20] + b"".join(segments) + plain[20:]  # after the JFIF segment


def _with_tag(tag: int, value: bytes) -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[tag], tags.tagtype[tag] = value, 7
    return encoded(picture(), "TIFF", tiffinfo=tags)
