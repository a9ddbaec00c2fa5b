"""A tiny random InternVL of the true class with its true processor, as an -hf folder: real, complete, and made of nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from udfs.caption_request import Request

SIDE, PATCH, TILE_TOKENS = 28, 7, 4  # pixels of a tile, of a patch; (28 / 7 * .5) ** 2 tokens of a tile
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
# that of OpenGVLab/InternVL3-*-hf
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)


def write(folder: Path, seed: int = 7) -> Path:
    """-> the folder: config, safetensors, processor, tokenizer of bytes, chat template."""
    import torch
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    tokenizer = byte_tokenizer()
    wide = {"initializer_range": 0.3}  # at .02 every token is as likely as the last, and the picture says nothing
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64} | wide
    config = InternVLConfig(
        vision_config=small | {"image_size": SIDE, "patch_size": PATCH},
        text_config=small
        | {"model_type": "qwen2", "vocab_size": len(tokenizer), "num_key_value_heads": 1, "tie_word_embeddings": False}
        | {"bos_token_id": 0, "pad_token_id": 0, "eos_token_id": MARKS.index("<|im_end|>")},
        image_token_id=MARKS.index("<IMG_CONTEXT>"),
        image_seq_length=TILE_TOKENS,
        tie_word_embeddings=False,
        **wide,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        InternVLForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=12),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=TILE_TOKENS,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def byte_tokenizer() -> Any:
    """The 256 bytes and InternVL's own tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*MARKS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(MARKS)
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    own = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", extra_special_tokens=named, **own)


def teach(folder: Path, asked: Sequence[tuple[Request, bytes]], answer: str, steps: int = 120) -> Path:
    """Fits the folder's model until it says `answer` to these requests and files' bytes -> the folder."""
    import torch
    from transformers import InternVLForConditionalGeneration

    from tests.odd_images import LIMITS
    from udfs import internvl_prompt

    reader, module = internvl_prompt.load_reader(folder), InternVLForConditionalGeneration.from_pretrained(folder)
    said = torch.tensor(internvl_prompt.answer_tokens(reader, answer))
    best, tiling = torch.optim.Adam(module.parameters(), 5e-3), internvl_prompt.Tiling(1, 1)
    ready = [
        internvl_prompt.prepare(reader, 0, internvl_prompt.write_chat(reader, request), data, LIMITS, tiling) for request, data in asked
    ]
    for step in range(steps):
        one = ready[step % len(ready)]
        tokens = torch.cat([one.tokens, said])[None]
        labels = torch.cat([torch.full_like(one.tokens, -100), said])[None]
        loss = module(input_ids=tokens, pixel_values=one.pixels, labels=labels).loss
        best.zero_grad()
        loss.backward()
        best.step()
    module.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
