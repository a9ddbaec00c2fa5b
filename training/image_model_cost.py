"""Settings -> what training an image model will take: parameters, memory a rank and FLOPs a step. No weight is loaded or made.

The classes are built on torch's meta device, and a forward and a backward pass of one row go through them there under torch's FLOP counter:
2 FLOPs for each multiply-and-add of linear layers, convolutions and attention, nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from conf.loops import TrainDiffusion
from training import adapters, zero_memory
from training.image_model import GRID_PIXELS, TINY, TINY_CONFIGS, VAE, check_grid, folder_of
from training.zero_memory import GIB, many

REGISTERS = 8  # tokens that AuraFlow puts before the text

Configs = Mapping[str, Mapping[str, Any]]

# fal/AuraFlow-v0.3, whose text encoder is EleutherAI/pile-t5-xl: 6.859, 0.084 and 1.224 billion parameters
AURAFLOW_CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        **{"num_mmdit_layers": 4, "num_single_dit_layers": 32, "attention_head_dim": 256, "num_attention_heads": 12},
        **{"joint_attention_dim": 2048, "caption_projection_dim": 3072, "pos_embed_max_size": 96 * 96},
    },
    "vae": VAE | {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
    "text_encoder": {
        **{"vocab_size": 32_128, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
        "feed_forward_proj": "gated-gelu",
    },
}


class Sizes(NamedTuple):
    """Parameters; FLOPs of one row: the transformer forward, forward and backward as it is trained, and the frozen parts forward."""

    parameters: int
    trained: int
    vae: int
    text_encoder: int
    forward: float
    step: float
    vae_forward: float
    text_encoder_forward: float


def forward_flops(config: Mapping[str, Any], image_size: int, text_length: int) -> float:
    """The transformer's config -> FLOPs of one row forward, by the formula: the counter's number without building the model."""
    width = config["attention_head_dim"] * config["num_attention_heads"]
    hidden = -(-int(8 * width / 3) // 256) * 256  # AuraFlowFeedForward
    patch = config.get("patch_size", 2) ** 2
    image, text = (image_size // GRID_PIXELS) ** 2, text_length + REGISTERS
    tokens = image + text
    ends = image * width * patch * (config.get("in_channels", 4) + config.get("out_channels", 4))
    ends += text_length * config["joint_attention_dim"] * config["caption_projection_dim"]
    ends += 256 * width + width**2 + 2 * width**2  # time step, last modulation
    block = tokens * (4 * width**2 + 3 * width * hidden) + 2 * tokens**2 * width
    joint = block + 12 * width**2  # modulation of image and text
    single = block + 6 * width**2
    return 2.0 * (ends + config["num_mmdit_layers"] * joint + config["num_single_dit_layers"] * single)


def measure(settings: TrainDiffusion, configs: Configs, lora: TrainDiffusion.Lora | None) -> Sizes:
    """The parts' configs -> Sizes of training them with adapters or, without `lora`, in full."""
    import torch
    from diffusers import AuraFlowTransformer2DModel, AutoencoderKL
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        transformer = AuraFlowTransformer2DModel.from_config(dict(configs["transformer"]))
        vae = AutoencoderKL.from_config(dict(configs["vae"]))
        encoder = UMT5EncoderModel(UMT5Config(**configs["text_encoder"]))
        check_grid(transformer.config, settings.image_size)
        if lora:
            adapters.add_adapters(transformer, lora)
        if settings.checkpointing:
            transformer.enable_gradient_checkpointing()
        row = row_of(transformer, settings)
        with torch.no_grad():
            forward = count_flops(lambda: transformer(**row))
            vae_forward = count_flops(lambda: vae.encode(torch.empty(1, 3, settings.image_size, settings.image_size)))
            text_forward = count_flops(lambda: encoder(input_ids=torch.zeros(1, settings.text_length, dtype=torch.long)))
        step = count_flops(lambda: transformer(**row)[0].sum().backward())
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    return Sizes(_count(transformer), trained, _count(vae), _count(encoder), forward, step, vae_forward, text_forward)


def row_of(transformer: Any, settings: TrainDiffusion) -> dict[str, Any]:
    """-> the transformer's arguments for one row, empty, on the current device."""
    import torch

    config, side = transformer.config, settings.image_size // 8
    return {
        "hidden_states": torch.empty(1, config.in_channels, side, side),
        "encoder_hidden_states": torch.empty(1, settings.text_length, config.joint_attention_dim),
        "timestep": torch.empty(1),
        "return_dict": False,
    }


def count_flops(run: Callable[[], object]) -> float:
    """A call -> the FLOPs of what torch did in it."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def formula(sizes: Sizes, precision: str, ema: bool) -> Iterator[str]:
    """The lines that say what a plan's bytes are."""
    frozen = (4 * sizes.vae + (2 if precision == "bf16" else 4) * sizes.text_encoder) / GIB
    yield from zero_memory.formula(precision, ema, f"VAE and text encoder, {frozen:.2f} GiB on each rank")


def tell(settings: TrainDiffusion) -> Iterator[str]:
    """Settings -> the lines of a plan, for the model that would be trained; when that is the tiny one, for AuraFlow too."""
    if settings.pretrained is not None:
        yield from _tell_model(settings, f"the model in {settings.pretrained}", read_configs(settings.pretrained))
        return
    yield from _tell_model(settings, f"{TINY}, which this config trains", TINY_CONFIGS)
    yield from _tell_model(settings, "the real AuraFlow v0.3, which this config does not train (set pretrained)", AURAFLOW_CONFIGS)


def read_configs(pretrained: str) -> dict[str, dict[str, Any]]:
    """A folder in diffusers' layout -> the configs of its parts, without their private entries."""
    parts = ("transformer", "vae", "text_encoder")
    texts = {part: (folder_of(pretrained) / part / "config.json").read_text() for part in parts}
    return {part: {key: value for key, value in json.loads(text).items() if key[0] != "_"} for part, text in texts.items()}


def _tell_model(settings: TrainDiffusion, name: str, configs: Configs) -> Iterator[str]:
    yield f"{name}: {settings.image_size} px, {settings.text_length} tokens"
    for lora in (None, settings.lora or TrainDiffusion.Lora()):
        sizes = measure(settings, configs, lora)
        if lora is None:
            yield (
                f"  parameters: transformer {many(sizes.parameters)}, VAE {many(sizes.vae)}, text encoder {many(sizes.text_encoder)}; "
                f"FLOPs a row, forward: {sizes.forward:.3g}, {sizes.vae_forward:.3g} and {sizes.text_encoder_forward:.3g}"
            )
            yield from (f"  {line}" for line in formula(sizes, settings.precision, settings.ema_decay is not None))
        chosen = "chosen" if bool(lora) == bool(settings.lora) else "not chosen"
        yield f"  {f'LoRA, rank {lora.rank}' if lora else 'full'} ({chosen}): {many(sizes.trained)} trained"
        yield from (f"    {line}" for line in _tell_training(settings, sizes))


def _tell_training(settings: TrainDiffusion, sizes: Sizes) -> Iterator[str]:
    rows, times = settings.rows_per_step, sizes.step / sizes.forward
    frozen = rows * (sizes.vae_forward + sizes.text_encoder_forward)
    again = ", activations computed twice" if settings.checkpointing else ""
    yield f"FLOPs a step of {rows} rows: {rows * sizes.step:.3g} ({times:.2f} x forward{again}), and {frozen:.3g} of VAE and text encoder"
    yield from zero_memory.table(sizes.parameters, sizes.trained, settings.precision, settings.ema_decay is not None)


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
