"""Ways to decode a JPEG for a tower -> Markdown: CPU an image, and how far the vectors and score bins move from the full decode.

    python -m benchmarks.decode_part [--folder REAL_PHOTOGRAPHS] [--images 24]

What is timed is the decode and the reduction to 224 (bicubic, Pillow), the least of several rounds on one thread, on generated
photograph-like JPEGs (benchmarks/pictures.py). Vectors are those of the demo's CLIP ViT-B/16 by onnxruntime, scores of a head from
seed 0 whose scores of the full decodes are stretched to spread evenly over [0, 1], so that every bin is in use: the hardest case for bins.
A folder of real photographs says more about vectors than drawn ones; both tables say which it was. The sample has no side above 448 px:
nothing of it is scaled, which is checked.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, JpegImagePlugin

from benchmarks.pictures import photograph
from conf.build import Limits
from conf.settings import load_encoder
from udfs import decode, engine, jpeg, score_head, tower_clip

SIZES = ((1152, 864), (1632, 1224), (2304, 1728), (4000, 3000))  # 1, 2, 4 and 12 MP
SIDE = 224
ROUNDS = 5
SAMPLE = Path(__file__).parents[1] / "tests/data/sample/images"
ENCODER = "clip-vit-b-16-demo"
LIMITS = Limits().model_dump()
Way = Callable[[bytes], Image.Image]


def pillow(data: bytes) -> Image.Image:
    return _loaded(_opened(data))


def draft(data: bytes, shorter: int, longer: int) -> Image.Image:
    image = _opened(data)
    by = next(by for by in (8, 4, 2, 1) if by == 1 or (min(image.size) // by >= shorter and max(image.size) // by >= longer))
    jpeg.scale(image, by)
    return _loaded(image)


def simple(data: bytes, shorter: int = 0, **options: bool) -> Image.Image:
    import simplejpeg

    return Image.fromarray(simplejpeg.decode_jpeg(data, min_height=shorter, min_width=shorter, **options))


def opencv(data: bytes, half: bool) -> Image.Image:
    import cv2

    cv2.setNumThreads(1)
    flags = (cv2.IMREAD_REDUCED_COLOR_2 if half else cv2.IMREAD_COLOR) | cv2.IMREAD_IGNORE_ORIENTATION
    return Image.fromarray(cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), flags), cv2.COLOR_BGR2RGB))


def torchvision(data: bytes) -> Image.Image:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def chosen(data: bytes) -> Image.Image:
    """The project's own: every check of udfs/decode.py is in its time."""
    return decode.decode(data, LIMITS, scaled=True).image


def _opened(data: bytes) -> Image.Image:
    return JpegImagePlugin.JpegImageFile(io.BytesIO(data))


def _loaded(image: Image.Image) -> Image.Image:
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


WAYS: dict[str, Way] = {
    "Pillow, full": pillow,
    "Pillow draft, 448 px and more": lambda data: draft(data, 448, 448),
    f"**Pillow draft, {jpeg.SHORTER} x {jpeg.LONGER} and more (chosen, udfs/decode.py whole)**": chosen,
    "Pillow draft, 320 px and more": lambda data: draft(data, 320, 320),
    "simplejpeg, full": simple,
    "simplejpeg, full, fast DCT and upsampling": lambda data: simple(data, fastdct=True, fastupsample=True),
    "simplejpeg, eighths, 448 px and more": lambda data: simple(data, 448),
    "simplejpeg, eighths, 384 px and more": lambda data: simple(data, 384),
    "OpenCV, full": lambda data: opencv(data, False),
    "OpenCV, a half": lambda data: opencv(data, True),
    "torchvision, full": torchvision,
}
FULL = next(iter(WAYS))


class Drift(NamedTuple):
    """Of a way's vectors and scores to those of the full decode."""

    cosine: np.ndarray
    bins_changed: float
    largest_step: int


