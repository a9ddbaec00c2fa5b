"""Scores of held-out images by the head and by baselines -> SRCC, pairwise accuracy, intervals and a verdict.

A scope is all rows, or the originals and one kind of degradation (`blur` is the views `blur:1`, `blur:2`). SRCC is
Spearman's rank correlation of score and target with average ranks; 0 where one of them is constant. Pairwise accuracy
is the share of degraded views that score below their own original, a tie counts one half. Intervals are percentiles over
RESAMPLES bootstrap draws of whole *images* (views of one image are not independent), the same draws for every scorer, so
that the difference of two scorers has an interval of its own. The head beats the baselines in a scope when the interval
of its SRCC minus that of the best baseline there is above 0. Two choices favour the baselines: the best one is the best on
the held-out rows, and each is fitted for its scope (see baselines.py) while the head is one for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
COVERAGE = 0.95
OVERALL = "overall"
ORIGINAL = "original"
CELLS = 8_000_000  # draws x rows in one array

Floats = npt.NDArray[np.floating[Any]]
Numbers = npt.NDArray[Any]
Rows = npt.NDArray[np.intp]  # row numbers


def evaluate(rows: Mapping[str, Numbers], head: Floats, baselines: Mapping[str, Mapping[str, Floats]], seed: int) -> dict[str, Any]:
    """(held-out rows with image_id, view, value; head scores [n]; scope -> name -> baseline scores [n]) -> the evaluation as plain JSON."""
    _, image = np.unique(rows["image_id"], return_inverse=True)
    draws = draw_images(int(image.max()) + 1, seed)
    scopes = {name: _measure(rows, image, chosen, draws, head, baselines[name]) for name, chosen in find_scopes(rows["view"]).items()}
    return {
        "images": int(image.max()) + 1,
        "rows": len(image),
        "metric": "srcc",
        "resamples": RESAMPLES,
        "coverage": COVERAGE,
        "seed": seed,
        "beats_baselines": scopes[OVERALL]["verdict"] == "beats",
        "scopes": scopes,
    }


def shorten(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluation -> what a report shows, small enough for a tag: without the intervals of the baselines that are not the best."""
    scopes = {}
    for name, scope in evaluation["scopes"].items():
        best = scope["baselines"][scope["best_baseline"]]
        points = {baseline: metrics["srcc"][0] for baseline, metrics in scope["baselines"].items()}
        scopes[name] = {**scope, "best_baseline": {"name": scope["best_baseline"], **best}, "baselines": points}
    return {**evaluation, "scopes": scopes}


def summarise(evaluation: Mapping[str, Any]) -> str:
    """Evaluation -> two lines for a person: overall, then the verdict of each degradation."""
    whole = evaluation["scopes"][OVERALL]
    words = {"beats": "the head beats the baselines", "unclear": "no clear difference", "loses": "the head LOSES to a baseline"}
    line = (
        f"held out {evaluation['images']} images, {evaluation['rows']} rows: SRCC {show(whole['head']['srcc'])}, best baseline "
        f"({whole['best_baseline']}) {show(whole['baselines'][whole['best_baseline']]['srcc'])}, "
        f"difference {show(whole['difference'])}: {words[whole['verdict']]}"
    )
    kinds = {name: scope for name, scope in evaluation["scopes"].items() if name != OVERALL}
    parts = [f"{name} {scope['verdict']} {show(scope['difference'])} ({scope['best_baseline']})" for name, scope in kinds.items()]
    return line + "\nby degradation, SRCC of head minus best baseline: " + ", ".join(parts)


def draw_images(images: int, seed: int) -> npt.NDArray[np.int64]:
    """Number of images -> [1 + RESAMPLES, images]: how often each image is in a draw; the first draw has each of them once."""
    drawn = np.random.default_rng(seed).multinomial(images, np.full(images, 1.0 / images), size=RESAMPLES)
    return np.concatenate([np.ones((1, images), dtype=np.int64), drawn])


def find_scopes(views: Numbers) -> dict[str, Rows]:
    """View names [n] -> scope name -> row numbers: overall first, then the kinds of degradation by name."""
    kinds = np.array([str(view).split(":")[0] for view in views])
    degradations = sorted(set(kinds) - {ORIGINAL})
    return {OVERALL: np.arange(len(views))} | {name: np.flatnonzero((kinds == ORIGINAL) | (kinds == name)) for name in degradations}


