"""The loop's step time against bare DDP on the same two gloo ranks -> Markdown and raw figures: ratio, data wait, checkpoint stall, memory.

Each measurement is a process tree of its own (benchmarks/step_loops.py); the ways of training take turns. All must end with the same weights.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from benchmarks import made_exports, results
from benchmarks.step_loops import HOW, MICRO_BATCH, RANKS

STEPS, CHECKPOINT_EVERY = 42, 14
QUICK_HOW, QUICK_STEPS = ("ddp-memory", "zero-1"), 4
EVERY = 1_000  # steps between two checkpoints by default: what the stall is told as a share of
CLOSE = 1e-6  # relative, of the norm of all weights: sums in another order
BARE = ("ddp-memory", "ddp-feed")


class Run(NamedTuple):
    """One training. `steps`, `cpu_steps`: seconds of each step that counts, and rank 0's CPU seconds in it.

    `waits`: shares of the time that a rank waited for rows; `weights`: the norm of what came out.
    """

    how: str
    repeat: int
    steps: list[float]
    cpu_steps: list[float]
    waits: list[float]
    checkpoints: list[float]
    weights: float
    wall: float
    cpu: float
    rss: dict[str, float]


def measure(
    measured: Callable[[list[str]], dict[str, Any]], work: Path, cache: Path, repeats: int, quick: bool
) -> tuple[list[str], list[dict[str, Any]]]:
    """`measured`: a command -> wall, cpu and rss of its process tree. -> (paragraphs of Markdown, every run)."""
    ways, steps = (QUICK_HOW, QUICK_STEPS) if quick else (HOW, STEPS)
    rows = steps * RANKS * MICRO_BATCH
    export, out, folder = cache / f"step-{rows}", work / "step.json", work / "training"
    made_exports.make(export, "labels", rows, 512)
    runs: list[Run] = []
    for repeat in range(repeats):
        for how in [*ways[repeat % len(ways) :], *ways[: repeat % len(ways)]]:
            shutil.rmtree(folder, ignore_errors=True)
            command = [sys.executable, "-m", "benchmarks.step_loops", str(out), how, str(export), str(folder)]
            cost = measured([*command, "--checkpoint-every", str(CHECKPOINT_EVERY)])
            runs.append(run := Run(how, repeat, **({"checkpoints": []} | json.loads(out.read_text())), **cost))
            print(f"step {how}: {mean(run.steps):.3f} s a step, median {median(run.steps):.3f}", file=sys.stderr, flush=True)
    check_same(runs)
    return _tell(runs, steps), [run._asdict() for run in runs]


def check_same(runs: Sequence[Run]) -> None:
    """Raises RuntimeError when a way of training came to other weights: it did other work."""
    first = runs[0]
    for run in runs:
        if abs(run.weights / first.weights - 1) > CLOSE:
            raise RuntimeError(f"step: weights of norm {run.weights} by {run.how}, {first.weights} by {first.how}")


def _tell(runs: Sequence[Run], steps: int) -> list[str]:
    about = (
        f"A transformer of 12.6M parameters, fp32, {RANKS} gloo ranks of one thread, {steps} steps of {RANKS * MICRO_BATCH} rows. Ratio: mean step time over "
        f"that of a bare loop in the same repeat, median and range. In a training this short the loop sums its metrics over the ranks, and tells them, "
        f"at every step; in one of {loop_steps()} steps or more at every 50th. Stall: seconds of one checkpoint (fsync included), and its share of the time "
        f"with one every {EVERY:,} steps."
    )
    return ["## A step of the loop against bare DistributedDataParallel", about, results.markdown(HEAD, step_rows(runs))]


def loop_steps() -> int:
    from training.loop import WINDOW, WINDOWS

    return WINDOW * WINDOWS


HEAD = [
    "way",
    "mean step, s",
    "median step, s",
    *(f"ratio to {bare}" for bare in BARE),
    "CPU-s a step, rank 0",
    "data wait, %",
    "checkpoint, s",
    "stall, %",
    "largest rank, MB",
]


def step_rows(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each way of training."""
    rows = []
    for how in dict.fromkeys(run.how for run in sorted(runs, key=lambda run: HOW.index(run.how))):
        mine = [run for run in runs if run.how == how]
        step = median(mean(run.steps) for run in mine)
        times = [f"{step:.3f}", f"{median(one for run in mine for one in run.steps):.3f}"]
        told = [results.spread(ratios(runs, how, bare)) for bare in BARE]
        told.append(f"{median(mean(run.cpu_steps) for run in mine):.3f}")
        wait = f"{100 * median(mean(run.waits) for run in mine):.2f}"
        stalls = [one for run in mine for one in run.checkpoints]
        stall = [f"{median(stalls):.2f}", f"{100 * median(stalls) / (EVERY * step + median(stalls)):.2f}"] if stalls else ["-", "-"]
        rows.append([how, *times, *told, wait, *stall, f"{max(run.rss.get('worker', 0.0) for run in mine):.0f}"])
    return rows


def ratios(runs: Sequence[Run], how: str, bare: str) -> list[float]:
    """Mean step time of a way over a bare loop's: each repeat's own, ascending."""
    times = {(run.how, run.repeat): mean(run.steps) for run in runs}
    return sorted(time / times[bare, repeat] for (one, repeat), time in times.items() if one == how and (bare, repeat) in times)
