"""A folder in diffusers' layout, or nothing -> the parts of an image model of the AuraFlow class.

    transformer    what is trained: AuraFlowTransformer2DModel
    vae            pixels -> latents, frozen: AutoencoderKL
    text_encoder   tokens -> states, frozen: UMT5EncoderModel
    tokenizer      text -> tokens

Without a folder the parts are tiny, random and of the true classes: the same code path, for tests and demos, and no model. They are the
same in every process and for every seed, as a pretrained folder would be.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from conf.loops import TrainDiffusion
from conf.section import Mistake
from udfs.pinned import hash_file

if TYPE_CHECKING:
    import torch

TINY = "tiny random model"  # how the stand-in is called wherever it is named
PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
GRID_PIXELS = 16  # of a side of a patch: 8 by the VAE, 2 by the transformer
_SEED = 20_240_712  # of the tiny parts

# what the tiny VAE and AuraFlow's, which is SDXL's, have in common
VAE = {
    **{"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": 4},
    **{"scaling_factor": 0.13025, "force_upcast": True},
}
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        **{"num_mmdit_layers": 2, "num_single_dit_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2},
        **{"joint_attention_dim": 32, "caption_projection_dim": 32, "pos_embed_max_size": 96 * 96},
    },
    "vae": VAE | {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
    "text_encoder": {
        **{"vocab_size": 259, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        **{"feed_forward_proj": "gated-gelu", "pad_token_id": 0, "eos_token_id": 1},
    },
}


class Frozen(NamedTuple):
    """The parts that are used and not trained."""

    vae: Any
    text_encoder: Any
    tokenizer: Any


def describe(settings: TrainDiffusion) -> str:
    """-> what the training starts from, in words."""
    return TINY if settings.pretrained is None else f"the model in {settings.pretrained}"


def load_transformer(settings: TrainDiffusion) -> torch.nn.Module:
    """-> AuraFlowTransformer2DModel, all of it trainable, in the precision of the training. Raises Mistake when a picture is larger than its grid."""
    from diffusers import AuraFlowTransformer2DModel

    module: Any
    if settings.pretrained is None:
        with _tiny():
            module = AuraFlowTransformer2DModel(**TINY_CONFIGS["transformer"])
        _cast(module, dtype_of(settings))
    else:
        folder = folder_of(settings.pretrained)
        _no_progress_bars()
        module = AuraFlowTransformer2DModel.from_pretrained(
            folder, subfolder="transformer", torch_dtype=dtype_of(settings), local_files_only=True
        )
    check_grid(module.config, settings.image_size)
    trainable: torch.nn.Module = module.requires_grad_(True)
    return trainable


def transformer_config(settings: TrainDiffusion) -> dict[str, Any]:
    """-> the transformer's config, without loading it."""
    if settings.pretrained is None:
        return TINY_CONFIGS["transformer"]
    config: dict[str, Any] = json.loads((folder_of(settings.pretrained) / "transformer/config.json").read_text())
    return config


def load_frozen(settings: TrainDiffusion) -> Frozen:
    """-> VAE, text encoder and tokenizer, in evaluation mode on the CPU. The VAE stays in fp32 when its config asks for that."""
    import torch

    frozen = _load_tiny() if settings.pretrained is None else _load_pretrained(folder_of(settings.pretrained))
    precise = torch.float32 if frozen.vae.config.force_upcast else dtype_of(settings)
    _cast(frozen.vae, precise).eval().requires_grad_(False)
    _cast(frozen.text_encoder, dtype_of(settings)).eval().requires_grad_(False)
    return frozen


def dtype_of(settings: TrainDiffusion) -> torch.dtype:
    import torch

    return torch.bfloat16 if settings.precision == "bf16" else torch.float32


