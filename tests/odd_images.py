"""Odd, broken and hostile files, made in memory: what a crawl holds besides pictures.

`ODD` maps a name to (bytes, expected): "ok", or the code with which the file ends, at its header or at its pixels.
`write_folder` writes them all as files, with names that are no UTF-8; `python -m tests.odd_images` writes the small
ones to tests/data/odd, which the demo ingests.
"""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageDraw, PngImagePlugin

LIMITS: dict[str, Any] = {  # conf.build.Limits' defaults as a mapping; a test keeps them equal
    "formats": ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"),
    "max_bytes": 64 * 2**20,
    "max_pixels": 50_000_000,
    "max_frames": 1_000,
    "min_side": 8,
}
DEMO = (
    "truncated.jpg", "empty.jpg", "page.jpg", "really_a_jpeg.png", "cmyk.jpg", "grey16.png", "palette_alpha.png", "exif_6.jpg", "animated.gif",
    "animated.webp", "icc_other.png", "icc_broken.jpg", "bomb.png", "bomb.gif", "bomb.jpg", "drawing.svg", "drawing.eps", "marked.png",
)  # fmt: skip
_STORE = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF orientation -> Image.Transpose that undoes its turn
_GIF_FRAME = b",\0\0\0\0\x08\0\x08\0\0\x02\x0a\x84\x8f\xa9\xcb\xed\x0f\xa3\x9c\xb4\xda\0"  # 8 x 8 pixels


class Odd(NamedTuple):
    data: bytes
    expected: str


def picture(width: int = 192, height: int = 144) -> Image.Image:
    """RGB with four different corners, smooth areas and edges: any turn or flip shows."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    planes = np.stack([220 - 160 * x, 60 + 150 * y, 40 + 180 * x * (1 - y)], axis=-1)
    image = Image.fromarray(planes.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width * 0.1, height * 0.1, width * 0.4, height * 0.5), fill=(250, 240, 60))
    draw.polygon([(width * 0.9, height * 0.2), (width * 0.6, height * 0.9), (width * 0.95, height * 0.8)], fill=(20, 30, 90))
    return image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int, kind: str = "JPEG", **options: Any) -> bytes:
    """The picture, stored turned, with the EXIF orientation that makes it upright again."""
    exif = Image.Exif()
    exif[274] = orientation
    stored = picture() if orientation == 1 else picture().transpose(Image.Transpose(_STORE[orientation]))
    return encoded(stored, kind, exif=exif.tobytes(), **options)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"", level: int = 9) -> bytes:
    """A PNG by hand: `rows` are deflated, `extra` holds whole chunks before the pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(rows, level)) + chunk(b"IEND", b"")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def tiff(entries: list[tuple[int, int, int, int]], rest: bytes = b"") -> bytes:
    """A little-endian TIFF of one directory at byte 8; entries are (tag, type, count, value)."""
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries) + b"\0\0\0\0" + rest


