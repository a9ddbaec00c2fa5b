"""Measurements -> the ratios that are published, and Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from statistics import median
from typing import NamedTuple

KINDS = {"bare": "bare loop", "spark": "Studbook", "daft": "Daft", "ray": "Ray Data"}


class Run(NamedTuple):
    """One measured command."""

    part: str
    kind: str  # of KINDS
    images: int
    repeat: int
    wall: float  # seconds until the command ended
    cpu: float  # seconds, whole process tree
    rss: dict[str, float]  # kind of process -> peak MB of its largest


class Slope(NamedTuple):
    """Median over the repeats of a straight line through two sizes: ms of one more image, seconds of none."""

    cpu_ms: float
    cpu_start: float
    wall_ms: float
    wall_start: float


def slope(runs: Iterable[Run]) -> Slope:
    """Runs of one part and kind at two sizes, both in every repeat -> Slope."""
    by_repeat: dict[int, list[Run]] = {}
    for run in runs:
        by_repeat.setdefault(run.repeat, []).append(run)
    lines = []
    for pair in by_repeat.values():
        small, large = sorted(pair, key=lambda run: run.images)
        more = large.images - small.images
        cpu, wall = (large.cpu - small.cpu) / more, (large.wall - small.wall) / more
        lines.append((cpu * 1000, small.cpu - cpu * small.images, wall * 1000, small.wall - wall * small.images))
    return Slope(*(median(line[column] for line in lines) for column in range(4)))


def of(runs: Iterable[Run], part: str, kind: str) -> list[Run]:
    return [run for run in runs if (run.part, run.kind) == (part, kind)]


def kinds_of(runs: Iterable[Run], part: str) -> list[str]:
    """The pipelines that a part was measured with, in the order of KINDS."""
    return sorted({run.kind for run in runs if run.part == part}, key=list(KINDS).index)


def ratios(runs: Sequence[Run], part: str, kind: str = "spark", to: str = "bare") -> list[float]:
    """CPU of one more image by `kind` over that by `to`: each repeat's own, ascending."""
    repeats = sorted({run.repeat for run in runs if run.part == part})
    pairs = [[slope(run for run in of(runs, part, one) if run.repeat == repeat) for one in (kind, to)] for repeat in repeats]
    return sorted(mine.cpu_ms / other.cpu_ms for mine, other in pairs)


def cost_rows(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each part and kind."""
    rows = []
    for part in dict.fromkeys(run.part for run in runs):
        for kind in kinds_of(runs, part):
            mine = of(runs, part, kind)
            line = slope(mine)
            whole = [_at(mine, size) for size in sorted({run.images for run in mine})]
            told = spread(ratios(runs, part, kind)) if kind != "bare" else "1"
            marginal = [f"{line.cpu_ms:.2f}", told, f"{line.wall_ms:.2f}"]
            rows.append([part, KINDS[kind], *marginal, f"{line.cpu_start:.1f}", f"{line.wall_start:.1f}", "; ".join(whole)])
    return rows


COST_HEAD = [
    "part",
    "pipeline",
    "CPU-ms of one more image",
    "of the bare loop's",
    "wall ms of one more image",
    "start-up CPU-s",
    "start-up wall s",
    "whole run: images: CPU-ms an image, wall s",
]


def _at(runs: Sequence[Run], images: int) -> str:
    mine = [run for run in runs if run.images == images]
    return f"{images}: {median(run.cpu for run in mine) * 1000 / images:.0f} ms, {median(run.wall for run in mine):.1f} s"


def memory_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Peak MB of each kind of process over all repeats of a part's largest size."""
    rows = []
    for part in dict.fromkeys(run.part for run in runs):
        for kind in kinds_of(runs, part):
            largest = max(run.images for run in of(runs, part, kind))
            mine = [run.rss for run in of(runs, part, kind) if run.images == largest]
            told = {name: max(rss.get(name, 0.0) for rss in mine) for name in sorted({name for rss in mine for name in rss})}
            rows.append([part, KINDS[kind], str(largest), *(f"{told[name]:.0f}" if name in told else "-" for name in MEMORY)])
    return rows


def stage_rows(said: str) -> list[list[str]]:
    """What jobs.run_all printed -> (stage, seconds, what it said of having nothing to do)."""
    rows = []
    for block in re.split(r"^== \d+/\d+ ", said, flags=re.MULTILINE)[1:]:
        name, _, rest = block.partition("\n")
        took = re.search(rf"^   {re.escape(name)}: ([\d.]+) s$", rest, re.MULTILINE)
        idle = [line for line in rest.splitlines() if "nothing to do" in line]
        rows.append([name, took[1] if took else "?", "; ".join(idle)])
    return rows


MEMORY = ("driver", "JVM", "worker")
MEMORY_HEAD = ["part", "pipeline", "images", "driver (Python), MB", "JVM, MB", "largest Python worker, MB"]


def spread(values: Sequence[float]) -> str:
    """Ascending values -> their median and range."""
    return f"{median(values):.3f} ({values[0]:.3f} to {values[-1]:.3f})" if values else "-"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
