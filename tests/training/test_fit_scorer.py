"""The loss: squared error and pairs of views of one image, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.fit_scorer import losses
from training.vector_heads import read_vectors


def tensors(*rows: tuple[float, float, int, float]) -> tuple[torch.Tensor, ...]:
    raw, value, group, weight = zip(*rows, strict=True)
    return torch.tensor(raw, requires_grad=True), torch.tensor(value), torch.tensor(group), torch.tensor(weight)


def test_a_pair_costs_what_its_scores_fall_short_of_the_difference_of_its_targets() -> None:
    squared, ranking = losses(*tensors((0.5, 1.0, 0, 1.0), (0.4, 0.2, 0, 1.0), (0.9, 0.2, 1, 1.0)))
    assert squared.tolist() == pytest.approx([0.25, 0.04, 0.49])
    assert ranking.tolist() == pytest.approx([0.7, 0.7, 0.0])  # targets 0.8 apart, scores 0.1; the third has no partner


def test_a_row_has_the_mean_over_its_partners_and_equal_targets_are_no_pair() -> None:
    _, ranking = losses(*tensors((0.0, 1.0, 0, 1.0), (0.0, 0.6, 0, 1.0), (0.0, 0.6, 0, 1.0)))
    assert ranking.tolist() == pytest.approx([0.4, 0.4, 0.4])


def test_rightly_scored_rows_cost_nothing() -> None:
    squared, ranking = losses(*tensors((1.0, 1.0, 0, 1.0), (0.6, 0.6, 0, 1.0), (0.2, 0.2, 0, 1.0)))
    assert squared.tolist() == [0.0, 0.0, 0.0]
    assert ranking.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)


def test_padded_rows_do_not_act() -> None:
    real = [(0.5, 1.0, 0, 1.0), (0.4, 0.2, 0, 1.0)]
    gradients = []
    for padding in ([], [(0.7, 0.6, 0, 0.0)], [(-9.0, 0.0, 0, 0.0), (9.0, 1.0, 0, 0.0)]):
        raw, value, group, weight = tensors(*real, *padding)
        squared, ranking = losses(raw, value, group, weight)
        (weight * (squared + ranking)).sum().backward()
        assert raw.grad is not None
        assert raw.grad[2:].abs().sum() == 0
        gradients.append(raw.grad[:2])
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_a_vector_of_another_width_is_refused() -> None:
    packed = np.array([np.ones(4, dtype="<f2").tobytes(), np.ones(3, dtype="<f2").tobytes()], dtype=object)
    with pytest.raises(ValueError, match=r"vectors of \[6\] bytes, the manifest's encoder width 4 needs 8"):
        read_vectors(packed, 4)
    assert read_vectors(packed[:1], 4).tolist() == [[0.5, 0.5, 0.5, 0.5]]
