"""Bytes -> upright RGB pixels on white in sRGB; broken pixels are a reject, and many threads stay within the memory."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.odd_images import DEMO, LIMITS, chunk, costly, encoded, icc_profile, odd, picture, png, turned, write_demo, write_folder
from udfs import decode, header, jpeg
from udfs.reject import Reject

ROOT = Path(__file__).parents[2]


def pixels(data: bytes) -> np.ndarray:
    decoded = decode.decode(data, LIMITS)
    assert decoded.image.mode == "RGB"
    return np.asarray(decoded.image)


def apart(first: np.ndarray, second: np.ndarray) -> int:
    """Largest difference in levels."""
    assert first.shape == second.shape
    return int(np.abs(first.astype(int) - second.astype(int)).max())


UPRIGHT = np.asarray(picture())
GREY = np.asarray(picture().convert("L"))
GREY_RGB = np.stack([GREY] * 3, axis=-1)


@pytest.mark.parametrize("name", sorted(odd()))
def test_every_odd_file_is_decoded_or_refused_with_its_code(name: str) -> None:
    data, expected = odd()[name]
    try:
        found = header.probe(data, LIMITS)
        image = decode.decode(data, LIMITS).image
    except Reject as reject:
        assert reject.code == expected, reject
        return
    assert expected == "ok"
    assert (image.mode, image.size) == ("RGB", (found.width, found.height))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_every_orientation_decodes_to_the_same_upright_picture(kind: str, orientation: int) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert apart(pixels(turned(orientation, kind, **options)), UPRIGHT) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_a_jpeg_too(orientation: int) -> None:
    difference = np.abs(pixels(turned(orientation, quality=95)).astype(int) - UPRIGHT.astype(int))
    assert difference.mean() < 1.5


@pytest.mark.parametrize("name", ["grey16.png", "grey16.tiff", "int32.tiff", "float.tiff"])
def test_deep_grey_is_scaled_and_not_clipped(name: str) -> None:
    assert apart(pixels(odd()[name].data), GREY_RGB) == 0


def test_16_bit_colour_keeps_its_high_byte() -> None:
    assert apart(pixels(odd()["rgb16.png"].data), UPRIGHT) == 0


def test_16_bit_grey_is_rounded() -> None:
    values = np.arange(0, 65_536, 64, dtype=np.uint16).reshape(32, 32)
    assert (pixels(encoded(Image.fromarray(values), "PNG"))[..., 0] == np.rint(values / 257)).all()


def test_floats_beyond_the_unit_are_stretched_and_nan_is_black() -> None:
    values = np.linspace(-50, 150, 32 * 32, dtype=np.float32).reshape(32, 32)
    values[0, 0] = np.nan
    found = pixels(encoded(Image.fromarray(values), "TIFF"))[..., 0]
    assert (found[0, 0], found[0, 1], found[-1, -1]) == (0, 0, 255)


def test_what_is_transparent_is_white_and_what_is_half_transparent_is_half_way() -> None:
    image = Image.new("RGBA", (16, 16), (200, 100, 0, 0))
    image.paste((200, 100, 0, 128), (0, 0, 8, 16))
    for kind in ("PNG", "TIFF"):
        found = pixels(encoded(image, kind))
        assert found[0, 15].tolist() == [255, 255, 255]
        assert apart(found[0, 0], np.array([227, 177, 127])) <= 1


@pytest.mark.parametrize("name", ["palette_alpha.png", "grey_alpha.png", "alpha.webp"])
def test_every_kind_of_transparency_lies_on_white(name: str) -> None:
    image = Image.open(io.BytesIO(odd()[name].data)).convert("RGBA")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image)
    assert apart(pixels(odd()[name].data), np.asarray(ground.convert("RGB"))) <= 1


def test_a_transparent_level_of_16_bit_grey_is_white() -> None:
    row = b"\0" + b"\x10\x00" * 8 + b"\x20\x00" * 8
    found = pixels(png(16, 16, 16, 0, row * 16, chunk(b"tRNS", b"\x10\x00")))[0, :, 0]
    assert found.tolist() == [255] * 8 + [32] * 8


def test_a_palette_and_a_bilevel_picture_keep_their_colours() -> None:
    image = picture().quantize(32)
    assert apart(pixels(encoded(image, "PNG")), np.asarray(image.convert("RGB"))) == 0
    assert apart(pixels(odd()["bilevel.png"].data), np.asarray(picture().convert("1").convert("RGB"))) == 0


@pytest.mark.parametrize("name", ["cmyk.jpg", "cmyk.tiff"])
def test_cmyk_becomes_rgb(name: str) -> None:
    assert np.abs(pixels(odd()[name].data).astype(int) - UPRIGHT.astype(int)).mean() < 4


@pytest.mark.parametrize("name", ["animated.gif", "animated.webp", "animated.png", "pages.tiff", "two_pictures.jpg"])
def test_of_several_frames_the_first_is_decoded(name: str) -> None:
    assert np.abs(pixels(odd()[name].data).astype(int) - UPRIGHT.astype(int)).mean() < 8


def test_an_icc_profile_is_applied_called_srgb_or_called_invalid() -> None:
    names = ("icc_other.png", "icc_srgb.jpg", "icc_broken.jpg", "icc_of_other_pixels.jpg", "grey16.png")
    assert [decode.decode(odd()[name].data, LIMITS).colour for name in names] == ["applied", "srgb", "invalid", "invalid", "none"]


def test_a_profile_changes_colours_as_littlecms_says_and_an_invalid_one_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile()))
    told = ImageCms.profileToProfile(picture(), profile, ImageCms.createProfile("sRGB"))
    found = pixels(odd()["icc_other.png"].data)
    assert apart(found, np.asarray(told)) == 0
    assert np.abs(found.astype(int) - UPRIGHT.astype(int)).mean() > 5
    plain = pixels(encoded(picture(), "JPEG"))
    assert apart(pixels(odd()["icc_broken.jpg"].data), plain) == 0
    assert apart(pixels(odd()["icc_srgb.jpg"].data), plain) == 0


def test_transparent_pixels_stay_white_under_a_profile() -> None:
    image = picture().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 50, 50))
    decoded = decode.decode(encoded(image, "PNG", icc_profile=icc_profile()), LIMITS)
    assert decoded.colour == "applied"
    assert (np.asarray(decoded.image)[:50, :50] == 255).all()


def test_a_reject_keeps_no_pixels_alive() -> None:
    with pytest.raises(Reject) as caught:
        decode.decode(odd()["truncated.png"].data, LIMITS)
    assert caught.value.code == "decode_failed"
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_after_its_block_a_decoded_image_is_closed() -> None:
    with decode.decoding(odd()["animated.gif"].data, LIMITS) as decoded:
        assert decoded.image.getpixel((0, 0)) is not None
    with pytest.raises(ValueError, match="closed"):
        decoded.image.getpixel((0, 0))


def test_room_is_given_in_turn_and_a_big_image_is_not_overtaken() -> None:
    room, order = decode._Room(10), []
    small_in, big_waits = threading.Event(), threading.Event()

    def big() -> None:
        big_waits.set()
        with room.take(10):
            order.append("big")

    def late() -> None:
        with room.take(1):
            order.append("late")

    with room.take(1):
        small_in.set()
        first = threading.Thread(target=big)
        first.start()
        big_waits.wait()
        while not room._door.locked():
            pass
        second = threading.Thread(target=late)
        second.start()
        second.join(0.05)
        assert order == []  # there is room for `late`, but `big` was first
    first.join()
    second.join()
    assert order == ["big", "late"]


BIG = picture(1600, 1200)  # a JPEG of it is decoded to a half, 800 x 600


def scaled(data: bytes) -> np.ndarray:
    with decode.decoding(data, LIMITS, scaled=True) as decoded:
        assert decoded.image.mode == "RGB"
        assert decoded.image == decode.decode(data, LIMITS, scaled=True).image
        return np.asarray(decoded.image)


@pytest.mark.parametrize(
    ("size", "by"),
    [((800, 600), 1), ((1024, 768), 2), ((1023, 767), 1), ((768, 1365), 2), ((767, 2000), 1), ((1000, 1000), 1), ((1024, 1024), 2),
     ((2000, 1535), 2), ((2048, 1536), 4), ((4096, 3072), 8), ((8192, 6144), 8), ((50_000, 300), 1)],
)  # fmt: skip
def test_a_jpeg_is_scaled_by_the_largest_power_of_two_that_leaves_384_by_512(size: tuple[int, int], by: int) -> None:
    assert jpeg.divisor(*size) == jpeg.divisor(*size[::-1]) == by


@pytest.mark.parametrize("kind", ["plain", "progressive", "grey", "cmyk", "profile"])
def test_a_scaled_jpeg_of_any_kind_is_close_to_the_full_one_reduced(kind: str) -> None:
    image = {"grey": BIG.convert("L"), "cmyk": BIG.convert("CMYK")}.get(kind, BIG)
    options = {"progressive": {"progressive": True}, "profile": {"icc_profile": icc_profile()}}.get(kind, {})
    data = encoded(image, "JPEG", quality=92, **options)
    found = scaled(data)
    assert found.shape == (600, 800, 3)
    reduced = np.asarray(Image.fromarray(pixels(data)).reduce(2))
    assert np.abs(found.astype(int) - reduced.astype(int)).mean() < 1.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_jpeg_is_turned_upright_with_odd_sides_rounded_up(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    upright = picture(1601, 1203)
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose({2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]))
    found = scaled(encoded(stored, "JPEG", quality=95, exif=exif.tobytes()))
    assert found.shape == (602, 801, 3)
    assert np.abs(found.astype(int) - np.asarray(upright.reduce(2)).astype(int)).mean() < 1.5


@pytest.mark.parametrize("kept", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_is_found_in_a_scaled_decode_too(kept: float, progressive: bool) -> None:
    data = encoded(BIG, "JPEG", progressive=progressive)
    for take in (pixels, scaled):
        with pytest.raises(Reject) as caught:
            take(data[: int(kept * len(data))])
        assert caught.value.code == "decode_failed"


def test_small_jpegs_and_other_formats_are_not_scaled() -> None:
    for data in (encoded(picture(800, 600), "JPEG"), encoded(BIG, "PNG"), encoded(BIG, "WEBP")):
        assert np.array_equal(scaled(data), pixels(data))


@pytest.mark.parametrize("name", sorted(name for name, one in odd().items() if one.data[:2] == b"\xff\xd8"))
def test_every_odd_jpeg_ends_alike_scaled_or_not(name: str) -> None:
    data, expected = odd()[name]
    try:
        scaled(data)
    except Reject as reject:
        assert reject.code == expected, reject
    else:
        assert expected == "ok"


def test_a_scaled_decode_takes_the_room_of_what_it_makes_and_of_a_progressive_files_coefficients() -> None:
    plain, progressive = (encoded(BIG, "JPEG", progressive=told, subsampling="4:4:4") for told in (False, True))
    shares = [decode._share(header.layout_of(data, LIMITS), data, 2) - len(data) for data in (plain, progressive)]
    assert shares == [8 * 800 * 600, 8 * 800 * 600 + 6 * 1600 * 1200]


CHILD = """
import json, sys, threading, time
from pathlib import Path
from tests.odd_images import LIMITS, encoded, icc_profile, picture
from udfs import decode, header, perceptual_hash, pixel_statistics
from udfs.reject import Reject

