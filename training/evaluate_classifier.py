"""What a classifier gives for held-out images -> precision and recall of each class, calibration, `other`, and what it may have learned instead.

Every figure is [value, low, high]: percentiles over bootstrap draws of whole groups of near-duplicates (evaluate_scorer.draw_images), [] where no
image can tell it. Of two images that are both right every draw is right, and the draws know no doubt: so the interval of a share is at least
Wilson's for as many groups, and that of balanced accuracy, the mean recall of the classes that are held out, at least what Wilson's of the
recalls add up to (MOVER: Zou and Donner 2008, "Construction of confidence limits about effect measures"). Two guesses stand beside the classifier:
the most frequent class of the training images (`beats_baselines`: better than it beyond the interval), and that of the
collection (`origin`) or source an image is from. Where a classifier is not clearly better than the second, nothing here tells whether it knows
the classes or the collections that they were taken from: `confounded`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from training.evaluate_scorer import COVERAGE, RESAMPLES, draw_images, interval
from training.temperature import BINS, Temperature, count_bins, expected_error
from udfs.class_head import softmax

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

OF_CLASS = ("precision", "recall")
Z = 1.959964  # of a 95 % interval, as COVERAGE
ALONE = ("origin", "source")  # columns that may tell a class without a look at the image

Numbers = npt.NDArray[Any]
Rows = Mapping[str, Numbers]


class Given(NamedTuple):
    """Held-out images: the number of their class [n], logits [n, classes], and how the head reads these."""

    target: Numbers
    logits: Numbers
    temperature: float
    other_below: float

    @property
    def said(self) -> Numbers:
        return self.logits.argmax(axis=1)


def evaluate(
    classes: Sequence[str], buckets: Mapping[str, Rows], logits: Numbers, temperature: Temperature, other_below: float, seed: int
) -> dict[str, Any]:
    """(classes in the order of the logits; rows with class_name, near_group, origin, source of all buckets; logits of the held-out rows)
    -> the evaluation as plain JSON."""
    train, held_out = buckets["train"], buckets["held_out"]
    given = Given(number(classes, held_out["class_name"]), logits, temperature.value, other_below)
    _, group = np.unique(held_out["near_group"], return_inverse=True)
    guesses = {column: guess_alone(classes, train, held_out, column) for column in ALONE}
    draws = draw_images(int(group.max()) + 1, seed)
    sums = tally(given, len(classes), guesses, group, draws)
    told = measure(sums)
    figures = find_figures(given, len(classes), group, told)
    usual = Counter(train["class_name"].tolist()).most_common(1)[0][0]
    majority = _majority(sums, list(classes).index(usual))
    difference = interval(told["balanced_accuracy"] - majority)
    difference[1] = min(difference[1], round(figures["balanced_accuracy"][1] - float(majority[0]), 4))
    confounding = {column: _confounding(sums, told, column, buckets) for column in ALONE}
    return {
        "rows": len(group),
        "groups": len(draws[0]),
        "train_rows": len(train["class_name"]),
        "metric": "balanced_accuracy",
        "resamples": RESAMPLES,
        "coverage": COVERAGE,
        "seed": seed,
        **{name: found for name, found in figures.items() if name not in OF_CLASS},
        "majority": {"class": usual, "balanced_accuracy": interval(majority), "difference": difference},
        "beats_baselines": _beyond(difference),
        "confounded": not all(one["better"] for one in confounding.values()),
        "confounding": confounding,
        "classes": {name: _class(place, name, sums, figures, buckets) for place, name in enumerate(classes)},
        "confusion": confuse(given, len(classes)).tolist(),
        "temperature": temperature._asdict(),
        "other_below": other_below,
        "reliability": {when: sums[when][0].reshape(BINS, 3).tolist() for when in ("before", "after")},
    }


def shorten(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluation -> what a report shows, small enough for a tag."""
    return {name: value for name, value in evaluation.items() if name not in ("confusion", "reliability")}


