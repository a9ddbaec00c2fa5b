"""RGB images -> L2-normalised image embeddings of an open_clip vision transformer (CLIP and its relatives).

`encoder.model` names the architecture as open_clip does (`ViT-L-14-quickgelu`); its weights come from `encoder.weights`
(a safetensors file of the visual tower alone, sha256 checked before the first image) or from `encoder.pretrained`
(open_clip's tag, fetched from the hub). Only the visual tower stays in memory.

Cost of one worker [measured, 2 shared AMD cores]: import torch 1.4 CPU-s, open_clip 1.7 (bytecode compiled; 3.0 and 6.0
without), load and verify ViT-B/16 0.6; then 300 to 330 CPU-ms an image in fp32, 1 thread, 470 in bf16 (slower here).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch

KERNEL_VERSION = 1
PREPROCESSING = "shorter side bicubic (Pillow), centre crop, CLIP mean and std"

# what open_clip's own transform does for CLIP weights; written here so that `prepare` imports no torch
RECIPE = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
MEAN = np.array(RECIPE["mean"], np.float32)[:, None, None]
THIN = 16  # longer / shorter; beyond it the crop sees less than a sixteenth of the strip anyway
STD = np.array(RECIPE["std"], np.float32)[:, None, None]


def load(encoder: Mapping[str, Any], device: str, precision: str) -> torch.nn.Module:
    """(conf.settings.Encoder as a dict, "cpu" or "cuda:1", "fp32" or "bf16") -> the visual tower, in eval mode on the device.

    Raises ValueError when open_clip has no such model, when width or image_size are not the model's, when the weights
    file is missing, has another sha256 or other tensors, or when the hub's weights want another preprocessing.
    """
    import open_clip

    config = open_clip.get_model_config(encoder["model"] or "")
    if config is None:
        raise ValueError(f"encoder {encoder['name']!r}: model: given {encoder['model']!r}, expected one of open_clip.list_models()")
    for key, true in (("width", config["embed_dim"]), ("image_size", config["vision_cfg"]["image_size"])):
        if encoder[key] != true:
            raise ValueError(f"encoder {encoder['name']!r}: {key}: given {encoder[key]}, but {encoder['model']} has {true}")
    if encoder["weights"] is None and encoder["pretrained"] is None and ":" not in encoder["model"]:  # hf-hub:owner/name has its own
        raise ValueError(f"encoder {encoder['name']!r}: give weights (a safetensors file and its sha256) or pretrained (open_clip's tag)")
    tower = from_file(encoder, config, precision) if encoder["weights"] is not None else from_hub(encoder, precision)
    return tower.requires_grad_(False).to(device).eval()


def prepare(image: Image.Image, encoder: Mapping[str, Any]) -> np.ndarray:
    """RGB image of any size -> float32 (3, side, side), equal to open_clip's own transform. About 1 ms an image of 400 px."""
    side = encoder["image_size"]
    image = _without_far_ends(image)
    width, height = image.size
    shorter = min(width, height)
    # torchvision's Resize and CenterCrop: int() of the longer side, round() of the crop's corner
    size = (int(side * width / shorter), int(side * height / shorter))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    pixels = np.asarray(image.crop((left, top, left + side, top + side)))
    scaled = pixels.transpose(2, 0, 1).astype(np.float32, order="C")
    scaled /= 255
    scaled -= MEAN
    scaled /= STD
    return scaled


def _without_far_ends(image: Image.Image) -> Image.Image:
    """A strip longer than THIN times its shorter side -> its middle: scaled whole, a 500,000 x 8 strip would need 12 GB."""
    width, height = image.size
    keep = THIN * min(width, height)
    if max(width, height) <= keep:
        return image
    left, top = max(0, (width - keep) // 2), max(0, (height - keep) // 2)
    return image.crop((left, top, left + min(width, keep), top + min(height, keep)))


def encode(model: torch.nn.Module, batch: np.ndarray) -> np.ndarray:
    """float32 (n, 3, side, side) from `prepare` -> float32 (n, width), rows of length 1. Images of a batch do not influence each other."""
    import torch

    weight = model.get_parameter("conv1.weight")
    with torch.inference_mode():
        images = torch.from_numpy(batch).to(weight.device, weight.dtype)
        return torch.nn.functional.normalize(model(images).float(), dim=1).cpu().numpy()


def from_file(encoder: Mapping[str, Any], config: Mapping[str, Any], precision: str) -> torch.nn.Module:
    """Local safetensors -> the visual tower of open_clip's `config`, its pages shared by all workers that load the same file."""
    import open_clip
    import torch
    from open_clip.model import convert_weights_to_lp
    from safetensors.torch import load_file

    path = Path(encoder["weights"])
    verify(path, encoder["sha256"], encoder["name"])
    cast = torch.bfloat16 if precision == "bf16" else None
    with torch.device("meta"):  # shapes only: no random initialisation, and a text tower that takes no memory
        text = open_clip.CLIPTextCfg(layers=1)
        tower = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text, config.get("quick_gelu", False), cast_dtype=cast).visual
    try:
        tower.load_state_dict(load_file(path), assign=True)
    except RuntimeError as error:
        found = " ".join(str(error).split())[:300]
        raise ValueError(f"encoder {encoder['name']!r}: weights {path}: not the visual tower of {encoder['model']}: {found}") from error
    if cast is not None:
        convert_weights_to_lp(tower, cast)  # as create_model(precision="bf16"): norms stay fp32
    return tower


def from_hub(encoder: Mapping[str, Any], precision: str) -> torch.nn.Module:
    """open_clip's tag -> the visual tower; open_clip loads the whole CLIP, and the text tower is dropped here."""
    import open_clip

    clip = open_clip.create_model(encoder["model"], pretrained=encoder["pretrained"], precision=precision, require_pretrained=True)
    wanted = open_clip.get_model_preprocess_cfg(clip)
    other = {key: wanted[key] for key in RECIPE if wanted[key] != RECIPE[key]}
    if other:
        raise ValueError(
            f"encoder {encoder['name']!r}: pretrained: {encoder['pretrained']} wants {other}, kernel clip prepares by {RECIPE}"
        )
    return clip.visual


def verify(path: Path, sha256: str, name: str) -> None:
    """ValueError naming both hashes when the file is not the pinned one."""
    if not path.is_file():
        raise ValueError(f"encoder {name!r}: weights: no file at {path} (looked from {Path.cwd()}); the demo's come from `make weights`")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(
            f"encoder {name!r}: weights {path}: sha256: expected {sha256}, found {found}; fetch the file again or pin its hash"
        )
