"""What a detector says is checked before it is stored; a number that is none refuses that output and no other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.udfs.test_detectors import write_tagger
from udfs import detector_tagger, model_runs
from udfs.detection import Detection, checked
from udfs.engine import How
from udfs.reject import Reject

BOX = [0.1, 0.1, 0.9, 0.1, 0.9, 0.2, 0.1, 0.2]


def detection(p: float = 0.5, box: list[float] | None = None) -> Detection:
    return {"labels": [{"name": "cat", "kind": "general", "p": p}], "regions": [{"text": "ok", "p": 0.9, "box": box or BOX}]}


def test_a_detection_passes_as_it_is() -> None:
    assert checked(detection()) == detection()


@pytest.mark.parametrize("bad", [detection(p=math.nan), detection(p=math.inf), detection(box=[math.nan, *BOX[1:]])])
def test_a_number_that_is_none_is_refused(bad: Detection) -> None:
    with pytest.raises(Reject) as caught:
        checked(bad)
    assert caught.value.code == "not_finite"


@pytest.mark.parametrize(("bad", "message"), [(detection(p=7.2), "after its sigmoid"), (detection(box=BOX[:4]), "8 numbers")])
def test_a_detector_that_is_wrong_stops_the_job(bad: Detection, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(bad)


def test_each_row_gets_its_own_detection_and_a_broken_one_is_added_to_what_was_refused(tmp_path: Path) -> None:
    detector = write_tagger(tmp_path)
    refused = {"code": "not_finite", "detail": "encoder x", "transient": False, "outputs": ["x"]}
    pixels = np.full((16, 16, 3), 90, np.float32)
    rows: list[dict[str, Any]] = [
        {"tensors": {"tiny": one, "other": 1}, "detections": [], "reject": before}
        for one, before in ((pixels, None), (pixels * np.nan, None), (pixels * np.nan, dict(refused)))
    ]
    rows.append({"tensors": {}, "detections": [], "reject": None})  # does not want it
    model_runs.detect(detector, rows, How("cpu"))
    (alone,) = detector_tagger.detect(detector_tagger.load(detector, "cpu"), [pixels])
    assert rows[0]["detections"] == [{"detector": "tiny", **alone}]
    assert [row["tensors"] for row in rows] == [{"other": 1}] * 3 + [{}]
    assert [len(row["detections"]) for row in rows] == [1, 0, 0, 0]
    assert rows[1]["reject"]["outputs"] == ["tiny"]
    assert rows[2]["reject"]["outputs"] == ["x", "tiny"]
    assert rows[3]["reject"] is None
