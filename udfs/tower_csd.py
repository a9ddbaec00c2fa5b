"""RGB images -> style features of CSD (Somepalli et al. 2024, Contrastive Style Descriptors), the style backbone of V7.

`encoder.model` is the architecture of its CLIP backbone (`ViT-L-14-quickgelu`); `encoder.weights` one safetensors file of the visual tower and
`style_projection`, as `python -m udfs.convert_weights csd IN OUT` writes it. `encoder.config` may say

    feature   backbone (default): what V7's styles are made of, 1024 numbers after the last norm, before any projection, not normalised
              projected: those times style_projection, as rows of length 1 (768 numbers)
    vision_cfg, embed_dim, quick_gelu: open_clip's form of another architecture than the name's

Preprocessing (V7's notebook): shorter side to 224 bicubic, centre crop, CLIP's mean and std. Cost: that of CLIP ViT-L/14.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from udfs.engine import Graph, vectors
from udfs.tower_clip import PREPROCESSING, architecture, check_sizes, fill, lowered, prepare, read, skeleton

if TYPE_CHECKING:
    import torch

__all__ = ["KERNEL_VERSION", "PREPROCESSING", "encode", "load", "prepare"]

KERNEL_VERSION = 1
FEATURES = ("backbone", "projected")
PROJECTION = "style_projection"


def load(encoder: Mapping[str, Any], device: str, precision: str) -> torch.nn.Module:
    """(conf.enrichment.Encoder as a dict, "cpu" or "cuda:1", "fp32" or "bf16") -> the tower, in eval mode on the device. Raises ValueError."""
    feature, config = _asked(encoder)
    if encoder["weights"] is None:
        raise ValueError(
            f"encoder {encoder['name']!r}: weights: kernel csd needs a file (python -m udfs.convert_weights csd) and its sha256"
        )
    state = read(encoder)
    if (projection := state.pop(PROJECTION, None)) is None:
        raise ValueError(f"encoder {encoder['name']!r}: weights {encoder['weights']}: expected {PROJECTION}: it is no converted CSD")
    width = config["vision_cfg"]["width"] if feature == "backbone" else int(projection.shape[1])
    check_sizes(encoder, width, config)
    visual: Any = skeleton(config, precision)
    visual.proj = None  # the features before CLIP's own projection
    tower = lowered(fill(visual, state, encoder), precision)
    if feature == "projected":
        tower = _projected(tower, projection.float())
    return tower.requires_grad_(False).to(device).eval()


def encode(model: torch.nn.Module | Graph, batch: np.ndarray) -> np.ndarray:
    """float32 (n, 3, side, side) from `prepare` -> float32 (n, width), as the feature is: `backbone` is not normalised."""
    return vectors(model, batch)


def _asked(encoder: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """-> (feature, open_clip's configuration)."""
    own = dict(encoder["config"])
    feature = own.pop("feature", "backbone")
    if feature not in FEATURES:
        raise ValueError(f"encoder {encoder['name']!r}: config.feature: given {feature!r}, allowed {list(FEATURES)}")
    return feature, architecture(encoder, own)


def _projected(visual: torch.nn.Module, projection: torch.Tensor) -> torch.nn.Module:
    from torch import nn

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual, self.projection = visual, nn.Parameter(projection)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return nn.functional.normalize(self.visual(images).float() @ self.projection, dim=1)

    return Projected()
