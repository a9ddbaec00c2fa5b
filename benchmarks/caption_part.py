"""A task of paid captioning against the fake service -> Markdown and raw figures: CPU a request over the bare SDK's, pace, hidden limits, memory.

Each measurement is a process of its own (benchmarks/caption_loops.py), the service another one; the ways of asking take turns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks import results

WAYS = ("ours", "sdk", "aiohttp")
NAMES = {"ours": "a task of the stage", "sdk": "bare google-genai", "aiohttp": "bare aiohttp"}
ROWS = {"cost": 1_000, "pace": 3_200, "limit": 3_600, "memory": 100_000}
QUICK = {"cost": 64, "pace": 640, "limit": 1_200, "memory": 2_000}


class Run(NamedTuple):
    """One measurement. kind: of ROWS; way: of WAYS, "" where there is one; told: its figures (benchmarks/caption_loops.py)."""

    kind: str
    way: str
    repeat: int
    told: dict[str, float]


def measure(
    measured: Callable[[list[str]], dict[str, Any]], work: Path, cache: Path, repeats: int, quick: bool
) -> tuple[list[str], list[dict[str, Any]]]:
    """`measured`: runs a command. -> (paragraphs of Markdown, every run)."""
    rows, out, runs = QUICK if quick else ROWS, work / "caption.json", list[Run]()
    for repeat in range(repeats):
        for way in [*WAYS[repeat % len(WAYS) :], *WAYS[: repeat % len(WAYS)]]:
            runs += [_one(measured, out, kind, way, rows[kind], repeat) for kind in ("cost", "pace")]
    for kind in ("limit", "memory"):
        runs.append(_one(measured, out, kind, "", rows[kind], 0))
    return tell(runs, rows), [run._asdict() for run in runs]


def _one(measured: Callable[[list[str]], dict[str, Any]], out: Path, kind: str, way: str, rows: int, repeat: int) -> Run:
    measured([sys.executable, "-m", "benchmarks.caption_loops", str(out), kind, *([way] if way else []), str(rows)])
    run = Run(kind, way, repeat, json.loads(out.read_text()))
    print(f"caption {kind} {way}: {run.told}", file=sys.stderr, flush=True)
    return run


def tell(runs: Sequence[Run], rows: dict[str, int]) -> list[str]:
    """Every run -> paragraphs."""
    about = (
        f"{rows['cost']:,} requests with a picture of 60 kB, 64 in flight, one process; CPU of the asking process alone. The task of the stage renders "
        "a request for each row, checks answers and journals every call; the bare ways send one prompt and schema for all rows and do none of it. To read, "
        "decode and render the picture is in no figure: all send bytes that are there. Ratio: of the same repeat, median and range. Rate: "
        f"{rows['pace']:,} answers after 200 ms each, 64 in flight, start and end of the task in it; 1 is 320 a second. The server has the other core."
    )
    told = {(way, kind): [run.told for run in runs if (run.way, run.kind) == (way, kind)] for way in WAYS for kind in ("cost", "pace")}
    table = [
        [
            NAMES[way],
            f"{median(one['cpu_ms'] for one in told[way, 'cost']):.2f}",
            results.spread(ratios(runs, way, "sdk")),
            results.spread(sorted(one["share"] for one in told[way, "pace"])),
        ]
        for way in WAYS
    ]
    (limit,) = [run.told for run in runs if run.kind == "limit"]
    (memory,) = [run.told for run in runs if run.kind == "memory"]
    found = [
        f"A hidden limit of 40 calls/s where the config believes in 80: {limit['used']:.3f} of it is used, {100 * limit['refused']:.2f} % of the calls "
        f"are refused (both without the first 10 s, in which the limit is found); halved, it is found after {limit['found_s']:.0f} s.",
        f"Memory over {rows['memory']:,} requests: {memory['early_mb']:.0f} MB at most in the first tenth, {memory['late_mb']:.0f} MB after.",
    ]
    head = ["way", "CPU-ms a request", "ratio to the bare SDK", "share of the ideal rate"]
    return ["## A task of paid captioning", about, results.markdown(head, table), *found]


def ratios(runs: Sequence[Run], way: str, to: str) -> list[float]:
    """CPU of one request over that of another way: each repeat's own, ascending."""
    cpu = {(run.way, run.repeat): run.told["cpu_ms"] for run in runs if run.kind == "cost"}
    return sorted(ms / cpu[to, repeat] for (one, repeat), ms in cpu.items() if one == way)
