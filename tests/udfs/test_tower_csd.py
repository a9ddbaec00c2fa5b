"""CSD of the true class with random weights: the feature is the backbone's, before any projection and not normalised."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.enrichment import Encoder
from udfs import engine, export_tower, tower_csd
from udfs.onnx_file import open_session

TINY = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}}
TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 1, "layers": 1}


@pytest.fixture
def encoder(tmp_path: Path) -> dict[str, Any]:
    """The file that udfs/convert_weights.py writes, of a random tower in fp16, as the released one is; and its encoder."""
    torch.manual_seed(3)
    visual: Any = open_clip.CLIP(TINY["embed_dim"], TINY["vision_cfg"], open_clip.CLIPTextCfg(**TEXT), quick_gelu=True).visual
    state = {name: tensor.half() for name, tensor in visual.state_dict().items() if name != "proj"}
    save_file(state | {"style_projection": torch.randn(32, 24).half()}, tmp_path / "csd.safetensors")
    return pinned(tmp_path / "csd.safetensors", TINY, 32)


def pinned(path: Path, config: dict[str, Any], width: int) -> dict[str, Any]:
    told = {"name": "csd", "kernel": "csd", "model": "tiny", "config": config, "width": width, "image_size": 32, "weights": str(path)}
    return Encoder.model_validate(told | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}).model_dump()


def batch(count: int = 4) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 3, 32, 32)).astype(np.float32)


def restated(encoder: dict[str, Any], images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> (backbone feature, style vector) by CSD's own lines: `feature = backbone(x)`, `style = normalize(feature @ last_layer_style)`."""
    state = {name: tensor.float() for name, tensor in load_file(encoder["weights"]).items()}
    projection = state.pop("style_projection")
    visual: Any = open_clip.CLIP(32, TINY["vision_cfg"], open_clip.CLIPTextCfg(**TEXT), quick_gelu=True).visual
    visual.load_state_dict(state | {"proj": torch.eye(32)})  # CSD sets CLIP's projection aside
    with torch.inference_mode():
        feature = visual.eval()(torch.from_numpy(images))
        return feature.numpy(), torch.nn.functional.normalize(feature @ projection, dim=1).numpy()


def test_the_feature_is_the_backbones_output_not_normalised_and_the_projected_one_has_length_1(encoder: dict[str, Any]) -> None:
    feature, style = restated(encoder, batch())
    found = tower_csd.encode(tower_csd.load(encoder, "cpu", "fp32"), batch())
    assert found.shape == (4, 32)
    assert np.allclose(found, feature, atol=1e-5)
    assert np.abs(np.linalg.norm(found, axis=1) - 1).min() > 1
    projected = pinned(Path(encoder["weights"]), TINY | {"feature": "projected"}, 24)
    assert np.allclose(tower_csd.encode(tower_csd.load(projected, "cpu", "fp32"), batch()), style, atol=1e-5)


@pytest.mark.parametrize(("feature", "width"), [("backbone", 32), ("projected", 24)])
def test_its_graph_gives_the_same(encoder: dict[str, Any], tmp_path: Path, feature: str, width: int) -> None:
    told = pinned(Path(encoder["weights"]), TINY | {"feature": feature}, width)
    export_tower.export(told, tmp_path / "csd.onnx")
    graph = engine.Graph(open_session(tmp_path / "csd.onnx", "cpu"))
    assert np.abs(tower_csd.encode(graph, batch()) - tower_csd.encode(tower_csd.load(told, "cpu", "fp32"), batch())).max() < 1e-5


def test_bf16_stays_close(encoder: dict[str, Any]) -> None:
    exact, rounded = (tower_csd.encode(tower_csd.load(encoder, "cpu", precision), batch()) for precision in ("fp32", "bf16"))
    assert rounded.dtype == np.float32
    cosine = (exact * rounded).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    assert cosine.min() > 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": None, "sha256": None}, "needs a file"),
        ({"width": 24}, "width: given 24, but tiny has 32"),
        ({"image_size": 224}, "image_size: given 224, but tiny has 32"),
        ({"config": TINY | {"feature": "logits"}}, r"config.feature: given 'logits', allowed \['backbone', 'projected'\]"),
        ({"config": {"feature": "backbone"}}, "model: given 'tiny'"),
        ({"config": TINY | {"vision_cfg": TINY["vision_cfg"] | {"layers": 3}}}, "not the visual tower of tiny"),  # type: ignore[operator]
    ],
)
def test_a_wrong_encoder_is_refused_by_name(encoder: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tower_csd.load(encoder | change, "cpu", "fp32")


def test_weights_without_a_style_projection_are_no_csd(encoder: dict[str, Any]) -> None:
    path = Path(encoder["weights"])
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "style_projection"}, path)
    with pytest.raises(ValueError, match="expected style_projection"):
        tower_csd.load(pinned(path, TINY, 32), "cpu", "fp32")


def test_the_released_models_shape_is_what_its_architectures_name_says() -> None:
    told = {"name": "csd-vit-l-14", "config": {}, "model": "ViT-L-14-quickgelu"}
    feature, config = tower_csd._asked(told)
    visual: Any = tower_csd.skeleton(config, "fp32")
    assert (feature, config["vision_cfg"]["width"], config["vision_cfg"]["image_size"], len(visual.transformer.resblocks)) == (
        "backbone",
        1024,
        224,
        24,
    )
