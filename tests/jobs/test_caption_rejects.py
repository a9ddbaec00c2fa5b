"""An image that was refused comes back when what the reject depended on has changed, and only then."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import functions as F

from conf.settings import Settings
from jobs import caption, caption_rejects, caption_tiers, ingest
from jobs.lake import Lake
from tests.jobs.conftest import MakeSettings, write_image
from tests.servers.gemini_server import GeminiServer

MakeLake = Callable[[Settings], Lake]
ALT = "A red fox stands in deep snow."


def refusals(lake: Lake, settings: Settings) -> dict[str, str]:
    """id (hex) -> code of the rejects that hold."""
    return {bytes(row["image_id"]).hex(): row["code"] for row in caption_rejects.standing(lake, settings).collect()}


def waiting(lake: Lake, settings: Settings) -> set[str]:
    return {bytes(row["image_id"]).hex() for row in caption_tiers.pending(lake, settings).collect()}


def test_an_image_of_which_nothing_was_known_comes_back_when_something_else_is_known_of_it(
    tmp_path: Path, make_settings: MakeSettings, make_lake: MakeLake, capsys: pytest.CaptureFixture[str]
) -> None:
    image = write_image(tmp_path / "images/0.png", 0)
    name = hashlib.sha256(image.read_bytes()).hexdigest()
    listed = tmp_path / "images/list.jsonl"
    source = {"name": "list", "kind": "manifest", "uri": str(listed), "columns": {"uri": "file", "key": "key", "alt_text": "alt"}}
    tiers = [{"name": "all", "captioner": "tags", "parts": ["short", "tags"]}]
    settings = make_settings(ingest={"sources": [source]}, captions={"tiers": tiers})
    lake = make_lake(settings)

    def told(alt: str | None, key: str = "0") -> None:
        listed.write_text(json.dumps({"file": "0.png", "key": key, "alt": alt}) + "\n")
        ingest.run(lake, settings)

    told(None)
    caption.run(lake, settings)
    assert refusals(lake, settings) == {name: "nothing_known"}
    told(None, "another source of which nothing is known")
    capsys.readouterr()
    caption.run(lake, settings)
    assert capsys.readouterr().out == "caption: nothing to do\n"
    told("https://example.com/fox.png")  # no sentence that a caption may hold
    assert refusals(lake, settings) == {} and waiting(lake, settings) == {name}
    caption.run(lake, settings)
    assert refusals(lake, settings) == {name: "nothing_known"} and waiting(lake, settings) == set()
    told(ALT)
    caption.run(lake, settings)
    assert [row["text"] for row in lake.read("captions").where("kind = 'short'").collect()] == [ALT]
    assert refusals(lake, settings) == {} and lake.read("rejects").count() == 2
    caption.run(lake, settings)
    assert capsys.readouterr().out.endswith("caption: nothing to do\n")


def test_a_picture_that_could_not_be_read_comes_back_with_a_new_source_and_what_the_service_refused_does_not(
    tmp_path: Path, make_settings: MakeSettings, make_lake: MakeLake, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write_image(tmp_path / f"images/{name}.png", seed) for seed, name in enumerate(("lost", "blocked", "forbidden"))]
    lost, blocked, forbidden = (hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    with GeminiServer({}) as server:
        flash = {"engine": "gemini", "model": "gemini-3.8-flash", "key": {"environment": "HOME"}, "base_url": server.url, "in_flight": 2}
        flash |= {"media_resolution": "low", "max_output_tokens": 2048, "timeout_seconds": 5.0}
        told = {"budget_usd": 5.0, "captioners": {"flash": flash}, "tiers": [{"name": "all", "captioner": "flash"}]}
        settings = make_settings(captions=told, waves={"rows": 40, "task_rows": 20, "attempts": 1})
        lake = make_lake(settings)
        ingest.run(lake, settings)
        shutil.move(paths[0], tmp_path / "elsewhere.png")
        server.order(queue=["block_SAFETY", "block_PROHIBITED_CONTENT"])
        caption.run(lake, settings)
        codes = refusals(lake, settings)
        assert codes.pop(lost) == "missing" and {codes[blocked], codes[forbidden]} == {"not_captioned", "prohibited"}
        assert waiting(lake, settings) == set() and server.counts()["requests"] == 2

        (tmp_path / "images/new").mkdir()
        shutil.move(tmp_path / "elsewhere.png", tmp_path / "images/new/lost.png")
        for path in paths[1:]:
            shutil.copy(path, tmp_path / "images/new")
        ingest.run(lake, settings)
        assert lake.read("sources").count() == 6 and waiting(lake, settings) == {lost}
        caption.run(lake, settings)
        assert {bytes(row["image_id"]).hex() for row in lake.read("captions").collect()} == {lost}
        assert server.counts()["requests"] == 3 and refusals(lake, settings) == codes
        capsys.readouterr()
        caption.run(lake, settings)
        assert "caption: tier all: nothing to do" in capsys.readouterr().out and server.counts()["requests"] == 3

        # another limit is a new chance too, and a reject without a name for what it depends on, as older versions wrote, is no reject
        assert lake.read("rejects").where(F.col("code") == "missing").first()["fingerprint"].count("@") == 1  # type: ignore[index]
