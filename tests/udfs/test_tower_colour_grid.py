from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conf.settings import load_encoder
from udfs import tower_colour_grid as tower

ENCODER = load_encoder("colour-grid").model_dump()


def embedded(*images: Image.Image) -> np.ndarray:
    tower.load(ENCODER, "cpu", "fp32")
    return tower.encode(None, np.stack([tower.prepare(image, ENCODER) for image in images]))


def test_vectors_are_unit_fp32_of_the_configured_width_for_any_size_and_for_black() -> None:
    vectors = embedded(Image.new("RGB", (400, 9), "red"), Image.new("RGB", (3, 5), "white"), Image.new("RGB", (64, 64)))
    assert vectors.shape == (3, ENCODER["width"])
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)


def test_a_cell_holds_the_mean_colour_of_its_part_of_the_image() -> None:
    pixels = np.zeros((80, 80, 3), np.uint8)
    pixels[:10, 70:] = (255, 127, 0)
    cells = tower.prepare(Image.fromarray(pixels), ENCODER)
    assert np.allclose(cells[:, 0, 7] * 256 - 1, (255, 127, 0))
    assert (cells[:, 1:, :] * 256 == 1).all()


def test_the_golden_vector_of_a_gradient_has_not_changed() -> None:
    ramp = np.add.outer(np.arange(64), 2 * np.arange(64))[..., None] * np.array([1, 0.5, 0.25])
    vector = embedded(Image.fromarray(ramp.astype(np.uint8)))[0]
    expected = [0.012480, 0.037439, 0.062398, 0.011440, 0.023919, 0.036399, 0.008320, 0.014560]
    assert np.allclose(vector[::24], expected, atol=1e-6), "the numbers changed: raise KERNEL_VERSION and renew this vector"


def test_a_wrong_width_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"width: given 128, kernel colour_grid gives 192"):
        tower.load(ENCODER | {"width": 128}, "cpu", "fp32")


def test_it_runs_without_torch() -> None:
    use = "from udfs import tower_colour_grid as t; t.load({'name': 'x', 'width': 192}, 'cpu', 'fp32')"
    subprocess.run([sys.executable, "-c", f"import sys; sys.modules['torch'] = None; {use}"], cwd=Path(__file__).parents[2], check=True)
