"""The CLIP tower with the demo's real weights (`make weights`), and the hub's path with a tiny CLIP of the true class."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from conf.settings import load_encoder
from udfs import tower_clip as tower

SAMPLE = Path(__file__).parent.parent / "data" / "sample"
ENCODER = load_encoder("clip-vit-b-16-demo").model_dump()
TINY = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "head_width": 16, "patch_size": 56},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tower.load(ENCODER, "cpu", "fp32")


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """A whole CLIP (both towers) of random weights as the file that a hub would give, and its encoder."""
    (tmp_path / "tiny-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    torch.manual_seed(7)
    save_file(open_clip.create_model("tiny-clip").state_dict(), tmp_path / "hub.safetensors")
    names = {"name": "tiny", "model": "tiny-clip", "pretrained": str(tmp_path / "hub.safetensors")}
    return ENCODER | names | {"width": 16, "weights": None, "sha256": None}


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prepared(images: list[Image.Image]) -> np.ndarray:
    return np.stack([tower.prepare(image, ENCODER) for image in images])


@pytest.mark.parametrize("size", [(224, 224), (225, 224), (500, 333), (333, 501), (1000, 100), (17, 9), (3000, 2001)])
def test_preparing_an_image_equals_open_clips_own_transform_exactly(size: tuple[int, int]) -> None:
    image = noise(*size)
    assert np.array_equal(tower.prepare(image, ENCODER), open_clip.image_transform(224, is_train=False)(image).numpy())


def test_vectors_are_unit_fp32_and_independent_of_their_batch(model: Any) -> None:
    batch = prepared([noise(300, 200), noise(64, 90), noise(224, 224)])
    vectors = tower.encode(model, batch)
    assert (vectors.shape, vectors.dtype) == ((3, 512), np.float32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.abs(vectors[1:2] - tower.encode(model, batch[1:2])).max() < 2e-6


def test_the_golden_vector_of_a_gradient_has_not_changed(model: Any) -> None:
    ramp = np.add.outer(np.arange(64), 2 * np.arange(64))[..., None] * np.array([1, 0.5, 0.25])
    vector = tower.encode(model, prepared([Image.fromarray(ramp.astype(np.uint8))]))[0]
    expected = [0.02116, 0.01458, 0.01241, 0.00794, -0.00866, 0.02045, -0.01260, -0.02564]
    assert np.allclose(vector[::64], expected, atol=2e-5), "the numbers changed: raise KERNEL_VERSION and renew this vector"


def test_the_real_tower_puts_images_of_one_style_next_to_each_other(model: Any) -> None:
    files: dict[str, list[str]] = defaultdict(list)
    for row in map(json.loads, (SAMPLE / "metadata.jsonl").read_text().splitlines()):
        files[row["style"]].append(row["file"])
    styles = ["3d_render", "anime", "cartoon", "clipart", "icon"]  # each from one package: style and source cannot be told apart
    chosen = [(style, file) for style in styles for file in files[style][:6]]
    vectors = tower.encode(model, prepared([Image.open(SAMPLE / file).convert("RGB") for _, file in chosen]))
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -1)
    right = [chosen[nearest][0] == style for (style, _), nearest in zip(chosen, likeness.argmax(1), strict=True)]
    assert np.mean(right) > 0.7  # chance: 5 / 29 = 0.17


def test_bf16_stays_close_to_fp32(model: Any) -> None:
    batch = prepared([Image.open(SAMPLE / "images" / "3d_render_0243dc44ec4d.png").convert("RGB")])
    rounded = tower.encode(tower.load(ENCODER, "cpu", "bf16"), batch)
    assert rounded.dtype == np.float32
    assert ((rounded * tower.encode(model, batch)).sum(1) > 0.99).all()


def test_other_bytes_than_the_pinned_ones_are_refused_naming_both_hashes(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"other")
    with pytest.raises(
        ValueError, match=f"expected {ENCODER['sha256']}, found d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa"
    ):
        tower.load(ENCODER | {"weights": str(path)}, "cpu", "fp32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "/nowhere.safetensors"}, "no file at /nowhere.safetensors"),
        ({"model": "ViT-Z"}, "model: given 'ViT-Z'"),
        ({"model": None}, "model: given None"),
        ({"weights": None}, "give weights .* or pretrained"),
        ({"width": 768}, "width: given 768, but ViT-B-16-quickgelu has 512"),
        ({"image_size": 336}, "image_size: given 336, but ViT-B-16-quickgelu has 224"),
        ({"model": "ViT-B-32-quickgelu"}, "not the visual tower of ViT-B-32-quickgelu"),
    ],
)
def test_a_wrong_encoder_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tower.load(ENCODER | change, "cpu", "fp32")


def test_weights_by_pretrained_give_what_the_whole_clip_gives_and_the_text_tower_goes(tiny: dict[str, Any]) -> None:
    batch = prepared([noise(300, 200), noise(64, 90)])
    loaded = tower.load(tiny, "cpu", "fp32")
    whole = open_clip.create_model("tiny-clip", pretrained=tiny["pretrained"]).eval()
    with torch.inference_mode():
        expected = whole.encode_image(torch.from_numpy(batch), normalize=True).numpy()
    assert np.allclose(tower.encode(loaded, batch), expected, atol=1e-6)
    assert set(loaded.state_dict()) == {name.removeprefix("visual.") for name in whole.state_dict() if name.startswith("visual.")}


def test_weights_that_want_another_preprocessing_are_refused(tiny: dict[str, Any]) -> None:
    # a tag whose weights were trained on other means, as SigLIP's: `local-dir:` is open_clip's own way to say so
    folder = Path(tiny["pretrained"]).parent
    Path(tiny["pretrained"]).rename(folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}))
    with pytest.raises(ValueError, match=r"wants \{'mean': \[0.5, 0.5, 0.5\]\}"):
        tower.load(tiny | {"model": f"local-dir:{folder}", "pretrained": None}, "cpu", "fp32")


def test_a_strip_is_cut_to_its_middle_before_it_is_scaled() -> None:
    strip = Image.new("RGB", (400_000, 8), "red")
    strip.paste("blue", (199_900, 0, 200_100, 8))
    for image in (strip, strip.transpose(Image.Transpose.ROTATE_90)):
        pixels = tower.prepare(image, {"image_size": 224})
        assert pixels.shape == (3, 224, 224)
        assert np.allclose(pixels, tower.prepare(Image.new("RGB", (224, 224), "blue"), {"image_size": 224}))
