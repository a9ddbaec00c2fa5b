"""The moving average of a model's weights (EMA): kept where the fp32 weights are, cut over the ranks as they are.

average <- average + (1 - d) * (weights - average) after each optimizer step, d = min(decay, (1 + n) / (10 + n)) after n steps, so that a
short training is not an average of its random start (the ramp of TensorFlow's ExponentialMovingAverage, `num_updates`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training import fragments, process_group

NAME = "ema.safetensors"


class Average:
    """Of the trained parameters of one engine. `decay` None: no average; the weights stand for it."""

    def __init__(self, model: Any, decay: float | None) -> None:
        self._model, self._decay = model, decay
        self._parts = {name: part.clone() for name, part in fragments.of(model).items()} if decay else {}

    def update(self, steps: int) -> None:
        """After an optimizer step; `steps`: how many the model has made."""
        import torch

        if self._decay is None or not self._parts:
            return
        mine = fragments.of(self._model)
        torch._foreach_lerp_(
            list(self._parts.values()), [mine[name] for name in self._parts], 1.0 - min(self._decay, (1 + steps) / (10 + steps))
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the average for the length of the block. Every rank must enter it."""
        if self._decay is None:
            yield
            return
        with fragments.swapped(self._model, self._parts):
            yield

    def whole(self, keep: bool) -> fragments.Weights:
        """The average (without one: the weights) as whole fp32 tensors on the CPU, {} unless `keep`. Every rank must call it."""
        with self.applied():
            return fragments.whole(self._model, keep)

    def save(self, folder: Path, rank: int) -> str:
        """Every rank must call it -> "" or what failed on this rank. One file, the same whatever the stage and the number of ranks."""
        return "" if self._decay is None else self.write(folder / NAME, rank)

    def write(self, path: Path, rank: int) -> str:
        """`whole` -> a file, all of it or nothing, by rank 0. Every rank must call it -> "" or what failed on this rank."""
        import safetensors.torch
        from safetensors import SafetensorError

        whole, part = self.whole(keep=rank == 0), path.with_suffix(".part")
        if rank == 0:
            try:
                safetensors.torch.save_file(whole, part)
                part.rename(path)
            except (OSError, SafetensorError) as error:
                part.unlink(missing_ok=True)
                return f"{path}: {error}"
        return ""

    def load(self, folder: Path, ranks: process_group.Ranks) -> None:
        """Every rank reads what `save` wrote and keeps its own parts."""
        if self._decay is not None:
            self._parts = read(self._model, folder / NAME, ranks)


def read(model: Any, path: Path, ranks: process_group.Ranks) -> fragments.Weights:
    """A file of `write` -> this rank's parts of it, a tensor in memory at a time."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return fragments.cut(model, file.get_tensor, ranks)
