"""The feed against other loops over the same parquet -> Markdown and raw figures: rows/s, CPU, first batch, rows lost, flat memory.

Each measurement is a process of its own (benchmarks/feed_loops.py) that makes two passes: in the first the feed hashes every file, in the
second it does not, as in all later epochs of a training. The loops take turns; memory is also measured over three times the rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks import made_exports, results
from benchmarks.feed_loops import LOOPS, MICRO_BATCH, PIXELS, THREADS
from training import feed

ROWS = {"labels": 204_800, "images": 3_072}
QUICK = {"labels": 16_384, "images": 512}
MORE = 3  # times the rows, for memory
PASSES = 2
ABOUT = {
    "labels": f"vectors of {made_exports.WIDTH} fp16 and strings, prepared as for the scorer",
    "images": f"the sample's files, decoded to {PIXELS} px",
}


class Run(NamedTuple):
    """One process: a loop over one export. `passes`: what feed_loops.one_pass tells of each."""

    kind: str
    loop: str
    rows: int  # of the export's bucket `train`
    repeat: int
    before: float  # MB of the process before the first row
    passes: list[dict[str, Any]]
    wall: float  # of the whole process, imports included
    cpu: float
    rss: dict[str, float]

    def rate(self, number: int, cost: str) -> float | None:
        """Rows a second of `wall` or `cpu` in a pass; None when rows were lost: it did not do the work."""
        told = self.passes[number]
        return told["rows"] / told[cost] if told["rows"] == self.rows and told[cost] else None

    @property
    def lost(self) -> list[int]:
        return [self.rows - told["rows"] for told in self.passes]


Measured = Callable[[list[str]], dict[str, Any]]


def measure(measured: Measured, work: Path, cache: Path, repeats: int, quick: bool) -> tuple[list[str], list[dict[str, Any]]]:
    """`measured`: a command -> wall, cpu and rss of its process tree. -> (paragraphs of Markdown, every run)."""
    runs: list[Run] = []
    for kind in ROWS:
        rows = (QUICK if quick else ROWS)[kind]
        runs += _compare(measured, work, cache, kind, rows, range(repeats))
        if not quick:
            runs += _compare(measured, work, cache, kind, MORE * rows, range(1))
    return _tell(runs), [run._asdict() for run in runs]


def _compare(measured: Measured, work: Path, cache: Path, kind: str, rows: int, repeats: range) -> Iterator[Run]:
    folder, out = cache / f"feed-{kind}-{rows}", work / "feed.json"
    made_exports.make(folder, kind, rows)
    for path in folder.iterdir():  # into the page cache, for all alike
        path.read_bytes()
    for repeat in repeats:
        loops = list(LOOPS)
        for loop in loops[repeat % len(loops) :] + loops[: repeat % len(loops)]:
            command = [sys.executable, "-m", "benchmarks.feed_loops", str(out), loop, kind, str(folder), "--passes", str(PASSES)]
            cost = measured(command)
            run = Run(kind, loop, rows, repeat, **json.loads(out.read_text()), **cost)
            told = ", ".join(f"{one['rows']} rows in {one['wall']:.1f} s" for one in run.passes)
            print(f"feed {kind} {loop}: {told}", file=sys.stderr, flush=True)
            yield run


def _tell(runs: Sequence[Run]) -> list[str]:
    texts = ["## The feed against other loops over the same files", _conditions()]
    for kind in ROWS:
        mine = [run for run in runs if run.kind == kind]
        texts += [f"### {kind}: {ABOUT[kind]}, {mine[0].rows} rows", results.markdown(HEAD, rate_rows(mine))]
        texts.append(results.markdown(MEMORY_HEAD, memory_rows(mine)))
    return texts


def _conditions() -> str:
    sizes = ", ".join(f"{size} ({kind})" for kind, size in MICRO_BATCH.items())
    return (
        f"Ratios are to the raw loop (pyarrow's read_table and the same `prepare`) of the same repeat, median and range. Micro-batches of {sizes} rows; "
        f"{feed.READERS} threads read and {THREADS} prepare (feed, raw, petastorm's default thread pool). Feed and raw-shuffled shuffle windows of files, the "
        "others nothing; the feed alone keeps an image's rows together, checks rows, ids and held-out images, and in its first pass hashes every file. "
        "First batch: from the start of a pass, imports apart."
    )


RATIOS = ((0, "wall", "raw"), (1, "wall", "raw"), (1, "wall", "raw-shuffled"), (1, "cpu", "raw"))
HEAD = [
    "loop",
    "rows/s, first pass",
    "rows/s, second",
    "ratio, first pass",
    "ratio, second",
    "ratio to raw-shuffled, second",
    "ratio of rows per CPU-s, second",
    "first batch, s (first pass, second)",
    "passes that lost rows",
    "rows lost",
]


def rate_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Runs of one kind -> a row for each loop, from the runs over the smaller export."""
    size, rows = min(run.rows for run in runs), []
    for loop in LOOPS:
        mine = [run for run in runs if (run.loop, run.rows) == (loop, size)]
        lost = [one for run in mine for one in run.lost]
        rates = [_middle([run.rate(number, "wall") for run in mine], ".0f") for number in range(PASSES)]
        told = [results.spread(ratios(runs, loop, *which)) for which in RATIOS]
        first = ", ".join(_middle([run.passes[number]["first"] for run in mine], ".2f") for number in range(PASSES))
        rows.append([loop, *rates, *told, first, f"{sum(one > 0 for one in lost)} of {len(lost)}", str(sum(lost))])
    return rows


def ratios(runs: Sequence[Run], loop: str, number: int, cost: str, bare: str) -> list[float]:
    """Rows a second of a loop over a bare loop's in the same repeat, over the smaller export, where both did all the work."""
    size = min(run.rows for run in runs)
    by_repeat: dict[int, dict[str, float | None]] = {}
    for run in runs:
        if run.rows == size:
            by_repeat.setdefault(run.repeat, {})[run.loop] = run.rate(number, cost)
    pairs = [(rates.get(loop), rates.get(bare)) for rates in by_repeat.values()]
    return sorted(mine / other for mine, other in pairs if mine and other)


MEMORY_HEAD = ["loop", "rows", "MB before the first row", "peak MB", "largest worker, MB"]


def memory_rows(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each loop and size: the largest of the repeats."""
    rows = []
    for loop in LOOPS:
        for size in sorted({run.rows for run in runs}):
            mine = [run for run in runs if (run.loop, run.rows) == (loop, size)]
            worker = max(run.rss.get("worker", 0.0) for run in mine)
            peaks = [max(run.before for run in mine), max(run.rss.get("driver", 0.0) for run in mine)]
            rows.append([loop, str(size), *(f"{one:.0f}" for one in peaks), f"{worker:.0f}" if worker else "-"])
    return rows


def _middle(values: Sequence[float | None], form: str) -> str:
    there = [value for value in values if value is not None]
    return format(median(there), form) if there else "-"
