"""The evaluation against a case that fits on a hand, and against scipy on explicit resamples."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from training import baselines, draw_evaluation, evaluate_scorer

# two images: 0 and 1; original, a light and a strong blur, one noise
ROWS = {
    "image_id": np.array([b"a", b"a", b"a", b"a", b"b", b"b", b"b", b"b"], dtype=object),
    "view": np.array(["original", "blur:1", "blur:2", "noise:1"] * 2),
    "value": np.array([1.0, 0.6, 0.2, 0.6] * 2, dtype=np.float32),
}
SCOPES = ("overall", "blur", "noise")
HEAD = np.array([0.9, 0.6, 0.1, 0.9, 0.8, 0.5, 0.2, 0.4], dtype=np.float32)


def everywhere(**scores: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """The same baselines in every scope."""
    return dict.fromkeys(SCOPES, scores)


def test_pairwise_accuracy_counts_a_tie_one_half() -> None:
    scopes = evaluate_scorer.evaluate(ROWS, HEAD, everywhere(nothing=np.zeros(8)), seed=1)["scopes"]
    assert scopes["blur"]["head"]["pairwise_accuracy"][0] == 1.0
    assert scopes["noise"]["head"]["pairwise_accuracy"][0] == 0.75  # image a ties, image b is right
    assert scopes["overall"]["head"]["pairwise_accuracy"][0] == pytest.approx(5.5 / 6, abs=1e-4)
    assert scopes["overall"]["baselines"]["nothing"]["pairwise_accuracy"] == [0.5, 0.5, 0.5]
    assert {name: (scope["images"], scope["rows"], scope["pairs"]) for name, scope in scopes.items()} == {
        "overall": (2, 8, 6),
        "blur": (2, 6, 4),
        "noise": (2, 4, 2),
    }


def test_srcc_by_hand() -> None:
    # scores rank 3 1 2 against targets 3 2 1: d = 0, 1, 1, so 1 - 6 * 2 / (3 * 8)
    assert evaluate_scorer.correlate(np.array([9.0, 1.0, 5.0]), np.array([1.0, 0.6, 0.2])) == pytest.approx(0.5)
    assert evaluate_scorer.correlate(np.array([1.0, 1.0, 1.0]), np.array([1.0, 0.6, 0.2])) == 0.0


def test_srcc_of_a_draw_is_scipys_on_the_repeated_rows() -> None:
    rng = np.random.default_rng(3)
    scores, values = rng.integers(0, 6, 30).astype(float), rng.integers(0, 4, 30) / 4
    times = rng.multinomial(30, np.full(30, 1 / 30), size=20)
    expected = [spearmanr(np.repeat(scores, row), np.repeat(values, row)).statistic for row in times]
    assert evaluate_scorer.srcc(scores, values, times) == pytest.approx(expected)


def test_large_evaluations_are_measured_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    times = evaluate_scorer.draw_images(8, seed=1)
    whole = evaluate_scorer.srcc(HEAD, ROWS["value"], times)
    monkeypatch.setattr(evaluate_scorer, "CELLS", 100)
    assert np.array_equal(evaluate_scorer.srcc(HEAD, ROWS["value"], times), whole)


def test_intervals_draw_whole_images_and_are_seeded() -> None:
    draws = evaluate_scorer.draw_images(5, seed=1)
    assert draws.shape == (1001, 5)
    assert draws[0].tolist() == [1] * 5
    assert set(draws.sum(axis=1)) == {5}
    assert np.array_equal(draws, evaluate_scorer.draw_images(5, seed=1))
    assert not np.array_equal(draws, evaluate_scorer.draw_images(5, seed=2))


def many(images: int) -> dict[str, np.ndarray]:
    count = {"image_id": images, "view": images, "value": images}
    columns = {name: np.tile(ROWS[name][:4], count[name]) for name in ("view", "value")}
    return {"image_id": np.repeat(np.array([b"%d" % n for n in range(images)], dtype=object), 4), **columns}


def test_the_verdict_is_said_plainly_whoever_wins() -> None:
    rows = many(20)
    good = rows["value"].astype(float) + np.random.default_rng(0).normal(scale=0.05, size=80)
    noise = np.random.default_rng(1).normal(size=80)
    wins = evaluate_scorer.evaluate(rows, good, everywhere(sharpness=noise), seed=1)
    assert wins["beats_baselines"] is True
    assert wins["scopes"]["overall"]["difference"][1] > 0
    assert "the head beats the baselines" in evaluate_scorer.summarise(wins)
    lost = evaluate_scorer.evaluate(rows, noise, everywhere(sharpness=noise * 0.5, entropy=good), seed=1)
    assert lost["beats_baselines"] is False
    assert lost["scopes"]["overall"]["best_baseline"] == "entropy"
    assert "the head LOSES to a baseline" in evaluate_scorer.summarise(lost)
    equal = evaluate_scorer.evaluate(rows, good, everywhere(sharpness=good), seed=1)
    assert equal["scopes"]["blur"]["verdict"] == "unclear"
    assert "no clear difference" in evaluate_scorer.summarise(equal)


def test_rows_without_a_degraded_view_have_a_correlation_and_no_accuracy() -> None:
    rows = {**ROWS, "view": np.array(["original"] * 8)}
    scopes = evaluate_scorer.evaluate(rows, HEAD, everywhere(nothing=np.zeros(8)), seed=1)["scopes"]
    assert list(scopes) == ["overall"]
    assert scopes["overall"]["head"]["pairwise_accuracy"] == []
    assert scopes["overall"]["pairs"] == 0


def statistics(view: list[str], value: list[float], sharpness: list[float]) -> dict[str, np.ndarray]:
    rest = {name: np.zeros(len(value)) for name in baselines.STATISTICS}
    return {**rest, "sharpness": np.array(sharpness), "value": np.array(value), "view": np.array(view)}


def test_a_baseline_takes_its_sign_from_the_training_rows_of_its_scope() -> None:
    # sharpness falls with blur and rises more with noise
    train = statistics(["original", "blur:1", "noise:1", "noise:2"], [1.0, 0.6, 0.6, 0.2], [5.0, 4.0, 8.0, 9.0])
    scores = baselines.score_baselines(train, statistics(["original", "blur:1", "noise:1"], [1.0, 0.6, 0.6], [1.0, 2.0, 3.0]))
    assert {scope: alone["sharpness"].tolist() for scope, alone in scores.items()} == {
        "overall": [-1.0, -2.0, -3.0],
        "blur": [1.0, 2.0, 3.0],
        "noise": [-1.0, -2.0, -3.0],
    }


def test_a_degradation_that_training_lacks_is_scored_by_the_fit_on_all_rows() -> None:
    train = statistics(["original", "blur:1"], [1.0, 0.2], [1.0, 0.0])
    scores = baselines.score_baselines(train, statistics(["original", "noise:1"], [1.0, 0.2], [1.0, 3.0]))
    assert scores["noise"]["sharpness"].tolist() == [1.0, 3.0]


def test_the_ridge_of_one_useful_statistic_is_its_closed_form() -> None:
    # standardised sharpness -1 and 1: slope = sum(x * (value - mean)) / (rows + RIDGE) = 1 / 3
    train, held_out = statistics(["original"] * 2, [0.0, 1.0], [-1.0, 1.0]), statistics(["original"] * 2, [0.0, 0.0], [3.0, 0.0])
    assert baselines.score_baselines(train, held_out)["overall"][baselines.TOGETHER].tolist() == pytest.approx([1.5, 0.5])


def test_the_plot_is_a_png_with_every_view_and_scope() -> None:
    evaluation = evaluate_scorer.evaluate(ROWS, HEAD, everywhere(nothing=np.zeros(8), sharpness=HEAD), seed=1)
    assert draw_evaluation.draw(ROWS, HEAD, evaluation).startswith(b"\x89PNG")
