"""Values by arm and seed -> how the arms compare: mean and spread of each, the best, and its interval over the next best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

COVERAGE = 0.95


@dataclass(frozen=True)
class Arm:
    """One arm: its values by seed, in the order of seeds."""

    name: str
    values: dict[int, float]

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.values.values())))

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 with one seed."""
        return float(np.std(list(self.values.values()), ddof=1)) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Ranking:
    """Arms, the best first; `lead` is [mean, low, high] of best minus next (in the better direction) over the seeds of both."""

    metric: str
    smaller_is_better: bool
    arms: tuple[Arm, ...]
    lead: tuple[float, float, float] | None  # None: one arm, or fewer than two seeds that both have

    @property
    def clear(self) -> bool:
        return self.lead is not None and self.lead[1] > 0

    def __str__(self) -> str:
        width = max(len("arm"), *(len(arm.name) for arm in self.arms))
        lines = [f"{'arm':{width}}  seeds  {self.metric}: mean    sd        lowest    highest"]
        indent = " " * len(self.metric)
        for arm in self.arms:
            values = list(arm.values.values())
            figures = f"{arm.mean:<9.4f} {arm.spread:<9.4f} {min(values):<9.4f} {max(values):<9.4f}".rstrip()
            lines.append(f"{arm.name:{width}}  {len(values):5}  {indent}  {figures}")
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        best = f"best: {self.arms[0].name}"
        if len(self.arms) == 1:
            return f"{best}, the only arm with a value"
        if self.lead is None:
            return f"{best}, without an interval over {self.arms[1].name}: they have fewer than two seeds in common"
        value, low, high = self.lead
        verdict = "the interval excludes 0" if self.clear else "NOT clear, the interval holds 0"
        return f"{best}, better than {self.arms[1].name} by {value:.4f} [{low:.4f}, {high:.4f}] over the seeds: {verdict}"


def rank(values: Mapping[tuple[str, int], float], metric: str, smaller_is_better: bool) -> Ranking:
    """(arm, seed) -> value: the ranking by the arms' means."""
    by_arm: dict[str, dict[int, float]] = {}
    for (arm, seed), value in sorted(values.items()):
        by_arm.setdefault(arm, {})[seed] = value
    sign = -1.0 if smaller_is_better else 1.0
    arms = tuple(sorted((Arm(name, of_arm) for name, of_arm in by_arm.items()), key=lambda arm: (-sign * arm.mean, arm.name)))
    return Ranking(metric, smaller_is_better, arms, _lead(arms, sign) if len(arms) > 1 else None)


def _lead(arms: tuple[Arm, ...], sign: float) -> tuple[float, float, float] | None:
    from scipy.stats import t

    best, following = arms[:2]
    differences = np.array([sign * (value - following.values[seed]) for seed, value in best.values.items() if seed in following.values])
    if len(differences) < 2:
        return None
    half = float(t.ppf((1 + COVERAGE) / 2, len(differences) - 1)) * float(differences.std(ddof=1)) / len(differences) ** 0.5
    mean = float(differences.mean())
    return mean, mean - half, mean + half