def check_grid(config: Any, image_size: int) -> None:
    """Raises Mistake when the picture has more patches a side than the model has learned positions.

    AuraFlowPatchEmbed takes the positions of a smaller picture from the centre of the grid, as the release was trained; a larger one it
    would give wrong positions without a word (wide) or stop in the middle of the network (tall).
    """
    side = int(config.pos_embed_max_size**0.5)
    if image_size > side * GRID_PIXELS:
        raise Mistake(
            f"train_diffusion.image_size: given {image_size}, but the model has {side} x {side} positions of {GRID_PIXELS} pixels: "
            f"at most {side * GRID_PIXELS}"
        )


@lru_cache
def fingerprint(folder: str) -> str:
    """A pretrained folder -> sha256 over the names and bytes of its parts' files: weights are named by what they are, not where they lie."""
    whole = hashlib.sha256()
    for path in sorted(path for part in PARTS for path in (folder_of(folder) / part).rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(folder)} {hash_file(path)}\n".encode())
    return whole.hexdigest()


def latents(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 3, h, w] on the VAE's device -> float32 latents [n, c, h/8, w/8]: the middle of the VAE's distribution, as a cache could hold."""
    scaled = pixels.to(vae.dtype) / 127.5 - 1
    middle = vae.encode(scaled).latent_dist.mode().float()
    return (middle - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def text_states(encoder: Any, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Tokens and mask [n, length] -> states [n, length, width], 0 at the padding, which the transformer attends to all the same.

    As AuraFlowPipeline.encode_prompt does when it samples.
    """
    states = encoder(input_ids=tokens, attention_mask=mask)[0]
    return states * mask.unsqueeze(-1).to(states.dtype)


def save_transformer(folder: Path, weights: Mapping[str, torch.Tensor], settings: TrainDiffusion) -> None:
    """All weights of a transformer by name -> the folder in diffusers' layout: config.json and safetensors of 5 GB at most."""
    import torch
    from diffusers import AuraFlowTransformer2DModel

    with torch.device("meta"):
        module: Any = AuraFlowTransformer2DModel.from_config(transformer_config(settings))
    module.load_state_dict(weights, strict=True, assign=True)
    module.save_pretrained(folder, max_shard_size="5GB", safe_serialization=True)


def _load_pretrained(folder: Path) -> Frozen:
    from diffusers import AutoencoderKL
    from transformers import AutoTokenizer, UMT5EncoderModel

    _no_progress_bars()
    return Frozen(
        AutoencoderKL.from_pretrained(folder, subfolder="vae", local_files_only=True),
        UMT5EncoderModel.from_pretrained(folder, subfolder="text_encoder", local_files_only=True),
        AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
    )


def _no_progress_bars() -> None:
    """Both libraries draw one for each file of weights, on every rank."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _load_tiny() -> Frozen:
    from diffusers import AutoencoderKL
    from transformers import UMT5Config, UMT5EncoderModel

    with _tiny():
        vae = AutoencoderKL(**TINY_CONFIGS["vae"])
        text_encoder = UMT5EncoderModel(UMT5Config(**TINY_CONFIGS["text_encoder"]))
    return Frozen(vae, text_encoder, _byte_tokenizer())


def _byte_tokenizer() -> Any:
    """-> a tokenizer whose words are the 256 bytes: real, complete, and made of nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _cast(module: Any, dtype: torch.dtype) -> Any:
    """By torch's own method: that of diffusers warns of modules to keep in fp32 also when there are none."""
    import torch

    return torch.nn.Module.to(module, dtype)


@contextmanager
def _tiny() -> Iterator[None]:
    """Random weights from a seed of their own; the process's random state is as before."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        yield


def folder_of(pretrained: str) -> Path:
    """-> the folder, with all parts in it. Raises Mistake naming those that are missing."""
    folder = Path(pretrained)
    if missing := [part for part in PARTS if not (folder / part).is_dir()]:
        raise Mistake(
            f"train_diffusion.pretrained: {folder.absolute()} has no {', '.join(missing)}; give a local folder in diffusers' layout "
            f"with {', '.join(PARTS)}"
        )
    return folder
