"""A plain vision transformer of the true class with random weights: the class token after the last norm, as transformers gives it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, Dinov2ForImageClassification, ViTForImageClassification

from conf.enrichment import Encoder
from udfs import engine, export_tower, tower_vit
from udfs.onnx_file import open_session

DINO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 42, "patch_size": 14, "mlp_ratio": 2}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "intermediate_size": 64}


def encoder(path: Path, model: str, config: dict[str, Any], side: int) -> dict[str, Any]:
    told = {"name": model, "kernel": "vit", "model": model, "config": config, "width": 32, "image_size": side, "weights": str(path)}
    return Encoder.model_validate(told | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}).model_dump()


def saved(folder: Path, model: str, config: dict[str, Any]) -> tuple[Any, Path]:
    torch.manual_seed(5)
    tower = AutoModel.from_config(AutoConfig.for_model(model, **config)).eval()
    for weight in tower.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    tower.save_pretrained(folder / model)  # under the names that files on the hub have
    return tower, folder / model / "model.safetensors"


def batch(side: int) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(3, 3, side, side)).astype(np.float32)


# DINOv2's position grid is stretched to another image size than it was trained at, as its own repository does: 42 -> 56
@pytest.mark.parametrize(("model", "config", "side"), [("dinov2", DINO, 56), ("vit", VIT, 28)])
def test_the_vector_is_the_class_token_under_torch_and_as_a_graph(tmp_path: Path, model: str, config: dict[str, Any], side: int) -> None:
    tower, path = saved(tmp_path, model, config)
    told = encoder(path, model, config, side)
    with torch.inference_mode():
        token = tower(pixel_values=torch.from_numpy(batch(side))).last_hidden_state[:, 0].numpy()
    expected = token / np.linalg.norm(token, axis=1, keepdims=True)
    assert np.abs(tower_vit.encode(tower_vit.load(told, "cpu", "fp32"), batch(side)) - expected).max() < 1e-6
    export_tower.export(told, tmp_path / "vit.onnx")
    graph = engine.Graph(open_session(tmp_path / "vit.onnx", "cpu"))
    assert np.abs(tower_vit.encode(graph, batch(side)) - expected).max() < 1e-5
    rounded = tower_vit.encode(tower_vit.load(told, "cpu", "bf16"), batch(side))
    assert (rounded * expected).sum(1).min() > 0.99


@pytest.mark.parametrize(
    ("model", "config", "side", "kind"), [("dinov2", DINO, 42, Dinov2ForImageClassification), ("vit", VIT, 28, ViTForImageClassification)]
)
def test_a_file_of_the_whole_classifier_gives_its_tower_under_any_of_its_names(
    tmp_path: Path, model: str, config: dict[str, Any], side: int, kind: Any
) -> None:
    classifier = kind(AutoConfig.for_model(model, **config)).eval()
    classifier.save_pretrained(tmp_path)  # the hub's names
    save_file(classifier.state_dict(), tmp_path / "today.safetensors")  # those of this version of transformers
    with torch.inference_mode():
        expected = getattr(classifier, model)(pixel_values=torch.from_numpy(batch(side))).last_hidden_state[:, 0]
        for path in (tmp_path / "model.safetensors", tmp_path / "today.safetensors"):
            tower = tower_vit.load(encoder(path, model, config, side), "cpu", "fp32")
            assert torch.allclose(tower(torch.from_numpy(batch(side))), expected, atol=1e-5)


def test_preparing_is_dinov2s_own_transform() -> None:
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (333, 500, 3), dtype=np.uint8))
    own = transforms.Compose(  # facebookresearch/dinov2, data/transforms.py: make_classification_eval_transform
        [
            transforms.Resize(256, interpolation=InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    assert np.allclose(tower_vit.prepare(image, {"image_size": 224}), own(image).numpy(), atol=1e-6)


def test_a_wrong_encoder_is_refused_by_name(tmp_path: Path) -> None:
    _, path = saved(tmp_path, "dinov2", DINO)
    told = encoder(path, "dinov2", DINO, 42)
    for change, message in (
        ({"model": "dinov9"}, "model: given 'dinov9'"),
        ({"width": 16}, "width: given 16, but its config has 32"),
        ({"image_size": 43}, "image_size: given 43, patches have 14"),
        ({"weights": None, "sha256": None}, "needs a safetensors file"),
        ({"config": DINO | {"num_hidden_layers": 3}}, "it lacks"),
        ({"config": DINO | {"num_hidden_layers": 1}}, "unknown are"),
        ({"config": DINO | {"patch_size": 7}}, "not the visual tower of dinov2"),
    ):
        with pytest.raises(ValueError, match=message):
            tower_vit.load(told | change, "cpu", "fp32")