def number(classes: Sequence[str], names: Numbers) -> Numbers:
    """Class names [n] -> their places in `classes` [n]."""
    places = {name: place for place, name in enumerate(classes)}
    return np.array([places[str(name)] for name in names], dtype=np.intp)


def confuse(given: Given, classes: int) -> Numbers:
    """-> [classes, classes]: how many images of the row's class were taken for the column's."""
    table = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(table, (given.target, given.said), 1)
    return table


def guess_alone(classes: Sequence[str], train: Rows, held_out: Rows, column: str) -> Numbers:
    """-> for each held-out row the class that most training rows of its `column` have, or that most rows have where there are none."""
    counted: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for value, one in zip(train[column].tolist(), number(classes, train["class_name"]).tolist(), strict=True):
        counted[value][one] += 1
    usual = sum(counted.values(), Counter()).most_common(1)[0][0]
    known = {value: of_value.most_common(1)[0][0] for value, of_value in counted.items()}
    return np.array([known.get(value, usual) for value in held_out[column].tolist()], dtype=np.intp)


def tally(given: Given, classes: int, guesses: Mapping[str, Numbers], group: Numbers, draws: Numbers) -> dict[str, Numbers]:
    """-> what adds up over images, by name, in each draw [draws, k]; a draw says how often each group counts."""
    from scipy.sparse import csr_matrix

    target, said = given.target, given.said
    right = target == said
    before, after = (softmax(given.logits, temperature).max(axis=1) for temperature in (1.0, given.temperature))
    covered = after >= given.other_below
    columns = {
        "true": _mark(target, classes),
        "said": _mark(said, classes),
        "hit": _mark(target, classes, right),
        "covered": csr_matrix(np.stack([covered, covered & right], axis=1).astype(np.float64)),
        "before": csr_matrix(count_bins(before, right).reshape(len(target), -1)),
        "after": csr_matrix(count_bins(after, right).reshape(len(target), -1)),
    }
    columns |= {f"alone_{column}": _mark(target, classes, target == guess) for column, guess in guesses.items()}
    of_group = csr_matrix((np.ones(len(group)), (group, np.arange(len(group)))), shape=(draws.shape[1], len(group)))
    times = draws.T.astype(np.float64)
    return {name: np.asarray(((of_group @ column).T @ times).T) for name, column in columns.items()}


