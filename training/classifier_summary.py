"""The evaluation of a classifier -> lines for a person: figures with intervals, each class, and what the classifier may have learned instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training import evaluate_scorer


def summarise(evaluation: Mapping[str, Any]) -> str:
    """Evaluation -> lines for a person."""
    temperature, majority = evaluation["temperature"], evaluation["majority"]
    lines = [
        f"held out {evaluation['rows']} images in {evaluation['groups']} groups of near-duplicates: balanced accuracy {show(evaluation['balanced_accuracy'])}, "
        f"always {majority['class']} {majority['balanced_accuracy'][0]:.2f}; accuracy {show(evaluation['accuracy'])}",
        f"temperature {temperature['value']:.2f} from {temperature['images']} images that fit nothing else"
        + (" (as far as it may go: they tell too little)" if temperature["at_bound"] else "")
        + f": calibration error {show(evaluation['calibration_error_before'])} -> {show(evaluation['calibration_error'])}",
        f"other below {evaluation['other_below']:g}: {show(evaluation['coverage_of_classes'])} of the images get a class, "
        f"{show(evaluation['accuracy_of_classes'])} of these the right one",
    ]
    lines += [_line(name, one) for name, one in evaluation["classes"].items()]
    lines += [_warning(column, one) for column, one in evaluation["confounding"].items() if one["values"] > 1]
    return "\n".join(lines)


def _line(name: str, one: Mapping[str, Any]) -> str:
    figures = ", ".join(f"{what} {show(one[what])}" for what in ("precision", "recall"))
    most, share, values = (one["origin"][key] for key in ("most", "share", "values"))
    where = f"all from {most}" if values == 1 else f"{share:.0%} from {most}, {values} collections"
    return f"  {name}: {figures} ({one['train']} trained on, {one['held_out']} held out; {where})"


def _warning(column: str, one: Mapping[str, Any]) -> str:
    told = f"{column} alone (no look at the image) reaches {show(one['balanced_accuracy'])}, difference {show(one['difference'])}"
    if one["better"]:
        return f"{told}: the classifier is better than that"
    return f"{told}: CONFOUNDED, the classifier may have learned where images are from instead"


def show(found: list[float]) -> str:
    return evaluate_scorer.show(found) if found else "not known"
