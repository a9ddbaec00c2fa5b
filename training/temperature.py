"""Logits and classes of images that a classifier was not fitted on -> the temperature that makes its probabilities honest, and how honest they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from udfs.class_head import softmax

LOWEST, HIGHEST = 0.05, 20.0  # where few images are all right (or wrong) the best temperature would be 0 (or infinite)
BINS = 10  # of confidence, equally wide (Guo et al. 2017 take 15; a held-out set of some hundred images fills no more)

Numbers = npt.NDArray[Any]


class Temperature(NamedTuple):
    """`at_bound`: the images would take it further than LOWEST or HIGHEST."""

    value: float
    loss_before: float  # mean negative log likelihood at temperature 1 ...
    loss_after: float  # ... and at `value`
    images: int
    at_bound: bool


def fit(logits: Numbers, classes: Numbers) -> Temperature:
    """(logits [n, classes], class numbers [n]) -> the temperature of least negative log likelihood (Guo et al. 2017). One parameter."""
    from scipy.optimize import minimize_scalar

    bounds = np.log(LOWEST), np.log(HIGHEST)
    found = minimize_scalar(lambda log: loss(logits, classes, float(np.exp(log))), bounds=bounds, method="bounded", options={"xatol": 1e-4})
    value = float(np.exp(found.x))
    at_bound = bool(min(found.x - bounds[0], bounds[1] - found.x) < 1e-2)
    return Temperature(value, loss(logits, classes, 1.0), float(found.fun), len(classes), at_bound)


def loss(logits: Numbers, classes: Numbers, temperature: float) -> float:
    """Mean negative log likelihood of the classes."""
    chosen = softmax(logits, temperature)[np.arange(len(classes)), classes]
    return float(-np.log(np.maximum(chosen, np.finfo(np.float64).tiny)).mean())


def count_bins(confidence: Numbers, right: Numbers) -> Numbers:
    """(largest probability [n], whether that class is right [n]) -> [n, BINS, 3]: of each row's bin 1, its confidence, and whether it is right."""
    number = np.minimum((confidence * BINS).astype(int), BINS - 1)
    told = np.zeros((len(confidence), BINS, 3))
    told[np.arange(len(confidence)), number] = np.stack([np.ones(len(confidence)), confidence, right], axis=1)
    return told


def expected_error(bins: Numbers) -> Numbers:
    """Sums of count_bins over rows [..., BINS, 3] -> expected calibration error: the mean over rows of |accuracy - confidence| of their bin."""
    count, confidence, right = np.moveaxis(bins, -1, 0)
    return np.asarray(np.abs(right - confidence).sum(axis=-1) / count.sum(axis=-1))
