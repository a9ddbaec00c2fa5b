"""What a trainer brings to the one loop: its module, its rows, its losses and its evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from training import feed
from training.window import Metrics

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]


class Task(Protocol):
    """What a trainer brings. Every rank makes one."""

    name: str  # the start of its lines
    plan: feed.Plan  # of this rank: epoch 0 from its first row
    metric: str  # of `evaluate`, by which `patience` and the best weights go
    larger_is_better: bool

    @property
    def train_flops(self) -> float:
        """Of one row, forward and backward through the model, without what is computed twice to save memory: the count that MFU goes by."""

    def build(self) -> torch.nn.Module:
        """The module, with the same weights on every rank (torch's random state is set); what is trained requires a gradient."""

    def start(self, device: torch.device) -> None:
        """What is not trained goes to the device."""

    def prepare(self, rows: feed.Rows, epoch: int) -> feed.Arrays:
        """A micro-batch's columns -> arrays, in the feed's threads. An array `weight` [n] weighs the rows."""

    def losses(self, model: Any, inputs: Tensors) -> Tensors:
        """On the device: `loss` float32 [n] without row weights, and other parts [n] by name. inputs["weight"] is 0 for rows that only fill up."""

    def evaluate(self, model: Any) -> Metrics:
        """On every rank, without gradients, with the averaged weights where there are; the same metrics on each. {}: nothing to measure."""
