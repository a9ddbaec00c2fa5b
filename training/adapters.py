"""A transformer and LoRA settings -> the same transformer with adapters, which alone are trained; and those as diffusers loads them.

The file is what `AuraFlowPipeline.load_lora_weights` takes: names `transformer.<module>.lora_A.weight`, rank and alpha in its metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.loops import TrainDiffusion
from conf.section import Mistake

if TYPE_CHECKING:
    import torch

NAME = "default"  # peft's name of the one adapter
FILE = "pytorch_lora_weights.safetensors"


def add_adapters(transformer: Any, lora: TrainDiffusion.Lora) -> torch.nn.Module:
    """Freeze the transformer and put an adapter, which changes nothing yet, beside each layer of `lora.layers`. Raises Mistake when one matches none."""
    from peft import LoraConfig

    targets = list(match(transformer, lora.layers))
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, init_lora_weights=True), NAME)
    return transformer


def match(transformer: torch.nn.Module, layers: tuple[str, ...], section: str = "train_diffusion") -> dict[str, torch.nn.Linear]:
    """-> the linear layers whose names end with one of `layers`. Raises Mistake, with some real names, for an end that matches none."""
    import torch

    linear = {name: module for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    ends = {end: {name for name in linear if name == end or name.endswith(f".{end}")} for end in layers}
    if unmatched := [end for end, names in ends.items() if not names]:
        kinds = sorted({re.sub(r"^(?:\w+\.)*?\w+\.\d+\.", "", name) for name in linear})
        raise Mistake(f"{section}.lora.layers: given {unmatched}, which no linear layer ends with; the model's are {kinds}")
    wanted = set().union(*ends.values())
    return {name: module for name, module in linear.items() if name in wanted}


def save(folder: Path, weights: Mapping[str, torch.Tensor], lora: TrainDiffusion.Lora) -> Path:
    """Adapter weights by the trained module's names -> the safetensors file in `folder`."""
    from diffusers.loaders import AuraFlowLoraLoaderMixin

    told = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": sorted({name.rpartition(".lora_")[0] for name in weights})}
    plain: dict[str, Any] = {name.replace(f".{NAME}.", "."): value for name, value in weights.items()}
    AuraFlowLoraLoaderMixin.save_lora_weights(str(folder), plain, weight_name=FILE, transformer_lora_adapter_metadata=told)
    return folder / FILE
