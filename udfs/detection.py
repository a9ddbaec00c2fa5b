"""What a detector says of one image: names with probabilities, and regions of text; checked before it is stored.

A detector is a module `udfs/detector_<kernel>.py`:

    KERNEL_VERSION, PREPROCESSING      what its numbers depend on besides the files that conf/detectors/NAME.yaml pins
    LIBRARIES                          names of packages whose own weights it runs (their versions enter the fingerprint); may be absent
    load(detector, device) -> model    once a worker; checks the sha256 of the files
    prepare(image, detector) -> array  in the decode threads, from the one decoded image (RGB)
    detect(model, batch) -> list       one Detection for each array, in order; arrays may differ in shape
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from udfs.pinned import pinned
from udfs.reject import Reject

CORNERS = 4


class Label(TypedDict):
    """`kind` is the detector's own word: `general`, `character`, `rating`, `nsfw`, ..."""

    name: str
    kind: str
    p: float


class Region(TypedDict):
    """`box`: x and y of the four corners in turn, clockwise from the top left, as shares of width and height."""

    text: str
    p: float
    box: list[float]


class Detection(TypedDict):
    labels: list[Label]
    regions: list[Region]


def checked(detection: Detection) -> Detection:
    """-> the same, fit for the table. Raises Reject not_finite for a number that is none, ValueError for a detector that is wrong."""
    told = [(label["name"], label["p"]) for label in detection["labels"]] + [(r["text"], r["p"]) for r in detection["regions"]]
    boxes = [region["box"] for region in detection["regions"]]
    if any(len(box) != 2 * CORNERS for box in boxes):
        raise ValueError(f"a region's box has {2 * CORNERS} numbers, given {[len(box) for box in boxes]}")
    _finite([p for _, p in told], [name for name, _ in told])
    for box, region in zip(boxes, detection["regions"], strict=True):
        _finite(box, [region["text"]] * len(box))
    for name, p in told:
        if not -1e-6 <= p <= 1 + 1e-6:
            raise ValueError(f"{name!r}: probability {p}: a detector gives values in [0, 1], after its sigmoid or softmax")
    return detection


def _finite(numbers: Sequence[float], names: Sequence[str]) -> None:
    for number, name in zip(numbers, names, strict=True):
        if not math.isfinite(number):
            raise Reject("not_finite", f"{name!r}: {number}")


def file_of(detector: Mapping[str, Any], key: str) -> Path:
    """(conf.enrichment.Detector as a dict, `weights` or `vocabulary`) -> its pinned file. Raises ValueError when it is missing or another one."""
    if detector[key] is None:
        raise ValueError(f"detector {detector['name']!r}: kernel {detector['kernel']} needs {key}: a local file and its sha256")
    return pinned(detector[key], detector["sha256" if key == "weights" else f"{key}_sha256"], f"detector {detector['name']!r}: {key}")
