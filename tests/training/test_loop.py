"""The loop in one process: what a row weighs, what is averaged, when it stops, what it does when things go wrong."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from conf.loops import Loop
from tests.training.conftest import COLUMNS, WIDTH, write_export
from training import checkpoint, engine, feed, loop, process_group
from training.exports import Export, open_export
from training.row_losses import FOLDER as ROW_LOSSES
from training.vector_heads import read_vectors

ROWS = 16 * 6
ALONE = process_group.Ranks(0, 1)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    engine.start("cpu")
    return open_export(write_export(tmp_path_factory.mktemp("loop") / "export"), "labels", COLUMNS, ("train", "held_out"))


class Line:
    """Task: a linear model of the vectors. `weigh` image -> weight; `spoil` images whose loss is taken times `by`; `measured` the values of evaluate."""

    name, metric, larger_is_better, train_flops = "line", "quality", True, 2.0 * WIDTH

    def __init__(self, export: Export, settings: Loop, weigh: dict[bytes, float] | None = None, measured: tuple[float, ...] = ()) -> None:
        self.plan = feed.Plan(export, "train", settings.seed, 0, settings.rows_per_step, settings.micro_batch)
        self.weigh, self.measured, self.spoilt = weigh, iter(measured), (-1, 0.0)
        self.made_steps, self.outputs = 0, 1
        self.evaluated: list[torch.Tensor] = []

    def build(self) -> torch.nn.Module:
        return torch.nn.Linear(WIDTH, self.outputs)

    def start(self, device: torch.device) -> None:
        pass

    def prepare(self, rows: feed.Rows, epoch: int) -> feed.Arrays:
        arrays = {"vectors": read_vectors(rows["vector"], WIDTH), "value": rows["value"]}
        if self.weigh is not None:
            arrays["weight"] = np.array([self.weigh.get(image_id, 1.0) for image_id in rows["image_id"]], np.float32)
        return arrays

    def losses(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        loss = ((model(inputs["vectors"]) - inputs["value"][:, None]) ** 2).mean(1)
        self.made_steps += 1
        step, factor = self.spoilt
        return {"loss": loss * factor if self.made_steps == step else loss}

    def evaluate(self, model: Any) -> dict[str, float]:
        self.evaluated.append(model.module.weight.detach().clone())
        value = next(self.measured, None)
        return {} if value is None else {"quality": value}


def settings(**given: Any) -> Loop:
    # stage 0 in one process: the weights are the parameters themselves
    plain: dict[str, Any] = {"model": "line", "epochs": 2, "rows_per_step": 12, "micro_batch": 12, "learning_rate": 0.01, "zero_stage": 0}
    return Loop(**(plain | {"say_every": 1000.0} | given))


def fit(task: Line, told: Loop, folder: Path) -> loop.Outcome:
    return loop.run(task, told, folder, ALONE, None)


def test_a_rows_weight_acts_at_micro_batch_1_and_is_the_same_at_any(export: Export, tmp_path: Path) -> None:
    heavy = feed.read(export, export.files("train")[0], ("image_id",))["image_id"][0]
    weights = []
    for number, (weigh, micro_batch) in enumerate([(None, 1), ({heavy: 5.0}, 1), ({heavy: 5.0}, 4), ({heavy: 5.0}, 12)]):
        told = settings(micro_batch=micro_batch, epochs=1)
        weights.append(fit(Line(export, told, weigh), told, tmp_path / str(number)).weights["weight"])
    assert not torch.allclose(weights[0], weights[1], atol=1e-3)
    assert torch.allclose(weights[1], weights[2], atol=1e-6)
    assert torch.allclose(weights[1], weights[3], atol=1e-6)


def test_a_step_that_is_padded_has_the_mean_over_its_real_rows(export: Export, tmp_path: Path) -> None:
    told = settings(rows_per_step=200, micro_batch=100, epochs=1, learning_rate=1e-2, clip_norm=1e9)
    weights = fit(Line(export, told), told, tmp_path).weights
    task = Line(export, told)
    torch.manual_seed(told.seed)
    module = task.build()
    rows = task.prepare(feed.read_bucket(export, "train"), 0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=told.learning_rate, weight_decay=told.weight_decay)
    task.losses(module, {name: torch.from_numpy(array) for name, array in rows.items()})["loss"].mean().backward()
    optimizer.step()
    assert torch.allclose(weights["weight"], module.weight, atol=1e-6)


def test_the_average_is_the_formulas_and_is_what_is_evaluated_and_exported(export: Export, tmp_path: Path) -> None:
    told = settings(ema_decay=0.9, checkpoint_every=1, keep=100)
    task = Line(export, told)
    outcome = fit(task, told, tmp_path)
    saved = [torch.load(folder / "engine/mp_rank_00_model_states.pt", weights_only=False) for folder in checkpoint.complete(tmp_path)]
    torch.manual_seed(told.seed)
    average = task.build().weight.detach().clone()
    for steps, state in enumerate(saved, 1):
        average += (1 - min(0.9, (1 + steps) / (10 + steps))) * (state["module"]["weight"] - average)
    assert torch.allclose(outcome.weights["weight"], average, atol=1e-6)
    assert torch.equal(task.evaluated[-1], outcome.weights["weight"])
    assert not torch.allclose(outcome.weights["weight"], saved[-1]["module"]["weight"], atol=1e-3)
    assert torch.equal(
        safetensors.torch.load_file(tmp_path / "checkpoints/step-00000016/ema.safetensors")["weight"], outcome.weights["weight"]
    )


def test_patience_stops_the_training_and_exports_the_best_weights(export: Export, tmp_path: Path) -> None:
    told = settings(epochs=8, evaluations=8, patience=2)
    task = Line(export, told, measured=(0.1, 0.5, 0.4, 0.3, 0.9))
    outcome = fit(task, told, tmp_path)
    assert (outcome.state.step, outcome.state.best, outcome.state.stopped) == (32, 0.5, True)
    assert torch.equal(outcome.weights["weight"], task.evaluated[1])
    assert torch.equal(task.evaluated[4], task.evaluated[1])  # measured again: the metrics are those of what is exported
    assert outcome.metrics == {"quality": 0.9}
    again = fit(Line(export, told, measured=(0.7,)), told, tmp_path)
    assert (again.state.step, again.metrics) == (32, {"quality": 0.7})
    assert torch.equal(again.weights["weight"], outcome.weights["weight"])


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (float("nan"), r"the loss is not finite: nan"),
        (1000.0, r"the loss exploded: \d+\.?\d*, more than explosion \(20\) times its median of 0\.\d+"),
    ],
)
def test_a_loss_that_is_lost_ends_the_training_naming_its_rows_and_saves_nothing_of_it(
    export: Export, tmp_path: Path, factor: float, said: str
) -> None:
    told = settings(epochs=4, checkpoint_every=8)
    task = Line(export, told)
    task.spoilt = (12, factor)
    with pytest.raises(
        ValueError, match=rf"{said}.* up to 12\. Images with the largest loss .*: [0-9a-f]{{64}} .* the last checkpoint is step 8\."
    ):
        fit(task, told, tmp_path)
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["step-00000008"]
    healed = Line(export, told)
    outcome = fit(healed, told, tmp_path)  # goes on from step 8, and the row is sound now
    straight = fit(Line(export, told), told, tmp_path / "straight")
    assert torch.equal(outcome.weights["weight"], straight.weights["weight"])


def wide(export: Export, told: Loop) -> Line:
    """Its weights are larger than what its rows cost."""
    task = Line(export, told)
    task.outputs = 64
    return task


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """No file of this process may be larger, as if the disk were full: the same errors come from the same calls."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("room", "named"), [(100, "row_losses"), (6000, "engine/mp_rank_00")])
def test_a_full_disk_costs_the_checkpoint_and_not_the_training(
    export: Export, tmp_path: Path, room: int, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = settings(epochs=3, checkpoint_every=8, evaluations=1, schedule="constant")
    fit(wide(export, told), told.model_copy(update={"epochs": 1}), tmp_path)
    before = checkpoint.complete(tmp_path)
    with full_disk(room):
        outcome = fit(wide(export, told), told, tmp_path)
    assert outcome.state.step == 24
    assert checkpoint.complete(tmp_path) == before == [tmp_path / "checkpoints/step-00000008"]
    assert not list(tmp_path.glob("checkpoints/*.part"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "NO CHECKPOINT at step 16: " in line]
    assert named in line
    again = fit(wide(export, told), told, tmp_path)
    assert torch.equal(again.weights["weight"], outcome.weights["weight"])
    assert checkpoint.complete(tmp_path)[-1].name == "step-00000024"


def test_a_checkpoint_of_another_stage_or_damaged_is_refused_with_the_reason(export: Export, tmp_path: Path) -> None:
    told = settings()
    fit(Line(export, told), told, tmp_path)
    with pytest.raises(ValueError, match=r"written with zero_stage 0, given 2.*set zero_stage back to 0"):
        fit(Line(export, told), told.model_copy(update={"zero_stage": 2}), tmp_path)
    (tmp_path / "checkpoints/step-00000016/engine/mp_rank_00_model_states.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"step-00000016: engine/mp_rank_00_model_states\.pt has 4 bytes, was written with \d+"):
        fit(Line(export, told), told, tmp_path)


def test_checkpoints_are_kept_by_the_policy(export: Export, tmp_path: Path) -> None:
    told = settings(checkpoint_every=2, keep=2, keep_every=6, evaluations=1)
    fit(Line(export, told), told, tmp_path)
    assert [int(folder.name[5:]) for folder in checkpoint.complete(tmp_path)] == [6, 12, 14, 16]


def test_every_time_a_row_was_trained_on_is_written_with_its_loss(export: Export, tmp_path: Path) -> None:
    told = settings(epochs=3, rows_per_step=10, micro_batch=5)
    fit(Line(export, told), told, tmp_path)
    written = [pq.read_table(path).to_pandas() for path in sorted((tmp_path / ROW_LOSSES).iterdir())]
    assert [(part["step"].min(), part["step"].max()) for part in written] == [(1, 8), (9, 15), (16, 22), (23, 30)]
    told_ids = sorted(feed.read_bucket(export, "train", ("image_id",))["image_id"])
    for epoch in range(3):
        assert sorted(np.concatenate([part["image_id"][part["epoch"] == epoch] for part in written])) == told_ids
    assert all(np.isfinite(part["loss"]).all() for part in written)


@pytest.mark.parametrize("how", ["one twice", "one less", "another"])
def test_an_epoch_whose_rows_are_not_the_manifests_ends_the_training(
    export: Export, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A feed that loses or doubles rows, as petastorm's own pool does: the audit is all that stands behind it."""
    real = feed.batches

    def wrong(plan: feed.Plan, *more: Any) -> Iterator[feed.Batch]:
        for batch in real(plan, *more):
            if batch.step == 2:
                ids, weight = batch.image_id.copy(), batch.weight.copy()
                ids[0] = {"one twice": ids[1], "one less": ids[0], "another": bytes(32)}[how]
                weight[0] = how != "one less"
                batch = batch._replace(image_id=ids, weight=weight)
            yield batch

    monkeypatch.setattr(feed, "batches", wrong)
    told = settings(rows_per_step=11, micro_batch=11)  # views of an image are not neighbours
    with pytest.raises(ValueError, match=r"audit of epoch 0: fed (95|96) rows with checksum \w{16}, the manifest of .* says 96 rows with"):
        fit(Line(export, told), told, tmp_path)


def test_a_gradient_that_is_not_finite_ends_the_training_at_every_stage_though_the_loss_is_finite(export: Export, tmp_path: Path) -> None:
    for stage in (0, 1, 2, 3):
        told = settings(zero_stage=stage, checkpoint_every=4)
        task = Line(export, told)
        task.losses = steep(task)  # type: ignore[method-assign]
        with pytest.raises(ValueError, match=r"a gradient is not finite .* up to 6\. Images with .* the last checkpoint is step 4\."):
            fit(task, told, tmp_path / str(stage))


def steep(task: Line) -> Any:
    """Its losses: at the sixth step the square root of 0, whose slope is infinite."""
    plain = task.losses

    def losses(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        told = plain(model, inputs)
        if task.made_steps == 6:
            told["loss"] = told["loss"] + torch.sqrt(told["loss"] * 0.0)
        return told

    return losses


def test_an_explosion_is_told_after_a_resume_too(export: Export, tmp_path: Path) -> None:
    told = settings(epochs=4, checkpoint_every=8)
    cut = Line(export, told)
    cut.spoilt = (10, float("nan"))
    with pytest.raises(ValueError, match="is not finite"):
        fit(cut, told, tmp_path)
    task = Line(export, told)
    task.spoilt = (2, 1000.0)  # the second step after step 8
    with pytest.raises(ValueError, match=r"the loss exploded: .* more than explosion \(20\) times its median"):
        fit(task, told, tmp_path)


class Kept:
    """A record that keeps what it is told."""

    def __init__(self) -> None:
        self.values: dict[int, dict[str, float]] = {}
        self.checkpoints: dict[int, dict[str, float]] = {}

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.values[step] = self.values.get(step, {}) | values

    def checkpoint(self, step: int, folder: Path, values: dict[str, float]) -> None:
        assert (folder / "state.json").is_file()
        self.checkpoints[step] = values


def test_a_checkpoint_has_the_metrics_of_its_own_weights_and_the_exported_ones_are_recorded(export: Export, tmp_path: Path) -> None:
    told = settings(checkpoint_every=3, evaluations=2, patience=5, keep=99)
    record: Any = Kept()
    outcome = loop.run(Line(export, told, measured=(0.5, 0.3, 0.5)), told, tmp_path, ALONE, record)
    assert record.checkpoints == {3: {}, 6: {}, 8: {"quality": 0.5}, 9: {}, 12: {}, 15: {}, 16: {"quality": 0.3}}
    assert record.values[16]["exported_quality"] == outcome.metrics["quality"] == 0.5


def test_a_state_says_where_the_next_start_begins(export: Export, tmp_path: Path) -> None:
    told = settings(epochs=2, checkpoint_every=5, evaluations=1, keep=9)
    fit(Line(export, told), told, tmp_path)
    states = [json.loads((folder / "state.json").read_text())["state"] for folder in checkpoint.complete(tmp_path)]
    assert [(state["step"], state["epoch"], state["start"], state["seen_rows"]) for state in states] == [
        (5, 0, 60, 60),
        (10, 1, 24, 24),
        (15, 1, 84, 84),
        (16, 1, 96, 96),
    ]


class Filling(Line):
    """The disk is full from its fourth evaluation to its fifth."""

    def evaluate(self, model: Any) -> dict[str, float]:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 if len(self.evaluated) == 3 else hard, hard))
        return super().evaluate(model)


def test_a_full_disk_keeps_the_best_of_before(export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = settings(epochs=4, evaluations=4, patience=3)
    task = Filling(export, told, measured=(0.1, 0.5, 0.2, 0.7, 0.5))
    outcome = fit(task, told, tmp_path)
    assert "NO COPY of the best weights at step 32: " in capsys.readouterr().out
    assert (outcome.state.best, outcome.metrics) == (0.5, {"quality": 0.5})
    assert torch.equal(outcome.weights["weight"], task.evaluated[1])
