"""A Task and settings -> fitted weights: the one loop of every trainer.

A step takes `rows_per_step` rows over all ranks and micro-batches, and its loss is the mean over its real rows of weight x loss: a row
of weight 3 counts three times at any micro-batch. Before each micro-batch torch's random state is set from (seed, step, number of the
micro-batch in the step), so dropout and noise are the same after a resume, and the same at any number of ranks with the same micro-batch.

What is counted (loss and its parts, rows and their ids, time) is added up over the ranks once a window of at most WINDOW steps; there, on all ranks
alike, a loss or gradient that is not finite and a loss that has exploded end the training, naming the images; no checkpoint is written of such a
state. At the end of an epoch the rows that were fed and the checksum of their ids must be the manifest's.

A checkpoint that cannot be written (a full disk) is told and the training goes on: the earlier one stands. What the tracker cannot deliver waits.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from conf.loops import Loop
from conf.section import Mistake
from training import average, checkpoint, engine, feed, fragments, process_group, row_losses
from training.average import Average
from training.checkpoint import State
from training.progress import Progress
from training.task import Task
from training.window import Metrics, Window

if TYPE_CHECKING:
    import torch

    from training.tracker import Record

WINDOW, WINDOWS = 50, 200  # steps between two sums over the ranks at most; and at least so many of them in a training
CALM = 5  # windows before an explosion can be told
RECENT = 20  # windows whose median it is told by
BEST = "best.safetensors"


class Outcome(NamedTuple):
    """`weights`: what is exported, whole fp32 tensors by name on rank 0, {} elsewhere. `metrics`: the evaluation of these weights."""

    weights: fragments.Weights
    state: State
    metrics: Metrics


def run(task: Task, settings: Loop, folder: Path, ranks: process_group.Ranks, record: Record | None) -> Outcome:
    """Every rank calls it, with `record` on rank 0. Goes on from the folder's newest checkpoint. Raises Mistake when the loss is lost."""
    return _Fit(task, settings, folder, ranks, record).run()


