"""What a file is, from its header alone: every odd file is taken or refused with its code, in milliseconds."""

from __future__ import annotations

import io
import struct
import time
from typing import Any

import pytest
from PIL import Image

from conf.build import Limits
from tests.odd_images import LIMITS, chunk, encoded, odd, picture, png, tiff, turned
from udfs import file_layout, header
from udfs.reject import Reject

AT_THE_PIXELS = ("ok", "decode_failed")  # the header of these is good


def code_of(data: bytes, **limits: Any) -> str:
    try:
        header.probe(data, LIMITS | limits)
    except Reject as reject:
        return reject.code
    return "ok"


@pytest.mark.parametrize("name", sorted(odd()))
def test_every_odd_file_is_taken_or_refused_with_its_code_within_milliseconds(name: str) -> None:
    data, expected = odd()[name]
    begin = time.thread_time()
    code = code_of(data)
    assert time.thread_time() - begin < 0.5
    assert code == ("ok" if expected in AT_THE_PIXELS else expected)


def test_the_limits_of_these_tests_are_the_defaults_of_the_settings() -> None:
    assert Limits().model_dump() == LIMITS


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_width_and_height_are_those_after_the_orientation(kind: str, orientation: int) -> None:
    assert header.probe(turned(orientation, kind), LIMITS)[:3] == (kind, 192, 144)


def test_frames_are_counted_in_every_format_that_has_them() -> None:
    names = ("animated.gif", "animated.webp", "animated.png", "pages.tiff", "two_pictures.jpg", "grey16.png")
    assert [header.probe(odd()[name].data, LIMITS).frames for name in names] == [3, 3, 3, 3, 1, 1]


@pytest.mark.parametrize("name", ["animated.gif", "animated.webp", "animated.png", "pages.tiff"])
def test_one_frame_too_many_is_refused(name: str) -> None:
    assert code_of(odd()[name].data, max_frames=3) == "ok"
    assert code_of(odd()[name].data, max_frames=2) == "too_many_frames"


def test_limits_are_inclusive() -> None:
    data = encoded(picture(64, 48), "PNG")
    assert code_of(data, max_bytes=len(data), max_pixels=64 * 48, min_side=48) == "ok"
    assert code_of(data, max_bytes=len(data) - 1) == "too_many_bytes"
    assert code_of(data, max_pixels=64 * 48 - 1) == "too_many_pixels"
    assert code_of(data, min_side=49) == "too_small"


def test_a_format_that_the_limits_do_not_list_is_refused_by_name_and_never_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "_OPENERS", dict.fromkeys(header._OPENERS, lambda *_: pytest.fail("a parser ran")))
    for name in ("pages.tiff", "truncated.tiff", "drawing.svg", "drawing.eps", "document.pdf", "modern.avif", "layers.psd", "icon.ico"):
        with pytest.raises(Reject, match=r"format_refused: [A-Z]+.*allowed JPEG, PNG"):
            header.probe(odd()[name].data, LIMITS | {"formats": ("JPEG", "PNG")})


def test_a_format_that_no_reader_knows_is_the_users_mistake() -> None:
    with pytest.raises(ValueError, match=r"limits.formats: given \['PPM'\], allowed \['BMP'"):
        header.probe(b"P6 8 8 255 ", LIMITS | {"formats": ("JPEG", "PPM")})


@pytest.mark.parametrize(
    "text",
    [
        b"<svg><rect/></svg>",
        b"\xef\xbb\xbf <?xml version='1.0'?><!-- a --><!DOCTYPE svg PUBLIC '-//W3C//DTD SVG 1.1//EN'>\n<svg:svg >",
    ],
)
def test_svg_is_known_by_its_first_element(text: bytes) -> None:
    assert header.sniff(text) == "SVG"


def test_html_that_holds_a_drawing_is_no_drawing() -> None:
    assert header.sniff(b"<html><body><svg></svg></body></html>") is None


