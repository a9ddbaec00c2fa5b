"""Captions composed from what is known, in a real lake: who captions what, once, with every text's tokens; and the report's part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from jinja2 import Environment, StrictUndefined
from pyspark.sql import functions as F

from conf.captions import Captioner, Tier
from conf.section import Mistake
from conf.settings import Settings
from jobs import caption, caption_rows, caption_tiers, embed, facts, flag, ingest, report_captions
from jobs.lake import Lake
from tests.jobs.conftest import REPOSITORY, MakeSettings, write_image
from udfs import caption_answer

IMAGES = 6
ASKED = ("short", "medium", "tags", "ocr")


@pytest.fixture
def settings(tmp_path: Path, make_settings: MakeSettings) -> Settings:
    """Six images of a manifest: the first four have a caption and tags, the fifth tags alone, the sixth nothing at all."""
    lines = []
    for number in range(IMAGES):
        write_image(tmp_path / f"images/{number}.png", number)
        about = {
            "tags": '["fox","snow","outdoors"]' if number < 5 else "[]",
            "caption": f'"A red fox number {number} stands in deep snow. Behind the fox grows a row of dark firs."'
            if number < 4
            else "null",
        }
        lines.append(f'{{"file": "{number}.png", "tags": {about["tags"]}, "caption": {about["caption"]}}}\n')
    (tmp_path / "images/list.jsonl").write_text("".join(lines))
    source = {
        "name": "list",
        "kind": "manifest",
        "uri": str(tmp_path / "images/list.jsonl"),
        "columns": {"uri": "file", "key": "file", "tags": "tags", "alt_text": "caption"},
    }
    tiers = [
        {"name": "wide", "captioner": "tags", "rules": [{"name": "wide", "value": "max_side", "at_least": 60}], "parts": ["tags"]},
        {"name": "rest", "captioner": "tags", "parts": list(ASKED)},
    ]
    write_image(tmp_path / "images/0.png", 0, (96, 32))
    return make_settings(waves={"rows": 50, "task_rows": 20}, ingest={"sources": [source]}, captions={"tiers": tiers})


def test_each_image_is_captioned_once_by_its_tier_or_refused_by_name(
    settings: Settings, make_lake: Callable[[Settings], Lake], capsys: pytest.CaptureFixture[str]
) -> None:
    lake = make_lake(settings)
    ingest.run(lake, settings)
    capsys.readouterr()
    caption.tell_that_flags_lack(lake, settings)
    assert capsys.readouterr().out == ""
    seen = settings.model_copy(update={"embed": settings.embed.model_copy(update={"detectors": ("open-nsfw",)})})
    caption.tell_that_flags_lack(lake, seen)
    assert capsys.readouterr().out.startswith(f"caption: {IMAGES} images wait for flags: "), "they may wait for ever"
    for stage in (embed, flag, caption):
        stage.run(lake, settings)
    keys = {bytes(row["image_id"]): row["key"] for row in lake.read("sources").collect()}
    rows = lake.read("captions").collect()
    kinds: dict[str, set[str]] = {}
    for row in rows:
        kinds.setdefault(keys[bytes(row["image_id"])], set()).add(row["kind"])
    assert kinds == {"0.png": {"tags"}} | {f"{n}.png": {"short", "medium", "tags"} for n in range(1, 4)} | {
        "4.png": {"short", "medium", "tags"} & kinds["4.png"]
    }
    assert {"short", "tags"} <= kinds["4.png"]
    assert {(row["engine"], row["model"], row["prompt"], row["tokenizer"], row["language"]) for row in rows} == {
        ("tags", "none", "studbook-1", "utf8-bytes/4", "en")
    }
    assert {row["tier"] for row in rows if keys[bytes(row["image_id"])] == "0.png"} == {"wide"}
    assert all(row["tokens"] == -(-len(row["text"].encode()) // 4) for row in rows)
    assert any("A red fox number 2 stands in deep snow" in row["text"] for row in rows if row["kind"] == "short")
    (refused,) = lake.read("rejects").where(F.col("stage") == "caption").collect()
    assert (keys[bytes(refused["image_id"])], refused["code"], refused["permanent"]) == ("5.png", "nothing_known", True)
    capsys.readouterr()
    version = lake.version("captions")
    caption.run(lake, settings)
    assert capsys.readouterr().out == "caption: nothing to do\n" and lake.version("captions") == version

    told = report_captions.section(
        lake,
        settings,
        "",
        lambda rows, group: {"all": [row.asDict() | {"picture": None, "why": "", "name": "x"} for row in rows.collect()]},
    )
    assert {(row["tier"], row["kind"], row["images"]) for row in told["counts"]} >= {("wide", "tags", 1), ("rest", "short", 4)}
    assert len(told["images"]) == 5 and all(len(one["prompts"]) == 1 + report_captions.EPOCHS for one in told["images"])
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string((REPOSITORY / "jobs/report_captions.html").read_text())
    assert "A red fox number 2 stands in deep snow" in page.render(captions=told)

    again = settings.model_copy(update={"captions": settings.captions.model_copy(update={"tiers": settings.captions.tiers[1:]})})
    assert caption_tiers.pending(lake, again).count() == 1  # the first image: another tier asks for other parts of it
    known = facts.gather(lake, settings, ["max_side"], "", None, {})  # of 30 million images, for one rule over their size
    assert facts.tables_read(["max_side"]) == ["images"] and facts.tables_read(["denied", "rating"]) == ["images", "rejects", "flags"]
    assert known.columns == ["image_id", "max_side", "image_version"] and {Path(uri).parent.name for uri in known.inputFiles()} == {
        "images"
    }


def test_options_of_pace_are_not_in_the_fingerprint_and_those_of_the_request_are(settings: Settings) -> None:
    def told(**changes: object) -> str:
        one = Captioner(engine="openai", model="m", base_url="http://127.0.0.1:1").model_copy(update=changes)
        captions = settings.captions.model_copy(update={"captioners": {"x": one}, "tiers": (tier := Tier(name="t", captioner="x"),)})
        return caption_rows.fingerprint(settings.model_copy(update={"captions": captions}), tier)

    assert told() == told(in_flight=3, tries=9, timeout_seconds=1.0) != told(max_output_tokens=7)
    assert told().startswith("openai:m:studbook-1:")


def test_a_tokenizer_that_is_not_there_stops_the_stage(settings: Settings, make_lake: Callable[[Settings], Lake]) -> None:
    captions = settings.captions.model_copy(update={"tokenizer": "/nowhere", "tokenizer_sha256": "0" * 64})
    with pytest.raises(Mistake, match=r"no tokenizer\.json in /nowhere"):
        caption.run(make_lake(settings), settings.model_copy(update={"captions": captions}))


def test_the_parts_of_a_tier_are_parts_of_an_answer() -> None:
    assert set(ASKED) < set(caption_answer.PARTS)
