"""Parameters and how many of them are trained -> bytes of a rank under each ZeRO stage, for the plan of any trainer."""

from __future__ import annotations

from collections.abc import Iterator

WORLDS = (1, 8, 64)
GIB = 2**30


def memory(parameters: int, trained: int, precision: str, ema: bool, stage: int, world: int) -> float:
    """-> bytes a rank, by `formula`."""
    word, master = (2, 4) if precision == "bf16" else (4, 4 if stage else 0)
    weights, gradients = word * parameters, word * trained
    state = (master + 8 + (4 if ema else 0)) * trained
    return weights / (world if stage == 3 else 1) + gradients / (world if stage >= 2 else 1) + state / (world if stage >= 1 else 1)


def formula(precision: str, ema: bool, besides: str = "") -> Iterator[str]:
    """The lines that say what `memory` counts. besides: what else stands in the memory of a rank and is not in it."""
    word, masters = (2, "4 T masters") if precision == "bf16" else (4, "4 T masters (from ZeRO 1 on)")
    yield f"bytes a rank, {precision}: {word} P weights + {word} T gradients + {masters} + 8 T Adam moments{' + 4 T EMA' if ema else ''};"
    yield "P parameters, T of them trained. On W ranks ZeRO 1 divides masters, moments and EMA by W, 2 the gradients too, 3 the weights too."
    other = f", and {besides}" if besides else ""
    yield f"Not in it: activations, the collectives' buffers, the step's fp32 gradients{other}."


def table(parameters: int, trained: int, precision: str, ema: bool) -> Iterator[str]:
    """-> lines: GiB by stage and number of ranks."""
    yield "GiB a rank  " + "".join(f"{f'{world} ranks' if world > 1 else '1 rank':>12}" for world in WORLDS)
    for stage in range(4):
        cells = (memory(parameters, trained, precision, ema, stage, world) / GIB for world in WORLDS)
        yield f"ZeRO {stage}      " + "".join(f"{cell:12.3f}" for cell in cells)


def many(count: int) -> str:
    return f"{count / 1e9:.3f} B" if count >= 1e8 else f"{count / 1e6:.3f} M"
