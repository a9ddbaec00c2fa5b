"""A batch that memory does not hold is taken in halves: every image comes out, in order, by the kernels' own path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from conf.settings import load_encoder
from udfs import engine, model_runs, tower_clip
from udfs.micro_batches import Loaded, in_parts, is_out_of_memory

ENCODER = load_encoder("clip-vit-b-16-demo").model_dump()


class Small(torch.nn.Module):
    """A tower that holds `room` images, as a GPU would: torch's own error above that."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, ENCODER["width"], 8, 8)
        self.room, self.seen = room, list[int]()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {len(images)} images")
        return self.patches(images).mean((2, 3))


def rows(count: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    tensors = [random.normal(size=(3, 16, 16)).astype(np.float32) for _ in range(count)]
    return [{"tensors": {ENCODER["name"]: tensor}, "embeddings": [], "reject": None} for tensor in tensors]


def encoded(monkeypatch: pytest.MonkeyPatch, tower: Small, *batches: list[dict[str, Any]]) -> None:
    loaded = Loaded(tower)
    monkeypatch.setattr(model_runs, "_tower", lambda encoder, how: loaded)
    for batch in batches:
        model_runs.encode(ENCODER, batch, engine.How("cpu"))


@pytest.mark.parametrize(("room", "seen"), [(11, [11, 11]), (5, [11, 5, 5, 1, 5, 5, 1]), (1, [11, 5, 2, *[1] * 22])])
def test_a_batch_that_runs_out_of_memory_is_halved_until_it_fits_and_the_size_is_kept(
    monkeypatch: pytest.MonkeyPatch, room: int, seen: list[int]
) -> None:
    tower, first, second = Small(room), rows(11), rows(11)
    expected = tower_clip.encode(tower.eval(), np.stack([row["tensors"][ENCODER["name"]] for row in first[:1]]))[0]
    tower.seen.clear()
    encoded(monkeypatch, tower, first, second)
    assert tower.seen == seen
    for batch in (first, second):
        assert [len(row["embeddings"]) for row in batch] == [1] * 11
        assert all(row["reject"] is None for row in batch)
        assert np.allclose(np.frombuffer(batch[0]["embeddings"][0]["vector"], "<f2"), expected, atol=1e-3)
    vectors = [row["embeddings"][0]["vector"] for row in first]
    assert len(set(vectors)) == 11
    assert vectors == [row["embeddings"][0]["vector"] for row in second]


def test_an_image_that_does_not_fit_alone_is_a_transient_reject_of_that_output(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = rows(3)
    encoded(monkeypatch, Small(0), batch)
    for row in batch:
        assert row["embeddings"] == []
        reject = row["reject"]
        assert (reject["code"], reject["transient"], reject["outputs"]) == ("out_of_memory", True, [ENCODER["name"]])


def test_results_stay_in_order_whatever_fits() -> None:
    def run(model: int, part: Sequence[int]) -> list[int]:
        if sum(part) > model:
            raise MemoryError
        return [10 * item for item in part]

    assert in_parts(run, [1, 2, 3, 50, 4, 5], Loaded(9)) == [10, 20, 30, None, 40, 50]


def test_another_error_is_raised_as_it_is() -> None:
    def run(model: None, part: Sequence[int]) -> list[int]:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        in_parts(run, [1, 2], Loaded(None))


def test_the_memory_errors_of_torch_and_onnxruntime_are_known_and_others_are_not() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    refused = onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException
    arena = "Non-zero status code returned while running MatMul node. BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer"
    assert is_out_of_memory(refused(arena))
    assert not is_out_of_memory(refused("Non-zero status code returned while running MatMul node. Shape mismatch"))
