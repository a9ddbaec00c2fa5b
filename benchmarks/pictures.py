"""Seeds -> JPEGs that cost what photographs cost, and copies of images with other bytes and the same pixels."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

TWO_MEGAPIXELS = (1632, 1224)
SMALL = (400, 300)
TINY = (256, 192)
DISTINCT = 24  # pictures that are drawn; the rest are their copies: drawing costs more than decoding


def photograph(seed: int, size: tuple[int, int]) -> bytes:
    """(seed, (width, height)) -> JPEG bytes, quality 90, the same for the same seed.

    Smooth shapes with finer and weaker ones on top (amplitude ~ 1 / frequency, as in photographs) and sensor noise: about 2
    bits a pixel, where cameras' own 2 MP files of that quality have 1.5 to 4.
    """
    random = np.random.default_rng(seed)
    whole = np.full((size[1], size[0], 3), 128, np.float32)
    for cells in (3, 8, 24, 72, 216):
        coarse = random.integers(0, 256, (cells, cells * 4 // 3, 3), dtype=np.uint8)
        layer = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        whole += (np.asarray(layer, np.float32) - 128) * (2.5 / cells**0.5)
    whole += random.normal(0, 4, (size[1], size[0], 1)).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(whole, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def copy_of(data: bytes, number: int) -> bytes:
    """JPEG or PNG bytes -> the same picture under another sha256: a comment with the number is put in. 0: the bytes as they are."""
    if number == 0:
        return data
    text = b"copy %d" % number
    if data[:2] == b"\xff\xd8":
        return data[:2] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text + data[2:]
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        chunk = b"tEXtComment\0" + text
        end = 33  # after the signature (8) and IHDR (25), which comes first
        return data[:end] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[end:]
    raise ValueError(f"expected JPEG or PNG bytes, given {data[:8]!r}")


def write_photographs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """`count` files 000000.jpg ... of DISTINCT photographs and their copies; files that are there already stay."""
    write(folder, count, (photograph(seed, size) for seed in range(min(count, DISTINCT))))


def write_sample(folder: Path, count: int, images: Sequence[Path]) -> None:
    """`count` files of the given images (every k-th when there are more) and their copies."""
    step = max(1, len(images) // count)
    write(folder, count, (path.read_bytes() for path in images[::step][:count]))


def write(folder: Path, count: int, originals: Iterator[bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if len(list(folder.iterdir())) == count:
        return
    drawn = list(originals)
    for number in range(count):
        data = copy_of(drawn[number % len(drawn)], number // len(drawn))
        suffix = "jpg" if data[:2] == b"\xff\xd8" else "png"
        (folder / f"{number:06d}.{suffix}").write_bytes(data)
