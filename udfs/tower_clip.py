"""RGB images -> L2-normalised image embeddings of an open_clip vision transformer (CLIP and its relatives).

`encoder.model` names the architecture as open_clip does (`ViT-L-14-quickgelu`), or `encoder.config` is one in open_clip's form; its weights
come from `encoder.weights` (a safetensors file of the visual tower alone, sha256 checked before the first image) or from
`encoder.pretrained` (open_clip's tag, fetched from the hub). Only the visual tower stays in memory.

Cost of one worker under torch [measured, 2 shared AMD cores]: import torch 1.4 CPU-s, open_clip 1.7 (bytecode compiled; 3.0 and 6.0
without), load and verify ViT-B/16 0.6; then 480 CPU-ms an image in fp32, 1 thread. Under onnxruntime: udfs/export_tower.py, 380 to 395.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from udfs.engine import Graph, normalised, vectors
from udfs.pinned import pinned

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
MEAN, STD = (np.array(RECIPE[name], np.float32)[:, None, None] for name in ("mean", "std"))
THIN = 16  # longer / shorter; beyond it the crop sees less than a sixteenth of the strip anyway


def load(encoder: Mapping[str, Any], device: str, precision: str) -> torch.nn.Module:
    """(conf.enrichment.Encoder as a dict, "cpu" or "cuda:1", "fp32" or "bf16") -> the visual tower, in eval mode on the device.

    Raises ValueError when open_clip has no such model, when width or image_size are not the model's, when the weights
    file is missing, has another sha256 or other tensors, or when the hub's weights want another preprocessing.
    """
    state = None if encoder["weights"] is None else read(encoder)  # first: a wrong file is found before heavy imports
    config = architecture(encoder, encoder["config"])
    check_sizes(encoder, config["embed_dim"], config)
    if state is None and encoder["pretrained"] is None and ":" not in (encoder["model"] or ""):  # hf-hub:owner/name has its own
        raise ValueError(f"encoder {encoder['name']!r}: give weights (a safetensors file and its sha256) or pretrained (open_clip's tag)")
    if state is not None:
        tower = fill(skeleton(config, precision), state, encoder)
    elif encoder["config"]:
        raise ValueError(f"encoder {encoder['name']!r}: config: weights from the hub have open_clip's own architecture; give none")
    else:
        tower = from_hub(encoder, precision)
    return lowered(tower, precision).requires_grad_(False).to(device).eval()


def prepare(image: Image.Image, encoder: Mapping[str, Any]) -> np.ndarray:
    """RGB image of any size -> float32 (3, side, side), equal to open_clip's own transform. About 1 ms an image of 400 px."""
    return cropped(image, encoder["image_size"], encoder["image_size"], MEAN, STD)


def cropped(image: Image.Image, shorter_side: int, side: int, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """RGB image -> its shorter side scaled (bicubic), the middle cut out, (x / 255 - mean) / std: float32 (3, side, side)."""
    image = _without_far_ends(image)
    width, height = image.size
    shorter = min(width, height)
    # torchvision's Resize and CenterCrop: int() of the longer side, round() of the crop's corner
    size = (int(shorter_side * width / shorter), int(shorter_side * height / shorter))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    pixels = np.asarray(image.crop((left, top, left + side, top + side)))
    scaled = pixels.transpose(2, 0, 1).astype(np.float32, order="C")
    scaled /= 255
    scaled -= mean
    scaled /= std
    return scaled


def _without_far_ends(image: Image.Image) -> Image.Image:
    """A strip longer than THIN times its shorter side -> its middle: scaled whole, a 500,000 x 8 strip would need 12 GB."""
    width, height = image.size
    keep = THIN * min(width, height)
    if max(width, height) <= keep:
        return image
    left, top = max(0, (width - keep) // 2), max(0, (height - keep) // 2)
    return image.crop((left, top, left + min(width, keep), top + min(height, keep)))


def encode(model: torch.nn.Module | Graph, batch: np.ndarray) -> np.ndarray:
    """float32 (n, 3, side, side) from `prepare` -> float32 (n, width), rows of length 1. Images of a batch do not influence each other."""
    return normalised(vectors(model, batch))


def architecture(encoder: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """-> open_clip's configuration: the given one, or that of the name."""
    import open_clip

    known = dict(config) or open_clip.get_model_config(encoder["model"] or "")
    if known is None:
        raise ValueError(f"encoder {encoder['name']!r}: model: given {encoder['model']!r}, expected one of open_clip.list_models()")
    if missing := {"embed_dim", "vision_cfg"} - set(known):
        raise ValueError(f"encoder {encoder['name']!r}: config: an open_clip architecture has {sorted(missing)}")
    return known


def check_sizes(encoder: Mapping[str, Any], width: int, config: Mapping[str, Any]) -> None:
    """ValueError when the encoder's sizes are not those of its architecture."""
    for key, true in (("width", width), ("image_size", config["vision_cfg"]["image_size"])):
        if encoder[key] != true:
            raise ValueError(f"encoder {encoder['name']!r}: {key}: given {encoder[key]}, but {encoder['model']} has {true}")


def skeleton(config: Mapping[str, Any], precision: str) -> torch.nn.Module:
    """open_clip's configuration -> its visual tower without memory: no random initialisation, and a text tower that is thrown away."""
    import open_clip
    import torch

    cast = torch.bfloat16 if precision == "bf16" else None
    with torch.device("meta"):
        text = open_clip.CLIPTextCfg(layers=1)
        return open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text, config.get("quick_gelu", False), cast_dtype=cast).visual


def read(encoder: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The pinned safetensors file of an encoder -> its tensors, their pages shared by all workers that read the same file."""
    path = pinned(encoder["weights"], encoder["sha256"], f"encoder {encoder['name']!r}: weights")
    from safetensors.torch import load_file  # imports torch

    return load_file(path)


def fill(tower: torch.nn.Module, state: Mapping[str, torch.Tensor], encoder: Mapping[str, Any]) -> torch.nn.Module:
    """Every tensor of the tower in fp32 from the file's, and none left over; else ValueError."""
    try:
        tower.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    except RuntimeError as error:
        found = " ".join(str(error).split())[:300]
        told = f"encoder {encoder['name']!r}: weights {encoder['weights']}: not the visual tower of {encoder['model']}: {found}"
        raise ValueError(told) from error
    return tower


def lowered(tower: torch.nn.Module, precision: str) -> torch.nn.Module:
    """The tower in its precision, as open_clip's create_model(precision="bf16"): norms stay fp32."""
    if precision == "bf16":
        import torch
        from open_clip.model import convert_weights_to_lp

        convert_weights_to_lp(tower, torch.bfloat16)
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
