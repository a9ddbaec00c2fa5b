"""A selection becomes a frozen export of its images' bytes: every image once or named, whatever is killed, and nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, load
from jobs import caption_rows, export_images, ingest, snapshot
from jobs.lake import Lake
from tests.jobs.conftest import REPOSITORY, write_image
from udfs import image_files
from udfs.snapshot import id_sum

MakeSettings = Callable[..., Settings]
SELECTION = "chosen"


@pytest.fixture(scope="module")
def corpus(spark: SparkSession, empty_lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images in a folder and three lines of a list with tags and alt texts, ingested; all but one are selected by hand."""
    root = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        write_image(root / f"images/part-{number % 2}/{number:02d}.png", number)
    shutil.copy(root / "images/part-0/00.png", root / "images/part-1/twin.png")
    os.utime(root / "images/part-0/00.png", (2_000_000_000, 2_000_000_000))  # the newest bytes speak first
    lines = [
        {"file": f"{root}/images/part-0/00.png", "tags": ["cat", "mat"], "alt": "a cat"},
        {"file": f"{root}/images/part-1/twin.png", "tags": ["mat", "rug"], "alt": "the cat"},
        {"file": f"{root}/images/part-1/01.png", "tags": ["dog"], "alt": "  "},
    ]
    (root / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    columns = {"uri": "file", "key": "file", "tags": "tags", "alt_text": "alt"}
    listed = {"name": "list", "kind": "manifest", "uri": f"{root}/list.jsonl", "columns": columns}
    sources = [{"name": "folder", "kind": "folder", "uri": f"{root}/images"}, listed]
    shutil.copytree(empty_lake, root / "lake")
    settings = load(REPOSITORY / "conf/demo.yaml", [f"lake.root={root}/lake", f"ingest.sources={json.dumps(sources)}"])
    lake = Lake(spark, settings)
    ingest.run(lake, settings)
    dropped = lake.read("sources").where(F.col("key") == "part-0/10.png").select("image_id")
    told = {"selection": F.lit(SELECTION), "name": F.lit("test"), "score": F.lit(7), "run": F.lit("by hand")}
    lake.append("selections", lake.read("images").join(dropped, "image_id", "left_anti").withColumns(told), "by hand", 0)
    shutil.copytree(root / "images", root / "untouched")
    return root


@pytest.fixture
def images(corpus: Path) -> Path:
    """The corpus' images, as they were ingested."""
    shutil.rmtree(corpus / "images", ignore_errors=True)
    return Path(shutil.copytree(corpus / "untouched", corpus / "images"))


@pytest.fixture
def settings(tmp_path: Path, make_settings: MakeSettings) -> Settings:
    export = {"root": str(tmp_path / "exports"), "image_rows_per_file": 4, "held_out": 0.3}
    return make_settings(export=export, waves={"rows": 100, "task_rows": 4})


@pytest.fixture
def lake(spark: SparkSession, corpus: Path, settings: Settings) -> Lake:
    shutil.copytree(corpus / "lake", settings.lake.root)
    return Lake(spark, settings)


def export(lake: Lake, settings: Settings) -> None:
    export_images.export(lake, settings, SELECTION, "scores", lake.versions(("images", "sources")))


def _text(kind: str, text: str) -> dict[str, str]:
    return {"id": f"{kind}/{hashlib.sha256(text.encode()).hexdigest()[:16]}", "kind": kind, "text": text}


def root_of(settings: Settings) -> Path:
    (root,) = Path(settings.export.root).iterdir()
    return root


def read(root: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """-> (manifest, rows of all files with their bucket)."""
    manifest = json.loads((root / "manifest.json").read_text())
    rows = []
    for file in manifest["files"]:
        data = (root / file["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == file["sha256"] and len(data) == file["bytes"]
        parquet = pq.ParquetFile(root / file["file"])
        assert (parquet.num_row_groups, parquet.metadata.num_rows) == (1, file["rows"])
        assert {field.name: str(field.type) for field in parquet.schema_arrow} == manifest["columns"]
        mine = parquet.read().to_pylist()
        assert f"{id_sum(row['image_id'] for row in mine):016x}" == file["ids"]
        rows += [row | {"bucket": file["bucket"]} for row in mine]
    assert manifest["rows"] == len(rows) == len({row["image_id"] for row in rows})
    return manifest, rows


def test_every_selected_image_is_exported_with_its_bytes_and_all_its_texts_and_a_second_run_does_nothing(
    lake: Lake, settings: Settings, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = caption_rows.fingerprint(settings, settings.captions.tiers[0])
    row = {
        "fingerprint": told,
        "kind": "short",
        "part": 0,
        "text": "A dog sits.",
        "language": "en",
        "tokens": 3,
        "tokenizer": "t",
        "engine": "tags",
    }
    row |= {
        "model": "none",
        "prompt": "p",
        "tier": "all",
        "request": "k",
        "run": "by hand",
        "image_id": bytearray(hashlib.sha256((images / "part-1/01.png").read_bytes()).digest()),
    }
    region = row | {"kind": "ocr", "part": 1, "text": "EXIT"}
    lake.append("captions", lake.spark.createDataFrame([row, region], lake.read("captions").schema), "by hand", 0)
    export(lake, settings)
    manifest, rows = read(root_of(settings))
    assert {path.name for path in root_of(settings).iterdir()} == {"manifest.json", *(file["file"] for file in manifest["files"])}
    assert (manifest["kind"], manifest["selection"], manifest["lacking"]) == ("images", SELECTION, {})
    on_disk = {hashlib.sha256(path.read_bytes()).digest(): path for path in images.rglob("*.png") if path.name != "10.png"}
    assert {row["image_id"] for row in rows} == set(on_disk)
    assert all(hashlib.sha256(row["bytes"]).digest() == row["image_id"] for row in rows)
    assert {(row["score"], row["rating"], row["style_cluster"], row["width"], row["height"]) for row in rows} == {(7, "", -1, 48, 32)}
    by_name = {on_disk[row["image_id"]].name: json.loads(row["captions"]) for row in rows}
    texts = [("alt_text", "a cat"), ("alt_text", "the cat"), ("source_tags", "cat, mat, rug")]
    assert by_name.get("twin.png", by_name.get("00.png")) == [_text(kind, text) for kind, text in texts]
    captions = [("ocr/1", "ocr", "EXIT"), ("short/0", "short", "A dog sits.")]
    assert by_name["01.png"] == [
        _text("source_tags", "dog"),
        *({"id": f"{told}/{place}", "kind": kind, "text": text} for place, kind, text in captions),
    ]
    assert by_name["02.png"] == []
    assert {row["bucket"] for row in rows} == {"train", "held_out"}
    for bucket in ("train", "held_out"):
        counts = [file["rows"] for file in manifest["files"] if file["bucket"] == bucket]
        assert set(counts[:-1]) <= {4} and 0 < counts[-1] <= 4
    landed = {(row["file"], row["rows"], row["ids"]) for row in lake.read("exports").collect()}
    assert landed == {(file["file"], file["rows"], file["ids"]) for file in manifest["files"]}

    before = lake.version("exports"), lake.version("rejects")
    capsys.readouterr()
    export(lake, settings)
    assert f"export-images: nothing to do, 11 images in file://{root_of(settings)}" in capsys.readouterr().out
    assert (lake.version("exports"), lake.version("rejects")) == before


@pytest.mark.proof
def test_an_image_that_cannot_be_read_is_named_and_lacks_and_another_attempt_is_another_export(
    lake: Lake, settings: Settings, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in images.rglob("*.png")}
    write_image(images / "part-1/03.png", 203)  # changed
    (images / "part-0/04.png").rename(images / "away.png")
    (images / "part-0/00.png").unlink()  # its image has another source
    export(lake, settings)
    assert "it lacks 1 bytes_changed, 1 missing (rejects of the stage export-images)" in capsys.readouterr().out
    first = root_of(settings)
    manifest, rows = read(first)
    assert manifest["lacking"] == {"bytes_changed": 1, "missing": 1}
    assert {row["image_id"] for row in rows} == set(ids.values()) - {ids[name] for name in ("03.png", "04.png", "10.png")}
    refused = {(row["input_key"], row["code"], row["permanent"], row["attempts"]) for row in lake.read("rejects").collect()}
    assert refused == {(ids["03.png"].hex(), "bytes_changed", True, 1), (ids["04.png"].hex(), "missing", True, 1)}

    (images / "away.png").rename(images / "part-0/04.png")
    shutil.move(images, images.with_name("gone"))
    again = settings.model_copy(update={"export": settings.export.model_copy(update={"image_attempt": 3})})
    with pytest.raises(Mistake, match=r"no image of the selection could be read \(11 missing\); raise export.image_attempt"):
        export(lake, again)
    shutil.move(images.with_name("gone"), images)
    again = settings.model_copy(update={"export": settings.export.model_copy(update={"image_attempt": 2})})
    export(lake, again)
    told = capsys.readouterr().out.partition("1 of 11")[2]
    assert f"{ids['03.png'].hex()}: bytes_changed: file://{images}/part-1/03.png" in told
    (second,) = {path.parent for path in Path(settings.export.root).glob("*/manifest.json")} - {first}
    assert read(second)[0]["lacking"] == {"bytes_changed": 1}


@pytest.mark.proof
def test_a_run_that_goes_on_after_a_kill_writes_only_the_files_that_lack(
    lake: Lake, settings: Settings, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(images / "part-1/03.png", 203)
    monkeypatch.setattr(export_images, "_close", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(lake, settings)
    monkeypatch.undo()
    root = root_of(settings)
    assert not (root / "manifest.json").exists()
    lines = sorted((root / image_files.LINES).iterdir())
    lost = lines[0].name.removesuffix(".json")
    lines[0].unlink()
    (root / lost).write_bytes(b"half")
    for path in images.rglob("*.png"):  # what is written is not read again: only the lost file's images are
        if hashlib.sha256(path.read_bytes()).digest() not in wanted_by(lake, settings, lost):
            path.unlink()
    export(lake, settings)
    manifest, rows = read(root)
    assert (len(rows), manifest["lacking"]) == (10, {"bytes_changed": 1})
    assert lake.read("rejects").count() == 1


def wanted_by(lake: Lake, settings: Settings, file: str) -> set[bytes]:
    """The images that the plan puts into a file."""
    bucket, _, number = file.removesuffix(".parquet").rpartition("-")
    rows = export_images.planned(lake, settings, SELECTION, "scores", lake.versions(("images", "sources")))
    ordered = rows.where(F.col("bucket") == bucket).orderBy(F.xxhash64(F.lit(settings.export.seed), "image_id"), "image_id")
    ids = [bytes(row["image_id"]) for row in ordered.select("image_id").collect()]
    return set(ids[int(number) * 4 : int(number) * 4 + 4])


def test_how_images_are_laid_out_changes_no_other_export(lake: Lake, settings: Settings) -> None:
    rows = lake.read("images").select("image_id")
    other = settings.model_copy(update={"export": settings.export.model_copy(update={"image_rows_per_file": 9})})
    assert snapshot.identity("labels", rows, settings) == snapshot.identity("labels", rows, other)
    assert snapshot.identity("images", rows, settings) != snapshot.identity("images", rows, other)
