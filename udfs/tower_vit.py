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
from udfs.tower_clip import cropped, read

if TYPE_CHECKING:
    import torch

KERNEL_VERSION = 1
PREPROCESSING = "shorter side to 256/224 bicubic (Pillow), centre crop, ImageNet mean and std"
MEAN = np.array((0.485, 0.456, 0.406), np.float32)[:, None, None]
STD = np.array((0.229, 0.224, 0.225), np.float32)[:, None, None]
BESIDE = ("pooler.", "classifier.", "head.", "lm_head.", "decoder.")  # of a file that holds more than the tower


def load(encoder: Mapping[str, Any], device: str, precision: str) -> torch.nn.Module:
    """(conf.enrichment.Encoder as a dict, "cpu" or "cuda:1", "fp32" or "bf16") -> the tower, in eval mode on the device. Raises ValueError."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = _configuration(encoder)
    if encoder["weights"] is None:
        raise ValueError(f"encoder {encoder['name']!r}: weights: kernel vit needs a safetensors file and its sha256")
    with torch.device("meta"):
        kind: Any = type(AutoModel.from_config(config))
    whose = f"encoder {encoder['name']!r}: weights {encoder['weights']}: not the visual tower of {encoder['model']}"
    try:  # transformers' own way: it knows the names under which older versions saved, and a classifier's prefix
        tower, told = kind.from_pretrained(None, config=config, state_dict=read(encoder), dtype=torch.float32, output_loading_info=True)
    except RuntimeError as error:  # another shape
        raise ValueError(f"{whose}: {' '.join(str(error).split())[:300]}") from error
    lacking = sorted(name for name in told["missing_keys"] if not name.startswith("pooler."))  # the pooler comes after the class token
    inside = (name.removeprefix(f"{kind.base_model_prefix}.") for name in told["unexpected_keys"])
    unknown = sorted(name for name in inside if not name.startswith(BESIDE) and not name.endswith("mask_token"))
    if lacking or unknown:
        raise ValueError(f"{whose}: it lacks {lacking[:4]}, unknown are {unknown[:4]}; give the values of its config.json in `config`")
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
