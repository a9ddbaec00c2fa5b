"""Copies that are worse in one named way: by their kind, by their strength, and the same each time."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image

from tests.odd_images import picture
from udfs import degrade as module
from udfs.degrade import VIEWS, degrade
from udfs.pixel_statistics import measure

KINDS = ("blur", "noise", "jpeg", "contrast", "saturation", "smooth")
SIZES = [(192, 144), (9, 300), (1_300, 700)]


def textured(width: int, height: int) -> Image.Image:
    """A picture with detail at every scale, which blocks and blurs can destroy."""
    grain = np.random.default_rng(5).integers(-30, 30, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(picture(width, height)).astype(int) // 2 + 50 + grain, 0, 255).astype(np.uint8))


def change(first: Image.Image, second: Image.Image, side: int = 224) -> float:
    """Mean difference in levels, as a tower sees it."""
    small = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).astype(float) for image in (first, second)]
    return float(np.abs(small[0] - small[1]).mean())


def test_the_views_are_six_kinds_in_two_strengths() -> None:
    assert list(VIEWS) == [f"{kind}:{level}" for kind in KINDS for level in (1, 2)]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("size", SIZES)
def test_a_view_has_the_size_of_its_picture_and_leaves_it_as_it_was(view: str, size: tuple[int, int]) -> None:
    image = textured(*size)
    before = image.tobytes()
    found = degrade(image, view, 7)
    assert (found.mode, found.size) == ("RGB", size)
    assert image.tobytes() == before
    assert found.tobytes() != before


@pytest.mark.parametrize("view", VIEWS)
def test_the_same_picture_view_and_seed_give_the_same_pixels_whatever_was_drawn_before(view: str) -> None:
    image = textured(192, 144)
    first = degrade(image, view, 7).tobytes()
    np.random.default_rng().normal()
    degrade(image, "noise:1", 99)
    assert degrade(image.copy(), view, 7).tobytes() == first


def test_noise_differs_by_seed_by_view_and_by_picture() -> None:
    flat = [Image.new("RGB", (64, 64), (level, 120, 120)) for level in (120, 121)]
    drawn = [np.asarray(degrade(image, view, seed)).astype(int) - np.asarray(image) for image, view, seed in
             [(flat[0], "noise:1", 7), (flat[0], "noise:1", 8), (flat[0], "noise:2", 7), (flat[1], "noise:1", 7)]]  # fmt: skip
    for other in drawn[1:]:
        assert abs(np.corrcoef(drawn[0].ravel(), other.ravel())[0, 1]) < 0.05


@pytest.mark.parametrize(("view", "deviation"), [("noise:1", 18.0), ("noise:2", 50.0)])
def test_noise_has_the_deviation_that_its_strength_says(view: str, deviation: float) -> None:
    found = np.asarray(degrade(Image.new("RGB", (256, 256), (128, 128, 128)), view, 1)).astype(float) - 128
    assert abs(found.mean()) < 0.2
    assert found.std() == pytest.approx(deviation, rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_strength_is_worse_than_the_first(kind: str) -> None:
    image = textured(400, 300) if kind == "smooth" else picture(400, 300)  # a median leaves what is smooth
    first, second = (change(image, degrade(image, f"{kind}:{level}", 7)) for level in (1, 2))
    assert 0.3 < first < second / (1.05 if kind == "smooth" else 1.3)


@pytest.mark.parametrize("view", [view for view in VIEWS if not view.startswith("saturation")])
def test_a_large_picture_is_degraded_as_much_as_a_small_one_to_the_eye_of_a_tower(view: str) -> None:
    small = textured(512, 384)
    large = small.resize((1_792, 1_344), Image.Resampling.BICUBIC)
    near = 0.35 if view.startswith("smooth") else 0.25  # an enlarged picture has less grain to lose when it is reduced again
    assert change(large, degrade(large, view, 7)) == pytest.approx(change(small, degrade(small, view, 7)), rel=near)


def test_each_kind_moves_the_statistic_that_it_should() -> None:
    image = textured(400, 300)
    before = measure(image)
    after = {kind: measure(degrade(image, f"{kind}:2", 7)) for kind in KINDS}
    assert after["blur"]["sharpness"] < before["sharpness"] / 10
    assert after["noise"]["sharpness"] > before["sharpness"] * 2
    assert after["contrast"]["contrast"] > before["contrast"] * 1.5
    assert after["saturation"]["saturation"] > before["saturation"] * 1.3
    assert after["saturation"]["mean"] == pytest.approx(before["mean"], abs=8)


def test_smoothing_takes_texture_and_leaves_edges() -> None:
    edge = np.zeros((256, 256, 3), dtype=np.uint8)
    edge[:, 128:] = 200
    assert degrade(Image.fromarray(edge), "smooth:2", 7).tobytes() == edge.tobytes()  # a blur would not
    grain = np.random.default_rng(1).integers(100, 140, (256, 256, 3), dtype=np.uint8)
    left = [np.asarray(degrade(Image.fromarray(grain), view, 7)).astype(float).std() for view in ("smooth:1", "smooth:2")]
    assert grain.std() / 1.8 > left[0] > left[1]


def test_an_unknown_view_is_the_users_mistake() -> None:
    with pytest.raises(ValueError, match="view: given 'blur:3', allowed"):
        degrade(picture(), "blur:3", 7)


def test_the_pixels_of_version_1() -> None:
    """When this fails, either undo the change or raise degrade.KERNEL_VERSION and put the new digests here."""
    found = {view: hashlib.sha256(degrade(textured(640, 480), view, 7).tobytes()).hexdigest()[:12] for view in VIEWS}
    assert (module.KERNEL_VERSION, found) == (1, GOLDEN)


GOLDEN = {
    "blur:1": "ab9513600480",
    "blur:2": "94301cb7b71f",
    "noise:1": "84f794fd3f57",
    "noise:2": "d735f4a78052",
    "jpeg:1": "93492a5ba8b9",
    "jpeg:2": "231711e75a75",
    "contrast:1": "490973cdf4d9",
    "contrast:2": "a6f8f154ab02",
    "saturation:1": "1102683c3de2",
    "saturation:2": "8c2a02d9f7ab",
    "smooth:1": "8900420f8854",
    "smooth:2": "b5c386a52ab8",
}