def measure(sums: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """Sums of `tally` -> metrics of each draw: [draws], and of each class [draws, classes]; NaN where no image can tell."""
    true, said, hit = (sums[name] for name in ("true", "said", "hit"))
    recall, (covered, covered_right) = _share(hit, true), sums["covered"].T
    return {
        "balanced_accuracy": _mean(recall),
        "accuracy": _share(hit.sum(axis=1), true.sum(axis=1)),
        "coverage_of_classes": _share(covered, true.sum(axis=1)),
        "accuracy_of_classes": _share(covered_right, covered),
        "calibration_error_before": expected_error(sums["before"].reshape(-1, BINS, 3)),
        "calibration_error": expected_error(sums["after"].reshape(-1, BINS, 3)),
        "precision": _share(hit, said),
        "recall": recall,
    }


def find_figures(given: Given, classes: int, group: Numbers, told: Mapping[str, Numbers]) -> dict[str, Any]:
    """Metrics of each draw -> [value, low, high] by name, of OF_CLASS one a class; never narrower than the groups that tell them allow."""
    found: dict[str, Any] = {name: interval(values) for name, values in told.items() if values.ndim == 1}
    for what, place in (("precision", given.said), ("recall", given.target)):
        groups = [len(np.unique(group[place == one])) for one in range(classes)]
        found[what] = [widen(interval(told[what][:, one]), groups[one]) for one in range(classes)]
    known = [one for one in found["recall"] if one]
    low, high = (float(np.sqrt(sum((one[0] - one[side]) ** 2 for one in known))) / len(known) for side in (1, 2))
    value, drawn_low, drawn_high = found["balanced_accuracy"]
    found["balanced_accuracy"] = [value, round(min(drawn_low, value - low), 4), round(max(drawn_high, min(1.0, value + high)), 4)]
    groups_covered = len(np.unique(group[softmax(given.logits, given.temperature).max(axis=1) >= given.other_below]))
    found["accuracy"], found["coverage_of_classes"] = (
        widen(found[name], len(np.unique(group))) for name in ("accuracy", "coverage_of_classes")
    )
    found["accuracy_of_classes"] = widen(found["accuracy_of_classes"], groups_covered)
    return found


def widen(found: list[float], groups: int) -> list[float]:
    """[share, low, high] of so many groups -> the same, at least as wide as Wilson's interval (1927). [] stays so."""
    if not found:
        return found
    share, low, high = found
    centre, reach = share + Z**2 / (2 * groups), Z * np.sqrt(share * (1 - share) / groups + Z**2 / (4 * groups**2))
    lowest, highest = ((centre + side * reach) / (1 + Z**2 / groups) for side in (-1, 1))
    return [share, round(min(low, float(lowest)), 4), round(max(high, min(1.0, float(highest))), 4)]


def balanced_accuracy(right: Numbers, target: Numbers, times: Numbers) -> Numbers:
    """(which rows are right [n], their class numbers [n], how often each counts [draws, n]) -> of each draw [draws]."""
    every = [target == one for one in np.unique(target)]
    recall = [_share(times[:, rows] @ right[rows].astype(np.float64), times[:, rows].sum(axis=1)) for rows in every]
    return _mean(np.stack(recall, axis=1))


def _mark(place: Numbers, classes: int, where: Numbers | None = None) -> csr_matrix:
    """-> [n, classes]: 1 at each row's place, where it counts."""
    from scipy.sparse import csr_matrix

    counts = np.ones(len(place)) if where is None else where.astype(np.float64)
    return csr_matrix((counts, (np.arange(len(place)), place)), shape=(len(place), classes))


def _share(part: Numbers, whole: Numbers) -> Numbers:
    return np.asarray(np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0))


def _mean(recall: Numbers) -> Numbers:
    """[draws, classes] -> the mean over the classes that a draw has."""
    there = ~np.isnan(recall)
    return _share(np.where(there, recall, 0.0).sum(axis=1), there.sum(axis=1))


def _majority(sums: Mapping[str, Numbers], usual: int) -> Numbers:
    """-> balanced accuracy of each draw, when every image is said to be of the class `usual`."""
    there = sums["true"] > 0
    return _share(there[:, usual].astype(np.float64), there.sum(axis=1))


def _beyond(difference: list[float]) -> bool:
    return bool(difference) and difference[1] > 0


def _confounding(sums: Mapping[str, Numbers], told: Mapping[str, Numbers], column: str, buckets: Mapping[str, Rows]) -> dict[str, Any]:
    """How far `column` alone tells the class, and whether the classifier is better than that."""
    alone = _mean(_share(sums[f"alone_{column}"], sums["true"]))
    difference = interval(told["balanced_accuracy"] - alone)
    values = np.concatenate([rows[column] for rows in buckets.values()])
    return {"values": len(np.unique(values)), "balanced_accuracy": interval(alone), "difference": difference, "better": _beyond(difference)}


def _class(place: int, name: str, sums: Mapping[str, Numbers], figures: Mapping[str, Any], buckets: Mapping[str, Rows]) -> dict[str, Any]:
    """One class -> its figures, and where its images are from."""
    from_ = {}
    for column in ALONE:
        mine = Counter(value for rows in buckets.values() for value in rows[column][rows["class_name"] == name].tolist())
        most, times = mine.most_common(1)[0]
        from_[column] = {"most": str(most), "share": round(times / mine.total(), 4), "values": len(mine)}
    return {
        "train": int((buckets["train"]["class_name"] == name).sum()),
        "held_out": int(sums["true"][0, place]),
        "said": int(sums["said"][0, place]),
        **{what: figures[what][place] for what in OF_CLASS},
        **from_,
    }
