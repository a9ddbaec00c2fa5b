"""One small training on two gloo ranks -> the time of each of its steps. Two ranks on this machine, one thread each, fp32.

    python -m benchmarks.step_loops OUT.json HOW EXPORT FOLDER --checkpoint-every 10

    ddp-memory   bare PyTorch: DistributedDataParallel, the rows prepared beforehand: nothing but the step
    ddp-feed     the same, fed by training.feed
    zero-0 .. 3  training.loop on training.engine, fed by training.feed, with its audit, row losses and checkpoints
    zero-1-mlflow  the same with the real record (journal and an MLflow store in sqlite)

The bare loop is the best that we know: fused AdamW, gradients as views of the buckets, a static graph, clipping for all at once. All train the same
model from the same weights. A step's time is that between two calls of the task's `losses`, so the wait for data is in it; steps
that are followed by a checkpoint are left out, it is told apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.made_exports import KINDS, WIDTH
from conf.build import Mlflow
from conf.loops import Loop
from training import engine, feed, loop, process_group, tracker
from training.exports import Export, open_export
from training.vector_heads import read_vectors

if TYPE_CHECKING:
    import torch

RANKS = 2
MICRO_BATCH = 64
TOKENS, MODEL, LAYERS = 12, 512, 4
HOW = ("ddp-memory", "ddp-feed", "zero-0", "zero-1", "zero-2", "zero-3", "zero-1-mlflow")


class FitVectors:
    """Task of the loop: a transformer of 12.6M parameters that reads a vector as 12 tokens and answers the row's value."""

    name, metric, larger_is_better = "benchmark", "none", True

    def __init__(self, settings: Loop, export: Export, ranks: process_group.Ranks) -> None:
        self.plan = feed.Plan(export, "train", settings.seed, 0, settings.rows_per_step, settings.micro_batch, *ranks, apart="held_out")
        self.began: list[tuple[float, float]] = []  # time, and CPU time of this rank, when each step's `losses` was called

    @property
    def train_flops(self) -> float:
        return 6.0 * TOKENS * LAYERS * 12 * MODEL**2

    def build(self) -> torch.nn.Module:
        from torch import nn

        layer = nn.TransformerEncoderLayer(MODEL, 8, 4 * MODEL, dropout=0.0, batch_first=True, norm_first=True)
        layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        return nn.Sequential(
            nn.Unflatten(1, (TOKENS, WIDTH // TOKENS)),
            nn.Linear(WIDTH // TOKENS, MODEL),
            layers,
            nn.Flatten(),
            nn.Linear(TOKENS * MODEL, 1),
        )

    def start(self, device: torch.device) -> None:
        pass

    def prepare(self, rows: feed.Rows, epoch: int) -> feed.Arrays:
        return {"vectors": read_vectors(rows["vector"], WIDTH), "value": rows["value"].astype(np.float32)}

    def losses(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.began.append((time.monotonic(), time.process_time()))
        return {"loss": (model(inputs["vectors"]).squeeze(1) - inputs["value"]) ** 2}

    def evaluate(self, model: Any) -> dict[str, float]:
        return {}


@dataclass
class Figures:
    """In place of the record of rank 0: keeps what the loop tells, and hands it on to a real one."""

    behind: tracker.Record | None = None
    waits: list[float] = field(default_factory=list)
    checkpoints: list[float] = field(default_factory=list)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        for name, kept in (("data_wait_share", self.waits), ("checkpoint_seconds", self.checkpoints)):
            kept += [values[name]] if name in values else []
        if self.behind is not None:
            self.behind.metrics(step, values)

    def checkpoint(self, step: int, folder: Path, values: Mapping[str, float]) -> None:
        if self.behind is not None:
            self.behind.checkpoint(step, folder, values)


def settings_of(how: str, checkpoint_every: int) -> Loop:
    stage = int(how.split("-")[1]) if how.startswith("zero") else 0
    told: dict[str, Any] = {"rows_per_step": RANKS * MICRO_BATCH, "micro_batch": MICRO_BATCH, "ranks": RANKS, "learning_rate": 1e-4}
    return Loop(model="benchmark", epochs=1, zero_stage=stage, evaluations=1, keep=1, checkpoint_every=checkpoint_every, **told)  # type: ignore[arg-type]


def by_loop(how: str, settings: Loop, export: Export, folder: Path) -> dict[str, Any]:
    """-> on rank 0: step times, shares of data wait, seconds of each checkpoint, size of the fitted weights."""
    ranks = engine.start("cpu")
    task = FitVectors(settings, export, ranks)
    record: Any = None
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        record = Figures(_real_record(folder, export) if how.endswith("mlflow") else None)
    outcome = loop.run(task, settings, folder, ranks, record)
    if record is None:
        return {}
    if record.behind is not None:
        record.behind.close("FINISHED")
    return _told(task, settings, record.waits[1:], outcome.weights) | {"checkpoints": record.checkpoints}


def _real_record(folder: Path, export: Export) -> tracker.Record:
    record = tracker.Record(
        folder, Mlflow(tracking_uri=f"sqlite:///{folder}/mlflow.db", artifacts=f"{folder}/artifacts", experiment="bench")
    )
    record.open("benchmark", {}, export, {tracker.TRAINING: "benchmark"})
    return record


def by_ddp(how: str, settings: Loop, export: Export) -> dict[str, Any]:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    ranks = process_group.Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    task = FitVectors(settings, export, ranks)
    torch.manual_seed(settings.seed)
    model = DistributedDataParallel(task.build(), gradient_as_bucket_view=True, static_graph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, engine.schedule(settings, task.plan.steps))
    batches: Iterator[feed.Batch] = feed.batches(task.plan, task.prepare, settings.feed_threads)
    if how == "ddp-memory":
        batches = iter(list(batches))
    waits: list[float] = []
    began = time.monotonic()
    while (batch := next(batches, None)) is not None:
        waits.append(time.monotonic() - began)
        loss = task.losses(model, {name: torch.from_numpy(array) for name, array in batch.rows.items()})["loss"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        rates.step()
        optimizer.zero_grad(set_to_none=True)
        began = time.monotonic()
    spent = task.began[-1][0] - task.began[0][0]
    return _told(task, settings, [sum(waits[1:]) / spent], dict(model.module.named_parameters())) if ranks.rank == 0 else {}


def _told(task: FitVectors, settings: Loop, waits: list[float], weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Times of the steps that no checkpoint follows, the first step apart."""
    steps = np.diff(task.began, axis=0)
    kept = [step for number, step in enumerate(steps.tolist(), 1) if number > 1 and number % settings.checkpoint_every]
    size = sum(float((weight.detach().double() ** 2).sum()) for weight in weights.values()) ** 0.5
    return {"steps": [wall for wall, _ in kept], "cpu_steps": [cpu for _, cpu in kept], "waits": waits, "weights": size}


def main(given: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("how", choices=HOW)
    parser.add_argument("export", type=Path)
    parser.add_argument("folder", type=Path, help="where the training's files go")
    parser.add_argument("--checkpoint-every", type=int, default=10)
    told = parser.parse_args(given)
    if not process_group.launched():
        raise SystemExit(process_group.launch("benchmarks.step_loops", given, RANKS))
    feed.quiet()
    tracker.quiet()
    settings = settings_of(told.how, told.checkpoint_every)
    export = open_export(told.export, "labels", KINDS["labels"], ("train", "held_out"))
    ddp = told.how.startswith("ddp")
    figures = by_ddp(told.how, settings, export) if ddp else by_loop(told.how, settings, export, told.folder)
    if figures:
        told.out.write_text(json.dumps(figures))
    process_group.leave()


if __name__ == "__main__":
    main(sys.argv[1:])
