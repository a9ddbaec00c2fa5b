"""RGB images -> L2-normalised features of a plain vision transformer through transformers (DINOv2 and its class).

`encoder.model` is the type of transformers' configuration (`dinov2`, `vit`, `dinov2_with_registers`), `encoder.config` its values (the
`config.json` beside the weights), `encoder.weights` that repository's `model.safetensors` with its sha256. The feature is the class token
after the last norm. Preprocessing is DINOv2's: shorter side to 256 / 224 of image_size bicubic, centre crop, ImageNet's mean and std.

Cost: that of the architecture; DINOv2 ViT-B/14 has 257 tokens where CLIP ViT-B/16 has 197.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from udfs.engine import Graph, normalised, vectors
from udfs.tower_clip import cropped, fill, read

if TYPE_CHECKING:
    import torch

KERNEL_VERSION = 1
PREPROCESSING = "shorter side to 256/224 bicubic (Pillow), centre crop, ImageNet mean and std"
MEAN = np.array((0.485, 0.456, 0.406), np.float32)[:, None, None]
STD = np.array((0.229, 0.224, 0.225), np.float32)[:, None, None]


def load(encoder: Mapping[str, Any], device: str, precision: str) -> torch.nn.Module:
    """(conf.enrichment.Encoder as a dict, "cpu" or "cuda:1", "fp32" or "bf16") -> the tower, in eval mode on the device. Raises ValueError."""
    import torch
    from transformers import AutoModel

    config = _configuration(encoder)
    if encoder["weights"] is None:
        raise ValueError(f"encoder {encoder['name']!r}: weights: kernel vit needs a safetensors file and its sha256")
    with torch.device("meta"):  # no random initialisation
        model = AutoModel.from_config(config)
    state = read(encoder)
    # the file may hold a head or sit under the architecture's name, where it was saved as a classifier
    prefix = f"{model.base_model_prefix}."
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.removeprefix(prefix) in model.state_dict()}
    tower = fill(model, inside, encoder)
    return _class_token(tower).to(device, torch.bfloat16 if precision == "bf16" else torch.float32).requires_grad_(False).eval()


def prepare(image: Image.Image, encoder: Mapping[str, Any]) -> np.ndarray:
    """RGB image of any size -> float32 (3, side, side)."""
    side = encoder["image_size"]
    return cropped(image, round(side * 256 / 224), side, MEAN, STD)


def encode(model: torch.nn.Module | Graph, batch: np.ndarray) -> np.ndarray:
    """float32 (n, 3, side, side) from `prepare` -> float32 (n, width), rows of length 1."""
    return normalised(vectors(model, batch))


def _configuration(encoder: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(encoder["model"] or "", **encoder["config"])
    except ValueError as error:
        told = f"encoder {encoder['name']!r}: model: given {encoder['model']!r}, expected a type of transformers, such as dinov2"
        raise ValueError(told) from error
    if encoder["width"] != config.hidden_size:
        raise ValueError(f"encoder {encoder['name']!r}: width: given {encoder['width']}, but its config has {config.hidden_size}")
    if encoder["image_size"] % config.patch_size:
        raise ValueError(f"encoder {encoder['name']!r}: image_size: given {encoder['image_size']}, patches have {config.patch_size}")
    return config


def _class_token(tower: torch.nn.Module) -> torch.nn.Module:
    from torch import nn

    class ClassToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.tower(pixel_values=images).last_hidden_state[:, 0]

    return ClassToken()
