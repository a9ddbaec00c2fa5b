"""A checked labels export and settings -> the fitted weights of V7's head and the metrics of every epoch.

Loss of a row: squared error to its target + ranking_weight x the mean hinge over its partners in the batch: rows of the
same image, kind and rater with another target, margin = the difference of the two targets, so that both terms agree on
the best scores (RankIQA, Liu et al. 2017, has one margin for all). Rows of weight 0 have no loss and no partners.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from conf.settings import Mistake, TrainScorer
from training import engine, feed
from training.exports import Export
from udfs import score_head

if TYPE_CHECKING:
    import torch

SAY_EVERY = 3.0  # seconds between progress lines
LOOKS = 4  # times that `look` sees the weights, evenly spread, the last epoch among them

Metrics = dict[str, float]
State = dict[str, "torch.Tensor"]


class Fitted(NamedTuple):
    """fp32 weights on the CPU, and loss, squared_error, ranking and rows_per_second of each epoch, plus what `look` gave."""

    weights: State
    epochs: list[Metrics]


def fit(export: Export, bucket: str, settings: TrainScorer, ranks: engine.Ranks, look: Callable[[State], Metrics]) -> Fitted:
    """Every rank calls it; `look` (weights -> more metrics) runs on rank 0 only. Raises Mistake when the loss is no longer finite."""
    import torch

    torch.manual_seed(settings.seed)
    head = score_head.build(export.manifest.encoder["width"])
    plans = [feed.Plan(export, bucket, settings.seed, e, settings.batch_size, *ranks, together="image_id") for e in range(settings.epochs)]
    model = engine.wrap(head, settings, sum(plan.steps for plan in plans))
    torch.manual_seed(settings.seed + 1_000_003 * (ranks.rank + 1))  # dropout: another stream on each rank
    say, epochs, weights = Progress(settings.epochs, export.rows(bucket)), [], {}
    for epoch, plan in enumerate(plans, 1):
        metrics = run_epoch(model, plan, settings.ranking_weight)
        if not np.isfinite(metrics["loss"]):
            raise Mistake(f"the loss is {metrics['loss']} in epoch {epoch}: lower train_scorer.learning_rate ({settings.learning_rate})")
        if epoch * LOOKS // settings.epochs > (epoch - 1) * LOOKS // settings.epochs:
            weights = engine.weights(model)
            metrics |= look(weights) if ranks.rank == 0 else {}
        epochs.append(metrics)
        if ranks.rank == 0:
            say(epoch, metrics)
    return Fitted(weights, epochs)


def run_epoch(model: Any, plan: feed.Plan, ranking_weight: float) -> Metrics:
    """Engine and one epoch's plan -> its mean losses per row over all ranks, and rows per second."""
    import torch

    started = time.monotonic()
    sums = torch.zeros(2, dtype=torch.float64, device=model.device)
    for batch in feed.batches(plan):
        vectors, value, group, weight = (torch.from_numpy(part).to(model.device) for part in columns(batch, plan.export))
        raw = model(vectors.to(next(model.module.parameters()).dtype)).squeeze(1).float()
        squared, ranking = losses(raw, value, group, weight)
        # the engine averages gradients over ranks: x world / rows of the step makes it the mean over the rows of the step
        model.backward((weight * (squared + ranking_weight * ranking)).sum() * (plan.world / batch.step_rows))
        model.step()
        sums += torch.stack([(weight * squared).sum(), (weight * ranking).sum()]).detach()
    rows = plan.export.rows(plan.bucket)
    squared_error, hinge = (value / rows for value in engine.total(sums.tolist(), model.device))
    loss = squared_error + ranking_weight * hinge
    return {"loss": loss, "squared_error": squared_error, "ranking": hinge, "rows_per_second": rows / (time.monotonic() - started)}


def losses(raw: torch.Tensor, value: torch.Tensor, group: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, targets, groups, weights, all [n] -> squared error [n] and each row's mean hinge over its partners [n]."""
    gap = value[:, None] - value[None, :]
    partner = (group[:, None] == group[None, :]) & (gap != 0) & (weight[:, None] * weight[None, :] > 0)
    behind = (gap.abs() - gap.sign() * (raw[:, None] - raw[None, :])).clamp(min=0)
    return (raw - value) ** 2, (behind * partner).sum(1) / partner.sum(1).clamp(min=1)


def columns(batch: feed.Batch, export: Export) -> tuple[npt.NDArray[Any], ...]:
    """Batch -> vectors [n, width], targets [n], groups [n] (a number per image, kind and rater), weights [n]."""
    rows = batch.rows
    names = [f"{i.hex()} {k} {r}" for i, k, r in zip(rows["image_id"], rows["kind"], rows["rater"], strict=True)]
    _, group = np.unique(names, return_inverse=True)
    return read_vectors(rows["vector"], export.manifest.encoder["width"]), rows["value"].astype(np.float32), group, batch.weight


def read_vectors(packed: npt.NDArray[Any], width: int) -> score_head.Vectors:
    """Little-endian fp16 bytes of each row -> float32 [n, width] of length 1. Raises Mistake on another length of bytes."""
    wrong = {len(vector) for vector in packed} - {2 * width}
    if wrong:
        raise Mistake(f"vectors of {sorted(wrong)} bytes, the manifest's encoder width {width} needs {2 * width}; export again")
    return score_head.normalise(np.frombuffer(b"".join(packed), dtype="<f2").reshape(-1, width))


class Progress:
    """A line every SAY_EVERY seconds and at the end: epoch, rows per second, loss, time left."""

    def __init__(self, epochs: int, rows: int) -> None:
        self.epochs, self.rows = epochs, rows
        self.started = self.said = time.monotonic()

    def __call__(self, epoch: int, metrics: Metrics) -> None:
        now = time.monotonic()
        if now - self.said < SAY_EVERY and epoch < self.epochs:
            return
        self.said = now
        spent = now - self.started
        left = spent / epoch * (self.epochs - epoch)
        rate = epoch * self.rows / spent
        print(f"train scorer: epoch {epoch}/{self.epochs}, {rate:.0f} rows/s, loss {metrics['loss']:.4f}, {left:.0f} s left", flush=True)
