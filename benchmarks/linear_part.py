"""The embed stage from 3,000 to 30,000 images -> Markdown and raw figures: whether the cost of an image and the drivers' memory stay.

Small JPEGs and no model, in waves of 3,000 rows and tasks of 500. An image's cost is told between sizes, so that start-up is not taken for a
saving of the larger ones; every size is whole waves, so that what a wave costs by itself is in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks import pictures, results
from benchmarks.bench import Bench, Part
from benchmarks.results import Run

PART = Part("linear", "colour-grid", (3_000, 15_000, 30_000), pictures.TINY, waves=(3_000, 500))
QUICK = PART._replace(sizes=(4, 8, 24), waves=(8, 4))


def measure(bench: Bench, repeats: int, quick: bool) -> tuple[list[str], list[dict[str, Any]]]:
    """-> (paragraphs of Markdown, every run)."""
    part = QUICK if quick else PART
    bench.prepare([part])
    runs = bench.compare(part, ["spark"], repeats)
    small, middle, large = (f"{size:,}" for size in part.sizes)
    told = f"CPU of one more image between {middle} and {large} images, over that between {small} and {middle}"
    told += (
        f": {results.spread(growth(runs, part.sizes))}. Rows a wave and a task: {part.waves}. Start-up is in the table's costs of an image."
    )
    return ["## Linear cost", told, results.markdown(HEAD, rows(runs))], [run._asdict() for run in runs]


def growth(runs: Sequence[Run], sizes: Sequence[int]) -> list[float]:
    """CPU of one more image in the upper range of sizes over that in the lower one: each repeat's own, ascending."""
    small, middle, large = sizes
    cost = {(run.images, run.repeat): run.cpu for run in runs}

    def each(lower: int, upper: int, repeat: int) -> float:
        return (cost[upper, repeat] - cost[lower, repeat]) / (upper - lower)

    return sorted(each(middle, large, repeat) / each(small, middle, repeat) for repeat in {run.repeat for run in runs})


HEAD = ["images", "CPU-ms an image", "wall s", *(f"{kind}, MB" for kind in results.MEMORY)]


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each size: medians, and the largest process of each kind in any repeat."""
    told = []
    for images in sorted({run.images for run in runs}):
        mine = [run for run in runs if run.images == images]
        memory = [f"{max(run.rss.get(kind, 0.0) for run in mine):.0f}" for kind in results.MEMORY]
        costs = [f"{1000 * median(run.cpu for run in mine) / images:.2f}", f"{median(run.wall for run in mine):.1f}"]
        told.append([f"{images:,}", *costs, *memory])
    return told
