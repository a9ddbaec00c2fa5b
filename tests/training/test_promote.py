"""The promotion rule on a real MLflow server: better beyond the interval, refused, or not to be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from conf.build import Mlflow
from conf.section import Mistake
from tests.training.conftest import ROOT, image_id
from training import mlflow_store, paired, promote

if TYPE_CHECKING:
    from tests.training.mlflow_server import Gate

pytest_plugins = ["tests.training.mlflow_server"]
VIEWS = {"original": 1.0, "blur:1": 0.6, "blur:2": 0.2}


@pytest.fixture
def store(gate: Gate, tmp_path: Path) -> Mlflow:
    return Mlflow(tracking_uri=gate.uri, experiment=tmp_path.name)


def predict(noise: float, images: range = range(60)) -> pd.DataFrame:
    """held_out.parquet of a model that sees the target through so much noise."""
    rng = np.random.default_rng(3)
    rows = [(image_id(image), view, value) for image in images for view, value in VIEWS.items()]
    table = pd.DataFrame(rows, columns=["image_id", "view", "value"])
    return table.assign(prediction=table["value"] + noise * rng.normal(size=len(table)))


def lose(level: float, images: range = range(40)) -> pd.DataFrame:
    rng = np.random.default_rng(4)
    return pd.DataFrame(
        [(image_id(image), level + 0.01 * rng.normal()) for image in images for _ in range(2)], columns=["image_id", "loss"]
    )


def add_version(store: Mlflow, model: str, tables: dict[str, pd.DataFrame], folder: Path) -> str:
    """A run with these files and a version made of it, with the alias that a trainer would give it."""
    client = mlflow_store.connect(store)
    run = client.create_run(mlflow_store.find_experiment(client, store)).info.run_id
    for name, table in tables.items():
        table.to_parquet(folder / name)
        client.log_artifact(run, str(folder / name))
    version = mlflow_store.register(client, model, run, "head", {mlflow_store.DIGEST: run})
    mlflow_store.settle_alias(client, model, version)
    return version


def aliases(store: Mlflow, model: str) -> dict[str, int]:
    return mlflow_store.find_aliases(mlflow_store.connect(store), model)


def call(store: Mlflow, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """The command in this process -> its exit status."""
    line = ["promote", *arguments, "--config", str(ROOT / "conf/demo.yaml"), "--set", f"mlflow.tracking_uri={store.tracking_uri}"]
    monkeypatch.setattr("sys.argv", line)
    try:
        promote.main()
    except SystemExit as end:
        return end.code
    return 0


def test_a_candidate_that_is_better_beyond_the_interval_becomes_the_champion_and_says_why(
    store: Mlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_version(store, "better", {"held_out.parquet": predict(1.0)}, tmp_path)
    add_version(store, "better", {"held_out.parquet": predict(0.1, range(10, 70))}, tmp_path)
    assert aliases(store, "better") == {"champion": 1, "candidate": 2}
    assert call(store, monkeypatch, "better", "--plan") == 0
    assert aliases(store, "better") == {"champion": 1, "candidate": 2}
    assert call(store, monkeypatch, "better") == 0
    assert aliases(store, "better") == {"champion": 2}
    said = capsys.readouterr().out
    assert "on 50 images, 150 rows: better by 0." in said
    assert said.endswith("promote: better version 2 is the champion\n")
    tags = mlflow_store.connect(store).get_model_version("better", "2").tags
    figures = json.loads(tags["promotion"])
    assert (tags["promoted_over"], figures["metric"], figures["images"], figures["rows"]) == ("1", "held_out_srcc", 50, 150)
    assert 0 < figures["difference"][1] < figures["difference"][0] < figures["difference"][2]
    assert figures["difference"][0] == pytest.approx(figures["version"] - figures["champion"])
    assert call(store, monkeypatch, "better", "2") == 0
    assert "nothing to do, better version 2 is the champion" in capsys.readouterr().out


def test_a_version_that_is_not_better_beyond_the_interval_is_refused_with_figures_and_status_1(
    store: Mlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slightly = predict(0.5)
    slightly.loc[:2, "prediction"] = slightly.loc[:2, "value"]  # better in the mean, by a few rows
    add_version(store, "equal", {"held_out.parquet": predict(0.5)}, tmp_path)
    add_version(store, "equal", {"held_out.parquet": slightly}, tmp_path)
    assert call(store, monkeypatch, "equal", "2") == 1
    assert "promote: refused: the interval is not above 0; version 1 stays the champion" in capsys.readouterr().out
    assert aliases(store, "equal") == {"champion": 1, "candidate": 2}
    assert "promotion" not in mlflow_store.connect(store).get_model_version("equal", "2").tags


def test_models_with_losses_are_compared_by_the_mean_loss_of_an_image_where_smaller_is_better(
    store: Mlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_version(store, "losses", {"held_out_losses.parquet": lose(0.5)}, tmp_path)
    add_version(store, "losses", {"held_out_losses.parquet": lose(0.7)}, tmp_path)
    add_version(store, "losses", {"held_out_losses.parquet": lose(0.4)}, tmp_path)
    assert call(store, monkeypatch, "losses", "2") == 1
    assert "worse by 0.2000 (interval of the gain [-0." in capsys.readouterr().out
    assert call(store, monkeypatch, "losses", "3", "--metric", "held_out_loss") == 0
    assert aliases(store, "losses") == {"champion": 3}


def test_losses_on_other_lessons_of_the_same_images_are_not_compared() -> None:
    """A captioner's: what a teacher has said meanwhile is another answer, of another length and loss."""
    one, two = (lose(level).drop_duplicates("image_id") for level in (0.5, 0.7))
    lessons = [f"lesson {number}" for number in range(40)]
    changed = ["another"] * 5 + lessons[5:]
    assert paired.measure_loss("held_out_loss", one, two, 30).images == 40
    assert paired.measure_loss("held_out_loss", one.assign(lesson=lessons), two, 30).images == 40  # one of before knows none
    assert paired.measure_loss("held_out_loss", one.assign(lesson=lessons), two.assign(lesson=changed), 30).images == 35
    with pytest.raises(Mistake, match="35 held-out images in common"):
        paired.measure_loss("held_out_loss", one.assign(lesson=lessons), two.assign(lesson=changed), 36)


