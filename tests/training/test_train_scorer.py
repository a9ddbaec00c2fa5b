"""The trainer's command: real petastorm, DeepSpeed and MLflow on a small export."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.settings import load
from tests.training.conftest import EPOCHS, ROOT, Trained, command, run_child, write_export
from training import engine, exports, loop, tracker, train_scorer
from udfs import score_head

MODEL = "aesthetic-scorer"
SPARK = ["pyspark", "delta"]


@pytest.fixture
def client(trained: Trained) -> Any:
    return tracker.connect(load(ROOT / "conf/demo.yaml", trained.overrides).mlflow)


def test_a_first_training_registers_a_complete_version_and_makes_it_champion(trained: Trained, client: Any) -> None:
    version = client.get_model_version_by_alias(MODEL, "champion")
    manifest = (trained.export / "manifest.json").read_bytes()
    assert version.tags["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert version.tags["export"] == json.loads(manifest)["export"]
    assert json.loads(version.tags["made_from"]) == {"labels": 3, "embeddings": 4, "pixels": 4}
    assert (version.tags["encoder"], version.tags["encoder_fingerprint"], version.tags["width"]) == ("made-up", "abc123", "32")
    assert version.tags["beats_baselines"] in ("true", "false")
    assert len(version.tags["evaluation"]) < 5000
    files = client.download_artifacts(version.run_id, "head")
    weights = (Path(files) / "head.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == version.tags["sha256"]
    assert json.loads((Path(files) / "head.json").read_text())["sha256"] == version.tags["sha256"]
    assert score_head.load(weights)[0].in_features == 32
    assert "registered aesthetic-scorer version 1 as champion" in trained.output


def test_the_run_says_which_table_versions_and_settings_made_the_model(trained: Trained, client: Any) -> None:
    run = client.get_run(client.get_model_version(MODEL, "1").run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["epochs"] == str(EPOCHS)
    sources = {json.loads(given.dataset.source)["path"]: json.loads(given.dataset.source) for given in run.inputs.dataset_inputs}
    assert sources["demo/lake/embeddings"]["delta_table_version"] == 4
    sha256 = exports_of(trained).sha256
    assert {given.dataset.digest for given in run.inputs.dataset_inputs} == {sha256[:36]}
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    files = {"manifest.json", "config.yaml", "evaluation.json", "label_quality.png", "held_out.parquet", "head", "environment.txt"}
    assert names == files
    config = yaml.safe_load(Path(client.download_artifacts(run.info.run_id, "config.yaml")).read_text())
    assert set(config) == {"limits", "mlflow", "training", "train_scorer"}  # nothing of Spark, whose keys may be a store's
    steps = EPOCHS * 2
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == list(range(1, steps + 1))
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "held_out_srcc")] == [3, 6, 9, 12]
    assert {"data_wait_share", "rows_per_second", "flops_per_second", "gradient_norm", "checkpoint_seconds"} < set(run.data.metrics)
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    assert sorted(int(model.params["step"]) for model in models) == [3, 6, 9, 12]
    assert {metric.key for model in models for metric in model.metrics or []} == {"held_out_srcc"}


def test_the_trainings_folder_says_what_it_is_and_that_it_is_through(trained: Trained) -> None:
    (folder,) = (trained.export.parent / "trainings").iterdir()
    about, finished = (json.loads((folder / name).read_text()) for name in ("training.json", "finished.json"))
    assert about["digest"] == finished["digest"] == folder.name.removeprefix("aesthetic-scorer-")
    assert (finished["steps"], finished["epochs"], finished["export"]) == (EPOCHS * 2, EPOCHS, about["export"])
    assert finished["rows_seen"] == EPOCHS * 16 * 6
    assert {path.name for path in (folder / "row_losses").iterdir()} == set(finished["files"])


def test_a_second_start_loads_no_model_and_sets_a_champion_that_a_kill_left_out(trained: Trained, client: Any, tmp_path: Path) -> None:
    client.delete_registered_model_alias(MODEL, "champion")
    hidden = [*SPARK, "torch", "deepspeed", "petastorm"]
    again = run_child(command(trained.export, trained.overrides), hidden, tmp_path / "child")
    assert again.returncode == 0, again.stderr
    assert again.stdout == "train scorer: nothing to do, version 1 was made from this export (champion)\n"
    assert str(client.get_model_version_by_alias(MODEL, "champion").version) == "1"


def test_two_gloo_ranks_train_without_compiler_or_pyspark_and_a_later_version_is_candidate(
    trained: Trained, client: Any, tmp_path: Path
) -> None:
    overrides = [f"train_scorer.{setting}" for setting in ("ranks=2", "zero_stage=3", "rows_per_step=40", "micro_batch=20", "epochs=2")]
    done = run_child(command(trained.export, trained.overrides + overrides), SPARK, tmp_path / "child", PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout and "Cache cleanup" not in done.stdout
    assert "registered aesthetic-scorer version 2 as candidate" in done.stdout
    assert "python -m training.promote aesthetic-scorer 2 --config" in done.stdout
    assert str(client.get_model_version_by_alias(MODEL, "champion").version) == "1"
    assert client.get_model_version(MODEL, "2").tags["sha256"] != client.get_model_version(MODEL, "1").tags["sha256"]


def test_the_same_export_and_settings_give_bit_equal_weights(trained: Trained, client: Any, tmp_path: Path) -> None:
    settings = load(ROOT / "conf/demo.yaml", trained.overrides)
    export, ranks = exports_of(trained), engine.start("cpu")
    fitted = loop.run(train_scorer.make_task(settings, export, ranks), settings.train_scorer, tmp_path, ranks, None)
    again = hashlib.sha256(train_scorer.pack(fitted.weights)).hexdigest()
    assert again == client.get_model_version(MODEL, "1").tags["sha256"]


def test_a_training_cut_before_its_registration_goes_on_in_the_same_run_without_a_step(
    trained: Trained, client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*trained.overrides, "train_scorer.model=cut", "train_scorer.epochs=1"]
    monkeypatch.setattr("sys.argv", ["train_scorer", *command(trained.export, overrides)])
    with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
        cut.setattr(train_scorer, "write_result", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train_scorer.main()
    assert client.search_model_versions("name = 'cut'") == []
    train_scorer.main()
    assert "goes on after step 2 of 2" in capsys.readouterr().out
    (folder,) = (trained.export.parent / "trainings").glob("cut-*")
    (folder / "finished.json").unlink()  # as if killed after its registration
    train_scorer.main()
    assert (folder / "finished.json").is_file()
    capsys.readouterr()
    (version,) = client.search_model_versions("name = 'cut'")
    runs = client.search_runs([client.get_run(version.run_id).info.experiment_id], "params.model = 'cut'")
    assert [run.info.run_id for run in runs] == [version.run_id]
    train_scorer.main()
    assert capsys.readouterr().out == "train scorer: nothing to do, version 1 was made from this export (champion)\n"


def test_a_store_that_lost_a_finished_training_gets_its_record_anew(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = f"sqlite:///{tmp_path}/store/mlflow.db"
    overrides = [*trained.overrides, f"mlflow.tracking_uri={other}", f"mlflow.artifacts={tmp_path}/artifacts"]
    monkeypatch.setattr("sys.argv", ["train_scorer", *command(trained.export, overrides)])
    train_scorer.main()
    said = capsys.readouterr().out
    assert "trained, but not registered there" in said
    assert "registered aesthetic-scorer version 1 as champion" in said
    train_scorer.main()
    assert capsys.readouterr().out == "train scorer: nothing to do, version 1 was made from this export (champion)\n"


def test_an_image_in_both_buckets_stops_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export = write_export(tmp_path / "export", train=4, held_out=range(3, 6))
    assert ": 1 images are in both train and held_out, e.g. " in refuse(export, tmp_path, monkeypatch, capsys)


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, "was changed: its sha256 is"),
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "has 500 bytes, the manifest says"),
        (Path.unlink, "is missing; export again"),
    ],
    ids=["changed", "truncated", "missing"],
)
def test_a_tampered_file_stops_the_training_with_its_name(
    damage: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export = write_export(tmp_path / "export")
    damage(export / "train-00001.parquet")
    assert f"train-00001.parquet {said}" in refuse(export, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda manifest: manifest["columns"].pop("sharpness"), "columns: sharpness: given None, expected float"),
        (lambda manifest: manifest["columns"].update(value="double"), "columns: value: given double, expected float"),
        (lambda manifest: manifest.update(kind="selection"), "given an export of kind 'selection', expected 'labels'"),
        (lambda manifest: manifest.update(files=manifest["files"][:3]), "no rows in bucket 'held_out'"),
        (lambda manifest: manifest.update(rows=7), "the manifest says 7 rows, its files have 132"),
        (lambda manifest: manifest["encoder"].pop("width"), "the manifest's encoder has no width"),
        (lambda manifest: manifest.pop("files"), "not a manifest of this version: files: Field required"),
    ],
    ids=["column missing", "column type", "kind", "no held_out", "rows", "encoder", "no files"],
)
def test_a_bad_manifest_is_one_line_and_status_2(
    spoil: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refuse(write_export(tmp_path / "export", spoil=spoil), tmp_path, monkeypatch, capsys)


def test_a_folder_without_a_manifest_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no manifest.json there" in refuse(tmp_path / "nothing", tmp_path, monkeypatch, capsys)


def test_a_plan_says_what_is_pending_and_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"mlflow.tracking_uri=sqlite:///{tmp_path}/store/mlflow.db", f"training.root={tmp_path}/trainings"]
    monkeypatch.setattr("sys.argv", ["train_scorer", *command(write_export(tmp_path / "export"), overrides, "--plan")])
    train_scorer.main()
    assert "40 epochs of 96 rows, 36 rows held out, about 16 s" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


def exports_of(trained: Trained) -> exports.Export:
    return exports.open_export(trained.export, "labels", train_scorer.COLUMNS, ("train", "held_out"))


def refuse(export: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command in this process; it must end with status 2 and one line, which is returned."""
    overrides = [f"mlflow.tracking_uri=sqlite:///{folder}/store/mlflow.db", f"mlflow.artifacts={folder}/artifacts"]
    monkeypatch.setattr("sys.argv", ["train_scorer", *command(export, [*overrides, f"training.root={folder}/trainings"])])
    with pytest.raises(SystemExit) as end:
        train_scorer.main()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.count("\n") == 1
    return said
