"""An evaluation of a classifier -> its confusion matrix and its calibration, PNG bytes.

Left: a row is a class, a cell how many of its held-out images were taken for the column's; the shade is the share of the row. Right: accuracy over
confidence, before and after the temperature; the area of a point grows with its images, the diagonal is what
honest probabilities give.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NUMBERED = 30  # classes: with more the cells are too small for a number
BEFORE, AFTER = "#E69F00", "#0072B2"  # Okabe and Ito's, told apart by colour-blind readers


def draw(classes: Sequence[str], evaluation: Mapping[str, Any]) -> bytes:
    """(classes in the order of the confusion matrix, result of evaluate_classifier.evaluate) -> PNG bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no global state and half the import
    from matplotlib.figure import Figure

    side = float(np.clip(0.55 * len(classes), 4.0, 16.0))
    figure = Figure(figsize=(side + 6.5, side + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(side, 4.5))
    _draw_confusion(left, classes, np.array(evaluation["confusion"]))
    _draw_reliability(right, evaluation)
    told = evaluation["balanced_accuracy"]
    doubt = "; confounded with where the images are from" if evaluation["confounded"] else ""
    figure.suptitle(f"{evaluation['rows']} held-out images, balanced accuracy {told[0]:.2f} [{told[1]:.2f}, {told[2]:.2f}]{doubt}")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _draw_confusion(axes: Any, classes: Sequence[str], table: Any) -> None:
    count = table.sum(axis=1, keepdims=True)
    share = table / np.maximum(count, 1)
    axes.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), [f"{name} ({int(images)})" for name, images in zip(classes, count[:, 0], strict=True)])
    axes.set_xlabel("said")
    axes.set_ylabel("labelled (held-out images)")
    if len(classes) <= NUMBERED:
        for row, column in zip(*np.nonzero(table), strict=True):
            shade = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, int(table[row, column]), ha="center", va="center", color=shade, fontsize=9)


def _draw_reliability(axes: Any, evaluation: Mapping[str, Any]) -> None:
    axes.plot([0, 1], [0, 1], color="#999999", lw=0.8)
    for when, colour in (("before", BEFORE), ("after", AFTER)):
        count, confidence, right = np.array(evaluation["reliability"][when]).T
        there = count > 0
        error = evaluation["calibration_error" if when == "after" else "calibration_error_before"][0]
        x, y = confidence[there] / count[there], right[there] / count[there]
        label = f"{when} temperature {evaluation['temperature']['value']:.2f}: error {error:.2f}"
        axes.scatter(x, y, s=12 + 200 * count[there] / count.sum(), color=colour, alpha=0.7, label=label)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(-0.03, 1.22)  # room for the legend
    axes.set_xlabel("largest probability")
    axes.set_ylabel("share that is right")
    for mark in axes.legend(loc="upper left", fontsize=8).legend_handles:
        mark.set_sizes([30])
