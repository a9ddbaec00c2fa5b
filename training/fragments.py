"""What is trained, wherever a ZeRO stage keeps it: this rank's parts of the fp32 weights, by the parameters' names, in place.

Each stage cuts the weights over the ranks in a way of its own. All that needs them (export, moving average, its checkpoints) goes through here.
With training/engine.py the only file that knows DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from training.process_group import Ranks

if TYPE_CHECKING:
    import torch

Weights = dict[str, "torch.Tensor"]


def of(engine: Any) -> Weights:
    """Engine -> this rank's parts of the trained parameters' fp32 values, by name; writing to them writes to the model's master weights.

    A parameter of which this rank holds nothing is not there. After a write call `refresh`.
    """
    from deepspeed.utils import safe_get_local_fp32_param

    held: Weights = {}
    for name, parameter in _trained(engine):
        if hasattr(parameter, "ds_id"):  # ZeRO 3
            held[name] = safe_get_local_fp32_param(parameter).detach()
        elif hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2, and bf16
            if parameter._hp_mapping is not None:
                held[name] = parameter._hp_mapping.hp_fragment.detach()
        else:
            held[name] = parameter.data
    return held


def refresh(engine: Any) -> None:
    """Makes the weights that the model computes with what the fp32 fragments are. Every rank must call it."""
    if hasattr(next(iter(_trained(engine)))[1], "ds_id"):
        held = of(engine)
        for name, parameter in _trained(engine):
            parameter.ds_tensor.data.copy_(held[name])  # type: ignore[attr-defined]
        persistent = engine.optimizer.persistent_parameters  # small ones that ZeRO 3 keeps whole
        if persistent:
            persistent[0].partition(persistent, has_been_updated=False)
            persistent[0].all_gather(persistent)
    elif hasattr(engine.optimizer, "update_lp_params"):
        engine.optimizer.update_lp_params()


def whole(engine: Any, keep: bool) -> Weights:
    """Engine -> the whole fp32 values of the trained parameters on the CPU, by name ({} unless `keep`). Every rank must call it: parts are gathered."""
    from deepspeed.utils import safe_get_full_fp32_param

    values: Weights = {}
    for name, parameter in _trained(engine):
        master = safe_get_full_fp32_param(parameter)
        if keep:
            values[name] = (parameter.data if master is None else master).detach().float().cpu().clone()
    return values


@contextmanager
def swapped(engine: Any, other: Weights) -> Iterator[None]:
    """For the length of the block the model computes with `other` (parts as of `of`), which holds the model's own meanwhile. Every rank must enter it."""
    _swap(engine, other)
    try:
        yield
    finally:
        _swap(engine, other)


def _swap(engine: Any, other: Weights) -> None:
    for name, mine in of(engine).items():
        kept = mine.clone()
        mine.copy_(other[name])
        other[name].copy_(kept)
    refresh(engine)


def cut(engine: Any, whole: Callable[[str], torch.Tensor], ranks: Ranks) -> Weights:
    """(name -> a whole fp32 tensor, read one at a time) -> this rank's parts of them, cut as those of `of` are."""
    import torch

    parts: Weights = {}
    for name, held in of(engine).items():
        parameter, flat = engine.module.get_parameter(name), whole(name).flatten()
        if hasattr(parameter, "ds_id"):  # equal parts, the last one padded
            padded = torch.nn.functional.pad(flat, (0, held.numel() * ranks.world - flat.numel()))
            part = padded.narrow(0, held.numel() * ranks.rank, held.numel())
        elif hasattr(parameter, "_hp_mapping"):
            address = parameter._hp_mapping.lp_fragment_address
            part = flat.narrow(0, address.start, address.numel)
        else:
            part = flat
        parts[name] = part.to(held.device, held.dtype, copy=True).view(held.shape)
    return parts


def spoilt(engine: Any) -> bool:
    """Whether a weight on this rank is not finite: what becomes of such a gradient where no step is left out (ZeRO 0)."""
    import torch

    return not all(bool(torch.isfinite(part.sum())) for part in of(engine).values())  # a sum: one pass, and no copy


def _trained(engine: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad)
