"""Arms x seeds as processes of their own, their runs in a real MLflow server, and the ranking of what they reached."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from conf.build import Mlflow
from conf.section import Mistake
from conf.settings import load
from tests.training.conftest import ROOT, write_export
from training import compare, mlflow_store
from training.draw_comparison import draw
from training.ranking import rank

if TYPE_CHECKING:
    from tests.training.mlflow_server import Gate

pytest_plugins = ["tests.training.mlflow_server"]


def call(folder: Path, monkeypatch: pytest.MonkeyPatch, arms: str, *more: str, trainer: str = "train_scorer") -> int | str | None:
    """The command in this process, whose children run the trainer that only records -> its exit status."""
    (folder / "arms.yaml").write_text(arms)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nshift 2\ncd {ROOT}\nexec {sys.executable} -m tests.training.recording_trainer "$@"\n')
    python.chmod(0o755)
    if not (folder / "export").is_dir():
        write_export(folder / "export", train=2)
    line = [str(folder / "export"), "--config", str(ROOT / "conf/demo.yaml"), "--set", f"training.root={folder}/trainings"]
    with monkeypatch.context() as here:
        here.setattr("sys.executable", str(python))
        here.setattr("sys.argv", ["compare", *line, "--trainer", trainer, "--arms", str(folder / "arms.yaml"), *more])
        try:
            compare.main()
        except SystemExit as end:
            return end.code
    return 0


ARMS = """
name: rates
seeds: [1]
arms:
  slow: {train_scorer.learning_rate: 1.0e-5}
  fast: {train_scorer.learning_rate: 2.0}
"""


def test_arms_are_trained_once_ranked_and_kept_by_their_parent_and_a_failed_one_is_named_and_tried_again(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    more = [
        "--set",
        f"mlflow.tracking_uri={gate.uri}",
        "--set",
        f"mlflow.experiment={tmp_path.name}",
        "--set",
        f"train_scorer.model={tmp_path.name}",
    ]
    assert call(tmp_path, monkeypatch, ARMS, *more) == 1
    said = capfd.readouterr().out
    assert "compare: FAILED: fast, seed 1: its training ended with status 1\n" in said
    assert "best: slow, the only arm with a value" in said
    (tmp_path / "trainings/mended").touch()
    assert call(tmp_path, monkeypatch, ARMS, *more) == 0
    said = capfd.readouterr().out
    assert said.count("nothing to do") == 1
    assert "best: fast, without an interval over slow: they have fewer than two seeds in common" in said
    assert f"python -m training.promote {tmp_path.name} 2 " in said
    client = mlflow_store.connect(Mlflow(tracking_uri=gate.uri))
    runs = client.search_runs([client.get_experiment_by_name(tmp_path.name).experiment_id])
    (parent,) = [run for run in runs if run.info.run_name == "rates"]
    children = [run.data.tags for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(tags["studbook.arm"] for tags in children) == ["fast", "slow"]
    assert len(runs) == 3
    files = Path(client.download_artifacts(parent.info.run_id, "", str(tmp_path)))
    assert (files / "comparison.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((files / "comparison.json").read_text())["ranking"]["arms"]
    assert [(arm["name"], arm["values"]) for arm in kept] == [
        ("fast", {"1": pytest.approx(0.71)}),
        ("slow", {"1": pytest.approx(0.51, abs=1e-4)}),
    ]


@pytest.mark.parametrize(
    ("arms", "trainer", "said"),
    [
        (ARMS, "train", "--trainer: given 'train', expected one of ["),
        (ARMS.replace("2.0", "-1"), "train_scorer", "train_scorer.learning_rate: "),
        (ARMS.replace("learning_rate: 2.0", "learning_rat: 2"), "train_scorer", "did you mean learning_rate?"),
        (ARMS.replace("2.0", "1.0e-5"), "train_scorer", "fast, seed 1 is the same training as slow, seed 1"),
        (
            ARMS.replace("learning_rate: 2.0", "zero_stage: 3, train_scorer.learning_rate: 1.0e-5"),
            "train_scorer",
            "is the same training as",
        ),
        (ARMS.replace("rates", "a b"), "train_scorer", "arms.yaml: name: "),
        (ARMS.replace("[1]", "[]"), "train_scorer", "arms.yaml: seeds: "),
    ],
    ids=["trainer", "value", "key", "same", "run only", "name", "seeds"],
)
def test_a_mistake_in_any_arm_stops_before_the_first_training(
    arms: str, trainer: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path, monkeypatch, arms, trainer=trainer) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "trainings").exists()


def test_an_arm_without_a_comparison_is_a_mistake() -> None:
    with pytest.raises(Mistake, match="comparison and arm go together"):
        load(ROOT / "conf/demo.yaml", ["mlflow.arm=fast"])


def test_a_lead_within_the_spread_of_the_seeds_is_not_clear() -> None:
    ranking = rank({("a", 1): 0.5, ("a", 2): 0.7, ("b", 1): 0.6, ("b", 2): 0.58}, "held_out_srcc", False)
    assert [arm.name for arm in ranking.arms] == ["a", "b"]
    assert not ranking.clear
    assert "NOT clear, the interval holds 0" in str(ranking)
    assert ranking.lead is not None
    assert ranking.lead[1] < 0 < ranking.lead[0]
    assert ranking.arms[0].spread == pytest.approx(0.1414, abs=1e-4)


def test_the_interval_is_students_over_the_seeds_that_both_arms_have_and_smaller_can_be_better() -> None:
    values = {("a", 1): 1.0, ("a", 2): 1.1, ("a", 3): 1.3, ("a", 4): 9.0, ("b", 1): 0.5, ("b", 2): 0.7, ("b", 3): 0.6}
    ranking = rank(values, "held_out_loss", True)
    assert (ranking.arms[0].name, ranking.clear) == ("b", True)
    assert ranking.lead is not None
    mean, low, high = ranking.lead  # differences .5, .4, .7: mean .5333, sd .1528, t(2) = 4.3027
    assert (mean, low, high) == (pytest.approx(0.5333, abs=1e-4), pytest.approx(0.1539, abs=1e-4), pytest.approx(0.9128, abs=1e-4))


def test_one_seed_gives_a_ranking_without_an_interval_and_a_plot() -> None:
    ranking = rank({("a", 1): 0.5, ("b", 1): 0.6}, "held_out_srcc", False)
    assert (ranking.lead, ranking.clear) == (None, False)
    assert "without an interval over a: they have fewer than two seeds in common" in str(ranking)
    assert draw(ranking).startswith(b"\x89PNG")
