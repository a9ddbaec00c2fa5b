"""Classes told by sources and files -> labels, a split export, and the classes that a registered head gives every image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings
from jobs import classify, embedding, export_classes, label_classes, registry
from jobs.lake import Lake
from training import mlflow_store
from udfs import class_head
from udfs.class_head import About

IMAGES, WIDTH = 24, 8
RATER = {"kind": "style", "rater": "me"}


def image_id(image: int) -> bytes:
    return hashlib.sha256(b"%d" % image).digest()


def append(lake: Lake, table: str, rows: list[dict[str, Any]], number: int = 0) -> None:
    """Rows that say only what the test is about; the other columns are NULL."""
    schema = {field.name: field.dataType.simpleString() for field in lake.read(table).schema}
    given = ", ".join(f"`{name}` {schema[name]}" for name in rows[0])
    frame = lake.spark.createDataFrame([tuple(row.values()) for row in rows], given)
    lake.append(
        table, frame.withColumns({name: F.lit(None).cast(kind) for name, kind in schema.items() if name not in rows[0]}), "test", number
    )


def source(
    image: int, tags: list[str] | None = None, key: str | None = None, opt_out: bool = False, name: str = "folder"
) -> dict[str, Any]:
    key = key or f"{image:02d}.png"
    told = {
        "source": name,
        "key": key,
        "image_id": image_id(image),
        "entry": key,
        "seen": "1",
        "uri": f"file:///pictures/{key}",
        "offset": 0,
    }
    return told | {"length": 9, "size": 9, "mtime_us": 1, "tags": tags or [], "opt_out": opt_out, "run": "test"}


@pytest.fixture
def settings(make_settings: Callable[..., Settings], tmp_path: Path) -> Settings:
    return make_settings(label_classes=[RATER | {"tags": {"photograph": "photo", "manga": "anime", "comic": "anime"}}])


@pytest.fixture
def lake(settings: Settings, make_lake: Callable[[Settings], Lake]) -> Lake:
    """Photographs and manga in turn; 3 is told both, 5 is opted out, 7 looks like 9 and 11 like the mirror of 9."""
    lake = make_lake(settings)
    tags = [["manga", "x"] if image % 2 else ["photograph"] for image in range(IMAGES)]
    tags[3], tags[1] = ["manga", "photograph"], ["comic", "manga"]
    append(lake, "sources", [source(image, tags[image], opt_out=image == 5) for image in range(IMAGES)])
    rng = np.random.default_rng(0)
    hashes, mirrors = rng.integers(0, 256, (2, IMAGES, 32), dtype=np.uint8)
    hashes[7] = hashes[9]
    hashes[11] = mirrors[9]
    mirrors[11] = hashes[9]
    vectors = [(np.eye(WIDTH)[image % 2] + 0.1).astype("<f2") for image in range(IMAGES)]
    vectors[23] = np.full(WIDTH, np.nan, dtype="<f2")
    outputs, statistics = embedding.outputs(settings), dict.fromkeys(("mean", "contrast", "saturation", "sharpness", "entropy"), 0.5)
    pixels, rows = [], []
    for image in range(IMAGES):
        about = {"image_id": image_id(image), "view": "original", "run": "test"}
        hash_ = {"phash": hashes[image].tobytes(), "phash_mirror": mirrors[image].tobytes(), "colour": "colour"}
        pixels.append(about | {"fingerprint": outputs["pixels"]} | hash_ | statistics)
        vector = {"fingerprint": outputs["colour-grid"], "encoder": "colour-grid", "width": WIDTH, "vector": vectors[image].tobytes()}
        rows.append(about | vector)
    append(lake, "pixels", pixels)
    append(lake, "embeddings", rows)
    return lake


def labels(lake: Lake, rater: str = "me") -> dict[bytes, tuple[str, str | None]]:
    rows = lake.read("labels").where(F.col("rater") == rater).collect()
    assert {(row["kind"], row["view"], row["value"]) for row in rows} <= {("style", "original", 1.0)}
    return {bytes(row["image_id"]): (row["class"], row["origin"]) for row in rows}


def test_classes_are_labelled_once_split_by_near_duplicates_and_given_by_the_registered_head(
    lake: Lake, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Mistake, match="run the stage label_classes first"):
        export_classes.run(lake, settings)
    label_classes.run(lake, settings)
    assert labels(lake) == {image_id(i): ("anime" if i % 2 else "photo", None) for i in range(IMAGES) if i != 3}
    said = capsys.readouterr().out
    assert "style by me: 23 images, 1 images without a label, told several classes (such as anime, photo); classes anime, photo" in said
    label_classes.run(lake, settings)
    assert capsys.readouterr().out.endswith("label-classes: nothing to do\n")

    reject = {
        "stage": "embed",
        "input_key": "",
        "fingerprint": "f",
        "image_id": image_id(4),
        "code": "denied",
        "detail": "",
        "permanent": True,
    }
    append(lake, "rejects", [reject | {"attempts": 1, "run": "test"}])
    root = Path(export_classes.run(lake, settings).removeprefix("file://"))
    said = capsys.readouterr().out
    assert "1 labelled images are left out: 0 whose raters disagree, 1 opted out, 0 without a vector" in said
    manifest = json.loads((root / "manifest.json").read_text())
    tables = {file["file"]: pq.read_table(root / file["file"]).to_pylist() for file in manifest["files"]}
    rows = {row["image_id"]: row | {"bucket": name.rpartition("-")[0]} for name, part in tables.items() for row in part}
    assert set(rows) == {image_id(i) for i in range(IMAGES) if i not in (3, 4, 5)}
    assert manifest["label"] == "style"
    assert {name: sum(one.values()) for name, one in manifest["classes"].items()} == {"anime": 10, "photo": 11}
    assert all(set(one) == {"train", "calibrate", "held_out"} for one in manifest["classes"].values())
    twins = [rows[image_id(i)] for i in (7, 9, 11)]
    assert {row["near_group"] for row in twins} == {min(image_id(i) for i in (7, 9, 11))}
    assert len({row["bucket"] for row in twins}) == 1
    assert len({row["near_group"] for row in rows.values()}) == 19
    assert {(row["source"], row["origin"]) for row in rows.values()} == {("folder", "folder")}
    export_classes.run(lake, settings)
    assert "export-classes: nothing to do, 21 rows of 2 classes" in capsys.readouterr().out

    settings = settings.model_copy(update={"classify": (classify.Classify(label="style", model="style-classifier"),)})
    with pytest.raises(Mistake, match=r"train one \(python -m training.train_classifier EXPORT"):
        classify.run(lake, settings)
    register(settings, tmp_path, embedding.outputs(settings)["colour-grid"])
    classify.run(lake, settings)
    told = {bytes(row["image_id"]): row for row in lake.read("classes").collect()}
    assert {key: row["class"] for key, row in told.items()} == {image_id(i): ("other" if i % 2 else "photo") for i in range(23)}
    row = told[image_id(0)]
    assert [one["class"] for one in row["probabilities"]] == ["anime", "photo"]
    assert row["p"] == max(one["p"] for one in row["probabilities"])
    assert (row["label"], row["model_version"]) == ("style", "1")
    (refused,) = lake.read("rejects").where("stage = 'classify'").collect()
    assert (refused["input_key"], refused["code"]) == (image_id(23).hex(), "not_finite")
    capsys.readouterr()
    classify.run(lake, settings)
    assert capsys.readouterr().out == "classify: nothing to do\n"

    version = register(settings, tmp_path, "other:vectors")
    other = settings.model_copy(update={"classify": (classify.Classify(label="style", model="style-classifier", alias="candidate"),)})
    with pytest.raises(Mistake, match=f"version {version} was trained on vectors other:vectors"):
        classify.champions(other)


def register(settings: Settings, folder: Path, encoder: str) -> str:
    """A head that knows photographs and is never sure of anime, as a trainer would register it."""
    weights = {"0.weight": torch.zeros(2, WIDTH), "0.bias": torch.tensor([0.1, 0.0])}
    weights["0.weight"][1, 0], weights["0.weight"][1, 1] = 2.0, -0.2
    head = class_head.pack(weights, About("style", ("anime", "photo"), 1.0, 0.9))
    (folder / "head.safetensors").write_bytes(head)
    client = mlflow_store.connect(settings.mlflow)
    run = client.create_run(mlflow_store.find_experiment(client, settings.mlflow)).info.run_id
    client.log_artifact(run, str(folder / "head.safetensors"), "head")
    tags = dict.fromkeys(registry.TAGS, "") | {"sha256": hashlib.sha256(head).hexdigest(), "encoder_fingerprint": encoder}
    version = mlflow_store.register(client, "style-classifier", run, "head", tags | {mlflow_store.DIGEST: encoder})
    mlflow_store.settle_alias(client, "style-classifier", version)
    return version


def test_a_file_names_images_by_id_key_and_address_and_what_it_cannot_name_is_told(
    lake: Lake, make_settings: Callable[..., Settings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    append(lake, "sources", [source(20, key="twice.png", name="a"), source(21, key="twice.png", name="b")], 1)
    lines = [(image_id(0).hex().upper(), "photo"), ("01.png", "anime"), ("file:///pictures/02.png", "photo"), ("/pictures/04.png", "photo")]
    lines += [("06.png", "photo"), (image_id(6).hex(), "anime"), ("twice.png", "photo"), ("nowhere.png", "photo")]
    (tmp_path / "told.jsonl").write_text("\n".join(json.dumps({"of": name, "is": one, "from": "shelf"}) for name, one in lines) + "\n\n")
    fields = {"file": str(tmp_path / "told.jsonl"), "image_field": "of", "class_field": "is"}
    settings = make_settings(label_classes=[RATER | fields | {"origin_field": "from"}])
    label_classes.run(lake, settings)
    told = labels(lake)
    assert told == {image_id(i): ("anime" if i == 1 else "photo", "shelf") for i in (0, 1, 2, 4)}
    said = capsys.readouterr().out
    assert "4 images, 1 images without a label, told several classes" in said
    assert "1 names in" in said and "that no image has (such as 'nowhere.png')" in said
    assert "that several images have (such as 'twice.png')" in said
    (tmp_path / "told.jsonl").write_text('{"of": "01.png", "is": "photo", "from": "attic"}\n')
    label_classes.run(lake, settings)
    rows = lake.read("labels").where(F.col("image_id") == F.lit(image_id(1))).select("class", "fingerprint").collect()
    assert sorted(row["class"] for row in rows) == ["anime", "photo"]  # another file, another fingerprint
    (tmp_path / "told.jsonl").write_text('{"of": "01.png", "is": "other"}\n')
    with pytest.raises(Mistake, match=r"a row has of '01.png' and is 'other'; expected an id, key or address"):
        label_classes.run(lake, settings)
    (tmp_path / "told.csv").write_text("image,class\n02.png,photo\n")
    with pytest.raises(Mistake, match=r"has no column shelf; its columns are \['image', 'class'\]"):
        label_classes.run(lake, make_settings(label_classes=[RATER | {"file": str(tmp_path / "told.csv"), "origin_field": "shelf"}]))
    by_source = RATER | {"rater": "table", "file": str(tmp_path / "told.csv"), "sources": {"a": "sketch"}}
    label_classes.run(lake, make_settings(label_classes=[by_source]))
    assert labels(lake, "table") == {image_id(2): ("photo", None), image_id(20): ("sketch", None)}
    with pytest.raises(Mistake, match="are given twice"):
        label_classes.run(lake, make_settings(label_classes=[by_source, by_source]))
    with pytest.raises(Mistake, match=r"missing; expected a .jsonl or .csv file"):
        label_classes.run(lake, make_settings(label_classes=[RATER | {"file": str(tmp_path / "none.csv")}]))