def test_pillows_global_limit_neither_changes_nor_decides() -> None:
    limit = Image.MAX_IMAGE_PIXELS
    wide = png(100_000, 1_000, 1, 0, b"")  # 100 MP: Pillow would warn
    assert code_of(wide) == "too_many_pixels"
    assert limit == Image.MAX_IMAGE_PIXELS


def test_what_a_decode_would_need_in_memory_is_bounded_whatever_max_pixels_says() -> None:
    flat = b"RIFF\x2a\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (5_999).to_bytes(3, "little") * 2 + bytes(16)  # 36 MP, 16 bytes each
    with pytest.raises(Reject, match="too_many_pixels: 6000 x 6000 WEBP needs about 549 MB"):
        header.probe(flat, LIMITS | {"max_pixels": 10**9})


def test_a_picture_and_its_second_reading_must_agree_on_the_size() -> None:
    data = bytearray(encoded(picture(64, 48), "PNG"))
    second = chunk(b"IHDR", struct.pack(">IIBBBBB", 4_000, 4_000, 8, 2, 0, 0, 0))  # Pillow believes the last one
    with pytest.raises(Reject, match="header_broken: PNG: 64 x 48 or 4000 x 4000 pixels"):
        header.probe(bytes(data[:33]) + second + bytes(data[33:]), LIMITS)


def test_marks_of_generators_are_found_and_those_of_ordinary_programs_are_not() -> None:
    found = {name: header.probe(odd()[name].data, LIMITS).ai_marks for name in odd() if odd()[name].expected == "ok"}
    assert {name: [mark["where"] for mark in marks] for name, marks in found.items() if marks} == {
        "marked.png": ["png:parameters"],
        "workflow.png": ["png:workflow"],
        "squeezed.png": ["png:prompt"],
        "novel.png": ["png:Software"],
        "generator.jpg": ["exif:Software"],
        "generator.webp": ["exif:Software"],
    }
    assert found["workflow.png"][0]["text"] == '{"nodes": [{"type": "KSampler"}], "note": "✓"}'


def test_exif_that_overlaps_itself_is_refused_before_pillow_reads_it() -> None:
    entries = [(30_000 + i, 7, 60_000, 8) for i in range(2_000)]  # 120 MB out of 64 KB
    exif = b"Exif\0\0" + tiff(entries, bytes(36_000))
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    jpeg = encoded(picture(), "JPEG")
    with pytest.raises(Reject, match="header_broken: TIFF or EXIF: more than"):
        header.probe(jpeg[:2] + segment + jpeg[2:], LIMITS)


def test_a_directory_that_points_back_at_itself_ends() -> None:
    data = bytearray(encoded(picture(), "TIFF"))
    start = struct.unpack_from("<I", data, 4)[0]
    end = start + 2 + 12 * struct.unpack_from("<H", data, start)[0]
    data[end : end + 4] = struct.pack("<I", start)
    assert file_layout.read(bytes(data), "TIFF", 1_000).frames == 1


def test_the_numbers_of_version_2() -> None:
    """When this fails, either undo the change or raise header.KERNEL_VERSION and put the new numbers here."""
    found = {name: header.probe(odd()[name].data, LIMITS)[:4] for name in ("exif_6.jpg", "animated.gif", "run_length.bmp", "alpha.webp")}
    assert (header.KERNEL_VERSION, found) == (
        2,
        {
            "exif_6.jpg": ("JPEG", 192, 144, 1),
            "animated.gif": ("GIF", 192, 144, 3),
            "run_length.bmp": ("BMP", 64, 48, 1),
            "alpha.webp": ("WEBP", 192, 144, 1),
        },
    )


def test_a_picture_cut_anywhere_is_a_row_or_a_reject() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = encoded(picture(24, 16), kind)
        codes = {code_of(data[:length]) for length in range(0, len(data), max(1, len(data) // 60))}
        assert codes <= {"empty", "not_an_image", "header_broken", "ok"}, kind
        assert Image.open(io.BytesIO(data)).size == (24, 16)