def peak():  # not ru_maxrss: a child inherits its parent's
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

def take(data):
    begin = time.perf_counter()
    try:
        header.probe(data, LIMITS)
        with decode.decoding(data, LIMITS) as decoded:
            pixel_statistics.measure(decoded.image), perceptual_hash.phash(decoded.image)
    except Reject as reject:
        return reject.code
    finally:
        slowest.append(time.perf_counter() - begin)
    return "ok"

slowest, codes = [], {}
take(encoded(picture(), "PNG", icc_profile=icc_profile()))
before = peak()
files = iter(sorted(Path(sys.argv[1]).iterdir()))
lock = threading.Lock()

def work():
    while True:
        with lock:
            path = next(files, None)
        if path is None:
            return
        codes[path.name] = take(path.read_bytes())

threads = [threading.Thread(target=work) for _ in range(2)]
[t.start() for t in threads]
[t.join() for t in threads]
print(json.dumps({"codes": codes, "growth": peak() - before, "slowest": max(slowest)}))
"""


def test_two_threads_take_all_odd_and_costly_files_within_500_mb_and_10_seconds_each(tmp_path: Path) -> None:
    expected = write_folder(tmp_path)
    for name, data in costly().items():
        (tmp_path / f"costly_{name}").write_bytes(data)
        expected[f"costly_{name}"] = "ok"
    told = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=100)
    found = json.loads(told.stdout)
    assert found["codes"] == expected
    assert found["growth"] < 500
    assert found["slowest"] < 10


def test_the_files_of_the_demo_are_what_the_maker_makes(tmp_path: Path) -> None:
    write_demo(tmp_path)
    committed = ROOT / "tests/data/odd"
    assert {path.name for path in committed.iterdir()} == set(DEMO)
    assert sum(path.stat().st_size for path in committed.iterdir()) < 300_000
    for name in DEMO:
        assert (committed / name).read_bytes() == (tmp_path / name).read_bytes(), f"{name}: run `python -m tests.odd_images`"


GOLDEN = {
    "alpha.webp": "845e595fdad1",
    "animated.gif": "16f338224812",
    "cmyk.jpg": "f46fcf8f83f1",
    "exif_6.jpg": "de2524568887",
    "float.tiff": "ccd129087f19",
    "grey16.png": "ccd129087f19",
    "grey_alpha.png": "990f9b1706ce",
    "icc_other.png": "a5353b4081e6",
    "palette_alpha.png": "85f0c0269b27",
    "progressive.jpg": "6ca517cc6fc6",
    "rgb16.png": "a9054499bd8b",
    "run_length.bmp": "80a7d8b3c3c2",
}


def test_the_pixels_of_version_1() -> None:
    """When this fails, either undo the change or raise decode.KERNEL_VERSION and put the new digests here."""
    found = {name: hashlib.sha256(pixels(odd()[name].data).tobytes()).hexdigest()[:12] for name in GOLDEN}
    assert (decode.KERNEL_VERSION, found) == (1, GOLDEN)
    data = encoded(BIG, "JPEG", quality=92)
    assert (decode.SCALED, hashlib.sha256(scaled(data).tobytes()).hexdigest()[:12]) == ("1+pillow-draft:384:512", "3dd80d4eb2ac")
