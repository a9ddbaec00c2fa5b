"""Copies of pictures, altered in the usual ways -> how many of them a deny list finds, and how often it takes another picture for one of its own.

    python -m benchmarks.deny_part [FOLDER]      (without a folder: the sample of tests/data; 3 minutes)

Every picture is listed, and every one is a query in each transform (drawn by a seed, off the grid of the guesses). False positives are
counted over all pairs of a query and another picture of the list, as they are: a pair counts when any hash of one is near any of the
other. Pictures that are two states of one (frames of a sprite, themes of an icon) are no false positives; they are recognised without
the hash, by the mean difference of their colours at 32 x 32 (RELATED levels of 255), and both counts are printed.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from conf.build import Limits
from conf.enrichment import Deny
from udfs import decode, deny_list, picture_frames
from udfs.pixel_statistics import luma_of
from udfs.reject import Reject

SAMPLE = Path(__file__).parents[1] / "tests/data/sample/images"
RELATED = 16.0  # mean difference of two pictures' colours at 32 x 32, in levels: below it they are states of one picture
RATE = 1e-4  # false positives of all pairs at which the recall is asked for
SEED = 7
LISTS: Mapping[str, Callable[[Image.Image], np.ndarray]] = {
    "plain": lambda luma: picture_frames.mirrored(luma)[:1],
    "crops": picture_frames.crops,
}
QUERIES: Mapping[str, Callable[[Image.Image], np.ndarray]] = {
    "as it is": lambda luma: picture_frames.mirrored(luma)[:1],
    "mirror": picture_frames.mirrored,
    "guesses": picture_frames.guesses,
}
WAYS = [("plain", "as it is"), ("plain", "mirror"), ("plain", "guesses"), ("crops", "guesses")]
SIZES = (1_000, 10_000, 100_000, 1_000_000)  # hashes of a list, for the cost

Random = np.random.Generator
Transform = Callable[[Image.Image, Random], Image.Image]


def resize(image: Image.Image, random: Random) -> Image.Image:
    scale = max(random.uniform(0.3, 2.0), 48 / min(image.size))
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def recompress(image: Image.Image, random: Random) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=int(random.integers(20, 91)))
    return Image.open(out).convert("RGB")


def flip(image: Image.Image, random: Random) -> Image.Image:
    return ImageOps.mirror(image)


def border(image: Image.Image, random: Random) -> Image.Image:
    """Of one colour, 2 to 20 % of the shorter side wide."""
    colour = tuple(int(level) for level in random.integers(0, 256, 3))
    return ImageOps.expand(image, max(1, round(min(image.size) * random.uniform(0.02, 0.2))), colour)


def crop(share: float) -> Transform:
    """Takes `share` of width and height away, anywhere."""

    def cut(image: Image.Image, random: Random) -> Image.Image:
        less = (round(image.width * share), round(image.height * share))
        left, top = (int(random.integers(0, one + 1)) for one in less)
        return image.crop((left, top, left + image.width - less[0], top + image.height - less[1]))

    return cut


def chain(*steps: Transform) -> Transform:
    def run(image: Image.Image, random: Random) -> Image.Image:
        for step in steps:
            image = step(image, random)
        return image

    return run


TRANSFORMS: dict[str, Transform] = {
    "resize (.3 to 2)": resize,
    "recompress (q 20 to 90)": recompress,
    "flip": flip,
    "border (2 to 20 %)": border,
    "crop 5 %": crop(0.05),
    "crop 10 %": crop(0.1),
    "crop 20 %": crop(0.2),
    "resize + recompress": chain(resize, recompress),
    "flip + resize + recompress": chain(flip, resize, recompress),
    "border + resize + recompress": chain(border, resize, recompress),
    "crop 5 % + recompress": chain(crop(0.05), recompress),
    "crop 10 % + flip + resize": chain(crop(0.1), flip, resize),
}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SAMPLE
    images = _read(folder)
    lumas = [luma_of(image) for image in images]
    lists = {name: [make(luma) for luma in lumas] for name, make in LISTS.items()}
    related = _related(images)
    count = len(images)
    print(f"{count} pictures, {count * (count - 1)} pairs of a query and another listed picture, {related.sum() - count} of them related")
    distance = Deny().distance
    for listed, asked in WAYS:
        nearest = np.stack([_nearest(QUERIES[asked](luma), lists[listed]) for luma in lumas])
        _tell_false(f"list {listed}, query {asked}", nearest, related, distance)
    print(f"\nrecall at deny.distance={distance}" + "".join(f" | list {listed}, query {asked}" for listed, asked in WAYS))
    for name, transform in TRANSFORMS.items():
        random = np.random.default_rng(SEED)
        copies = [luma_of(transform(image, random)) for image in images]
        found = [[_nearest(QUERIES[asked](copy), [lists[listed][at]])[0] for at, copy in enumerate(copies)] for listed, asked in WAYS]
        print(f"{name:<30}" + "".join(f" | {np.mean(np.array(one) <= distance):.3f}" for one in found), flush=True)
    _tell_cost(lumas)


def _read(folder: Path) -> list[Image.Image]:
    images, limits = [], Limits().model_dump()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            images.append(decode.decode(path.read_bytes(), limits, scaled=True).image)
        except Reject as reject:
            print(f"left out: {path.name}: {reject.code}")
    return images


def _nearest(query: np.ndarray, listed: list[np.ndarray]) -> np.ndarray:
    """(hashes of a query, hashes of each listed picture) -> the distance to each."""
    import faiss

    starts = np.cumsum([0, *(len(one) for one in listed)])
    whole = np.concatenate(listed)
    distances = np.empty((len(query), len(whole)), np.int32)
    faiss.hammings(  # type: ignore[attr-defined]  # its stubs lack it
        *map(faiss.swig_ptr, (query, whole)), len(query), len(whole), query.shape[1], faiss.swig_ptr(distances)
    )
    return np.minimum.reduceat(distances.min(axis=0), starts[:-1])


def _related(images: list[Image.Image]) -> np.ndarray:
    """-> bool[n, n]: pictures that are states of one, as they are or mirrored."""
    small = np.stack([np.asarray(image.resize((32, 32), Image.Resampling.BOX), np.float32) for image in images])
    straight, mirrored = ([np.abs(small - one).mean(axis=(1, 2, 3)) for one in way] for way in (small, small[:, :, ::-1]))
    near: np.ndarray = np.minimum(np.stack(straight), np.stack(mirrored)) < RELATED
    return near | near.T


def _tell_false(way: str, nearest: np.ndarray, related: np.ndarray, distance: int) -> None:
    """False positives of all pairs, and of those that are not related: at deny.distance, and the distance at which they are RATE."""
    others = ~np.eye(len(nearest), dtype=bool)
    told = []
    for what, pairs in (("all pairs", others), ("unrelated", others & ~related)):
        sorted_ = np.sort(nearest[pairs])
        at_rate = int(sorted_[int(RATE * len(sorted_))]) - 1
        told.append(
            f"{what}: {np.mean(sorted_ <= distance):.1e} ({(sorted_ <= distance).sum()}), {RATE:g} at {at_rate} bits, nearest {sorted_[0]}"
        )
    print(f"{way:<28} false positives at {distance} bits: {'; '.join(told)}", flush=True)


def _tell_cost(lumas: list[Image.Image]) -> None:
    began = time.process_time()
    for luma in lumas:
        picture_frames.guesses(luma)
    print(f"\nguesses: {1e3 * (time.process_time() - began) / len(lumas):.2f} CPU-ms an image")
    random = np.random.default_rng(SEED)
    for size in SIZES:
        listed = deny_list.DenyList("cost", "phash", "", None, random.integers(0, 256, (size, 32), dtype=np.uint8))
        screen = deny_list.Screen([listed], Deny().distance, guess=True)
        few = lumas[: 20 if size < 1_000_000 else 5]
        began = time.process_time()
        for luma in few:
            screen.check(luma)
        print(f"check against {size} hashes: {1e3 * (time.process_time() - began) / len(few):.1f} CPU-ms an image, guesses included")


if __name__ == "__main__":
    main()
