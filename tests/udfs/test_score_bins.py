"""Rules of bins: by domain, at their edges, from a curve; and what explains a score."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LinearRegression

from udfs import explained, score, score_bins, score_head
from udfs.score_bins import LARGEST, V7, Bins, bin_of

TENTHS = tuple(score_bins.STEPS)
FITTED = Bins("score-bins:1", "ab", "s", "source", "", TENTHS, {"anime": tuple(step + 1 for step in TENTHS)})


@pytest.mark.parametrize(
    ("raw", "domain", "number"),
    [
        (0.05, None, 0),
        (0.1, None, 1),
        (0.95, None, 9),
        (0.95, "anime", 0),
        (1.1, "anime", 1),
        (9.0, "anime", 9),
        (0.1, "unknown", 1),
        (-5, "", 0),
    ],
)
def test_a_bin_is_how_many_edges_a_score_reaches_in_its_domain_or_in_all(raw: float, domain: str | None, number: int) -> None:
    assert bin_of(raw, domain, FITTED) == number


def test_equal_edges_leave_their_bins_empty() -> None:
    bins = Bins("b:1", all=(0.5,) * 9)
    assert [bin_of(raw, None, bins) for raw in (0.49, 0.5, 0.51)] == [0, 9, 9]


def test_a_rule_comes_back_from_its_file_and_what_is_no_rule_is_refused() -> None:
    data = score_bins.pack("quantile", "s", "source", "", TENTHS, {"anime": [step + 1 for step in TENTHS]})
    assert score_bins.unpack(data, "score-bins:1", "ab") == FITTED
    assert data == score_bins.pack("quantile", "s", "source", "", TENTHS, {"anime": [step + 1 for step in TENTHS]})
    for wrong in (TENTHS[:8], TENTHS[::-1], (*TENTHS[:8], float("nan"))):
        facts = json.loads(data) | {"all": list(wrong)}
        with pytest.raises(ValueError, match="expected 9 finite numbers that ascend"):
            score_bins.unpack(json.dumps(facts).encode(), "b:1", "")
    with pytest.raises(ValueError, match="format 7, expected 1"):
        score_bins.unpack(json.dumps(json.loads(data) | {"format": 7}).encode(), "b:1", "")


def test_edges_of_a_curve_are_v7s_bins_of_the_calibrated_value() -> None:
    random = np.random.default_rng(4)
    raw = random.normal(0.4, 0.3, 800)
    target = np.clip(raw + random.normal(0, 0.3, 800), 0, 0.93)
    knots, values = score_bins.isotonic(raw, target)
    bins = Bins("b:1", all=score_bins.edges_of(knots, values))
    model = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(raw, target)
    asked = random.normal(0.4, 0.5, 4_000)
    calibrated = model.predict(asked)
    away = np.abs(calibrated * 10 - np.rint(calibrated * 10)) > 1e-9  # on an edge a rounding decides
    expected = [score_head.score_bin(value) for value in calibrated[away]]
    assert [bin_of(one, None, bins) for one in asked[away]] == expected and away.mean() > 0.9
    assert bins.all[8] == (LARGEST if values[-1] < 0.9 else pytest.approx(np.interp(0.9, values, knots), abs=1.0))


def test_a_curve_that_never_reaches_a_value_has_no_such_bin_and_one_that_starts_above_has_none_below() -> None:
    edges = score_bins.edges_of(np.array([0.0, 1.0]), np.array([0.35, 0.65]))
    assert edges[:3] == (-LARGEST,) * 3 and edges[6:] == (LARGEST,) * 3
    assert edges[3:6] == pytest.approx(((0.4 - 0.35) / 0.3, (0.5 - 0.35) / 0.3, (0.6 - 0.35) / 0.3))
    assert {bin_of(raw, None, Bins("b:1", all=edges)) for raw in (-1e30, 0.0, 0.2, 0.6, 0.9, 1e30)} == {3, 4, 5, 6}


def test_stored_raw_scores_get_another_rule_and_keep_their_value_without_a_model() -> None:
    frame = pd.DataFrame({"image_id": [b"a", b"b"], "raw": np.array([0.95, 0.95], np.float32), "domain": [None, "anime"]})
    found = pd.concat(score.rebin([frame, frame[:0]], FITTED))
    assert found.bin.tolist() == [9, 0] and found.raw.tolist() == frame.raw.tolist()
    assert pd.concat(score.rebin([frame], V7)).bin.tolist() == [9, 9]


def test_importing_the_rules_loads_no_model_library() -> None:
    code = "import sys, udfs.score, udfs.score_bins, udfs.explained; sys.exit(any(name in sys.modules for name in ('torch', 'sklearn')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_share_explained_is_that_of_a_linear_regression() -> None:
    random = np.random.default_rng(5)
    x = random.normal(size=(400, 4)) * [1, 10, 0.1, 3]
    x[:, 1] += 5 * x[:, 0]
    y = x @ [0.5, -0.02, 3, 0] + random.normal(size=400)
    found = explained.explain(np.cov(np.column_stack([x, y]).T, bias=True), 400)
    assert found.together == pytest.approx(LinearRegression().fit(x, y).score(x, y), abs=1e-9)
    alone = [LinearRegression().fit(x[:, [column]], y).score(x[:, [column]], y) for column in range(4)]
    assert found.alone == pytest.approx(alone, abs=1e-9)
    assert found.adjusted == pytest.approx(1 - (1 - found.together) * 399 / 395)


def test_a_statistic_that_does_not_vary_or_repeats_another_explains_nothing_more() -> None:
    random = np.random.default_rng(6)
    first = random.normal(size=200)
    y = first + random.normal(size=200)
    columns = np.column_stack([first, np.full(200, 3.0), first * 2, random.normal(size=200), y])
    found = explained.explain(np.cov(columns.T, bias=True), 200)
    x = columns[:, [0, 3]]
    assert found.together == pytest.approx(LinearRegression().fit(x, y).score(x, y), abs=1e-6)
    assert found.alone[1] == 0.0 and found.alone[2] == pytest.approx(found.alone[0])
    flat = explained.explain(np.zeros((5, 5)), 10)
    assert flat.together == 0.0 and flat.alone == (0, 0, 0, 0)


def test_an_interval_holds_its_mean_and_is_the_same_each_time() -> None:
    values = np.random.default_rng(7).normal(0.3, 1.0, 200)
    mean, low, high = explained.interval(values, 1)
    assert low < mean < high and explained.interval(values, 1) == (mean, low, high)
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(200), rel=0.15)
