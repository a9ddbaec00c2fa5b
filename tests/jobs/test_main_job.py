"""The whole main job; then what the tables, exports and report say.

The first run is in this process, whose Spark is warm (a process of its own costs a minute more); the second, and the demo's two, are processes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, load
from jobs import embed, embedding, export_images, export_labels, ingest, label, lineage, registry, run_all, score, select_images, why
from jobs.checks import check
from jobs.lake import Lake
from jobs.tables import TABLES
from tests.jobs.conftest import REPOSITORY, write_image
from training import tracker, train_scorer, trainer

RUN = "import runpy, sys; sys.argv[0] = 'jobs.run_all'; runpy.run_module('jobs.run_all', run_name='__main__'); print('torch loaded:', 'torch' in sys.modules)"
IMAGES, CHOSEN, VIEWS = 30, 12, {"blur:1": 0.6, "blur:2": 0.2, "noise:2": 0.2}


class Build:
    """One build in a folder of its own: its config, and what the first run printed."""

    def __init__(self, folder: Path, spark: SparkSession, empty: Path) -> None:
        self.folder = folder
        for number in range(IMAGES):
            write_image(folder / f"images/{number:02d}.png", number, (96, 64 if number % 3 else 24))
        noise = np.random.default_rng(0).integers(0, 255, (150, 150, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images/cut.png")
        (folder / "images/cut.png").write_bytes((folder / "images/cut.png").read_bytes()[:20_000])
        (folder / "images/page.jpg").write_text("<html>")
        settings = {
            "lake": {"root": str(folder / "lake")},
            "spark": {"master": "local[2,4]", "jars": str(REPOSITORY / ".cache/jars"), "conf": {"spark.driver.memory": "1500m"}},
            "mlflow": {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "artifacts": str(folder / "artifacts")},
            "waves": {"rows": 40, "task_rows": 12},
            "encoder": "colour-grid",
            "ingest": {"sources": [{"name": "folder", "kind": "folder", "uri": str(folder / "images"), "licence": "CC0-1.0"}]},
            "embed": {"encoders": ["colour-grid"], "device": "cpu", "batch_size": 8},
            "label": {"images": CHOSEN, "views": VIEWS},
            "training": {"root": str(folder / "trainings")},
            "train_scorer": {"epochs": 3, "rows_per_step": 16, "micro_batch": 16},
            "select": {
                "name": "main",
                "seed": 3,
                "limit": 15,
                "rules": [
                    {"name": "tall", "value": "min_side", "at_least": 40},
                    {"name": "scored", "value": "score", "at_least": 0, "at_most": 9},
                    {"name": "licence", "value": "licence", "within": ["CC0-1.0"]},
                ],
            },
            "export": {"root": str(folder / "exports"), "rows_per_file": 7, "held_out": 0.3},
            "report": {"path": str(folder / "report.html")},
        }
        shutil.copytree(empty, folder / "lake")
        self.config = folder / "build.yaml"
        self.config.write_text(yaml.safe_dump(settings))
        check(self.settings())
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            run_all.run(Lake(spark, self.settings()), self.settings(), arguments=["--config", str(self.config)])
        self.first = said.getvalue()

    def run_again(self) -> str:
        command = [sys.executable, "-c", RUN, "--config", "build.yaml"]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def settings(self) -> Settings:
        return load(self.config)


@pytest.fixture(scope="module")
def build(spark: SparkSession, empty_lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    return Build(tmp_path_factory.mktemp("main"), spark, empty_lake)


@pytest.fixture
def settings(build: Build) -> Settings:
    return build.settings()


@pytest.fixture
def lake(spark: SparkSession, settings: Settings) -> Lake:
    return Lake(spark, settings)


def test_the_first_run_prints_the_funnel_and_where_things_lie(build: Build) -> None:
    funnel = {tuple(line.split()[:2]) for line in build.first.partition("The funnel")[2].splitlines() if line.startswith("  ")}
    assert {("in", "32"), ("images", "31"), ("embedded", "30"), ("scored", "30"), ("kept", "15"), ("rejected", "1")} <= funnel
    assert "report.html" in build.first
    assert "mlflow server --backend-store-uri" in build.first
    assert re.search(r"embed: 31/31 images, [\d.]+ images/s", build.first)


@pytest.mark.proof  # the gate asks the same of the demo
def test_the_second_run_finds_nothing_to_do_and_loads_no_model(build: Build, lake: Lake) -> None:
    before = lake.versions(TABLES)
    second = build.run_again()
    stages = (
        "ingest",
        "embed",
        "label",
        "export-labels",
        "train scorer",
        "land-train-stats",
        "score",
        "select",
        "export-selection",
        "report",
    )
    for stage in stages:
        assert f"{stage}: nothing to do" in second, second
    assert "torch loaded: False" in second
    assert lake.versions(TABLES) == before


def test_a_key_is_in_a_table_once(lake: Lake) -> None:
    twice = [lake.read(name).groupBy(*table.key).count().where("count > 1").select(F.lit(name)) for name, table in TABLES.items()]
    assert functools.reduce(DataFrame.union, twice).collect() == []


def test_labels_are_preferences_that_name_their_rule_and_view(lake: Lake) -> None:
    rows = lake.read("labels").collect()
    assert len(rows) == CHOSEN * (1 + len(VIEWS))
    assert {row["rater"] for row in rows} == {"rankiqa:1"}
    assert {(row["view"], round(row["value"], 3)) for row in rows} == {("original", 1.0), *VIEWS.items()}
    views = lake.read("embeddings").where(F.col("view") != "original")
    assert views.count() == lake.read("pixels").where(F.col("view") != "original").count() == CHOSEN * len(VIEWS)


def test_the_label_export_is_split_by_image_in_files_of_equal_rows(build: Build, settings: Settings, lake: Lake) -> None:
    root = Path(export_labels.folder(lake, settings).removeprefix("file://"))
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["rows"] == CHOSEN * (1 + len(VIEWS))
    assert set(manifest["made_from"]) == {"labels", "embeddings", "pixels"}
    images: dict[str, set[bytes]] = {"train": set(), "held_out": set()}
    for file in manifest["files"]:
        data = (root / file["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == file["sha256"]
        parquet = pq.ParquetFile(root / file["file"])
        assert (parquet.num_row_groups, parquet.metadata.num_rows) == (1, file["rows"])
        images[file["bucket"]] |= set(pq.read_table(root / file["file"]).column("image_id").to_pylist())
    for bucket in images:
        rows = [file["rows"] for file in manifest["files"] if file["bucket"] == bucket]
        assert set(rows[:-1]) <= {7} and 0 < rows[-1] <= 7
    assert images["train"] and images["held_out"] and not images["train"] & images["held_out"]
    landed = lake.read("exports").where(F.col("kind") == "labels").agg(F.sum("rows")).first()
    assert landed is not None and landed[0] == manifest["rows"]


def test_scores_follow_v7s_rule_and_name_their_head(lake: Lake) -> None:
    rows = lake.read("scores").collect()
    assert len(rows) == IMAGES
    for row in rows:
        assert row["bin"] == int(max(0.0, min(0.99, row["raw"])) * 10)
        assert row["tag"] == f"score_{row['bin']}"
    assert {row["model_version"] for row in rows} == {"1"}


def test_every_image_has_one_decision_with_all_the_rules_it_failed(lake: Lake) -> None:
    decisions = lake.read("decisions").collect()
    assert len(decisions) == lake.read("images").count() == 31
    kept = {bytes(row["image_id"]) for row in decisions if row["kept"]}
    assert kept == {bytes(row["image_id"]) for row in lake.read("selections").collect()}
    assert len(kept) == 15
    rules = [sorted(failed["rule"] for failed in row["failed"]) for row in decisions]
    assert rules.count(["tall"]) == 10
    assert rules.count(["limit"]) == 5
    assert rules.count(["scored"]) == 1  # the image that could not be decoded has no score
    small = next(row["failed"][0] for row in decisions if [f["rule"] for f in row["failed"]] == ["tall"])
    assert (small["value"], small["bound"]) == ("24", ">= 40")


def test_a_selection_is_the_same_whoever_makes_it_and_another_seed_gives_another(lake: Lake, settings: Settings) -> None:
    from jobs import facts

    head = score.fingerprint(score.champion(settings))
    versions = lake.versions(facts.TABLES)
    known = facts.gather(lake, settings, facts.used(settings.select), head, versions, {})
    chosen = {bytes(row["image_id"]) for row in lake.read("selections").collect()}
    again = select_images.decide(known.repartition(3), settings.select).where("kept").collect()
    assert {bytes(row["image_id"]) for row in again} == chosen
    other = settings.select.model_copy(update={"seed": 4})
    assert {bytes(row["image_id"]) for row in select_images.decide(known, other).where("kept").collect()} != chosen


def test_an_image_that_a_source_opted_out_is_dropped_whatever_the_rules(lake: Lake, settings: Settings) -> None:
    from jobs import facts

    head = score.fingerprint(score.champion(settings))
    known = facts.gather(lake, settings, facts.used(settings.select), head, lake.versions(facts.TABLES), {})
    out = F.when(F.col("min_side") == 24, F.array(F.lit("true"))).otherwise(F.col("opt_out"))
    decided = select_images.decide(known.withColumn("opt_out", out), settings.select.model_copy(update={"rules": (), "limit": None}))
    dropped = [[failed["rule"] for failed in row["failed"]] for row in decided.where(~F.col("kept")).collect()]
    assert dropped == [["opted_out"]] * 10


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"name": "a", "value": "beauty", "at_least": 1}, "value: given 'beauty', allowed"),
        ({"name": "a", "value": "licence", "at_least": 1}, "licence takes within or none_of"),
        ({"name": "a", "value": "score", "within": ("x",)}, "score takes at_least and at_most"),
    ],
)
def test_a_rule_over_no_value_or_with_the_wrong_question_is_named(
    build: Build, settings: Settings, rule: dict[str, object], words: str
) -> None:
    from conf.build import Select

    with pytest.raises(Mistake, match=re.escape(words)):
        rules = settings.select.model_copy(update={"rules": (Select.Rule(**rule),)})  # type: ignore[arg-type]
        check(settings.model_copy(update={"select": rules}))


def test_why_tells_an_images_story_by_id_key_or_file(
    build: Build, lake: Lake, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    file = build.folder / "images/03.png"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for name in (digest, digest[:10], "03.png", str(file)):
        why.tell(lake, settings, name)
        told = capsys.readouterr().out
        assert f"image {digest}" in told
        for table in ("images", "sources", "pixels", "embeddings", "scores", "decisions"):
            assert f"  {table}" in told
        assert "rule': 'tall'" in told  # 24 pixels high
    seen = lake.read("train_stats").agg(F.min_by("image_id", "image_id").alias("image_id"), F.sum("times_seen").alias("rows")).first()
    assert seen is not None and seen["rows"] == 3 * trained_rows(settings, lake)
    why.tell(lake, settings, bytes(seen["image_id"]).hex())
    assert "  models      aesthetic-scorer version 1 (champion) saw it" in capsys.readouterr().out
    why.tell(lake, settings, "page.jpg")
    assert "not_an_image" in capsys.readouterr().out
    with pytest.raises(Mistake, match="no table knows the image 'nobody'"):
        why.tell(lake, settings, "nobody")


def trained_rows(settings: Settings, lake: Lake) -> int:
    manifest = json.loads(lake.opener.read(f"{export_labels.folder(lake, settings)}/manifest.json"))
    return sum(file["rows"] for file in manifest["files"] if file["bucket"] == "train")


def test_a_model_tells_the_chain_down_to_the_rows_it_was_made_from(
    lake: Lake, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    lineage.tell(lake, settings, registry.find(settings.mlflow, "aesthetic-scorer"))
    told = capsys.readouterr().out
    assert "model      aesthetic-scorer version 1 (champion)" in told and "FINISHED" in told
    assert "the same in the table exports, the same on disk" in told
    for table in export_labels.TABLES:
        assert re.search(rf"table      {table} version \d+: [1-9]\d* rows", told)
    assert re.search(r"trained on \d+ images, \d+ rows over all epochs", told)


def test_the_selection_is_exported_with_its_bytes(lake: Lake, settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    export_images.run(lake, settings, plan_only=True)
    assert re.search(r"export-images: \d+ files pending; how long is unknown", capsys.readouterr().out)
    export_images.run(lake, settings)
    selected = lake.read("selections").count()
    assert f"export-images: {selected} images in file://" in capsys.readouterr().out
    manifest = json.loads(next(Path(settings.export.root).glob("images-*/manifest.json")).read_text())
    assert (manifest["rows"], manifest["lacking"]) == (selected, {})


def test_the_report_opens_without_a_server_and_shows_what_the_tables_hold(build: Build) -> None:
    page = (build.folder / "report.html").read_text()
    assert "http://" not in page and "https://" not in page
    for words in ("not_an_image", "decode_failed", "score_0", "rule <code>tall</code>", "Label quality", "aesthetic-scorer version 1"):
        assert words in page, words
    assert page.count("data:image/jpeg;base64,") > 20


def test_a_kill_before_the_manifest_leaves_no_export_and_the_next_run_makes_it(build: Build, lake: Lake, settings: Settings) -> None:
    """From here on the tests change the lake."""
    root = Path(export_labels.folder(lake, settings).removeprefix("file://"))
    before = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").unlink()
    (root / "train-00000.parquet").write_bytes(b"half")
    export_labels.run(lake, settings)
    after = json.loads((root / "manifest.json").read_text())
    assert after["files"] == before["files"]  # the same rows give the same bytes
    assert lake.read("exports").where(F.col("kind") == "labels").count() == len(after["files"])


@pytest.mark.proof  # the gate asks it of a registered head: test_recompute
def test_a_new_champion_costs_scores_and_nothing_else(lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    shorter = settings.model_copy(update={"train_scorer": settings.train_scorer.model_copy(update={"epochs": 1})})
    assert trainer.run(train_scorer, shorter, export_labels.folder(lake, settings), plan=False) == 0
    before = {table: lake.version(table) for table in ("images", "embeddings", "pixels", "labels")}
    client = tracker.connect(settings.mlflow)
    client.set_registered_model_alias("aesthetic-scorer", "champion", "2")
    try:
        head = score.champion(settings)
        assert score.pending(lake, settings, head).count() == IMAGES
        monkeypatch.setattr(embedding, "compute", lambda *_: pytest.fail("a tower was to run"))
        score.run(lake, settings)
        assert score.pending(lake, settings, head).isEmpty()
        counts = {row["model_version"]: row["count"] for row in lake.read("scores").groupBy("model_version").count().collect()}
        assert counts == {"1": IMAGES, "2": IMAGES}
        assert {table: lake.version(table) for table in before} == before
    finally:
        client.set_registered_model_alias("aesthetic-scorer", "champion", "1")


@pytest.mark.proof
def test_another_encoder_needs_its_own_degraded_views_and_no_second_label(build: Build, lake: Lake, settings: Settings) -> None:
    (build.folder / "finer.yaml").write_text("{name: finer, kernel: colour_grid, width: 192, image_size: 448}")
    finer = str(build.folder / "finer.yaml")
    other = settings.model_copy(update={"encoder": finer, "embed": settings.embed.model_copy(update={"encoders": (finer,)})})
    labels = lake.read("labels").count()
    embed.run(lake, other)
    wanted = label.pending(lake, other).select("view", "want").collect()
    assert sorted((row["view"], *row["want"]) for row in wanted) == sorted((view, "finer") for view in VIEWS for _ in range(CHOSEN))
    with pytest.raises(Mistake, match="run the stage label first"):
        export_labels.run(lake, other)
    label.run(lake, other)
    assert label.pending(lake, other).isEmpty()
    assert lake.read("labels").count() == labels
    assert export_labels.labelled(lake, other, lake.versions(export_labels.TABLES)).count() == labels
    with pytest.raises(Mistake, match="train a head on these vectors and make it the champion"):
        select_images.run(lake, other)


def test_images_that_no_run_of_embed_has_seen_stop_a_selection(build: Build, lake: Lake, settings: Settings) -> None:
    write_image(build.folder / "images/late.png", 99, (96, 64))
    ingest.run(lake, settings)
    with pytest.raises(Mistake, match="run the stages embed and score first"):
        select_images.run(lake, settings)
