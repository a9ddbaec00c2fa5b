"""Held-out rows, their head scores and the evaluation -> the label-quality plot, PNG bytes.

Left: the head's scores of each view, ordered by target: do the labels order what the head learned? Right: SRCC of head
and baselines in each scope, with intervals. Colours: Okabe and Ito's, told apart by colour-blind readers.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7")


def draw(rows: Mapping[str, npt.NDArray[Any]], scores: npt.NDArray[Any], evaluation: Mapping[str, Any]) -> bytes:
    """(columns view and value [n], scores [n], result of evaluate) -> PNG bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no global state and half the import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_views(left, rows, scores)
    _draw_scopes(right, evaluation)
    figure.suptitle(f"{evaluation['images']} held-out images, {evaluation['rows']} rows")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _draw_views(axes: Any, rows: Mapping[str, npt.NDArray[Any]], scores: npt.NDArray[Any]) -> None:
    target = {str(view): float(rows["value"][rows["view"] == view].mean()) for view in np.unique(rows["view"])}
    views = sorted(target, key=lambda view: (-target[view], view))
    axes.boxplot([scores[rows["view"] == view] for view in views], showfliers=False)
    axes.plot(range(1, len(views) + 1), [target[view] for view in views], "o", color="#D55E00", label="target")
    axes.set_xticks(range(1, len(views) + 1), views, rotation=45, ha="right")
    axes.set_title("head score by view")
    axes.legend(loc="lower left")


def _draw_scopes(axes: Any, evaluation: Mapping[str, Any]) -> None:
    scopes = evaluation["scopes"]
    names = ["head", *next(iter(scopes.values()))["baselines"]]
    for number, name in enumerate(names):
        metrics = [scope["head"] if name == "head" else scope["baselines"][name] for scope in scopes.values()]
        point, low, high = np.array([metric["srcc"] for metric in metrics]).T
        place = np.arange(len(scopes)) + (number - len(names) / 2) * 0.11
        spread = np.clip([point - low, high - point], 0.0, None)
        axes.errorbar(place, point, yerr=spread, fmt="s" if name == "head" else "o", ms=4, color=COLOURS[number % len(COLOURS)], label=name)
    axes.axhline(0.0, color="#999999", lw=0.5)
    axes.set_xticks(range(len(scopes)), list(scopes), rotation=45, ha="right")
    axes.set_title(f"SRCC with {evaluation['coverage']:.0%} intervals over images")
    axes.legend(fontsize=7)
