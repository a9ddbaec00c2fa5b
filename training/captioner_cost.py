"""A captioner's folder -> what teaching it will take: parameters, memory a rank and FLOPs a row. No weight is loaded or made.

The model is built on torch's meta device. FLOPs are 2 for each multiply-and-add of linear layers, the patch convolution and attention (all of the
square, as torch's counter does), nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from conf.loops import TrainCaptioner
from training import captioner_adapters, zero_memory
from training.zero_memory import many


class Sizes(NamedTuple):
    """Parameters of the whole, and those that are trained; of linear layers (and the patch convolution) by part; heads x their width x layers;
    tokens of a tile in the tower, and in the language model.
    """

    parameters: int
    trained: int
    language: int
    head: int
    vision: int
    patches: int
    projector: int
    language_attention: int
    vision_attention: int
    tile_patches: int
    tile_tokens: int
    vision_is_trained: bool


class Flops(NamedTuple):
    """Of a row, forward."""

    vision: float
    language: float


@lru_cache
def measure(folder: str, lora: TrainCaptioner.Lora) -> Sizes:
    """Raises Mistake when `lora.layers` match none."""
    import torch
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config: Any = InternVLConfig.from_pretrained(folder, local_files_only=True)
    text, vision = config.text_config, config.vision_config
    with torch.device("meta"):
        module: Any = InternVLForConditionalGeneration(config)
        parameters = sum(one.numel() for one in module.parameters())
        linear = {
            part: _linear(module.get_submodule(f"model.{part}")) for part in ("language_model", "vision_tower", "multi_modal_projector")
        }
        head = module.lm_head.weight.numel()
        patch = module.model.vision_tower.embeddings.patch_embeddings
        captioner_adapters.add(module, lora)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Sizes(
        parameters,
        sum(one.numel() for one in module.parameters() if one.requires_grad),
        linear["language_model"],
        head,
        linear["vision_tower"],
        patch.projection.weight.numel(),
        linear["multi_modal_projector"],
        text.num_attention_heads * width * text.num_hidden_layers,
        vision.hidden_size * vision.num_hidden_layers,
        patch.num_patches,
        config.image_seq_length,
        any(part != "language_model" for part in lora.within),
    )


def forward_flops(sizes: Sizes, tokens: float, tiles: float, answer: float) -> Flops:
    """Tokens of a row, the tiles of its picture, and the tokens whose logits are made."""
    seen = sizes.tile_patches + 1  # and the class token
    vision = tiles * (sizes.vision * seen + sizes.patches * sizes.tile_patches + 2 * seen**2 * sizes.vision_attention)
    projected = tiles * sizes.tile_tokens * sizes.projector
    language = sizes.language * tokens + 2 * tokens**2 * sizes.language_attention + sizes.head * answer
    return Flops(2.0 * (vision + projected), 2.0 * language)


def step_flops(folder: str, lora: TrainCaptioner.Lora, tokens: float, tiles: float, answer: float) -> float:
    """Forward and backward of a row. Backward costs one more forward of what has adapters, or lies above them; these themselves are left out."""
    sizes = measure(folder, lora)
    flops = forward_flops(sizes, tokens, tiles, answer)
    return (2.0 if sizes.vision_is_trained else 1.0) * flops.vision + 2.0 * flops.language


def tell(settings: TrainCaptioner, folder: str, row: tuple[float, float, float]) -> Iterator[str]:
    """Settings, and the means of a row (tokens, tiles, answer tokens) -> the lines of a plan."""
    sizes = measure(folder, settings.lora)
    flops = forward_flops(sizes, *row)
    tokens, tiles, answer = row
    yield f"the model in {folder}: {many(sizes.parameters)} parameters, {many(sizes.trained)} trained (LoRA, rank {settings.lora.rank})"
    yield f"  a held-out row has {tokens:.0f} tokens on average, {tiles:.1f} tiles among them and {answer:.0f} tokens of the answer"
    step = settings.rows_per_step * step_flops(folder, settings.lora, *row)
    yield f"  FLOPs a row, forward: {flops.vision:.3g} of the vision tower, {flops.language:.3g} of the language model"
    yield f"  FLOPs a step of {settings.rows_per_step} rows: {step:.3g}"
    yield from (f"  {line}" for line in zero_memory.formula(settings.precision, settings.ema_decay is not None))
    yield from (
        f"  {line}" for line in zero_memory.table(sizes.parameters, sizes.trained, settings.precision, settings.ema_decay is not None)
    )


def _linear(module: Any) -> int:
    import torch

    return sum(one.weight.numel() for one in module.modules() if isinstance(one, torch.nn.Linear))
