"""What is counted between two sums over the ranks: losses and their parts, rows and ids, time -> totals and metrics, the same on every rank."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from training import feed, hardware, process_group

if TYPE_CHECKING:
    import torch

PACED = 20  # windows that the pace is told of: one of a fast training may be a single step, with the start of an epoch in it or not

Metrics = dict[str, float]


class Totals(NamedTuple):
    """Of one window over all ranks. `ids`: the checksum of the rows' image_ids. `spoilt`: a rank said so. `means`: of the loss, its parts and the pace."""

    rows: int
    ids: int
    spoilt: bool
    means: Metrics


class Window:
    """`train_flops`: of one row. `waited`, `stalled`: seconds of this window that the loop has spent for data, and in checkpoints and evaluations."""

    def __init__(self, train_flops: float, ranks: process_group.Ranks, device: Any, precision: str) -> None:
        self._flops, self._ranks, self._device = train_flops, ranks, device
        self._peak = hardware.peak_flops(device, precision)
        self._pace: list[tuple[float, float, float]] = []  # rows of all ranks, seconds waited, seconds worked, of the last windows
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[str, Any] = {}
        self._rows = self._ids = 0
        self._began, self.waited, self.stalled = time.monotonic(), 0.0, 0.0

    def add(self, batch: feed.Batch, parts: dict[str, torch.Tensor]) -> None:
        """A micro-batch; parts: sums over its real rows, on the device."""
        for name, part in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + part.detach().double()
        kept = batch.weight > 0
        self._rows += int(kept.sum())
        self._ids += feed.id_sum(batch.image_id[kept])

    def close(self, spoilt: bool) -> Totals:
        """Sums over the ranks, and the next window begins. Every rank must call it."""
        names = sorted(self._sums)
        elapsed = time.monotonic() - self._began
        told = [float(self._sums[name]) for name in names]
        totals = process_group.total([*told, self._rows, self.waited, self.stalled, elapsed, float(spoilt)], self._device)
        (ids,) = process_group.total_modulo([self._ids % 2**64], self._device)
        rows, waited, stalled, spent, spoilt_ranks = totals[len(names) :]
        means = {name: value / max(1.0, rows) for name, value in zip(names, totals, strict=False)}
        means |= self._tell_pace(rows, waited / self._ranks.world, (spent - stalled) / self._ranks.world)
        self._begin()
        return Totals(round(rows), ids, spoilt_ranks > 0, means)

    def _tell_pace(self, rows: float, waited: float, worked: float) -> Metrics:
        self._pace = [*self._pace[-PACED + 1 :], (rows, waited, max(1e-9, worked))]
        rows, waited, worked = (sum(values) for values in zip(*self._pace, strict=True))
        flops = self._flops * rows / worked
        told = {"rows_per_second": rows / worked, "data_wait_share": waited / worked, "flops_per_second": flops}
        return told | ({"mfu": flops / (self._peak * self._ranks.world)} if self._peak else {})
