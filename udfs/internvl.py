"""Images and requests -> answers of a local InternVL: transformers' InternVLForConditionalGeneration from an `-hf` folder. The engine `internvl`.

What the model sees of a request and a picture is made by udfs/internvl_prompt.py, as it was when the model was fitted. A tile is 256 tokens of the
prompt, so that 1024 x 768 at the default of 12 tiles is 13, 3,328 tokens, and max_tiles 1 is 256.
Images are taken by their number of tiles, the most first: batches waste little on padding, and memory that is not enough is known at once. Padding is
on the left, decoding and tiling run in threads ahead of the model, generation is greedy: the same images give the same answers whatever stands beside
them, but for the last digits of floats in another batch.

Cost of preparing a 1024 x 768 JPEG at 448 pixels a tile [measured, 2 shared AMD cores]: 64 CPU-ms at max_tiles 1, 219 at 4, 387 at 12.

The schema goes into the prompt as text, and nothing holds the model to it: caption_answer.check says what its answer is worth.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from udfs import header
from udfs.ahead import ahead
from udfs.caption_call import Reply, Usage
from udfs.caption_request import Request
from udfs.internvl_prompt import Prepared, Reader, Tiling, count_tiles, load_reader, write_chat
from udfs.internvl_prompt import prepare as prepare_image
from udfs.micro_batches import Loaded, in_parts
from udfs.pinned import hash_file
from udfs.reject import Reject

KERNEL_VERSION = 1
FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")  # of the folder, that its hash is over
_FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)


class How(NamedTuple):
    """How a worker runs the model.

    folder: local, in the layout of OpenGVLab/InternVL3-8B-hf; sha256: `folder_hash` of it; device: "cpu" or "cuda:N"; precision: "fp32" or "bf16";
    batch_tiles: tiles of a batch (a picture with more is a batch alone); ahead: pictures that may wait for the model.
    """

    folder: str
    sha256: str
    device: str = "cpu"
    precision: str = "fp32"
    min_tiles: int = 1
    max_tiles: int = 12
    most_output: int = 1_024
    batch_tiles: int = 52
    threads: int = 2
    ahead: int = 16

    @property
    def tiling(self) -> Tiling:
        return Tiling(self.min_tiles, self.max_tiles)


class Model(NamedTuple):
    module: Any
    reader: Reader


def answers(requests: Sequence[Request], images: Sequence[bytes], limits: Mapping[str, Any], how: How) -> list[Reply | Reject]:
    """(requests, a file's bytes each, conf.build.Limits as a dict, How) -> in order a Reply `ok`, `cut` or `no_text`, or why the image is none.

    Rejects are those of udfs/decode.py, and out_of_memory for an image that does not fit alone. Raises ValueError when the folder is not what it
    should be.
    """
    assert len(requests) == len(images), (len(requests), len(images))
    loaded = _load(how.folder, how.sha256, how.device, how.precision)
    model: Model = loaded.model
    results: dict[int, Reply | Reject] = {}
    tiles: dict[int, int] = {}
    for place, data in enumerate(images):
        try:
            tiles[place] = count_tiles(model.reader.processor, header.upright_size(header.layout_of(data, limits)), how.tiling)
        except Reject as reject:
            results[place] = reject

    def prepare(place: int) -> Prepared | tuple[int, Reject]:
        try:
            return prepare_image(model.reader, place, write_chat(model.reader, requests[place]), images[place], limits, how.tiling)
        except Reject as reject:
            return place, reject

    order = sorted(tiles, key=lambda place: -tiles[place])
    for batch in _batches(ahead(prepare, order, how.threads, how.ahead), how.batch_tiles):
        whole = [one for one in batch if isinstance(one, Prepared)]
        results |= {one[0]: one[1] for one in batch if not isinstance(one, Prepared)}
        found = in_parts(lambda module, part: generate(module, part, how.most_output), whole, loaded)
        for one, reply in zip(whole, found, strict=True):
            results[one.place] = (
                Reject("out_of_memory", f"internvl: not even one image of {len(one.pixels)} tiles") if reply is None else reply
            )
    return [results[place] for place in range(len(images))]


def folder_hash(folder: str | Path) -> str:
    """-> sha256 over names and bytes of FILES in it, hex: a model is named by what it is, not by where it lies."""
    whole = hashlib.sha256()
    for path in sorted(path for pattern in FILES for path in Path(folder).glob(pattern)):
        whole.update(f"{path.name} {hash_file(path)}\n".encode())
    return whole.hexdigest()


def _batches(items: Iterable[Prepared | tuple[int, Reject]], most: int) -> Iterator[list[Prepared | tuple[int, Reject]]]:
    batch: list[Prepared | tuple[int, Reject]] = []
    tiles = 0
    for item in items:
        more = len(item.pixels) if isinstance(item, Prepared) else 0
        if batch and tiles + more > most:
            yield batch
            batch, tiles = [], 0
        batch.append(item)
        tiles += more
    if batch:
        yield batch


def generate(model: Model, part: Sequence[Prepared], most_output: int, together: bool = False) -> list[Reply]:
    """Prepared images of one batch -> their replies. together: every rank of a training goes on until the last has ended (ZeRO 3)."""
    import torch

    module, tokenizer = model.module, model.reader.processor.tokenizer
    ends = ends_of(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    width = max(len(one.tokens) for one in part)
    tokens = torch.full((len(part), width), pad)
    mask = torch.zeros((len(part), width), dtype=torch.int64)
    for row, one in enumerate(part):
        tokens[row, width - len(one.tokens) :] = one.tokens
        mask[row, width - len(one.tokens) :] = 1
    pixels = torch.cat([one.pixels for one in part])
    with torch.no_grad():  # not inference_mode: under ZeRO 3 the weights that it gathers could not be trained on any more
        made = module.generate(
            input_ids=tokens.to(module.device),
            attention_mask=mask.to(module.device),
            pixel_values=pixels.to(module.device, module.dtype),
            synced_gpus=together,
            **{"do_sample": False, "num_beams": 1, "max_new_tokens": most_output, "pad_token_id": pad, "eos_token_id": sorted(ends)},
        )
    rows = made[:, width:].cpu().tolist()
    return [_reply(model, one, row, ends) for one, row in zip(part, rows, strict=True)]


def ends_of(model: Model) -> set[int]:
    """-> the tokens that end an answer."""
    ends = model.module.generation_config.eos_token_id
    return {model.reader.processor.tokenizer.eos_token_id} if ends is None else set(ends) if isinstance(ends, list) else {ends}


def _reply(model: Model, one: Prepared, row: list[int], ends: set[int]) -> Reply:
    """A row of new tokens, padded after its end -> the reply. A code fence around the whole is taken off: many local models write one."""
    length = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
    text = model.reader.processor.tokenizer.decode(row[:length], skip_special_tokens=True).strip()
    fenced = _FENCE.fullmatch(text)
    image = int((one.tokens == model.reader.processor.image_token_id).sum())
    usage = Usage(prompt=len(one.tokens) - image, image=image, output=length, thoughts=0)
    is_cut = row[length - 1] not in ends
    code = "cut" if is_cut else "ok" if text else "no_text"
    return Reply(code, "" if text else "no text before its end", fenced[1] if fenced else text, usage)


@lru_cache(maxsize=2)
def _load(folder: str, sha256: str, device: str, precision: str) -> Loaded:
    """One model a worker and device. Raises ValueError as `load_module`, and when the folder is another one."""
    check(folder)
    if (found := folder_hash(folder)) != sha256:
        raise ValueError(f"internvl {folder}: hash of the folder: expected {sha256}, found {found}; fetch it again or pin the new hash")
    module = load_module(folder, precision)
    return Loaded(Model(module.to(device), load_reader(folder)))


def load_module(folder: str | Path, precision: str | None) -> Any:
    """A local -hf folder -> InternVLForConditionalGeneration on the CPU, frozen. precision: "fp32", "bf16", or None as it is stored.

    Raises ValueError when the folder is missing, no InternVL in the -hf layout, or its weights are not all of the model's.
    """
    import torch
    import transformers
    from transformers import InternVLForConditionalGeneration

    check(folder)
    transformers.utils.logging.disable_progress_bar()
    load: Callable[..., Any] = InternVLForConditionalGeneration.from_pretrained
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, None: "auto"}[precision]
    module, told = load(folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True)
    if lacking := sorted({*told["missing_keys"], *told["mismatched_keys"]}):
        raise ValueError(f"internvl {folder}: its weights lack {len(lacking)} tensors of the model, e.g. {lacking[0]}; fetch it again")
    return module.eval().requires_grad_(False)


def check(folder: str | Path) -> None:
    """Raises ValueError when that is no local InternVL in the -hf layout."""
    config = Path(folder) / "config.json"
    if not config.is_file():
        raise ValueError(f"internvl: no config.json in {Path(folder).absolute()}; give a local folder such as OpenGVLab/InternVL3-8B-hf")
    kind = json.loads(config.read_text()).get("model_type")
    if kind != "internvl":
        raise ValueError(f"internvl {folder}: model_type is {kind!r}, expected 'internvl'; take the checkpoint whose name ends in -hf")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m udfs.internvl FOLDER (prints the hash that a captioner's local.sha256 pins)")
    check(sys.argv[1])
    print(folder_hash(sys.argv[1]))
