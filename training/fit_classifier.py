"""An export of classes and settings -> the Task of fitting a classifier of vectors: what the one loop needs to know of it.

Loss of a row: cross entropy, times images / (classes x images of its class) where `balance` is set, so that every class counts the same and the
mean weight is 1. The bucket `calibrate` fits no weights: the temperature comes from it at every evaluation, and `patience` goes by its
loss. The bucket `held_out` only measures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from conf.loops import TrainClassifier
from conf.section import Mistake
from training import evaluate_classifier, feed, process_group, temperature
from training.evaluate_classifier import Given
from training.exports import Export
from training.vector_heads import HELD_OUT, TRAIN, read_vectors
from udfs import class_head

if TYPE_CHECKING:
    import torch

CALIBRATE = "calibrate"
METRIC = "calibration_loss"


class FitClassifier:
    """Task of the loop (training/task.py). `ranks`: where this process stands; every rank makes one."""

    name = "train classifier"
    metric = METRIC
    larger_is_better = False

    def __init__(self, settings: TrainClassifier, export: Export, ranks: process_group.Ranks) -> None:
        self.settings, self.width = settings, int(export.manifest.encoder["width"])
        self.classes = classes_of(export)
        self.weights = weigh(export, self.classes) if settings.balance else np.ones(len(self.classes), dtype=np.float32)
        self.plan = plan_rows(settings, export, ranks)
        self._kept: dict[str, tuple[torch.Tensor, npt.NDArray[Any]]] = {}

    @property
    def train_flops(self) -> float:
        """2 for each weight forward, twice as many backward."""
        hidden, classes = self.settings.hidden, len(self.classes)
        return 6.0 * (self.width * classes if hidden is None else (self.width + classes) * hidden)

    def build(self) -> torch.nn.Module:
        return class_head.build(self.width, len(self.classes), self.settings.hidden)

    def start(self, device: torch.device) -> None:
        import torch

        check_split(self.plan.export)
        for bucket in (CALIBRATE, HELD_OUT):
            rows = feed.read_bucket(self.plan.export, bucket, ("vector", "class_name"))
            vectors = torch.from_numpy(class_head.scale(read_vectors(rows["vector"], self.width))).to(device)
            self._kept[bucket] = vectors, evaluate_classifier.number(self.classes, rows["class_name"])

    def prepare(self, rows: feed.Rows, epoch: int) -> feed.Arrays:
        """-> vectors float32 [n, width] as the head takes them, target int64 [n], weight float32 [n]."""
        target = evaluate_classifier.number(self.classes, rows["class_name"])
        vectors = class_head.scale(read_vectors(rows["vector"], self.width))
        return {"vectors": vectors, "target": target.astype(np.int64), "weight": self.weights[target]}

    def losses(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        logits = predict(model, inputs["vectors"])
        loss = torch.nn.functional.cross_entropy(logits, inputs["target"], reduction="none")
        return {"loss": loss, "right": (logits.argmax(1) == inputs["target"]).float()}

    def evaluate(self, model: Any) -> dict[str, float]:
        (calibrate, known), (held_out, target) = (self._kept[bucket] for bucket in (CALIBRATE, HELD_OUT))
        fitted = temperature.fit(predict(model, calibrate).cpu().numpy(), known)
        given = Given(target, predict(model, held_out).cpu().numpy(), fitted.value, self.settings.other_below)
        once = np.ones((1, len(target)), dtype=np.int64)
        told = evaluate_classifier.measure(evaluate_classifier.tally(given, len(self.classes), {}, np.arange(len(target)), once))
        metrics = {METRIC: fitted.loss_after, "temperature": fitted.value}
        for name, values in told.items():
            named = (
                {f"held_out_{name}/{one}": value for one, value in zip(self.classes, values[0], strict=True)} if values.ndim == 2 else {}
            )
            metrics |= {key: float(value) for key, value in (named or {f"held_out_{name}": values[0]}).items() if np.isfinite(value)}
        return metrics


def classes_of(export: Export) -> tuple[str, ...]:
    """The classes in the order of the head's outputs."""
    return tuple(sorted(export.manifest.classes))


def weigh(export: Export, classes: tuple[str, ...]) -> npt.NDArray[np.float32]:
    """-> the weight of each class's training rows."""
    images = np.array([export.manifest.classes[name][TRAIN] for name in classes], dtype=np.float32)
    return np.asarray(images.sum() / (len(images) * images), dtype=np.float32)


def plan_rows(settings: TrainClassifier, export: Export, ranks: process_group.Ranks) -> feed.Plan:
    """The rows of the first epoch."""
    cut = (settings.rows_per_step, settings.micro_batch, ranks.rank, ranks.world)
    return feed.Plan(export, TRAIN, settings.seed, 0, *cut, apart=HELD_OUT)


def check_split(export: Export) -> None:
    """Raises Mistake when near-duplicates lie in two buckets: then the held-out ones would not be new to the classifier."""
    groups = {bucket: set(feed.read_bucket(export, bucket, ("near_group",))["near_group"]) for bucket in (TRAIN, CALIBRATE, HELD_OUT)}
    for one, other in ((TRAIN, CALIBRATE), (TRAIN, HELD_OUT), (CALIBRATE, HELD_OUT)):
        if both := groups[one] & groups[other]:
            raise Mistake(
                f"export {export.root}: {len(both)} groups of near-duplicates are in both {one} and {other}, e.g. that of {min(both).hex()}"
            )


def predict(model: Any, vectors: torch.Tensor) -> torch.Tensor:
    """float32 [n, width] -> logits float32 [n, classes], in the model's own precision."""
    logits: torch.Tensor = model(vectors.to(next(model.module.parameters()).dtype)).float()
    return logits