def find_pairs(views: Numbers, image: Rows, chosen: Rows) -> Rows:
    """(views [n], image numbers [n], rows of a scope) -> [p, 2]: row of an original, row of a degraded view of the same image."""
    original = {image[row]: row for row in chosen if views[row] == ORIGINAL}
    pairs = [(original[image[row]], row) for row in chosen if views[row] != ORIGINAL and image[row] in original]
    return np.array(pairs, dtype=np.intp).reshape(-1, 2)


def srcc(scores: Floats, values: Floats, times: Numbers) -> Floats:
    """(scores [n], targets [n], how often each row counts [draws, n]) -> Spearman's correlation of each draw [draws]."""
    if times.size > CELLS:  # memory: a few arrays of this size
        return np.concatenate([srcc(scores, values, part) for part in np.array_split(times, min(len(times), -(-times.size // CELLS)))])
    one, other = _ranks(scores, times), _ranks(values, times)
    count = times.sum(axis=1, keepdims=True)
    one = one - (times * one).sum(axis=1, keepdims=True) / count
    other = other - (times * other).sum(axis=1, keepdims=True) / count
    spread = np.sqrt((times * one**2).sum(axis=1) * (times * other**2).sum(axis=1))
    together = (times * one * other).sum(axis=1)
    return np.asarray(np.divide(together, spread, out=np.zeros(len(times)), where=spread > 0))


def correlate(scores: Floats, values: Floats) -> float:
    """Spearman's correlation of the rows as they are."""
    return float(srcc(scores, values, np.ones((1, len(scores)), dtype=np.int64))[0])


def pairwise_accuracy(scores: Floats, pairs: Rows, times: Numbers) -> Floats:
    """(scores [n], pairs [p, 2] of better and worse row, how often each counts [draws, p]) -> accuracy of each draw or NaN."""
    gap = scores[pairs[:, 0]] - scores[pairs[:, 1]]
    right = np.where(gap > 0, 1.0, np.where(gap == 0, 0.5, 0.0))
    count = times.sum(axis=1)
    return np.asarray(np.divide(times @ right, count, out=np.full(len(times), np.nan), where=count > 0))


def _ranks(values: Floats, times: Numbers) -> Floats:
    """Average ranks [draws, n] of `values` when row i occurs times[:, i] times."""
    _, level = np.unique(values, return_inverse=True)
    order = np.argsort(level, kind="stable")
    starts = np.flatnonzero(np.diff(level[order], prepend=-1))
    size = np.add.reduceat(times[:, order], starts, axis=1)
    below = np.cumsum(size, axis=1) - size
    return np.asarray((below + (size + 1) / 2.0)[:, level])


def _measure(
    rows: Mapping[str, Numbers], image: Rows, chosen: Rows, draws: Numbers, head: Floats, baselines: Mapping[str, Floats]
) -> dict[str, Any]:
    """One scope -> counts, metrics of every scorer as [point, low, high], the best baseline, the difference to it, the verdict."""
    scorers = {"head": head, **baselines}
    pairs = find_pairs(rows["view"], image, chosen)
    values, times, of_pairs = rows["value"][chosen], draws[:, image[chosen]], draws[:, image[pairs[:, 1]]]
    ranked = {name: srcc(scores[chosen], values, times) for name, scores in scorers.items()}
    correct = {name: pairwise_accuracy(scores, pairs, of_pairs) for name, scores in scorers.items()}
    metrics = {name: {"srcc": interval(ranked[name]), "pairwise_accuracy": interval(correct[name])} for name in ranked}
    best = max(baselines, key=lambda name: ranked[name][0])
    difference = interval(ranked["head"] - ranked[best])
    verdict = "beats" if difference[1] > 0 else "loses" if difference[2] < 0 else "unclear"
    return {
        "images": len(np.unique(image[chosen])),
        "rows": len(chosen),
        "pairs": len(pairs),
        "head": metrics.pop("head"),
        "baselines": metrics,
        "best_baseline": best,
        "difference": difference,
        "verdict": verdict,
    }


def interval(draws: Floats) -> list[float]:
    """Values of the draws -> [value of the data itself, low, high], 4 digits; draws without a value are left out."""
    tail = (1.0 - COVERAGE) / 2.0 * 100.0
    known = draws[1:][~np.isnan(draws[1:])]
    if np.isnan(draws[0]) or not len(known):
        return []
    low, high = np.percentile(known, [tail, 100.0 - tail])
    return [round(float(value), 4) for value in (draws[0], low, high)]


def show(interval: list[float]) -> str:
    return f"{interval[0]:.2f} [{interval[1]:.2f}, {interval[2]:.2f}]"
