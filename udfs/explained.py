"""Covariances -> the share of a score's variance that pixel statistics explain; and how sure a mean is. Numbers only."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
RESAMPLES = 1_000
COVERAGE = 0.95


class Explained(NamedTuple):
    """R2 of a least-squares regression: on each statistic alone, on all together, and that adjusted for their number (NaN: too few rows)."""

    alone: tuple[float, ...]
    together: float
    adjusted: float


def explain(covariance: Any, rows: int) -> Explained:
    """(covariances of the statistics and, last, the score; how many rows they are of) -> Explained. What does not vary explains nothing."""
    whole = np.asarray(covariance, dtype=np.float64)
    spread = np.sqrt(np.clip(np.diag(whole), 0, None))
    varies = spread > 1e-9 * np.maximum(1.0, spread.max(initial=0.0))
    scale = np.where(varies, spread, 1.0)
    correlation = whole / np.outer(scale, scale) * np.outer(varies, varies)
    inner, outer = correlation[:-1, :-1], correlation[:-1, -1]
    count = int(varies[:-1].sum())
    together = float(np.clip(outer @ np.linalg.pinv(inner, rcond=1e-9, hermitian=True) @ outer, 0, 1))
    free = rows - count - 1
    adjusted = 1 - (1 - together) * (rows - 1) / free if free > 0 else float("nan")
    return Explained(tuple(float(min(one**2, 1.0)) for one in outer), together, adjusted)


def interval(values: Floats, seed: int) -> tuple[float, float, float]:
    """One value an image -> (mean, its lower and its upper bound): percentiles over RESAMPLES draws of images with replacement."""
    random = np.random.default_rng(seed)
    means = [float(values[random.integers(0, len(values), len(values))].mean()) for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(values.mean()), float(low), float(high)
