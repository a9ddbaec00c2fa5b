"""The classifier's trainer: its evaluation by hand, and one real training by petastorm, DeepSpeed and MLflow."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.section import Mistake
from conf.settings import load
from tests.training.conftest import ROOT, command, image_id
from training import classifier_summary, evaluate_classifier, fit_classifier, paired, temperature, tracker, train_classifier
from training.evaluate_classifier import widen
from training.exports import open_export
from training.temperature import Temperature
from udfs import class_head
from udfs.snapshot import id_sum

WIDTH = 16
CLASSES = ("anime", "photo", "sketch")
BUCKETS = {"train": range(60), "calibrate": range(100, 130), "held_out": range(200, 260)}
ARROW = {"binary": pa.binary(), "string": pa.string()}


def make_rows(images: range) -> list[dict[str, Any]]:
    """Each class lies in a direction of its own, with noise; sketches come from one collection, the others from two; two images a group."""
    directions = np.random.default_rng(0).normal(size=(len(CLASSES), WIDTH))
    rows = []
    for image in images:
        place = image // 2 % len(CLASSES)
        vector = directions[place] + 1.2 * np.random.default_rng([1, image]).normal(size=WIDTH)
        origin = "sketchbook" if place == 2 else f"shelf-{image // 6 % 2}"
        about = {"image_id": image_id(image), "near_group": image_id(image // 2 * 2), "vector": vector.astype("<f2").tobytes()}
        rows.append(
            about | {"class_name": CLASSES[place], "origin": origin, "source": "all", "view": "original", "kind": "style", "rater": "me"}
        )
    return rows


def write_export(folder: Path, buckets: dict[str, range] = BUCKETS, **told: Any) -> Path:
    folder.mkdir(parents=True)
    schema = pa.schema([(name, ARROW[kind]) for name, kind in train_classifier.COLUMNS.items()])
    files, counts = [], {name: dict.fromkeys(buckets, 0) for name in CLASSES}
    for bucket, images in buckets.items():
        path, rows = folder / f"{bucket}-00000.parquet", make_rows(images)
        pq.write_table(pa.Table.from_pylist(rows, schema), path)
        about = {"rows": len(rows), "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        files.append({"file": path.name, "bucket": bucket, **about, "ids": f"{id_sum(row['image_id'] for row in rows):016x}"})
        for row in rows:
            counts[row["class_name"]][bucket] += 1
    manifest: dict[str, Any] = {"export": "0123456789ab", "kind": "classes", "rows": sum(file["rows"] for file in files), "label": "style"}
    manifest |= {"columns": train_classifier.COLUMNS, "made_from": {"labels": 1}, "lake": "demo/lake", "classes": counts, "files": files}
    manifest |= {"encoder": {"name": "made-up", "fingerprint": "abc123", "width": WIDTH}} | told
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def run(export: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    overrides = [f"mlflow.tracking_uri=sqlite:///{folder}/store/mlflow.db", f"mlflow.artifacts={folder}/artifacts"]
    overrides += [f"training.root={folder}/trainings", "train_classifier.epochs=20", "train_classifier.rows_per_step=32"]
    overrides.append("train_classifier.evaluations=1")
    monkeypatch.setattr("sys.argv", ["train_classifier", *command(export, [*overrides, *more])])
    train_classifier.main()


def test_a_training_registers_a_calibrated_head_with_its_evaluation_and_its_confounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export = write_export(tmp_path / "export")
    run(export, tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert "registered style-classifier version 1 as champion" in said
    assert "held out 60 images in 30 groups of near-duplicates: balanced accuracy 0." in said
    assert "sketch: precision" in said and "all from sketchbook" in said
    client = tracker.connect(load(ROOT / "conf/demo.yaml", [f"mlflow.tracking_uri=sqlite:///{tmp_path}/store/mlflow.db"]).mlflow)
    version = client.get_model_version_by_alias("style-classifier", "champion")
    evaluation = json.loads(version.tags["evaluation"])
    assert (version.tags["label"], json.loads(version.tags["classes"])) == ("style", list(CLASSES))
    assert (version.tags["beats_baselines"], version.tags["confounded"]) == ("true", "false")
    assert {"sha256", "encoder_fingerprint", "evaluation", "export", "manifest_sha256", "made_from"} < set(version.tags)  # registry.TAGS
    assert evaluation["classes"]["sketch"]["origin"] == {"most": "sketchbook", "share": 1.0, "values": 1}
    value, low, high = evaluation["balanced_accuracy"]
    assert 0.6 < low < value < high <= 1
    weights = (Path(client.download_artifacts(version.run_id, "head")) / "head.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == version.tags["sha256"]
    head = class_head.load(weights)
    assert head.about == class_head.About("style", CLASSES, pytest.approx(float(version.tags["temperature"]), abs=1e-4), 0.5)
    table = pd.read_parquet(client.download_artifacts(version.run_id, "held_out_classes.parquet"))
    rows = make_rows(BUCKETS["held_out"])
    vectors = np.stack([np.frombuffer(row["vector"], "<f2") for row in rows]).astype(np.float32)
    probabilities = class_head.classify_batch(vectors, head)
    expected = {row["image_id"]: (row["class_name"], CLASSES[one.argmax()]) for row, one in zip(rows, probabilities, strict=True)}
    assert {row.image_id: (row["class"], row.prediction) for _, row in table.iterrows()} == expected
    assert value == pytest.approx(np.mean([one == other for one, other in expected.values()]), abs=1e-4)  # 20 of each class
    metrics = client.get_run(version.run_id).data.metrics
    assert metrics["exported_held_out_balanced_accuracy"] == pytest.approx(value, abs=1e-4)
    assert {"held_out_precision/photo", "held_out_recall/photo", "calibration_loss", "temperature", "right"} < set(metrics)
    assert "confusion.png" in {artifact.path for artifact in client.list_artifacts(version.run_id)}
    run(export, tmp_path, monkeypatch)
    assert capsys.readouterr().out == "train classifier: nothing to do, version 1 was made from this export (champion)\n"


@pytest.mark.parametrize(
    ("export", "said"),
    [
        ({"label": "ai_generated"}, "its labels are of kind 'ai_generated', train_classifier.label is 'style'"),
        ({"classes": {"photo": {"train": 3}, "anime": {"held_out": 2}}}, "no image to train on of anime"),
        ({"classes": {"photo": {"train": 3}}}, "only the class photo"),
    ],
    ids=["other labels", "nothing to train on", "one class"],
)
def test_an_export_that_cannot_be_trained_on_is_one_line_and_status_2(
    export: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(write_export(tmp_path / "export", **export), tmp_path, monkeypatch)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert said in error
    assert error.count("\n") == 1


def test_near_duplicates_in_two_buckets_are_refused(tmp_path: Path) -> None:
    apart = write_export(tmp_path / "apart")
    fit_classifier.check_split(open_export(apart, "classes", train_classifier.COLUMNS, tuple(BUCKETS)))
    together = write_export(tmp_path / "together", {"train": range(12), "calibrate": range(100, 106), "held_out": range(11, 20)})
    with pytest.raises(Mistake, match="1 groups of near-duplicates are in both train and held_out"):
        fit_classifier.check_split(open_export(together, "classes", train_classifier.COLUMNS, tuple(BUCKETS)))


def evaluate(said: list[int], labelled: list[int], origin: list[str], groups: list[int] | None = None) -> dict[str, Any]:
    """An evaluation of two classes; the training rows are 3 cats of `alley` and 2 dogs of `farm`."""
    train = {
        "class_name": np.array(["cat"] * 3 + ["dog"] * 2),
        "origin": np.array(["alley"] * 3 + ["farm"] * 2),
        "source": np.array(["s"] * 5),
    }
    names = np.array([("cat", "dog")[one] for one in labelled])
    held_out = {"class_name": names, "origin": np.array(origin), "source": np.array(["s"] * len(names))}
    held_out["near_group"] = np.array([image_id(one) for one in groups or range(len(names))], dtype=object)
    logits = np.where(np.array(said)[:, None] == np.arange(2), 2.0, 0.0)
    found = Temperature(0.5, 0.0, 0.0, 4, False)
    return evaluate_classifier.evaluate(("cat", "dog"), {"train": train, "held_out": held_out}, logits, found, 0.5, 7)


def test_precision_recall_and_confusion_are_those_counted_by_hand() -> None:
    told = evaluate([0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 0], ["alley"] * 6)
    assert told["confusion"] == [[3, 0], [1, 2]]
    assert [told["classes"][name][what][0] for name in ("cat", "dog") for what in ("precision", "recall")] == [0.75, 1.0, 1.0, 0.6667]
    assert told["balanced_accuracy"][0] == pytest.approx(5 / 6, abs=1e-4)
    assert told["accuracy"][0] == pytest.approx(5 / 6, abs=1e-4)
    assert told["majority"]["balanced_accuracy"][0] == 0.5
    confidence = 1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(-4.0))  # at temperature 1, and at one half
    assert [told[name][0] for name in ("calibration_error_before", "calibration_error")] == pytest.approx(
        [abs(5 / 6 - c) for c in confidence], abs=1e-4
    )
    assert told["coverage_of_classes"][0] == 1.0


def test_a_classifier_that_its_collections_explain_is_called_confounded() -> None:
    labelled = [0, 1] * 20
    apart = evaluate(labelled, labelled, ["alley", "farm"] * 20)
    assert apart["confounded"]
    assert not apart["confounding"]["origin"]["better"]
    assert "CONFOUNDED" in classifier_summary.summarise(apart)
    mixed = evaluate(labelled, labelled, ["alley", "alley", "farm", "farm"] * 10)
    assert mixed["confounding"]["origin"]["balanced_accuracy"][0] == 0.5
    assert not mixed["confounded"]
    assert mixed["beats_baselines"]


def test_an_interval_is_no_surer_than_its_groups_and_near_duplicates_are_one() -> None:
    one_group = evaluate([0, 0, 0, 0, 1], [0, 0, 0, 0, 1], ["alley"] * 5, [1, 1, 1, 1, 2])
    assert one_group["classes"]["cat"]["recall"] == widen([1.0, 1.0, 1.0], 1) == [1.0, 0.2065, 1.0]
    assert one_group["balanced_accuracy"][1] < 0.5
    assert widen([0.5, 0.0, 1.0], 100) == [0.5, 0.0, 1.0]
    assert widen([0.5, 0.5, 0.5], 10) == [0.5, 0.2366, 0.7634]  # Wilson's of 5 in 10
    assert widen([], 0) == []


def test_a_class_that_is_not_held_out_has_no_figures() -> None:
    told = evaluate([0, 0, 1], [0, 0, 0], ["alley"] * 3)
    assert told["classes"]["dog"]["recall"] == []
    assert told["classes"]["dog"]["precision"][0] == 0.0
    assert told["balanced_accuracy"][0] == pytest.approx(2 / 3, abs=1e-4)
    assert "recall not known" in classifier_summary.summarise(told)


def test_the_temperature_is_the_one_that_the_logits_were_spoilt_with() -> None:
    rng = np.random.default_rng(0)
    honest = rng.normal(size=(4000, 4)) * 2
    classes = (class_head.softmax(honest, 1.0).cumsum(axis=1) < rng.random((4000, 1))).sum(axis=1)
    found = temperature.fit(honest * 3.0, classes)
    assert found.value == pytest.approx(3.0, rel=0.1)
    assert found.loss_after < found.loss_before
    assert not found.at_bound
    sure = temperature.fit(np.eye(4), np.arange(4))
    assert sure.at_bound and sure.value == pytest.approx(temperature.LOWEST, rel=0.02)


def test_versions_are_compared_by_balanced_accuracy_on_the_images_that_both_held_out() -> None:
    images = range(80)
    table = pd.DataFrame({"image_id": [image_id(i) for i in images], "near_group": [image_id(i // 2) for i in images]})
    table["class"] = ["cat" if i % 4 else "dog" for i in images]
    good, poor = table.assign(prediction=table["class"]), table.assign(prediction="cat")
    figures = paired.measure_classes("held_out_balanced_accuracy", good, poor[10:], 30)
    assert (figures.images, figures.version, figures.champion) == (70, 1.0, 0.5)
    assert figures.better
    assert not paired.measure_classes("held_out_balanced_accuracy", good, good, 30).better
