"""V7's head and its bin rule."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from udfs import score_head
from udfs.reject import Reject


@pytest.mark.parametrize(
    ("raw", "expected"),
    [(-3.0, 0), (0.0, 0), (0.0999, 0), (0.1, 1), (0.29, 2), (0.3, 3), (0.7, 7), (0.89999, 8), (0.9, 9), (0.99, 9), (1.0, 9), (7.0, 9)],
)
def test_a_score_falls_into_v7s_bin(raw: float, expected: int) -> None:
    assert score_head.score_bin(raw) == expected


@pytest.mark.parametrize("raw", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_a_reject_not_score_9(raw: float) -> None:
    with pytest.raises(Reject) as reject:
        score_head.score_bin(raw)
    assert reject.value.code == "not_finite"


def test_the_head_is_v7s_layer_by_layer() -> None:
    head = score_head.build(768)
    assert [type(layer).__name__ for layer in head] == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    linear = [layer for layer in head if isinstance(layer, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(768, 1024), (1024, 512), (512, 1)]
    assert [layer.p for layer in head if isinstance(layer, torch.nn.Dropout)] == [0.5, 0.3]


def test_v7s_checkpoint_names_fit_without_their_prefix() -> None:
    checkpoint = {f"model.{name}": tensor for name, tensor in score_head.build(8).state_dict().items()}
    weights = safetensors.torch.save({name.removeprefix("model."): tensor for name, tensor in checkpoint.items()})
    assert score_head.load(weights)[0].in_features == 8


def test_loaded_weights_score_without_dropout_and_whatever_the_length_of_the_vector() -> None:
    torch.manual_seed(0)
    built = score_head.build(16)
    head = score_head.load(safetensors.torch.save(built.state_dict()))
    vectors = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    scores = score_head.score_batch(vectors, head)
    unit = torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    assert scores.dtype == np.float32
    assert scores == pytest.approx(built.eval()(unit).detach().squeeze(1).numpy(), abs=1e-6)
    assert score_head.score_batch(vectors * 2, head) == pytest.approx(scores, abs=1e-6)
    assert score_head.score_batch(vectors[:0], head).shape == (0,)


def test_a_vector_that_is_not_finite_gives_a_score_that_is_not() -> None:
    head = score_head.load(safetensors.torch.save(score_head.build(4).state_dict()))
    scores = score_head.score_batch(np.array([[1, 1, 1, 1], [np.nan, 0, 0, 0]], dtype=np.float32), head)
    assert np.isfinite(scores).tolist() == [True, False]


def test_loading_a_head_leaves_the_random_state_alone() -> None:
    weights = safetensors.torch.save(score_head.build(4).state_dict())
    before = torch.get_rng_state()
    score_head.load(weights)
    assert torch.equal(before, torch.get_rng_state())


def test_other_weights_are_refused_by_their_names() -> None:
    with pytest.raises(ValueError, match=r"given tensors \['weight'\], expected"):
        score_head.load(safetensors.torch.save({"weight": torch.zeros(1)}))


def test_importing_the_head_loads_no_torch() -> None:
    code = "import sys, udfs.score_head; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
