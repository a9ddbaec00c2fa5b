"""A checkpoint that torch.save wrote -> safetensors under this project's names, once: `python -m udfs.convert_weights KIND IN OUT`.

    score-head  V7's `v2.ckpt` (huggingface.co/purplesmartai/aesthetic-classifier): a Lightning checkpoint, key `state_dict`,
                prefix `model.` -> the names of udfs/score_head.py
    csd         the style model (`v3_checkpoint00120000.pth` of huggingface.co/purplesmartai/style-classifier, or the released
                CSD): key `model_state_dict` or `state_dict`, prefix `module.`; `backbone.*` has the names of OpenAI's CLIP visual
                tower, which are open_clip's -> those, and `style_projection` [1024, 768], which was `last_layer_style`

Names, shapes and types are checked against the architecture before a tensor is read. The file is read as data
(udfs/torch_checkpoint.py): no pickle runs. Prints one JSON line with the sha256 of both files, what was left out and what of the
sizes is not the released model's; the input's sha256 also stands in the output's metadata (`converted_from`). The same input
gives the same bytes. Cost of CSD (304 million numbers): 12 CPU-s, 1.8 GB. A file that is refused is one line and exit status 2.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from udfs.inert_pickle import Foreign, Named
from udfs.pinned import hash_file
from udfs.score_head import HIDDEN, NAMES
from udfs.torch_checkpoint import Checkpoint, Stored

CONVERTER_VERSION = 1
FLOATS = ("float32", "float16", "bfloat16")
Shape = tuple[int, ...]


class Mapped(NamedTuple):
    """tensors: our name -> where it lies; left_out: names of the state dict that are not needed; sizes: what the shapes say."""

    tensors: dict[str, Stored]
    left_out: list[str]
    sizes: dict[str, int]


class Kind(NamedTuple):
    keys: tuple[str, ...]  # of the checkpoint under which the state dict may lie
    map: Callable[[Mapping[str, Stored]], Mapped]
    released: dict[str, int]  # sizes of the released model
    dtype: str | None = None  # of what is written; None: as it is


def map_score_head(state: Mapping[str, Stored]) -> Mapped:
    """Lightning's names -> score_head.NAMES. What lies outside of `model.` (a loss, a metric) is left out."""
    prefix = "model." if any(name.startswith("model.") for name in state) else ""
    inside = {name.removeprefix(prefix): stored for name, stored in state.items() if name.startswith(prefix)}
    _expect_names(inside, set(NAMES))
    width = _size(inside["0.weight"], 1)
    first, second = HIDDEN
    shapes: dict[str, Shape] = {
        "0.weight": (first, width),
        "0.bias": (first,),
        "3.weight": (second, first),
        "3.bias": (second,),
        "6.weight": (1, second),
        "6.bias": (1,),
    }
    _expect_shapes(inside, shapes)
    return Mapped(inside, [name for name in state if not name.startswith(prefix)], {"width": width})


def map_csd(state: Mapping[str, Stored]) -> Mapped:
    """CSD's names -> open_clip's VisionTransformer and `style_projection`. The content head and CLIP's own projection are left out."""
    plain = {name.removeprefix("module."): stored for name, stored in state.items()}
    tensors = {name.removeprefix("backbone."): stored for name, stored in plain.items() if name.startswith("backbone.")}
    tensors.pop("proj", None)
    if "last_layer_style" not in plain or "conv1.weight" not in tensors or "positional_embedding" not in tensors:
        raise ValueError(f"expected backbone.* of CLIP's visual tower and last_layer_style, given {_some(plain)}")
    tensors["style_projection"] = plain["last_layer_style"]
    layers = {int(found[1]) for name in tensors if (found := re.match(r"transformer\.resblocks\.(\d{1,4})\.", name))}
    width, patch = _size(tensors["conv1.weight"], 0), _size(tensors["conv1.weight"], 2)
    tokens, out = _size(tensors["positional_embedding"], 0), _size(tensors["style_projection"], 1)
    shapes = _visual_shapes(width, patch, tokens, len(layers)) | {"style_projection": (width, out)}
    _expect_names(tensors, set(shapes))
    _expect_shapes(tensors, shapes)
    grid = round(max(0, tokens - 1) ** 0.5)
    if tokens < 2 or grid**2 != tokens - 1:
        raise ValueError(f"positional_embedding: {tokens} tokens are no square grid and one class token")
    left_out = [name for name in plain if name != "last_layer_style" and (not name.startswith("backbone.") or name == "backbone.proj")]
    return Mapped(tensors, left_out, {"width": width, "layers": len(layers), "patch": patch, "image_size": grid * patch, "projection": out})


KINDS = {
    "score-head": Kind(("state_dict",), map_score_head, {"width": 768}, dtype="float32"),  # the head is run in the type that it has
    "csd": Kind(
        ("model_state_dict", "state_dict"), map_csd, {"width": 1024, "layers": 24, "patch": 14, "image_size": 224, "projection": 768}
    ),
}


