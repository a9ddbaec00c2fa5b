"""Raw scores and domains -> 0..9 by a rule: V7's ten fixed bins, or edges that were fitted for each domain.

A fitted rule is nine edges a domain, ascending: the bin of a score is how many of them it reaches. Both ways of fitting end there:
quantiles are edges, and so are the scores at which a calibrated value, which only rises, reaches V7's .1, .2, ... .9. A domain
without edges of its own, and an image without a domain, take those of all. The raw score is the same under every rule.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from udfs import score_head
from udfs.reject import Reject

FORMAT = 1  # of the file
FILE = "bins.json"
EDGES = 9
STEPS = tuple(step / 10 for step in range(1, 10))  # the calibrated values, and the shares of a quantile rule, at which a bin begins
LARGEST = float(np.finfo(np.float32).max)  # an edge that no score reaches; its negative one that every score does

Edges = tuple[float, ...]


class Bins(NamedTuple):
    """`name`: `v7`, or MODEL:VERSION; `edges`: domain -> its nine; `domain`: what an image's domain is (none, source, class)."""

    name: str
    sha256: str = ""
    scores: str = ""  # fingerprint of the raw scores that it was fitted on
    domain: str = "none"
    classes: str = ""  # fingerprint of the classes that are the domains
    all: Edges = ()  # none: V7's rule
    edges: Mapping[str, Edges] = {}

    @property
    def is_v7(self) -> bool:
        return not self.all


V7 = Bins("v7")


def pack(method: str, scores: str, domain: str, classes: str, every: Sequence[float], edges: Mapping[str, Sequence[float]]) -> bytes:
    """A fitted rule -> its file. The same rule gives the same bytes."""
    facts = {"format": FORMAT, "method": method, "scores": scores, "domain": domain, "classes": classes}
    told = facts | {"all": list(every), "domains": {name: list(values) for name, values in edges.items()}}
    return json.dumps(told, indent=1, sort_keys=True).encode()


def unpack(data: bytes, name: str, sha256: str) -> Bins:
    """The file and the version that it is -> Bins. Raises ValueError when it holds no rule."""
    facts = json.loads(data)
    if facts.get("format") != FORMAT:
        raise ValueError(f"{name}: {FILE} has format {facts.get('format')!r}, expected {FORMAT}")
    edges = {domain: _checked(values, f"{name}: domain {domain!r}") for domain, values in facts["domains"].items()}
    return Bins(name, sha256, facts["scores"], facts["domain"], facts["classes"], _checked(facts["all"], f"{name}: all"), edges)


def bin_of(raw: float, domain: str | None, bins: Bins) -> int:
    """(raw score, domain of the image or None, rule) -> 0..9. Raises Reject("not_finite")."""
    if bins.is_v7:
        return score_head.score_bin(raw)
    value = float(raw)
    if not math.isfinite(value):
        raise Reject("not_finite", f"raw score {value}")
    return int(np.searchsorted(bins.edges.get(domain, bins.all) if domain is not None else bins.all, value, side="right"))


def isotonic(raw: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(raw scores, targets in [0, 1]) -> the knots of the rising curve with the least squared error: raw and calibrated, both ascending.

    Between knots it is linear, beyond the ends level (scikit-learn's IsotonicRegression).
    """
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(raw, target)
    return np.asarray(fitted.X_thresholds_, dtype=np.float64), np.asarray(fitted.y_thresholds_, dtype=np.float64)


def edges_of(knots: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> Edges:
    """A rising curve -> the scores at which it reaches .1, .2, ... .9: from there on V7's rule gives the next bin."""
    told = []
    for step in STEPS:
        place = int(np.searchsorted(values, step, side="left"))  # the first knot that reaches it
        if place == 0:
            told.append(-LARGEST)
        elif place == len(values):
            told.append(LARGEST)
        else:
            low, high = values[place - 1], values[place]
            told.append(float(knots[place - 1] + (step - low) / (high - low) * (knots[place] - knots[place - 1])))
    return tuple(told)


def _checked(values: Any, where: str) -> Edges:
    numbers = isinstance(values, list) and len(values) == EDGES and all(type(one) is float and math.isfinite(one) for one in values)
    if not numbers or list(values) != sorted(values):
        raise ValueError(f"{where}: given {values!r}, expected {EDGES} finite numbers that ascend")
    return tuple(values)
