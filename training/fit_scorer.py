"""A labels export and settings -> the Task of fitting V7's score head: what the one loop needs to know of it.

Loss of a row: squared error to its target + ranking_weight x the mean hinge over its partners in the micro-batch: rows of the
same image, kind and rater with another target, margin = the difference of the two targets, so that both terms agree on
the best scores (RankIQA, Liu et al. 2017, has one margin for all). Rows of weight 0 have no loss and no partners.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from conf.loops import TrainScorer
from training import evaluate_scorer, feed, process_group
from training.exports import Export
from training.vector_heads import HELD_OUT, TRAIN, read_vectors
from udfs import score_head

if TYPE_CHECKING:
    import torch

METRIC = "held_out_srcc"


class FitScorer:
    """Task of the loop (training/task.py). `ranks`: where this process stands; every rank makes one."""

    name = "train scorer"
    metric = METRIC
    larger_is_better = True

    def __init__(self, settings: TrainScorer, export: Export, ranks: process_group.Ranks) -> None:
        self.settings, self.width = settings, int(export.manifest.encoder["width"])
        self.plan = plan_rows(settings, export, ranks)
        self._held_out: tuple[torch.Tensor, npt.NDArray[Any]] | None = None

    @property
    def train_flops(self) -> float:
        """2 for each weight of the three layers forward, twice as many backward."""
        first, second = score_head.HIDDEN
        return 6.0 * (self.width * first + first * second + second)

    def build(self) -> torch.nn.Module:
        return score_head.build(self.width)

    def start(self, device: torch.device) -> None:
        import torch

        rows = feed.read_bucket(self.plan.export, HELD_OUT, ("vector", "value"))
        self._held_out = torch.from_numpy(read_vectors(rows["vector"], self.width)).to(device), rows["value"]

    def prepare(self, rows: feed.Rows, epoch: int) -> feed.Arrays:
        """-> vectors float32 [n, width], value float32 [n], group int64 [n]: a number for each image, kind and rater."""
        numbers: dict[tuple[bytes, str, str], int] = {}
        names = zip(rows["image_id"], rows["kind"].tolist(), rows["rater"].tolist(), strict=True)
        group = np.array([numbers.setdefault(name, len(numbers)) for name in names])
        return {"vectors": read_vectors(rows["vector"], self.width), "value": rows["value"].astype(np.float32), "group": group}

    def losses(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        raw = predict(model, inputs["vectors"])
        squared, ranking = losses(raw, inputs["value"], inputs["group"], inputs["weight"])
        return {"loss": squared + self.settings.ranking_weight * ranking, "squared_error": squared, "ranking": ranking}

    def evaluate(self, model: Any) -> dict[str, float]:
        assert self._held_out is not None
        vectors, values = self._held_out
        return {METRIC: evaluate_scorer.correlate(predict(model, vectors).cpu().numpy(), values)}


def plan_rows(settings: TrainScorer, export: Export, ranks: process_group.Ranks) -> feed.Plan:
    """The rows of the first epoch; an image's views stay together, so that they meet in a micro-batch and are ranked."""
    cut = (settings.rows_per_step, settings.micro_batch, ranks.rank, ranks.world)
    return feed.Plan(export, TRAIN, settings.seed, 0, *cut, together="image_id", apart=HELD_OUT)


def predict(model: Any, vectors: torch.Tensor) -> torch.Tensor:
    """float32 [n, width] -> raw scores float32 [n], in the model's own precision."""
    scores: torch.Tensor = model(vectors.to(next(model.module.parameters()).dtype)).squeeze(1).float()
    return scores


def losses(raw: torch.Tensor, value: torch.Tensor, group: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, targets, groups, weights, all [n] -> squared error [n] and each row's mean hinge over its partners [n]."""
    gap = value[:, None] - value[None, :]
    partner = (group[:, None] == group[None, :]) & (gap != 0) & (weight[:, None] * weight[None, :] > 0)
    behind = (gap.abs() - gap.sign() * (raw[:, None] - raw[None, :])).clamp(min=0)
    return (raw - value) ** 2, (behind * partner).sum(1) / partner.sum(1).clamp(min=1)
