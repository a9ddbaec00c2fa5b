"""A request and a picture -> the tokens and pixels that InternVL sees. One way for fitting and for serving: a model is asked as it was taught.

The schema goes into the prompt as text. A picture is cut into tiles (InternVL's own way: the grid of at most `max_tiles` that is nearest to its
shape, and a small one of the whole beside more than one); a tile is 256 tokens of the prompt between two marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from udfs.caption_request import Request
from udfs.decode import decoding

if TYPE_CHECKING:
    import torch

KERNEL_VERSION = 1


class Tiling(NamedTuple):
    min_tiles: int = 1
    max_tiles: int = 12

    @property
    def told(self) -> dict[str, Any]:
        """As the processor is told."""
        return {"crop_to_patches": True, "min_patches": self.min_tiles, "max_patches": self.max_tiles}


class Reader(NamedTuple):
    """What makes tokens and pixels for a model. `marks`: the tokens that a text may not hold, being the model's own. Threads may share it."""

    processor: Any
    marks: re.Pattern[str]


class Prepared(NamedTuple):
    """One image: its place in the order of the inputs, tokens int64 [n], pixels float [tiles, 3, height, width]."""

    place: int
    tokens: torch.Tensor
    pixels: torch.Tensor


def load_reader(folder: str | Path) -> Reader:
    """A local -hf folder -> its processor."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    own = sorted({*processor.tokenizer.get_added_vocab(), *processor.tokenizer.all_special_tokens}, key=len, reverse=True)
    return Reader(processor, re.compile("|".join(map(re.escape, own))))


def count_tiles(processor: Any, size: tuple[int, int], tiling: Tiling) -> int:
    """(width, height) of a picture as seen -> its tiles, by the processor's own rule."""
    return int(processor.image_processor.get_number_of_image_patches(size[1], size[0], tiling.told))


def write_chat(reader: Reader, request: Request) -> str:
    """-> the chat up to where the answer begins, with one mark for the picture."""
    told = f"{request.prompt}\nSchema of the JSON object: {json.dumps(request.schema, ensure_ascii=False)}"
    messages = [
        {"role": "system", "content": [{"type": "text", "text": unmarked(request.system, reader.marks)}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": unmarked(told, reader.marks)}]},
    ]
    return str(reader.processor.apply_chat_template(messages, add_generation_prompt=True))


def count_tokens(reader: Reader, chat: str, tiles: int) -> int:
    """-> the tokens of `prepare`'s prompt for a picture of so many tiles, without decoding it: the mark becomes two, and the tiles' between them."""
    return len(reader.processor.tokenizer(chat)["input_ids"]) + 1 + reader.processor.image_seq_length * tiles


def prepare(reader: Reader, place: int, chat: str, data: bytes, limits: Mapping[str, Any], tiling: Tiling) -> Prepared:
    """Runs in a thread, without padding: a fast tokenizer that pads is not safe in two. Raises Reject as `decoding` does."""
    with decoding(data, limits) as decoded:
        made = reader.processor(images=[decoded.image], text=[chat], return_tensors="pt", **tiling.told)
    return Prepared(place, made["input_ids"][0], made["pixel_values"])


def write_answer(reader: Reader, parts: Mapping[str, Any]) -> str:
    """The parts of an answer -> its JSON, as a model is taught to write it."""
    plain = {part: [unmarked(one, reader.marks) for one in value] if isinstance(value, list) else unmarked(value, reader.marks)
             for part, value in parts.items()}  # fmt: skip
    return json.dumps(plain, ensure_ascii=False)


def answer_tokens(reader: Reader, answer: str) -> list[int]:
    """-> its tokens with the end mark: by themselves, as they come out of a model behind a prompt that is fixed."""
    tokenizer = reader.processor.tokenizer
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def unmarked(text: str, marks: re.Pattern[str]) -> str:
    """A stranger's <IMG_CONTEXT> would be another picture, his <|im_start|> another speaker."""
    while marks.search(text):  # one may come together when another is taken out
        text = marks.sub("", text)
    return text