def reduced(image: Image.Image) -> Image.Image:
    """What a tower takes: its shorter side at SIDE."""
    shorter = min(image.size)
    return image.resize((SIDE * image.width // shorter, SIDE * image.height // shorter), Image.Resampling.BICUBIC)


def seconds(files: Sequence[bytes]) -> dict[str, float]:
    """-> CPU an image of each way, decode and reduction: the least of ROUNDS, in which the ways take turns."""
    least = dict.fromkeys(WAYS, float("inf"))
    for _ in range(ROUNDS):
        for name, way in WAYS.items():
            start = time.thread_time()
            for data in files:
                reduced(way(data))
            least[name] = min(least[name], (time.thread_time() - start) / len(files))
    return least


def speed() -> list[str]:
    """-> the table of times."""
    lines = ["| decode and reduction to 224, CPU ms an image | " + " | ".join(f"{w * h / 1e6:.0f} MP ({w} x {h})" for w, h in SIZES) + " |"]
    lines.append("|---" * (len(SIZES) + 1) + "|")
    told = {size: seconds([photograph(seed, size) for seed in range(2)]) for size in SIZES}
    for name in WAYS:
        cells = " | ".join(f"{told[size][name] * 1e3:.1f} ({told[size][FULL] / told[size][name]:.1f}x)" for size in SIZES)
        lines.append(f"| {name} | {cells} |")
    return lines


def drift(files: Sequence[bytes], ways: Mapping[str, Way]) -> dict[str, Drift]:
    encoder = load_encoder(ENCODER).model_dump()
    model = engine.load(tower_clip, encoder, engine.How("cpu", engine="onnxruntime", threads=1))
    vectors: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    for data in files:
        batch = np.stack([tower_clip.prepare(way(data), encoder) for way in ways.values()])
        for name, vector in zip(ways, tower_clip.encode(model, batch), strict=True):
            vectors[name].append(vector)
    whole = np.array(vectors[FULL])
    score = _spread_head(whole)
    bins = score(whole)
    told = {}
    for name, found in vectors.items():
        steps = np.abs(score(np.array(found)) - bins)
        told[name] = Drift((whole * np.array(found)).sum(1), float((steps > 0).mean()), int(steps.max()))
    return told


def _spread_head(vectors: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """-> vectors to bins, by an untrained head whose scores of these vectors reach from 0 to 1."""
    import torch

    torch.manual_seed(0)
    head = score_head.build(vectors.shape[1]).eval()

    def raw(of: np.ndarray) -> np.ndarray:
        return score_head.score_batch(of.astype("<f2").astype(np.float32), head)

    low, high = np.quantile(raw(vectors), (0.02, 0.98))
    return lambda of: np.array([score_head.score_bin(value) for value in (raw(of) - low) / (high - low)])


def real(folder: Path, most: int) -> list[bytes]:
    """JPEGs of a folder, between 1 and 13 MP, and each above 2 MP at 1 MP too (quality 90)."""
    files: list[bytes] = []
    for path in sorted(folder.rglob("*.jp*g")):
        if path.is_symlink() or path.stat().st_size > 16 * 2**20:
            continue
        image = Image.open(path)
        if min(image.size) < 768 or not 0.9e6 < image.width * image.height < 13e6:
            continue
        files.append(path.read_bytes())
        if (by := (1e6 / image.width / image.height) ** 0.5) < 0.7:
            small = image.convert("RGB").resize((round(image.width * by), round(image.height * by)), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=90)
            files.append(buffer.getvalue())
    return files[:: max(1, len(files) // most)][:most]


def vectors_table(about: str, files: Sequence[bytes]) -> list[str]:
    names = [name for name in WAYS if not name.startswith(("OpenCV", "torchvision", "simplejpeg, full"))]
    told = drift(files, {name: WAYS[name] for name in names})
    lines = [f"| {about}: {len(files)} | cosine mean | worst | score bins that change | by at most |", "|---|---|---|---|---|"]
    for name, found in told.items():
        if name != FULL:
            cells = f"{found.cosine.mean():.5f} | {found.cosine.min():.4f} | {found.bins_changed:.1%} | {found.largest_step}"
            lines.append(f"| {name} | {cells} |")
    return lines


def unscaled(folder: Path) -> int:
    """Images of a folder, none of which the chosen decode scales; AssertionError where it does."""
    sizes = [Image.open(path).size for path in sorted(folder.iterdir())]
    assert all(jpeg.divisor(*size) == 1 for size in sizes)
    return len(sizes)


def measure(images: int, folder: Path | None) -> tuple[list[str], dict[str, Any]]:
    """-> (paragraphs of Markdown, what they were made with)."""
    drawn = [photograph(100 + seed, SIZES[seed % len(SIZES)]) for seed in range(images)]
    paragraphs = ["\n".join(speed()), "\n".join(vectors_table("generated photographs of 1 to 12 MP", drawn))]
    if folder is not None:
        paragraphs.append("\n".join(vectors_table("real photographs and wallpapers of 1 to 13 MP", real(folder, images))))
    paragraphs.append(
        f"Of the sample's {unscaled(SAMPLE)} images none is scaled: no side is above 448 px. Pixels, vectors and bins are the full decode's."
    )
    return paragraphs, {"images": images, "rounds": ROUNDS, "sizes": SIZES, "encoder": ENCODER, "choice": jpeg.CHOICE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--folder", type=Path, help="of real photographs (JPEG)")
    options = parser.parse_args()
    paragraphs, _ = measure(options.images, options.folder)
    sys.stdout.write("\n\n".join(paragraphs) + "\n")


if __name__ == "__main__":
    main()
