"""Pixel statistics of views -> scores to compare the head with: what sharpness, contrast, entropy or saturation know alone and together.

Everything is fitted on training rows and applied to held-out rows: the sign of a single statistic, and the ridge
regression of the target on all five standardised statistics. Each scope of the evaluation has its own fit, on the
training rows of that scope: sharpness falls with blur and rises with noise, and a baseline that must serve both at once
would be a weak one to beat.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from training.evaluate_scorer import OVERALL, correlate, find_scopes

ALONE = ("sharpness", "contrast", "entropy", "saturation")
TOGETHER = "all statistics"
STATISTICS = ("mean", *ALONE)
RIDGE = 1.0  # of standardised columns: next to nothing beside hundreds of rows, enough against a constant column

Columns = Mapping[str, npt.NDArray[Any]]
Scores = npt.NDArray[np.float64]


def score_baselines(train: Columns, held_out: Columns) -> dict[str, dict[str, Scores]]:
    """(training rows with view and value, held-out rows; both with the statistics) -> scope -> name -> scores of all held-out rows.

    A degradation that training rows lack is scored by the fit on all of them.
    """
    seen = find_scopes(train["view"])
    fitted_on = {scope: seen.get(scope, seen[OVERALL]) for scope in find_scopes(held_out["view"])}
    return {scope: score_scope({name: column[rows] for name, column in train.items()}, held_out) for scope, rows in fitted_on.items()}


def score_scope(train: Columns, held_out: Columns) -> dict[str, Scores]:
    """Training rows of one scope, held-out rows -> name -> scores of the held-out rows."""
    scores = {name: score_alone(name, train, held_out) for name in ALONE}
    scores[TOGETHER] = score_together(train, held_out)
    return scores


def score_alone(name: str, train: Columns, held_out: Columns) -> Scores:
    """One statistic, turned round when it falls with the target on the training rows."""
    falls = correlate(train[name], train["value"]) < 0
    return np.asarray(held_out[name], dtype=np.float64) * (-1.0 if falls else 1.0)


def score_together(train: Columns, held_out: Columns) -> Scores:
    """Ridge regression in closed form; columns standardised with mean and deviation of the training rows."""
    table = np.stack([np.asarray(train[name], dtype=np.float64) for name in STATISTICS], axis=1)
    centre, spread = table.mean(axis=0), table.std(axis=0)
    spread[spread == 0] = 1.0
    table = (table - centre) / spread
    target = np.asarray(train["value"], dtype=np.float64)
    slope = np.linalg.solve(table.T @ table + RIDGE * np.eye(len(STATISTICS)), table.T @ (target - target.mean()))
    unseen = np.stack([np.asarray(held_out[name], dtype=np.float64) for name in STATISTICS], axis=1)
    return np.asarray((unseen - centre) / spread @ slope + target.mean())
