"""Two captioners of one sample in a real lake: the fake Gemini on loopback, and `tags`. The tests go in order and share the lake."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings
from jobs import caption, caption_sample, caption_tiers, checks, compare_captioners, facts, flag, ingest, prompt_facts, runs, select_images
from jobs.lake import Lake
from tests.jobs.conftest import REPOSITORY, write_image
from tests.servers.gemini_server import GeminiServer

IMAGES, SAMPLE, WIDE = 10, 6, 2
NOTEBOOK = REPOSITORY / "notebooks/captions.py"
Id = bytes


class Build:
    """Ten images; two of them wide, the tier `best`; of the last nothing is known. Six are the sample of flash and words."""

    def __init__(self, folder: Path, spark: SparkSession, empty: Path, server: GeminiServer) -> None:
        self.folder, self.server = folder, server
        lines = []
        for number in range(IMAGES):
            write_image(folder / f"images/{number}.png", number, (96, 32) if number < WIDE else (48, 32))
            about = {"tags": ["fox", "snow", "deep forest"], "caption": f"A red fox number {number} stands in deep snow."}
            lines.append(json.dumps({"file": f"{number}.png"} | (about if number < IMAGES - 1 else {"tags": [], "caption": None})))
        (folder / "images/list.jsonl").write_text("\n".join(lines) + "\n")
        shutil.copytree(empty, folder / "lake")
        self.lake = Lake(spark, self.settings())
        ingest.run(self.lake, self.settings())
        text = {
            "image_id": self.sample()[0],
            "fingerprint": flag.evidence(self.settings()).fingerprint,
            "tags": ["fox"],
            "text": "STOP\nhere",
        }
        row = dict.fromkeys(self.lake.read("flags").columns) | {
            "ai_generated": "unknown",
            "ai_evidence": [],
            "versions": "by hand",
            "run": "by hand",
        }
        self.append("flags", row | text)

    def settings(self, captions: dict[str, Any] | None = None, **compare: Any) -> Settings:
        # a variable that the workers' JVM has had from its start
        flash = {"engine": "gemini", "model": "gemini-3.8-flash", "key": {"environment": "HOME"}, "base_url": self.server.url}
        flash |= {"media_resolution": "low", "in_flight": 4, "max_output_tokens": 2048, "timeout_seconds": 5.0}
        tiers = [
            {"name": "best", "captioner": "flash", "rules": [{"name": "wide", "value": "max_side", "at_least": 60}]},
            {"name": "rest", "captioner": "words", "parts": ["short", "tags", "ocr"]},
        ]
        told: dict[str, Any] = {"budget_usd": 5.0, "captioners": {"flash": flash, "words": {"engine": "tags"}}, "tiers": tiers}
        source = {"name": "list", "kind": "manifest", "uri": str(self.folder / "images/list.jsonl")}
        source |= {"columns": {"uri": "file", "key": "file", "tags": "tags", "alt_text": "caption"}}
        whole = {
            "lake": {"root": str(self.folder / "lake")},
            "mlflow": {"tracking_uri": f"sqlite:///{self.folder}/mlflow.db", "artifacts": str(self.folder / "artifacts")},
            "waves": {"rows": 40, "task_rows": 20},
            "encoder": "colour-grid",
            "ingest": {"sources": [source]},
            "embed": {"encoders": ["colour-grid"], "device": "cpu"},
            "label": {"views": {"blur:1": 0.6}},
            "captions": told | (captions or {}),
            "compare_captioners": {"captioners": ["flash", "words"], "images": SAMPLE, "seed": 1} | compare,
            "select": {"name": "test", "seed": 1, "rules": []},
            "export": {"root": str(self.folder / "exports")},
            "training": {"root": str(self.folder / "trainings")},
            "report": {"path": str(self.folder / "report.html"), "images_per_group": 3},
        }
        return Settings.model_validate(whole, strict=False)

    def append(self, table: str, row: dict[str, Any]) -> None:
        self.lake.append(table, self.lake.spark.createDataFrame([row], self.lake.read(table).schema), f"by hand {row['image_id'].hex()}", 0)

    def sample(self, **compare: Any) -> list[bytearray]:
        rows = caption_sample.sample(self.lake, self.settings(**compare)).collect()
        return sorted(bytearray(row["image_id"]) for row in rows)

    def wide(self) -> set[Id]:
        return {bytes(row["image_id"]) for row in self.lake.read("images").where("width > 60").collect()}

    def by(self, engine: str) -> set[Id]:
        rows = self.lake.read("captions").where(F.col("engine") == engine).select("image_id").distinct().collect()
        return {bytes(row["image_id"]) for row in rows}

    def files(self) -> dict[str, bytes]:
        made = compare_captioners.latest(self.settings())
        assert made is not None
        return runs.files(self.settings().mlflow, made)


@pytest.fixture(scope="module")
def server() -> Iterator[GeminiServer]:
    with GeminiServer({}) as started:
        yield started


@pytest.fixture(scope="module")
def build(spark: SparkSession, empty_lake: Path, tmp_path_factory: pytest.TempPathFactory, server: GeminiServer) -> Build:
    return Build(tmp_path_factory.mktemp("compared"), spark, empty_lake, server)


def test_the_sample_is_a_function_of_seed_and_ids_and_a_larger_one_holds_a_smaller(build: Build) -> None:
    drawn = {size: {bytes(one) for one in build.sample(images=size)} for size in (2, SAMPLE, IMAGES)}
    assert [len(one) for one in drawn.values()] == [2, SAMPLE, IMAGES] and drawn[2] < drawn[SAMPLE] < drawn[IMAGES]
    assert {bytes(one) for one in build.sample(images=None)} == drawn[IMAGES]
    assert len({frozenset(bytes(one) for one in build.sample(images=SAMPLE, seed=seed)) for seed in (1, 4)}) > 1


def test_each_captioner_captions_the_sample_beside_the_tiers_and_no_image_twice(build: Build) -> None:
    lake, settings, server = build.lake, build.settings(), build.server
    drawn, wide = {bytes(one) for one in build.sample()}, build.wide()
    everybody = {bytes(row["image_id"]) for row in lake.read("images").collect()}
    assert wide - drawn and wide & drawn
    waiting: dict[str, set[Id]] = {}
    for row in caption_tiers.pending(lake, settings).collect():
        waiting.setdefault(row["tier"], set()).add(bytes(row["image_id"]))
    compared = dict.fromkeys(("compare.flash", "compare.words"), drawn)
    assert waiting == compared | {"best": wide - drawn, "rest": everybody - wide - drawn}
    caption.run(lake, settings)
    assert build.by("gemini") == drawn | wide and server.counts()["requests"] == len(drawn | wide)
    unknown = {bytes(row["image_id"]) for row in lake.read("rejects").where("code = 'nothing_known'").collect()}
    assert build.by("tags") | unknown == drawn | (everybody - wide)
    assert lake.read("captions").groupBy("image_id", "fingerprint", "kind", "part").count().where("count > 1").isEmpty()
    assert caption_tiers.pending(lake, settings).isEmpty()


def test_captioners_are_compared_once_in_a_run_of_mlflow(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    lake, settings = build.lake, build.settings()
    capsys.readouterr()
    compare_captioners.run(lake, settings)
    said = capsys.readouterr().out
    assert f"compare-captioners: {SAMPLE} of the sample's {SAMPLE} images, asked of each of flash, words" in said
    files = build.files()
    told = json.loads(files["comparison.json"])
    drawn = build.sample()
    paid = lake.read("caption_calls").where(F.col("image_id").isin(drawn)).agg(F.sum("nano_usd").alias("nano")).first()
    assert paid is not None and told["captioners"]["flash"]["usd"][0] == pytest.approx(paid["nano"] / SAMPLE / 1e9)
    words = told["captioners"]["words"]
    assert words["usd"] is None and words["captioned"] == SAMPLE - sum(words["refusals"].values())
    assert words["tag_recall"][0] == 1.0  # it says them all
    assert words["ocr_similarity"][0] == 1.0 and words["ocr_images"] == 1  # and repeats the detector
    assert set(words["kinds"]) == {"short", "tags", "ocr"} < set(told["captioners"]["flash"]["kinds"]) | {"ocr"}
    (pair,) = told["pairs"]
    assert 0 <= pair["agreement"][0] <= 1 and (pair["first"], pair["second"]) == ("flash", "words")
    table = pd.read_csv(io.BytesIO(files["captioners.csv"]), keep_default_na=False).set_index(["captioner", "other", "kind", "measure"])
    assert float(table.loc[("flash", "words", "", "agreement"), "value"]) == pytest.approx(pair["agreement"][0])
    run = runs.connect(settings.mlflow).get_run(compare_captioners.latest(settings) or "")
    assert run.data.metrics["words.tag_recall"] == 1.0 and run.data.metrics["flash.short.texts"] == SAMPLE
    assert run.data.params["captioner flash"].startswith("gemini:gemini-3.8-flash:studbook-1:")
    compare_captioners.run(lake, settings)
    assert capsys.readouterr().out.startswith("compare-captioners: nothing to do, MLflow run ")


def test_disagreement_is_a_value_for_rules_known_of_what_all_compared_have_captioned(build: Build) -> None:
    lake, settings = build.lake, build.settings()
    images = pd.read_parquet(io.BytesIO(build.files()["images.parquet"]))
    wanted = {bytes(row.image_id): 1 - row.agreement for row in images.itertuples()}
    made = select_images.made_by(settings, ["disagreement"])
    known = facts.gather(lake, settings, ["disagreement"], "", None, made).collect()
    assert {bytes(row["image_id"]): row["disagreement"] for row in known if row["disagreement"] is not None} == pytest.approx(wanted)
    assert len(known) == IMAGES and {row["captions_version"] for row in known} == {made["captions"], None}
    middle = sorted(wanted.values())[-2]
    rule = {"name": "apart", "value": "disagreement", "at_least": middle - 1e-9}
    tiers = [
        {"name": "apart", "captioner": "flash", "rules": [rule]},
        {"name": "rest", "captioner": "words", "parts": ["short", "tags", "ocr"]},
    ]
    told = build.settings({"tiers": tiers})
    checks.check(told)
    rows = caption_tiers.assigned(lake, told, caption_sample.images(lake)).where("tier = 'apart'").collect()
    assert {bytes(row["image_id"]) for row in rows} == {one for one, value in wanted.items() if value >= middle - 1e-9}
    with pytest.raises(Mistake, match=r"captions\.tiers\.apart: disagreement is between .* at least two, given \['flash'\]"):
        checks.check(build.settings({"tiers": tiers}, captioners=["flash"]))
    with pytest.raises(Mistake, match=r"captions\.tiers\.apart\.rules\.apart: disagreement takes at_least and at_most"):
        wrong = {"name": "apart", "captioner": "flash", "rules": [rule | {"at_least": None, "within": ["much"]}]}
        checks.check(build.settings({"tiers": [wrong]}))


def test_an_images_prompts_are_of_one_captioner_that_of_the_earliest_tier(build: Build) -> None:
    lake, settings = build.lake, build.settings()
    by = {"gemini": build.by("gemini"), "tags": build.by("tags")}
    assert by["gemini"] & by["tags"]  # the sample has captions of both
    for row in prompt_facts.gather(lake, settings, "").collect():
        engines = {caption["id"].partition(":")[0] for caption in row["captions"]}
        assert engines == ({"gemini"} if bytes(row["image_id"]) in by["gemini"] else {"tags"})
    alone = build.settings({"tiers": [{"name": "rest", "captioner": "words", "parts": ["short", "tags", "ocr"]}]})
    rows = prompt_facts.gather(lake, alone, "").collect()
    assert {bytes(row["image_id"]) for row in rows} == by["tags"]
    assert all(caption["id"].startswith("tags:") for row in rows for caption in row["captions"])


def test_an_image_that_rises_to_an_earlier_tier_waits_and_one_that_falls_costs_nothing(build: Build) -> None:
    lake = build.lake
    drawn = {bytes(one) for one in build.sample()}
    narrow = {"name": "wide", "value": "max_side", "at_most": 60}
    tiers = build.settings().model_dump(mode="json")["captions"]["tiers"]
    turned = build.settings({"tiers": [{**tiers[0], "rules": [narrow]}, tiers[1]]})
    waiting = {bytes(row["image_id"]): row["tier"] for row in caption_tiers.pending(lake, turned).collect()}
    everybody = {bytes(row["image_id"]) for row in lake.read("images").collect()}
    assert waiting == dict.fromkeys(
        everybody - build.wide() - drawn, "best"
    )  # the wide ones keep flash's captions, and the sample has them


def test_what_a_service_called_prohibited_waits_for_no_captioner_and_is_of_the_sample(build: Build) -> None:
    settings, drawn = build.settings(), build.sample()
    flash = settings.captions.captioners["flash"]
    captioners = settings.captions.captioners | {"flash": flash.model_copy(update={"max_output_tokens": 1024})}
    other = settings.model_copy(update={"captions": settings.captions.model_copy(update={"captioners": captioners})})
    reject = dict.fromkeys(build.lake.read("rejects").columns) | {"stage": "caption", "code": "prohibited", "detail": "", "run": "by hand"}
    reject |= {
        "input_key": drawn[0].hex(),
        "image_id": drawn[0],
        "fingerprint": "gemini:other:studbook-1:0123456789ab",
        "permanent": True,
        "attempts": 1,
    }
    build.append("rejects", reject)
    waiting = {bytes(row["image_id"]) for row in caption_tiers.pending(build.lake, other).where("tier = 'compare.flash'").collect()}
    assert waiting == {bytes(one) for one in drawn[1:]} and build.sample() == drawn


def test_a_tiers_rule_over_a_value_whose_stage_has_not_run_is_refused_by_name(build: Build) -> None:
    def asks(value: str) -> Settings:
        rule = {"name": "high", "value": value, "at_least": 0.5}
        return build.settings({"tiers": [{"name": "some", "captioner": "words", "rules": [rule], "parts": ["short", "tags"]}]})

    told = "captions: tiers ask for sharpness, and images have no such value yet; run the stages embed first"
    with pytest.raises(Mistake, match=told):
        caption_tiers.demand(build.lake, asks("sharpness"))
    with pytest.raises(Mistake, match="tiers ask for text_share, and images have no such value yet; run the stages flag first"):
        caption_tiers.demand(build.lake, asks("text_share"))
    for value in ("max_side", "disagreement"):
        caption_tiers.demand(build.lake, asks(value))


def test_the_notebook_shows_captions_prompts_ledger_and_comparison(
    build: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = build.folder / "build.yaml"
    config.write_text(yaml.safe_dump(build.settings().model_dump(mode="json")))
    monkeypatch.setattr(sys, "argv", [str(NOTEBOOK), str(config)])
    runpy.run_path(str(NOTEBOOK), run_name="__main__")
    said = capsys.readouterr().out
    assert "compare-captioners: " in said and "|gemini|gemini-3.8-flash|ok " in said.replace(" |", "|").replace("| ", "|")
    page = (build.folder / "captions.html").read_text()
    assert all(text in page for text in ("Captioners compared", "What was paid", "epoch 2", "data:image/jpeg;base64,", "agreement 0."))


def test_what_is_opted_out_is_not_of_the_sample_though_a_service_called_it_prohibited(build: Build) -> None:
    lake, banned = build.lake, build.sample()[0]
    row = lake.read("sources").where(F.col("image_id") == banned).limit(1).withColumns({"opt_out": F.lit(True), "run": F.lit("by hand")})
    lake.append("sources", lake.spark.createDataFrame(row.collect(), lake.read("sources").schema), "opted out", 0)
    prohibited = {bytes(one["image_id"]) for one in caption_sample.prohibited(lake).collect()}
    assert bytes(banned) in prohibited
    left = {bytes(one) for one in build.sample(images=None)}
    assert len(left) == IMAGES - 1 and bytes(banned) not in left


@pytest.mark.proof
def test_the_notebook_makes_its_page_where_there_is_no_comparison_to_make(
    build: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = build.folder / "build.yaml"
    config.write_text(yaml.safe_dump(build.settings(covers=1.0).model_dump(mode="json")))
    (build.folder / "captions.html").unlink(missing_ok=True)  # of the test before, where that ran too
    monkeypatch.setattr(sys, "argv", [str(NOTEBOOK), str(config)])
    runpy.run_path(str(NOTEBOOK), run_name="__main__")
    assert "two captioners must have been asked about 100% of them" in capsys.readouterr().out
    assert '<h2 id="captions">' in (build.folder / "captions.html").read_text()
