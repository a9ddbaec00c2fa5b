"""The trainer's command: real petastorm, DeepSpeed and MLflow on a small export."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from conf.settings import load
from tests.training.conftest import EPOCHS, ROOT, Trained, command, run_child, write_export
from training import engine, exports, feed, fit_scorer, tracker, train_scorer
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
    assert names == {"manifest.json", "config.yaml", "evaluation.json", "label_quality.png", "head"}
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == list(range(1, EPOCHS + 1))
    assert client.get_metric_history(run.info.run_id, "held_out_srcc")[-1].step == EPOCHS


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
    overrides = [f"train_scorer.{setting}" for setting in ("ranks=2", "zero_stage=3", "batch_size=20", "epochs=2")]
    done = run_child(command(trained.export, trained.overrides + overrides), SPARK, tmp_path / "child", PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout and "Cache cleanup" not in done.stdout
    assert "registered aesthetic-scorer version 2 as candidate" in done.stdout
    assert "set_registered_model_alias('aesthetic-scorer', 'champion', '2')" in done.stdout
    assert str(client.get_model_version_by_alias(MODEL, "champion").version) == "1"
    assert client.get_model_version(MODEL, "2").tags["sha256"] != client.get_model_version(MODEL, "1").tags["sha256"]


def test_the_same_export_and_settings_give_bit_equal_weights(trained: Trained, client: Any) -> None:
    settings = load(ROOT / "conf/demo.yaml", trained.overrides).train_scorer
    fitted = fit_scorer.fit(exports_of(trained), "train", settings, engine.start("cpu"), lambda _: {})
    again = hashlib.sha256(train_scorer.pack(fitted.weights)).hexdigest()
    assert again == client.get_model_version(MODEL, "1").tags["sha256"]
    assert fitted.epochs[-1]["loss"] < fitted.epochs[0]["loss"]


def test_a_training_cut_before_its_registration_is_done_again_and_nothing_points_to_the_first_run(
    trained: Trained, client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*trained.overrides, "train_scorer.model=cut", "train_scorer.epochs=1"]
    monkeypatch.setattr("sys.argv", ["train_scorer", *command(trained.export, overrides)])
    with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
        cut.setattr(tracker, "register", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train_scorer.main()
    assert client.search_model_versions("name = 'cut'") == []
    train_scorer.main()
    (version,) = client.search_model_versions("name = 'cut'")
    runs = client.search_runs([client.get_run(version.run_id).info.experiment_id], "params.model = 'cut'")
    assert [run.info.run_id == version.run_id for run in runs] == [True, False]  # newest first
    train_scorer.main()
    assert capsys.readouterr().out.endswith("train scorer: nothing to do, version 1 was made from this export (champion)\n")


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
        (lambda manifest: manifest.pop("files"), "not a manifest: files: Field required"),
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
    overrides = [f"mlflow.tracking_uri=sqlite:///{tmp_path}/store/mlflow.db"]
    monkeypatch.setattr("sys.argv", ["train_scorer", *command(write_export(tmp_path / "export"), overrides, "--plan")])
    train_scorer.main()
    assert "pending: 40 epochs of 96 rows, 36 rows held out, about 16 s" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


def test_a_run_that_failed_registers_nothing_and_is_ignored_later(trained: Trained, client: Any) -> None:
    settings = load(ROOT / "conf/demo.yaml", trained.overrides)
    with pytest.raises(RuntimeError, match="power cut"), tracker.open_run(client, settings.mlflow, "cut", {}, exports_of(trained)) as run:
        raise RuntimeError("power cut")
    assert client.get_run(run).info.status == "FAILED"
    assert {version.run_id for version in client.search_model_versions(f"name = '{MODEL}'")}.isdisjoint({run})


def exports_of(trained: Trained) -> exports.Export:
    return exports.open_export(trained.export, "labels", train_scorer.COLUMNS, ("train", "held_out"))


def refuse(export: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command in this process; it must end with status 2 and one line, which is returned."""
    monkeypatch.setattr("sys.argv", ["train_scorer", *command(export, [f"mlflow.tracking_uri=sqlite:///{folder}/store/mlflow.db"])])
    with pytest.raises(SystemExit) as end:
        train_scorer.main()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.count("\n") == 1
    return said


def test_no_view_of_a_held_out_image_is_fed_to_training(trained: Trained) -> None:
    export = exports_of(trained)
    held_out = set(feed.read_bucket(export, "held_out", ("image_id",))["image_id"])
    fed = {image for batch in feed.batches(feed.Plan(export, "train", 7, 1, 64)) for image in batch.rows["image_id"]}
    assert len(held_out) == 6
    assert len(fed) == 16
    assert not held_out & fed
