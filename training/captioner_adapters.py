"""An InternVL and LoRA settings -> the same model with adapters, which alone are trained; off for a moment; and as peft's own files.

The folder that `save` writes is what `peft.PeftModel.from_pretrained(model, folder)` takes: adapter_config.json and adapter_model.safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.loops import TrainCaptioner
from training import adapters

if TYPE_CHECKING:
    import torch

FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of names in the file: peft loads it into its own wrapper


def add(module: Any, lora: TrainCaptioner.Lora) -> torch.nn.Module:
    """Freeze the model and put an adapter, which changes nothing yet, beside each chosen layer. Raises Mistake when `lora.layers` match none."""
    module.requires_grad_(False)
    module.add_adapter(_config(lora, targets(module, lora)), adapters.NAME)
    trained: torch.nn.Module = module
    return trained


def targets(module: Any, lora: TrainCaptioner.Lora) -> list[str]:
    """-> the full names of the layers."""
    import torch

    parts = torch.nn.ModuleDict({part: module.get_submodule(f"model.{part}") for part in lora.within})
    return [f"model.{name}" for name in adapters.match(parts, lora.layers, "train_captioner")]


@contextmanager
def off(module: torch.nn.Module) -> Iterator[None]:
    """For the length of the block the model is what it was before the training.

    By the layers' own switch: peft's `disable_adapters` also takes the adapters out of training, and DeepSpeed's hooks go by that.
    """
    switched = layers(module)
    assert switched
    for layer in switched:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in switched:
            layer._disable_adapters = False


def layers(module: torch.nn.Module) -> list[Any]:
    """-> the layers that have an adapter beside them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [one for one in module.modules() if isinstance(one, BaseTunerLayer)]


def save(folder: Path, weights: Mapping[str, torch.Tensor], lora: TrainCaptioner.Lora, base: str) -> None:
    """Adapter weights by the trained module's names, the base model's name -> peft's two files in `folder`."""
    import safetensors.torch

    told = _config(lora, sorted({name.rpartition(".lora_")[0] for name in weights}))
    told.base_model_name_or_path, told.inference_mode = base, True
    told.target_modules = sorted(told.target_modules)  # peft makes it a set, whose order would make each file another
    told.save_pretrained(str(folder))
    plain = {_PREFIX + name.replace(f".{adapters.NAME}.", "."): value.contiguous() for name, value in weights.items()}
    safetensors.torch.save_file(plain, folder / FILE, {"format": "pt"})


def _config(lora: TrainCaptioner.Lora, names: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=names, init_lora_weights=True, task_type="CAUSAL_LM")