@pytest.mark.parametrize(
    ("second", "arguments", "said"),
    [
        ({"held_out.parquet": predict(0.1, range(31, 91))}, [], "29 held-out images in common, expected 30 or more (given 60 and 60)"),
        ({"held_out.parquet": predict(0.1).drop(columns="prediction")}, [], "held_out.parquet lacks the columns ['prediction']"),
        ({"held_out.parquet": pd.concat([predict(0.1)] * 2)}, [], "have image_id, view, value twice"),
        ({}, [], "version 2 has no held_out.parquet in its run"),
        ({"held_out.parquet": predict(0.1)}, ["--metric", "held_out_loss"], "version 2 has no held_out_losses.parquet in its run"),
        ({"held_out.parquet": predict(0.1)}, ["7"], "version: given '7', "),
    ],
    ids=["few common", "columns", "twice", "no file", "other metric", "no version"],
)
def test_what_cannot_be_compared_is_one_line_and_status_2(
    second: dict[str, Any],
    arguments: list[str],
    said: str,
    store: Mlflow,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path.name
    add_version(store, model, {"held_out.parquet": predict(0.5)}, tmp_path)
    add_version(store, model, second, tmp_path)
    assert call(store, monkeypatch, model, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert aliases(store, model) == {"champion": 1, "candidate": 2}


def test_a_model_without_a_candidate_and_one_that_is_not_registered_are_named(
    store: Mlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_version(store, "lonely", {}, tmp_path)
    assert call(store, monkeypatch, "lonely") == 2
    assert "lonely has no candidate" in capsys.readouterr().err
    assert call(store, monkeypatch, "unheard-of") == 2
    assert "model: given 'unheard-of', which is not registered" in capsys.readouterr().err
    mlflow_store.connect(store).delete_registered_model_alias("lonely", "champion")
    assert call(store, monkeypatch, "lonely", "1") == 0
    assert aliases(store, "lonely") == {"champion": 1}


def test_the_command_of_a_promotion_names_the_store_that_was_given_and_survives_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["train_scorer", "export", "--config", "my build.yaml", "--set", "mlflow.tracking_uri=sqlite:///charm/comparison.db"]
    monkeypatch.setattr("sys.argv", [*line, "--set", "mlflow.comparison=rates", "--set", "mlflow.arm=slow", "--set", "train_scorer.seed=2"])
    told = "python -m training.promote model 3 --config 'my build.yaml' --set mlflow.tracking_uri=sqlite:///charm/comparison.db"
    assert mlflow_store.promotion_command("model", "3") == told
