"""Batch mode in a real lake: jobs of the fake service are sent by workers, watched, collected and landed; killed, they are found again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings
from jobs import caption, caption_batch, caption_jobs, caption_ledger, caption_rows, forget, ingest
from jobs.lake import Lake
from tests.jobs.conftest import MakeSettings
from tests.servers.gemini_server import GeminiServer
from udfs import addresses, caption_budget, caption_collect, caption_intent, caption_send
from udfs.opener import Opener, to_path, to_uri

IMAGES = 12
MakeLake = Callable[[Settings], Lake]
Make = Callable[..., Settings]
NO = "The caller does not have permission."
TEXTS = ("hex(image_id)", "kind", "part", "text", "tokens", "request")


@pytest.fixture
def server() -> Iterator[GeminiServer]:
    with GeminiServer({}) as started:
        yield started


@pytest.fixture
def make(images: Path, make_settings: MakeSettings, server: GeminiServer) -> Make:
    def made(budget: float = 5.0, engine: str = "gemini-batch", **batch: Any) -> Settings:
        # a variable that the workers' JVM has had from its start
        flash = {"engine": engine, "model": "gemini-3.8-flash", "key": {"environment": "HOME"}, "base_url": server.url}
        flash |= {"media_resolution": "low", "max_output_tokens": 2048, "timeout_seconds": 5.0}
        flash["batch"] = {"rows": 5, "poll_seconds": 0.05} | batch
        return make_settings(
            captions={"budget_usd": budget, "captioners": {"flash": flash}, "tiers": [{"name": "all", "captioner": "flash"}]}
        )

    return made


@pytest.fixture
def lake(make: Make, make_lake: MakeLake) -> Lake:
    lake = make_lake(make())
    ingest.run(lake, make())
    return lake


class Killed(BaseException):
    pass


def killed(*_: object) -> int:
    raise Killed


def die_while_jobs_run(lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(caption_jobs, "finish", killed)
        caption.run(lake, settings)


def bill(lake: Lake) -> int:
    found = lake.read("caption_calls").agg(F.sum("nano_usd").alias("nano")).first()
    assert found is not None
    return int(found["nano"] or 0)


def test_batch_mode_gives_the_rows_of_the_online_path_at_half_the_price_also_where_jobs_end_halfway(
    lake: Lake, make: Make, server: GeminiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.order(batch_end="PARTIALLY_SUCCEEDED", batch_done=0.6, batch_polls=2)
    caption.run(lake, make(rounds=1))
    said = capsys.readouterr().out
    assert "12/12 images, round 1: 12 requests" in said and "requests that no job answered" in said
    left = {row["detail"] for row in lake.read("rejects").where("code = 'not_captioned' AND NOT permanent").collect()}
    some = lake.read("captions").select("image_id").distinct().count()
    assert left == {"no_reply: no job answered it"} and 0 < some < IMAGES
    server.order(batch_end="SUCCEEDED")
    caption.run(lake, make())
    assert f"{IMAGES - some}/{IMAGES - some} images, round 1: {IMAGES - some} requests" in capsys.readouterr().out
    assert set(server.counts()["by_image"].values()) == {1}, "none is asked twice"
    version = lake.version("captions")
    caption.run(lake, make())
    assert "tier all: nothing to do" in capsys.readouterr().out and lake.version("captions") == version
    billed, half = server.counts()["batch_billed"], bill(lake)
    assert half == pytest.approx(375 * (billed["prompt"] + billed["image"]) + 1_875 * (billed["output"] + billed["thoughts"]), abs=IMAGES)
    batched = {tuple(row) for row in lake.read("captions").selectExpr(*TEXTS).collect()}

    # the same tier online is another engine: its rows are asked of the journal, which has every answer
    before = server.counts()["requests"]
    caption.run(lake, make(engine="gemini"))
    online = {tuple(row) for row in lake.read("captions").where("engine = 'gemini'").selectExpr(*TEXTS).collect()}
    assert online == batched and server.counts()["requests"] == before and bill(lake) == half

    assert caption_ledger.settle_all(lake, make(), "test") > half, "what a job left out counts at its worst"


@pytest.mark.proof  # the gate forgets what was bought online, in test_caption_paid.py
def test_of_a_forgotten_image_nothing_is_left_but_its_cost_also_while_its_job_runs(
    lake: Lake, make: Make, server: GeminiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, area = make(), Path(lake.area("_captions").removeprefix("file://"))
    victims = [bytes(row["image_id"]).hex() for row in lake.read("images").orderBy("image_id").limit(2).collect()]

    def told(name: str) -> list[Path]:
        return [path for path in area.rglob("*") if path.is_file() and name.encode() in path.read_bytes()]

    die_while_jobs_run(lake, settings, monkeypatch)
    assert told(victims[0])
    forget.run(lake, settings, images=[victims[0]])
    assert not told(victims[0])
    caption.run(lake, settings)
    assert lake.read("captions").select("image_id").distinct().count() == IMAGES - 1
    assert not told(victims[0]) and told(victims[1])

    spent = caption_ledger.settle_all(lake, settings, "test")
    forget.run(lake, settings, images=[victims[1]])
    assert not told(victims[1]) and not caption_ledger.holding(lake, frozenset(victims))
    assert caption_ledger.settle_all(lake, settings, "test") == spent


@pytest.mark.proof
def test_a_driver_that_dies_while_jobs_run_finds_them_again_and_sends_none_twice(
    lake: Lake, make: Make, server: GeminiServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    die_while_jobs_run(lake, make(), monkeypatch)
    sent = server.counts()["others"]
    assert lake.read("captions").isEmpty() and sent > 0
    server.order(batch_refuses=True)
    told = r"the service \(gemini-batch, gemini-3.8-flash\) does not tell of jobs that it was sent: get: key_refused: .*; check the key in HOME"
    with pytest.raises(Mistake, match=told):
        caption.run(lake, make())
    server.order(batch_refuses=False)
    caption.run(lake, make())
    assert lake.read("captions").select("image_id").distinct().count() == IMAGES
    assert set(server.counts()["by_image"].values()) == {1} and "round 1" not in capsys.readouterr().out
    assert not list(Path(lake.area("_captions").removeprefix("file://")).rglob("*.jobs"))


@pytest.mark.proof
def test_an_answer_that_is_refused_is_asked_once_more_in_the_next_round(lake: Lake, make: Make, server: GeminiServer) -> None:
    server.order(queue=["caption_wrong_schema"])
    caption.run(lake, make())
    assert lake.read("captions").select("image_id").distinct().count() == IMAGES
    assert sorted(server.counts()["by_image"].values()) == [1] * (IMAGES - 1) + [2] and lake.read("caption_calls").count() == IMAGES + 1


@pytest.mark.proof
def test_a_job_that_the_service_has_dropped_counts_at_its_worst_and_its_images_are_asked_again(
    lake: Lake, make: Make, server: GeminiServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    die_while_jobs_run(lake, make(), monkeypatch)
    server.order(batch_forgets=True)
    with pytest.raises(Killed), monkeypatch.context() as patch:
        patch.setattr(caption_batch._Wave, "ask", killed)
        caption.run(lake, make())
    lost = caption_ledger.settle_all(lake, make(), "test")
    assert lost > 0 and "ended as GONE" in capsys.readouterr().out and lake.read("caption_calls").isEmpty()
    server.order(batch_forgets=False)
    caption.run(lake, make())
    assert lake.read("captions").select("image_id").distinct().count() == IMAGES
    assert caption_ledger.settle_all(lake, make(), "test") == lost + bill(lake)


@pytest.mark.proof
def test_what_there_was_no_room_for_and_what_expired_is_sent_in_the_next_rounds(
    lake: Lake, make: Make, server: GeminiServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(caption_send, "Limits", partial(caption_send.Limits, waits=()))  # a service that is full is not waited for
    server.order(batch_room=1, batch_polls=2, batch_end=["EXPIRED"], batch_done=0.5)
    caption.run(lake, make(rounds=2, rows=6))
    said = capsys.readouterr().out
    assert said.count("round 1: ") > 1 and "ended as EXPIRED" in said
    assert lake.read("captions").select("image_id").distinct().count() == IMAGES and set(server.counts()["by_image"].values()) == {1}


@pytest.mark.proof
def test_a_reply_that_stops_the_job_ends_it_when_the_others_are_landed(lake: Lake, make: Make, server: GeminiServer) -> None:
    server.order(queue=["", "finish_PUP_LIMITED_DISABLED"])
    with pytest.raises(Mistake, match=r"\(gemini-batch, .*\) stopped the job: usage_policy; the service has shut this project out"):
        caption.run(lake, make())
    assert lake.read("captions").select("image_id").distinct().count() == IMAGES - 1


def test_a_later_attempt_of_a_task_sends_what_the_earlier_one_could_not(
    make: Make, images: Path, server: GeminiServer, tmp_path: Path
) -> None:
    rows = []
    for path in sorted(images.rglob("*.png")):
        stat = path.stat()
        address = dict.fromkeys(addresses.COLUMNS) | {"uri": to_uri(str(path)), "offset": 0, "length": stat.st_size}
        address |= {"size": stat.st_size, "mtime_us": stat.st_mtime_ns // 1_000}
        rows.append(
            {"image_id": hashlib.sha256(path.read_bytes()).digest(), "addresses": [address], "tags": [], "alt_text": "", "known": None}
        )
    frame, tier = pd.DataFrame(rows), caption_rows.of_worker(make(), make().captions.tiers[0])
    wave = caption_intent.Wave(to_uri(str(tmp_path / "run/000001")), "run/000001")
    hidden = images / "part-0/00.png"
    hidden.rename(tmp_path / "away.png")
    first = pd.concat(list(caption_send.send(iter([frame]), tier, wave, caption_send.Limits(9))))
    (tmp_path / "away.png").rename(hidden)
    again = pd.concat(list(caption_send.send(iter([frame]), tier, wave, caption_send.Limits(9))))
    assert (first.requests.sum(), again.requests.sum()) == (IMAGES - 1, IMAGES) and len(again) == len(first) + 1
    names = caption_intent.names(Opener(), wave)
    assert len(names) == len(again)

    # the key is withdrawn while the jobs run: watching, collecting and sending each end with a row that says so
    server.order(batch_refuses=True)
    noted = pd.DataFrame(list(names.items()), columns=["name", "job"])
    polled = pd.concat(list(caption_collect.poll(iter([noted]), tier.captioner)))
    collected = pd.concat(list(caption_collect.collect(iter([noted]), tier.captioner, {}, wave, caption_budget.Price(1, 1))))
    assert [told.fault.tolist() for told in (polled, collected)] == [["get: key_refused: HTTP 403 PERMISSION_DENIED: " + NO]] * 2
    os.unlink(to_path(wave.made(next(iter(names)))))  # it may have been created: it is looked for
    refused = pd.concat(list(caption_send.send(iter([frame]), tier, wave, caption_send.Limits(9))))
    assert refused.stop.tolist() == ["list: key_refused: HTTP 403 PERMISSION_DENIED: " + NO] and refused.requests.sum() == 0


@pytest.mark.proof
def test_the_budget_holds_and_a_service_that_sends_workers_elsewhere_ends_the_stage(
    lake: Lake, make: Make, server: GeminiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    caption.run(lake, make(budget=0.000001))
    assert "12 images wait" in capsys.readouterr().out and server.counts()["others"] == 0
    server.order(upload_elsewhere=True, elsewhere=f"{server.url}/upload/v1/files")
    with pytest.raises(Mistake, match=r"\(gemini-batch, .*\) stopped the job: upload: redirected.*; redirects are not followed"):
        caption.run(lake, make())
    server.order(upload_elsewhere=False)
    caption.run(lake, make())
    assert lake.read("captions").select("image_id").distinct().count() == IMAGES

    # the budget is used up and the table is lost: what is journaled lands without a request
    lake.spark.sql(f"DELETE FROM {lake._name('captions')}")
    before = server.counts()["others"]
    caption.run(lake, make(budget=0.000001))
    assert f"{IMAGES} images from the journal, without a call" in capsys.readouterr().out
    assert lake.read("captions").select("image_id").distinct().count() == IMAGES and server.counts()["others"] == before