class _Fit:
    def __init__(self, task: Task, settings: Loop, folder: Path, ranks: process_group.Ranks, record: Record | None) -> None:
        import torch

        self.task, self.settings, self.folder, self.ranks, self.record = task, settings, folder, ranks, record
        self.steps = settings.epochs * task.plan.steps
        self.looks = {round(self.steps * (one + 1) / settings.evaluations) for one in range(settings.evaluations)}
        self.every = max(1, min(WINDOW, self.steps // WINDOWS))
        self.micro_batches = engine.micro_batches(settings, ranks.world)
        self.metrics: Metrics = {}
        self.measured = -1  # the step of `metrics`
        if ranks.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
        found = checkpoint.latest(folder, settings)
        torch.manual_seed(settings.seed)
        module = task.build()
        universal = checkpoint.needs_universal(found, ranks, settings.zero_stage)
        self.model = engine.wrap(module, settings, self.steps, ranks, universal)
        self.average = Average(self.model, settings.ema_decay)
        self.state = found.state if found else State()
        self.saved = self.state.step if found else -1
        if found:
            checkpoint.load(self.model, self.average, found, ranks)
            self._say(f"goes on after step {self.state.step} of {self.steps}, from {found.folder}")
        if ranks.rank == 0:
            row_losses.forget_after(folder, self.state.step)
            checkpoint.sweep(folder)
        process_group.barrier()
        self.losses = row_losses.RowLosses(folder, ranks.rank)
        self.skipped = engine.skipped(self.model)
        self.window = Window(task.train_flops, ranks, self.model.device, settings.precision)
        self.progress = Progress(task.name, settings, self.steps, self.state.step)
        task.start(self.model.device)

    def run(self) -> Outcome:
        self.model.train()
        while self.state.epoch < self.settings.epochs and not self.state.stopped:
            self._epoch()
        if self.saved != self.state.step:
            self._save()
        weights = self._finish()
        return Outcome(weights, self.state, self.metrics)

    def _epoch(self) -> None:
        plan = self.task.plan.at(self.state.epoch, self.state.start)
        for batch in self._timed(feed.batches(plan, self.task.prepare, self.settings.feed_threads)):
            self._micro_batch(plan, batch)
            if batch.last:
                self._end_step(plan, batch.step_rows)
                if self.state.stopped:
                    return
        self._audit(plan)
        self.state = replace(self.state, epoch=self.state.epoch + 1, start=0, seen_rows=0, seen_ids=0)

    def _timed(self, batches: Iterator[feed.Batch]) -> Iterator[feed.Batch]:
        """The same, with the time that the model waits for them on the clock."""
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self.window.waited += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def _micro_batch(self, plan: feed.Plan, batch: feed.Batch) -> None:
        import torch

        inputs = {name: self._to_device(array) for name, array in batch.rows.items()}
        real = self._to_device(batch.weight)
        inputs["weight"] = inputs["weight"].float() * real if "weight" in inputs else real
        last = self.model.is_gradient_accumulation_boundary()
        assert last == batch.last, (plan, batch.step)
        torch.manual_seed(
            _stream(self.settings.seed, self.state.step, self.ranks.rank * self.micro_batches + self.model.micro_steps % self.micro_batches)
        )
        losses = self.task.losses(self.model, inputs)
        weighted = (losses["loss"] * inputs["weight"]).sum()
        self.model.backward(weighted * (self.ranks.world * self.micro_batches / batch.step_rows))
        self.model.step()
        self.window.add(batch, {"loss": weighted} | {name: (part * real).sum() for name, part in losses.items() if name != "loss"})
        counted = (batch.weight > 0) & (batch.rows.get("weight", batch.weight) > 0)  # one that its trainer leaves out has no loss
        self.losses.add(batch.image_id, self.state.epoch, self.state.step + 1, losses["loss"], counted)

    def _to_device(self, array: Any) -> torch.Tensor:
        import torch

        tensor, device = torch.from_numpy(array), self.model.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    def _end_step(self, plan: feed.Plan, step_rows: int) -> None:
        self.state = replace(self.state, step=self.state.step + 1, start=self.state.start + step_rows)
        step = self.state.step
        self.average.update(step)
        look = step in self.looks
        due = look or step % self.settings.checkpoint_every == 0
        if due or step % self.every == 0 or self.state.start == plan.rows:
            self._close_window()
        began = time.monotonic()
        if look:
            self._look()
        if due:
            self._save()
        self.window.stalled += time.monotonic() - began
        self.progress(step, self.state, self.ranks.rank)

    def _close_window(self) -> None:
        """Sums over the ranks -> metrics, and whether the loss is still one."""
        spoilt = self.settings.zero_stage == 0 and fragments.spoilt(self.model)  # the other stages leave such a step out
        totals = self.window.close(spoilt)
        self.losses.settle()
        self._check(totals.means["loss"], totals.spoilt or engine.skipped(self.model) > self.skipped)
        seen_rows, seen_ids = self.state.seen_rows + totals.rows, (self.state.seen_ids + totals.ids) % 2**64
        recent = [*self.state.recent[-RECENT + 1 :], totals.means["loss"]]
        self.state = replace(self.state, seen_rows=seen_rows, seen_ids=seen_ids, recent=recent)
        means = {"epoch": self.state.epoch + self.state.start / self.task.plan.rows, "learning_rate": float(self.model.get_lr()[0])}
        norm = self.model.get_global_grad_norm()
        self._record(totals.means | means | ({} if norm is None else {"gradient_norm": float(norm)}))

    def _check(self, loss: float, broken: bool) -> None:
        """Raises Mistake, on every rank, when the loss or a gradient is not finite, or the loss so many times its recent median."""
        usual = statistics.median(self.state.recent) if len(self.state.recent) >= CALM else float("inf")
        if np.isfinite(loss) and not broken and loss <= self.settings.explosion * usual:
            return
        worst: dict[str, float] = {}
        for value, image_id in sorted((one for rank in process_group.collect(self.losses.worst()) for one in rank), reverse=True):
            worst.setdefault(image_id, value)
        named = ", ".join(f"{image_id} ({value:.4g})" for image_id, value in list(worst.items())[: row_losses.WORST])
        if not np.isfinite(loss):
            found = f"the loss is not finite: {loss}"
        elif broken:
            found = f"a gradient is not finite (the loss is {loss:.4g})"
        else:
            found = f"the loss exploded: {loss:.4g}, more than explosion ({self.settings.explosion:g}) times its median of {usual:.4g}"
        raise Mistake(
            f"{found}, in the {self.every} steps up to {self.state.step}. Images with the largest loss since the last checkpoint: {named}. Nothing was "
            f"saved of this state: the last checkpoint is step {max(self.saved, 0)}. Look at these images and export without them; or lower "
            f"learning_rate ({self.settings.learning_rate:g}) or clip_norm, or raise warm_up, which is another training from the start; "
            f"`explosion` may be raised and the same training go on"
        )

    def _look(self) -> None:
        """Evaluation, whether it is the best so far, and whether patience is at its end."""
        self._evaluate()
        if not self.metrics or self.settings.patience is None:
            return
        value = self.metrics[self.task.metric]
        best, sign = self.state.best, 1 if self.task.larger_is_better else -1
        if best is None or sign * value > sign * best:
            failed = self._keep_best()
            if failed:
                self._say(f"NO COPY of the best weights at step {self.state.step}: {failed}. Those of before stay the best")
            else:
                self.state = replace(self.state, best=value, worse=0)
            return
        self.state = replace(self.state, worse=self.state.worse + 1)
        if self.state.worse >= self.settings.patience:
            self.state = replace(self.state, stopped=True)
            self._say(
                f"stops at step {self.state.step}: {self.state.worse} evaluations without a better {self.task.metric} than {best:.4f}"
            )

    def _evaluate(self) -> None:
        with self.average.applied():
            self._measure()
        self._record(self.metrics)

    def _measure(self) -> None:
        import torch

        self.model.eval()
        with torch.no_grad():
            metrics = self.task.evaluate(self.model)
        self.model.train()
        # rank 0's on every rank: they decide what is done together, and may differ in their last bit
        self.metrics, self.measured = process_group.collect(metrics)[0], self.state.step

    def _keep_best(self) -> str:
        """-> "" or what failed, the same on every rank."""
        failed = self.average.write(self.folder / BEST, self.ranks.rank)
        return "; ".join(one for one in process_group.collect(failed) if one)

    def _finish(self) -> fragments.Weights:
        """What is exported, and its metrics: the best with patience, else the last; averaged where there is an average."""
        import safetensors.torch

        if self.state.best is not None:
            with fragments.swapped(self.model, average.read(self.model, self.folder / BEST, self.ranks)):
                self._measure()
            weights = safetensors.torch.load_file(self.folder / BEST) if self.ranks.rank == 0 else {}
        else:
            if self.measured != self.state.step:  # it went on from its last step
                self._evaluate()
            weights = self.average.whole(keep=self.ranks.rank == 0)
        self._record({f"exported_{name}": value for name, value in self.metrics.items()})
        return weights

    def _save(self) -> None:
        began = time.monotonic()
        written = [one for one in process_group.collect(self.losses.write()) if one]
        failed = "; ".join(written) or checkpoint.save(self.model, self.average, self.state, self.folder, self.settings, self.ranks)
        if failed:
            self._say(f"NO CHECKPOINT at step {self.state.step}: {failed}. Training goes on; the last one is step {max(self.saved, 0)}")
            return
        self.saved = self.state.step
        self._record({"checkpoint_seconds": time.monotonic() - began})
        if self.record is not None:
            known = self.metrics if self.measured == self.state.step else {}
            self.record.checkpoint(self.state.step, checkpoint.complete(self.folder)[-1], known)

    def _audit(self, plan: feed.Plan) -> None:
        """Raises Mistake when the epoch's rows or ids are not the manifest's."""
        found, expected = (self.state.seen_rows, self.state.seen_ids), (plan.rows, plan.export.ids(plan.bucket))
        if found != expected:
            raise Mistake(
                f"audit of epoch {plan.epoch}: fed {found[0]} rows with checksum {found[1]:016x}, the manifest of {plan.export.root} says "
                f"{expected[0]} rows with {expected[1]:016x}. The feed is wrong: keep {self.folder} and report it"
            )

    def _record(self, values: Metrics) -> None:
        if self.record is not None and values:
            self.record.metrics(self.state.step, values)

    def _say(self, line: str) -> None:
        if self.ranks.rank == 0:
            print(f"{self.task.name}: {line}", flush=True)


def _stream(*what: int) -> int:
    """Numbers -> a seed that they alone make."""
    return int.from_bytes(hashlib.blake2b(" ".join(map(str, what)).encode(), digest_size=8).digest(), "little") >> 1
