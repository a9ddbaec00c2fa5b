"""A model tells what it was made from, an image which models saw it; what is missing or different is said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings
from jobs import land_train_stats, lineage, registry, snapshot, why
from jobs.lake import Lake
from tests.jobs.test_land_train_stats import CAT, DOG, write_training

SELECTION = "chosen"


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings()


@pytest.fixture
def lake(settings: Settings, make_lake: Callable[[Settings], Lake]) -> Lake:
    """Two images, of which a training that has landed saw one four times and one twice, and a third that none saw."""
    lake = make_lake(settings)
    facts = {"format": F.lit("PNG"), "width": F.lit(8), "height": F.lit(8), "bytes": F.lit(9).cast("bigint"), "frames": F.lit(1)}
    facts |= {"ai_marks": F.expr("CAST(array() AS ARRAY<STRUCT<where: STRING, text: STRING>>)"), "run": F.lit("by hand")}
    ids = lake.spark.createDataFrame([(CAT,), (DOG,), (hashlib.sha256(b"cow").digest(),)], "image_id BINARY")
    lake.append("images", ids.withColumns(facts), "by hand", 0)
    chosen = {"selection": F.lit(SELECTION), "name": F.lit("best"), "score": F.lit(1), "run": F.lit("by hand")}
    lake.append("selections", ids.withColumns(chosen), "by hand", 0)
    write_training(Path(settings.training.root), "one")
    land_train_stats.run(lake, settings)
    return lake


@pytest.fixture
def root(lake: Lake, settings: Settings) -> Path:
    """An export of the selection."""
    rows = lake.read("images").select("image_id", F.lit("train").alias("bucket"))
    facts = {"made_from": {"images": lake.version("images")}, "selection": SELECTION}
    snapshot.make(lake, settings, "labels", "0123", rows, ["image_id"], facts)
    return Path(settings.export.root) / "labels-0123"


def register(settings: Settings, root: Path) -> None:
    """What a trainer leaves in the registry: two versions of one model, the first by the training that has landed."""
    client = registry.connect(settings.mlflow)
    experiment = client.create_experiment("studbook", settings.mlflow.artifacts)
    sha256 = hashlib.sha256((root / "manifest.json").read_bytes()).hexdigest()
    client.create_registered_model("scorer")
    for training in ("one", "two"):
        run = client.create_run(experiment, start_time=1_000, run_name=f"train {training}").info.run_id
        client.log_metric(run, "held_out_srcc", 0.75)
        client.log_metric(run, "system/memory", 12.0)
        client.set_terminated(run, end_time=4_000)
        tags = {"training_digest": training, "export": "0123", "manifest_sha256": sha256, "made_from": json.dumps({"images": 1})}
        client.create_model_version("scorer", f"{settings.mlflow.artifacts}/head", run_id=run, tags=tags)
    client.set_registered_model_alias("scorer", "champion", "1")


def test_a_models_chain_down_to_rows_and_an_images_models(
    lake: Lake, settings: Settings, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    why.tell(lake, settings, CAT.hex())
    assert f"  models      there is no MLflow store at {settings.mlflow.tracking_uri} yet" in capsys.readouterr().out
    register(settings, root)

    why.tell(lake, settings, CAT.hex())
    assert "  models      scorer version 1 (champion) saw it 4 times, mean loss 2.25" in capsys.readouterr().out.splitlines()
    why.tell(lake, settings, hashlib.sha256(b"cow").hexdigest())
    assert "  models      no training that has landed has seen it" in capsys.readouterr().out

    assert [registry.find(settings.mlflow, wanted).version for wanted in ("scorer", "scorer@champion", "scorer/2")] == ["1", "1", "2"]
    lineage.tell(lake, settings, registry.find(settings.mlflow, "scorer"))
    told = capsys.readouterr().out.splitlines()
    sha256 = hashlib.sha256((root / "manifest.json").read_bytes()).hexdigest()
    assert told[0] == "model      scorer version 1 (champion)"
    assert told[1].endswith("(train one) FINISHED, 3 s")
    assert told[2:] == [
        "metrics    held_out_srcc 0.75",
        f"training   one, its folder file://{settings.training.root}/scorer-one is there",
        "trained on 2 images, 6 rows over all epochs, mean loss of an image 1.5",
        f"export     labels 0123, 1 files, 3 rows, file://{root}",
        f"manifest   sha256 {sha256}: the same in the table exports, the same on disk",
        f"selection  best ({SELECTION}), 3 images",
        "table      images version 1: 3 rows (now version 1)",
    ]

    (root / "manifest.json").write_text("{}")
    lineage.tell(lake, settings, registry.find(settings.mlflow, "scorer/2"))
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "model      scorer version 2"
    assert told[3:] == [
        f"training   two, its folder file://{settings.training.root}/scorer-two is not there (any more)",
        "trained on train_stats has no row of this training; python -m jobs.land_train_stats lands them",
        f"export     labels 0123, 1 files, 3 rows, file://{root}",
        f"manifest   sha256 {sha256}: the same in the table exports, ANOTHER on disk",
        "table      images version 1: 3 rows (now version 1)",
    ]
    unknown = registry.find(settings.mlflow, "scorer/2")._replace(
        run="f" * 32, tags={"manifest_sha256": "ab", "made_from": '{"images": 9}'}
    )
    lineage.tell(lake, settings, unknown)
    told = capsys.readouterr().out.splitlines()
    assert told[1:5] == [
        f"run        {'f' * 32}: MLflow has no such run (any more)",
        "training   the version has no tag training_digest",
        "export     ?: the table exports does not know it; manifest sha256 ab",
        told[4],
    ]
    assert told[4].startswith("table      images version 9: cannot be read any more: [DELTA_")
    for wanted in ("scorer@best", "scorer/3", "nobody", "nobody@champion"):
        with pytest.raises(Mistake, match=rf"model: given '{wanted}', which .* has not \(registered models: scorer\)"):
            registry.find(settings.mlflow, wanted)
