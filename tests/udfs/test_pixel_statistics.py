"""Five numbers of a picture: right on pictures whose numbers are known, and the same at every size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.odd_images import picture
from udfs import pixel_statistics
from udfs.pixel_statistics import luma_of, measure, reduced


def halves(left: tuple[int, int, int], right: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (64, 64), left)
    image.paste(right, (32, 0, 64, 64))
    return image


def test_a_flat_picture_has_its_level_and_nothing_else() -> None:
    assert measure(Image.new("RGB", (64, 48), (90, 90, 90))) == {
        "mean": 90.0, "contrast": 0.0, "saturation": 0.0, "sharpness": 0.0, "entropy": 0.0
    }  # fmt: skip


def test_a_picture_half_black_half_white_has_one_bit_and_the_greatest_contrast() -> None:
    found = measure(halves((0, 0, 0), (255, 255, 255)))
    assert (found["mean"], found["contrast"], found["saturation"], found["entropy"]) == (127.5, 127.5, 0.0, 1.0)


def test_saturation_is_the_s_of_hsv_and_black_has_none() -> None:
    assert measure(halves((200, 0, 0), (0, 0, 0)))["saturation"] == pytest.approx(0.5)
    assert measure(halves((200, 100, 150), (200, 100, 150)))["saturation"] == pytest.approx(0.5)


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    image = picture(80, 60)
    luma = np.asarray(image.convert("L")).astype(float)
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    rows, columns = luma.shape
    told = [(luma[y - 1 : y + 2, x - 1 : x + 2] * kernel).sum() for y in range(1, rows - 1) for x in range(1, columns - 1)]
    assert measure(image)["sharpness"] == pytest.approx(np.var(told))


def test_a_picture_too_small_for_the_kernel_has_no_sharpness() -> None:
    assert measure(Image.new("RGB", (200, 2)))["sharpness"] == 0.0


@pytest.mark.parametrize("width", [1_100, 1_537, 2_001])
def test_copies_of_one_picture_have_the_same_numbers_at_every_size(width: int) -> None:
    large = picture(2_304, 1_728)
    copy = measure(large.resize((width, width * 3 // 4), Image.Resampling.LANCZOS))
    for name, value in measure(large).items():
        assert copy[name] == pytest.approx(value, rel=0.05), name


def test_the_longer_side_is_reduced_and_a_small_picture_is_itself() -> None:
    small = picture(512, 100)
    assert reduced(small) is small
    assert reduced(picture(1_000, 3_000)).size == (171, 512)
    assert reduced(Image.new("RGB", (60_000, 8))).size == (512, 1)


def test_a_luma_that_the_caller_has_changes_nothing() -> None:
    image = picture(700, 500)
    assert measure(image, luma_of(image)) == measure(image)
    assert luma_of(luma_of(image)).tobytes() == luma_of(image).tobytes()


def test_the_numbers_of_version_1() -> None:
    """When this fails, either undo the change or raise pixel_statistics.KERNEL_VERSION and put the new numbers here."""
    found = {name: round(value, 4) for name, value in measure(picture(800, 600)).items()}
    assert (pixel_statistics.KERNEL_VERSION, found) == (1, GOLDEN)


GOLDEN = {"mean": 129.4956, "contrast": 48.863, "saturation": 0.6281, "sharpness": 88.8877, "entropy": 6.2933}