def convert(kind: str, source: Path, target: Path) -> dict[str, Any]:
    """(key of KINDS, checkpoint, safetensors to write) -> what was done, as the JSON line says it. Raises ValueError."""
    import safetensors.torch
    import torch

    if kind not in KINDS:
        raise ValueError(f"KIND: given {kind!r}, allowed {sorted(KINDS)}")
    if not source.is_file():
        raise ValueError(f"IN: no file at {source}")
    wanted, digest = KINDS[kind], hash_file(source)
    checkpoint = Checkpoint(source)
    try:
        mapped = wanted.map(_state_dict(checkpoint, wanted.keys))
        tensors = {name: checkpoint.tensor(stored) for name, stored in mapped.tensors.items()}
    except ValueError as error:
        raise ValueError(f"{source}: {str(error).removeprefix(f'{source}: ')}") from None
    finally:
        checkpoint.close()
    if broken := sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()):
        raise ValueError(f"{source}: not finite: {broken[:5]}")
    if wanted.dtype is not None:
        tensors = {name: tensor.to(getattr(torch, wanted.dtype)) for name, tensor in tensors.items()}  # to a wider type: exact
    made_from = {"kind": kind, "sha256": digest, "converter": CONVERTER_VERSION}
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    # one entry: safetensors writes several in an order that changes from run to run
    safetensors.torch.save_file(tensors, partial, {"converted_from": json.dumps(made_from, sort_keys=True)})
    written = hash_file(partial)
    partial.replace(target)
    return {
        "kind": kind,
        "input": str(source),
        "input_sha256": digest,
        "output": str(target),
        "output_sha256": written,
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        "sizes": mapped.sizes,
        "unlike_the_released": {name: size for name, size in mapped.sizes.items() if size != wanted.released[name]},
        "left_out": mapped.left_out,
        "foreign": checkpoint.foreign,  # named in the file outside of the weights, not looked up
    }


def _state_dict(checkpoint: Checkpoint, keys: tuple[str, ...]) -> dict[str, Stored]:
    """The state dict of a checkpoint, under one of `keys` or by itself: names to tensors, nothing else."""
    top = checkpoint.top
    if type(top) is not dict:
        raise ValueError(f"expected a dict of torch.save, given {_kind_of(top)}")
    key = next((key for key in keys if key in top), None)
    state = top if key is None else top[key]
    where = "the checkpoint" if key is None else f"its {key!r}"
    if type(state) is not dict or not state:
        raise ValueError(f"{where}: expected names and tensors, given {_kind_of(state)}")
    for name, value in state.items():
        if type(name) is not str or type(value) is not Stored:
            hint = f"; a state dict under one of {list(keys)} was expected" if key is None else ""
            raise ValueError(f"{where}: {str(name)[:100]!r} holds {_kind_of(value)}, expected a tensor{hint}")
    return state


def _visual_shapes(width: int, patch: int, tokens: int, layers: int) -> dict[str, Shape]:
    """Of open_clip's VisionTransformer (and OpenAI's): an MLP of four times the width, layer norms before and after, no `proj`."""
    shapes: dict[str, Shape] = {
        "class_embedding": (width,),
        "positional_embedding": (tokens, width),
        "conv1.weight": (width, 3, patch, patch),
    }
    shapes |= {f"{norm}.{part}": (width,) for norm in ("ln_pre", "ln_post") for part in ("weight", "bias")}
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        shapes |= {f"{block}.{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
        for linear, out, into in (
            ("attn.in_proj_", 3 * width, width),
            ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 4 * width, width),
            ("mlp.c_proj.", width, 4 * width),
        ):
            shapes |= {f"{block}.{linear}weight": (out, into), f"{block}.{linear}bias": (out,)}
    return shapes


def _expect_names(given: Mapping[str, Stored], expected: set[str]) -> None:
    if set(given) != expected:
        lacking, strange = sorted(expected - set(given)), sorted(set(given) - expected)
        raise ValueError(f"not the tensors of this architecture: it lacks {_some(lacking)}, unknown are {_some(strange)}")


def _expect_shapes(given: Mapping[str, Stored], shapes: Mapping[str, Shape]) -> None:
    for name, shape in shapes.items():
        if given[name].shape != shape or given[name].dtype not in FLOATS:
            told = f"given {list(given[name].shape)} of {given[name].dtype}, expected {list(shape)} of {' or '.join(FLOATS)}"
            raise ValueError(f"{name}: {told}")


def _size(stored: Stored, axis: int) -> int:
    return stored.shape[axis] if axis < len(stored.shape) else 0


def _some(names: Any) -> str:
    told = list(names)
    return f"{told[:6]}" + (f" and {len(told) - 6} more" if len(told) > 6 else "")


def _kind_of(value: object) -> str:
    return (
        f"{'an object of ' * isinstance(value, Foreign)}{value.name}" if isinstance(value, Foreign | Named) else f"a {type(value).__name__}"
    )


def main(arguments: list[str]) -> int:
    """(KIND, IN, OUT) -> exit status: 0, or 2 when the file is refused."""
    if len(arguments) != 3:
        print(f"convert_weights: given {len(arguments)} arguments, expected KIND IN OUT; KIND is one of {sorted(KINDS)}", file=sys.stderr)
        return 2
    try:
        told = convert(arguments[0], Path(arguments[1]), Path(arguments[2]))
    except ValueError as error:
        print(f"convert_weights: {error}", file=sys.stderr)
        return 2
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