def icc_profile(gamma: float = 1.8) -> bytes:
    """A valid matrix profile (ICC.1:2001, version 2) that is not sRGB: Adobe RGB's primaries under D50, another gamma."""
    white, red, green, blue = (0.9642, 1.0, 0.8249), (0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)
    xyz = {
        name: b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)
        for name, values in ((b"wtpt", white), (b"rXYZ", red), (b"gXYZ", green), (b"bXYZ", blue))
    }
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 4) + b"odd\0" + b"\0" * 79
    tags = {b"desc": text, **xyz, b"rTRC": curve, b"gTRC": curve, b"bTRC": curve, b"cprt": b"text\0\0\0\0CC0\0"}
    position, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        table += name + struct.pack(">II", position + len(body), len(value))
        body += value
    size = position + len(body)
    head = struct.pack(">I4sI4s4s4s12x4s", size, b"\0\0\0\0", 0x02200000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    head += b"\0" * 28 + struct.pack(">iii", *[round(v * 65536) for v in white])
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(picture(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def _jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated: each pass walks over all pixels."""
    data = encoded(Image.new("RGB", (512, 512), "grey"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xc4", 0, data.rindex(b"\xff\xda"))
    return data[:-2] + data[last:-2] * count + data[-2:]


def _run_length_bmp(width: int, height: int) -> bytes:
    palette = bytes(v for i in range(256) for v in (i, 255 - i, i // 2, 0))
    runs = b"".join(bytes([width, 40 + y % 100]) + b"\0\0" for y in range(min(height, 64)))
    offset = 54 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(runs), 0, 0, offset) + info + palette + runs + b"\0\1"


def _text(key: str, value: str, zipped: bool = False) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text(key, value, zip=zipped)
    return encoded(picture(), "PNG", pnginfo=info)


def _software(name: str, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[305] = name
    return encoded(picture(), kind, exif=exif.tobytes())


@cache
def odd() -> dict[str, Odd]:
    """Name -> (bytes, expected)."""
    files = _ordinary_but_odd() | _broken() | _hostile() | _marked()
    return {name: Odd(*value) for name, value in files.items()}


def _ordinary_but_odd() -> dict[str, tuple[bytes, str]]:
    image, grey = picture(), picture().convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    frames = [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image.transpose(Image.Transpose.ROTATE_180)]
    many: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    alpha = image.convert("RGBA")
    alpha.putalpha(grey)
    palette = alpha.quantize(64)
    rgb16 = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.asarray(image).astype(np.uint16) * 257)
    return {
        "really_a_jpeg.png": (encoded(image, "JPEG"), "ok"),
        "cmyk.jpg": (encoded(image.convert("CMYK"), "JPEG"), "ok"),
        "cmyk.tiff": (encoded(image.convert("CMYK"), "TIFF", compression="tiff_lzw"), "ok"),
        "grey16.png": (encoded(deep, "PNG"), "ok"),
        "grey16.tiff": (encoded(deep, "TIFF"), "ok"),
        "rgb16.png": (png(*image.size, 16, 2, rgb16), "ok"),
        "float.tiff": (encoded(Image.fromarray(np.asarray(grey).astype(np.float32) / 255), "TIFF"), "ok"),
        "int32.tiff": (encoded(Image.fromarray(np.asarray(grey).astype(np.int32) * 257), "TIFF"), "ok"),
        "bilevel.png": (encoded(image.convert("1"), "PNG"), "ok"),
        "palette_alpha.png": (encoded(palette, "PNG"), "ok"),
        "grey_alpha.png": (encoded(Image.merge("LA", (grey, grey)), "PNG"), "ok"),
        "alpha.webp": (encoded(alpha, "WEBP", lossless=True), "ok"),
        "progressive.jpg": (encoded(image, "JPEG", progressive=True), "ok"),
        "animated.gif": (encoded(frames[0].quantize(64), "GIF", save_all=True, append_images=[f.quantize(64) for f in frames[1:]]), "ok"),
        "animated.webp": (encoded(frames[0], "WEBP", **many), "ok"),
        "animated.png": (encoded(frames[0], "PNG", **many), "ok"),
        "pages.tiff": (encoded(frames[0], "TIFF", compression="jpeg", **many), "ok"),
        "two_pictures.jpg": (encoded(frames[0], "MPO", **many), "ok"),
        "icc_other.png": (encoded(image, "PNG", icc_profile=icc_profile()), "ok"),
        "icc_srgb.jpg": (encoded(image, "JPEG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()), "ok"),
        "icc_broken.jpg": (encoded(image, "JPEG", icc_profile=icc_profile()[:200] + b"broken"), "ok"),
        "icc_of_other_pixels.jpg": (encoded(image.convert("CMYK"), "JPEG", icc_profile=icc_profile()), "ok"),
        "run_length.bmp": (_run_length_bmp(64, 48), "ok"),
        **{f"exif_{n}.jpg": (turned(n), "ok") for n in range(1, 9)},
        "exif_9.jpg": (encoded(image, "JPEG", exif=turned_exif(9)), "ok"),
        "exif_broken.jpg": (encoded(image, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"), "ok"),
    }


def turned_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return exif.tobytes()


def _broken() -> dict[str, tuple[bytes, str]]:
    image = picture()
    whole = {kind: encoded(image, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")}
    flipped = bytearray(whole["PNG"])
    flipped[len(flipped) // 2] ^= 0xFF
    return {
        "empty.jpg": (b"", "empty"),
        "page.jpg": (b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>Not Found</body></html>\n", "not_an_image"),
        "notes.png": (b"BMX is not a bitmap, whatever its first letters say.\n", "not_an_image"),
        "zeros.png": (bytes(1000), "not_an_image"),
        "truncated.jpg": (whole["JPEG"][: len(whole["JPEG"]) * 6 // 10], "decode_failed"),
        "truncated.png": (whole["PNG"][: len(whole["PNG"]) * 6 // 10], "decode_failed"),
        "truncated.gif": (whole["GIF"][: len(whole["GIF"]) * 6 // 10], "decode_failed"),
        "truncated.bmp": (whole["BMP"][: len(whole["BMP"]) * 6 // 10], "decode_failed"),
        "truncated.webp": (whole["WEBP"][: len(whole["WEBP"]) * 6 // 10], "header_broken"),  # libwebp checks the size first
        "truncated.tiff": (whole["TIFF"][: len(whole["TIFF"]) * 6 // 10], "decode_failed"),
        "corrupt.png": (bytes(flipped), "decode_failed"),
        "header_only.jpg": (whole["JPEG"][:12], "header_broken"),
        "header_only.png": (whole["PNG"][:20], "header_broken"),
        "header_only.gif": (whole["GIF"][:12], "header_broken"),
        "no_frame.gif": (b"GIF89a\x20\0\x20\0\0\0\0;", "header_broken"),
        "no_size.gif": (b"GIF89a\0\0\0\0\0\0\0,\0\0\0\0\0\0\0\0\0\x02\x01\x00\0;", "header_broken"),
        "small.png": (encoded(picture(40, 4), "PNG"), "too_small"),
        "drawing.svg": (b'<?xml version="1.0"?>\n<!-- a drawing -->\n<svg xmlns="http://www.w3.org/2000/svg"/>\n', "format_refused"),
        "drawing.eps": (encoded(image.resize((24, 18)), "EPS"), "format_refused"),
        "document.pdf": (encoded(image.resize((24, 18)), "PDF"), "format_refused"),
        "layers.psd": (b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 16, 16, 8, 3) + bytes(40), "format_refused"),
        "modern.avif": (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(100), "format_refused"),
        "icon.ico": (encoded(image.resize((32, 32)), "ICO"), "format_refused"),
    }


def _hostile() -> dict[str, tuple[bytes, str]]:
    """Small files that cost a trusting reader gigabytes or minutes."""
    idle = chunk(b"teSt", b"")
    overlapping = [(256, 4, 1, 64), (257, 4, 1, 64)] + [(30_000 + i, 7, 200_000, 8) for i in range(2_000)]
    comments = b"!\xfe" + b"\xff" + b"x" * 255
    return {
        "bomb.png": (png(30_000, 30_000, 1, 0, bytes(3_751 * 30_000)), "too_many_pixels"),  # 113 MB in 109 KB
        "bomb.gif": (b"GIF89a" + struct.pack("<HH", 30_000, 30_000) + b"\0\0\0" + _GIF_FRAME + b";", "too_many_pixels"),
        "bomb_frame.gif": (b"GIF89a\x08\0\x08\0\0\0\0," + struct.pack("<HHHH", 0, 0, 30_000, 30_000) + b"\0\x02\1\0\0;", "too_many_pixels"),
        "bomb.jpg": (_jpeg_claiming(30_000, 30_000), "too_many_pixels"),
        "bomb.bmp": (b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 30_000, -30_000, 1, 24, 0) + bytes(24), "too_many_pixels"),
        "bomb.tiff": (tiff([(256, 4, 1, 30_000), (257, 4, 1, 30_000)]), "too_many_pixels"),
        "bomb.webp": (b"RIFF\x2a\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (16_382).to_bytes(3, "little") * 2 + bytes(16), "too_many_pixels"),
        "text_bomb.png": (_text("comment", "0" * 3_000_000, zipped=True), "header_broken"),
        "chunks.png": (png(64, 64, 8, 0, bytes(65 * 64), idle * 20_000), "header_broken"),
        "frames.png": (png(64, 64, 8, 0, bytes(65 * 64), chunk(b"acTL", struct.pack(">II", 2**31, 0))), "too_many_frames"),
        "frames.gif": (b"GIF89a\x08\0\x08\0\0\0\0" + _GIF_FRAME * 1_500 + b";", "too_many_frames"),
        "comments.gif": (b"GIF89a\x08\0\x08\0\0\0\0" + comments + comments[2:] * 6_000 + b"\0" + _GIF_FRAME, "header_broken"),
        "junk.jpg": (b"\xff\xd8\xff\xe0\0\x04\0\0" + bytes(300_000), "header_broken"),
        "segments.jpg": (b"\xff\xd8" + b"\xff\xe3\0\x02" * 100_000, "header_broken"),
        "scans.jpg": (_jpeg_of_scans(3_000), "header_broken"),
        "tags.tiff": (tiff(overlapping, bytes(200_000)), "header_broken"),
        "run_length_bomb.bmp": (_run_length_bmp(255, 100_000), "too_many_pixels"),
    }


def _marked() -> dict[str, tuple[bytes, str]]:
    return {
        "marked.png": (
            _text("parameters", "a lighthouse at dusk\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 192x144"),
            "ok",
        ),
        "workflow.png": (_text("workflow", '{"nodes": [{"type": "KSampler"}], "note": "\u2713"}'), "ok"),
        "squeezed.png": (_text("prompt", '{"3": {"class_type": "KSampler"}}', zipped=True), "ok"),
        "novel.png": (_text("Software", "NovelAI"), "ok"),
        "generator.jpg": (_software("Stable Diffusion WebUI"), "ok"),
        "generator.webp": (_software("Adobe Firefly", "WEBP"), "ok"),
        "photoshop.jpg": (_software("Adobe Photoshop 25.0"), "ok"),
        "gimp.png": (_text("Software", "GIMP 2.10"), "ok"),
    }


def costly() -> dict[str, bytes]:
    """Honest pictures at the edge of what a worker decodes: 24 to 49 MP in files of a few hundred KB. Takes seconds to make."""
    plain = Image.new("RGB", (7_000, 7_000), (200, 120, 40))
    deep = b"\0" + bytes([200, 0, 120, 0, 40, 0, 128, 0]) * 6_900  # 16-bit RGBA
    return {
        "turned.jpg": encoded(plain, "JPEG", exif=turned_exif(6), icc_profile=icc_profile()),
        "progressive.jpg": encoded(plain.crop((0, 0, 6_300, 6_300)), "JPEG", progressive=True, subsampling="4:4:4"),
        "deep_alpha.png": png(6_900, 6_900, 16, 6, deep * 6_900, level=1),
        "large.webp": encoded(plain.crop((0, 0, 5_000, 4_900)), "WEBP", method=0),
    }


def whole_tar() -> bytes:
    """A webdataset shard of three keys, each a .jpg, a .txt and a .json."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(3):
            side = {"txt": b"a caption", "json": b'{"tags": ["odd"], "licence": "CC0-1.0"}'}
            for suffix, data in {"jpg": encoded(picture(160 + 16 * number, 144), "JPEG"), **side}.items():
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def cut_tar() -> bytes:
    """whole_tar, ending in the middle of the second key's picture."""
    data = whole_tar()
    return data[: data.index(b"00001.jpg") + 1_500]


def write_missing(folder: Path) -> Path:
    """A link to nothing: listed, and not there when it is opened."""
    path = folder / "missing.jpg"
    path.symlink_to("nowhere.jpg")
    return path


def write_unreadable(folder: Path) -> Path:
    """A link to itself: opening it fails even for root, who may read a file of mode 000."""
    path = folder / "unreadable.jpg"
    path.symlink_to(path.name)
    return path


def write_folder(folder: Path) -> dict[str, str]:
    """Every odd file, and pictures under odd names -> name (as os.fsdecode gives it) -> "ok" or the expected code."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in odd().items():
        (folder / name).write_bytes(file.data)
    expected = {name: file.expected for name, file in odd().items()}
    for number, odd_name in enumerate((b"two\nlines.jpg", b"caf\xe9 100%.jpg", b" leading space.jpg", "Übergröße ✓.jpg".encode())):
        (folder / os.fsdecode(odd_name)).write_bytes(encoded(picture(100 + number, 80), "JPEG"))
        expected[os.fsdecode(odd_name)] = "ok"
    return expected


def write_demo(folder: Path) -> None:
    """The files of DEMO."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in DEMO:
        (folder / name).write_bytes(odd()[name].data)


if __name__ == "__main__":
    write_demo(Path(__file__).parent / "data" / "odd")
