"""Paid captions in a real lake: the real SDK on Spark's workers against the fake Gemini on loopback; money, journal and resume."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pyspark.sql import functions as F

from conf.captions import Captioner, CompareCaptioners, Tier
from conf.section import Mistake
from conf.settings import Settings
from jobs import caption, caption_ledger, caption_paid, caption_plan, caption_rows, forget, ingest
from jobs.lake import Lake
from tests.jobs.conftest import MakeSettings, write_image
from tests.servers.gemini_server import GeminiServer
from tests.udfs.test_rate_limit import between, bucket, simulate
from udfs import caption_wave, caption_work
from udfs.caption_journal import Journal, Place
from udfs.caption_record import Terms
from udfs.rate_limit import Rate

MODEL = "gemini-3.8-flash"
IMAGES = 12
MakeLake = Callable[[Settings], Lake]


@pytest.fixture
def server() -> Iterator[GeminiServer]:
    with GeminiServer({}) as started:
        yield started


@pytest.fixture
def settings(images: Path, make_settings: MakeSettings, server: GeminiServer) -> Callable[..., Settings]:
    def make(budget: float = 5.0, rows: int = 40, **captioner: Any) -> Settings:
        # a variable that the workers' JVM has had from its start
        flash = {"engine": "gemini", "model": MODEL, "key": {"environment": "HOME"}, "base_url": server.url, "media_resolution": "low"}
        flash |= {"in_flight": 4, "max_output_tokens": 2048, "timeout_seconds": 5.0} | captioner
        told = {"budget_usd": budget, "captioners": {"flash": flash}, "tiers": [{"name": "all", "captioner": "flash"}]}
        return make_settings(captions=told, waves={"rows": rows, "task_rows": 20})

    return make


@pytest.fixture
def lake(settings: Callable[..., Settings], make_lake: MakeLake) -> Lake:
    lake = make_lake(settings())
    ingest.run(lake, settings())
    return lake


def nano(lake: Lake) -> int:
    summed = lake.read("caption_calls").agg(F.sum("nano_usd").alias("nano")).first()
    assert summed is not None
    return int(summed["nano"] or 0)


def test_every_image_is_bought_once_and_the_ledger_is_the_servers_bill(
    lake: Lake, settings: Callable[..., Settings], server: GeminiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    caption.run(lake, settings(), plan_only=True)
    told = capsys.readouterr().out
    assert f"tier all: {IMAGES} images by flash (gemini, {MODEL}, media_resolution low)" in told and "rule of thumb" in told
    assert "budget that must be left: " in told and "names no requests_per_minute" in told
    assert server.counts()["requests"] == 0
    capsys.readouterr()
    caption.run(lake, settings(rows=7))
    assert f"{IMAGES} images have captions of this run\n" in capsys.readouterr().out
    assert server.counts()["requests"] == server.counts()["answered"] == IMAGES
    kinds = {row["kind"]: row["n"] for row in lake.read("captions").groupBy("kind").agg(F.count_distinct("image_id").alias("n")).collect()}
    assert {kinds[kind] for kind in ("short", "medium", "long", "style", "tags")} == {IMAGES}
    assert lake.read("captions").where("tokens <= 0 AND kind != 'ocr' OR model != 'gemini-3.8-flash' OR prompt != 'studbook-1'").isEmpty()
    bill, calls = server.counts()["billed"], lake.read("caption_calls")
    assert calls.count() == IMAGES and calls.where("code != 'ok' OR estimated").isEmpty()
    tokens = calls.agg(*[F.sum(f"{name}_tokens").alias(name) for name in ("prompt", "image", "output", "thought")]).first()
    assert tokens is not None and (tokens["prompt"] + tokens["image"], tokens["output"] + tokens["thought"]) == (
        bill["prompt"] + bill["image"],
        bill["output"] + bill["thoughts"],
    )
    assert nano(lake) == pytest.approx(750 * (bill["prompt"] + bill["image"]) + 3_750 * (bill["output"] + bill["thoughts"]), abs=IMAGES)
    version = lake.version("captions")
    caption.run(lake, settings())
    assert server.counts()["requests"] == IMAGES and lake.version("captions") == version
    (first,) = lake.folders(lake.area("_captions"))
    assert lake.opener.exists(lake.area("_captions", first, "closed.json"))  # by the later run

    # an image is forgotten: nothing of what was bought for it is left but its cost
    (victim,) = lake.read("images").orderBy("image_id").limit(1).collect()
    spent = caption_ledger.settle_all(lake, settings(), "test")
    forget.run(lake, settings(), images=[bytes(victim["image_id"]).hex()])
    parts = [path for path in Path(settings().lake.root).rglob("*.jsonl") if "_captions" in path.parts]
    assert len(list(Path(settings().lake.root).rglob("*.calls"))) == 1  # of two waves' the one that does not hold it
    assert parts and not any(bytes(victim["image_id"]).hex() in path.read_text() for path in parts)
    assert caption_ledger.settle_all(lake, settings(), "test") == spent > 0
    copies = list(Path(settings().lake.root).rglob("*.calls"))
    assert len(copies) == 2 and lake.spark.read.parquet(*map(str, copies)).count() == IMAGES - 1  # the other is made anew
    assert caption_wave.read_wave(lake.opener, caption_ledger.folder(lake, parts[0].parts[-4], 0)).strange == ()

    # the tables are lost; the journal is asked before the service
    lake.spark.sql(f"DELETE FROM {lake._name('captions')}")
    caption.run(lake, settings())
    assert server.counts()["requests"] == IMAGES
    assert lake.read("captions").select("image_id").distinct().count() == IMAGES - 1


@pytest.mark.proof
def test_what_is_expected_from_a_pilot_is_what_the_ledger_counts_within_2_percent(
    lake: Lake, images: Path, settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(100, 118):
        write_image(images / f"{number}.png", number)
    ingest.run(lake, settings())
    caption.run(lake, settings())
    for number in range(118, 178):
        write_image(images / f"{number}.png", number)
    ingest.run(lake, settings())
    capsys.readouterr()
    caption.run(lake, settings(), plan_only=True)
    plan = capsys.readouterr().out
    assert "an image: 1.00 calls" in plan and "(the ledger's 30 images)" in plan
    expected = re.search(r"expected in all ([\d.]+) USD; budget_usd 5.0, of which ([\d.]+) USD are spent", plan)
    assert expected is not None and float(expected[2]) == pytest.approx(nano(lake) / 1e9, abs=1e-4)
    before = nano(lake)
    caption.run(lake, settings())
    assert float(expected[1]) == pytest.approx((nano(lake) - before) / 1e9, rel=0.02) and "for 60 images" in capsys.readouterr().out


def test_a_budget_is_never_passed_and_what_is_left_waits(
    lake: Lake, settings: Callable[..., Settings], server: GeminiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    caption.run(lake, settings(budget=0.0))
    assert server.counts()["requests"] == 0 and f"{IMAGES} images wait: 0.0000 USD of the budget are left" in capsys.readouterr().out
    cap = 1.5
    caption.run(lake, settings(budget=cap))
    asked, said = server.counts()["requests"], capsys.readouterr().out
    assert 0 < asked <= IMAGES and nano(lake) <= cap * 1e9
    assert lake.read("captions").select("image_id").distinct().count() == asked
    assert asked == IMAGES or "images wait" in said
    assert re.search(r"tier all: \d images at once, where 12 may be", said)
    assert lake.read("rejects").where("stage = 'caption'").isEmpty()

    # the tables are lost and nothing is left of the budget: what was bought lands again
    told = ("hex(image_id)", "kind", "part", "text", "tokens", "request")
    before = sorted(tuple(row) for row in lake.read("captions").selectExpr(*told).collect())
    lake.spark.sql(f"DELETE FROM {lake._name('captions')}")
    caption.run(lake, settings(budget=0.0, rows=5))
    said = capsys.readouterr().out
    assert sorted(tuple(row) for row in lake.read("captions").selectExpr(*told).collect()) == before != []
    assert server.counts()["requests"] == asked and f"{asked} images from the journal, without a call" in said
    assert ("images wait" in said) == (asked < IMAGES)


def test_what_is_forbidden_is_an_id_and_a_code_and_nobody_else_is_asked(
    lake: Lake, settings: Callable[..., Settings], server: GeminiServer
) -> None:
    server.order(always="block_PROHIBITED_CONTENT")
    told = settings()
    flash = told.captions.captioners["flash"]
    captioners = {"flash": flash, "first": flash.model_copy(update={"max_output_tokens": 1024})}
    compared = {"captions": told.captions.model_copy(update={"captioners": captioners})}
    compared |= {"compare_captioners": CompareCaptioners(captioners=("first",), images=IMAGES)}
    caption.run(lake, told.model_copy(update=compared))  # `first` is asked about every image, and `flash` then about none
    asked = server.counts()["requests"]
    assert asked == IMAGES
    rows = lake.read("rejects").where("stage = 'caption'").collect()
    assert {(row["code"], row["detail"], row["permanent"]) for row in rows} == {("prohibited", "", True)} and len(rows) == IMAGES
    server.order(always="")
    caption.run(lake, settings())
    assert server.counts()["requests"] == asked and lake.read("captions").isEmpty()


def test_a_key_that_is_refused_stops_the_job_and_says_why(lake: Lake, settings: Callable[..., Settings], server: GeminiServer) -> None:
    server.order(always="400_key")
    with pytest.raises(
        Mistake, match=r"captioner flash \(gemini, gemini-3.8-flash\) stopped the job: key_refused: .*; check the key in HOME"
    ):
        caption.run(lake, settings())
    assert server.counts()["requests"] <= 2 * 4  # what was in flight in two tasks
    server.order(always="")
    caption.run(lake, settings())
    assert lake.read("captions").select("image_id").distinct().count() == IMAGES


def test_a_model_without_a_price_or_a_key_that_is_not_set_stops_the_job(
    lake: Lake, settings: Callable[..., Settings], server: GeminiServer
) -> None:
    told = settings().captions
    captioners = told.captioners | {"dear": told.captioners["flash"].model_copy(update={"model": "gemini-9"})}
    later = told.model_copy(update={"captioners": captioners, "tiers": (*told.tiers, Tier(name="later", captioner="dear"))})
    with pytest.raises(Mistake, match="tier later: no price of 'gemini-9', its captioner dear's model"):
        caption.run(lake, settings().model_copy(update={"captions": later}))
    assert server.counts()["requests"] == 0  # nor of the tier before it
    with pytest.raises(Mistake, match="the environment variable NO_SUCH_KEY is not set"):
        caption.run(lake, settings(key={"environment": "NO_SUCH_KEY"}))


def test_without_a_limit_in_the_config_the_pace_gives_way_to_a_server_that_has_one() -> None:
    one = Captioner(engine="openai", model="m", base_url="http://127.0.0.1:1", in_flight=64)
    log = simulate(Rate(caption_paid.pace(one, 2)), bucket(lambda now: 20), 300, in_flight=64)
    accepted, refused = between(log, 100, 300)
    assert accepted >= 0.95 * 20 and refused <= 0.01
    assert caption_paid.pace(one.model_copy(update={"requests_per_minute": 600}), 2) == 5


def test_a_start_that_was_killed_before_its_first_answer_hinders_no_later_one(
    settings: Callable[..., Settings], make_lake: MakeLake
) -> None:
    lake = make_lake(settings())
    about = {"tier": "all", "fingerprint": "f", "engine": "gemini", "model": MODEL}
    caption_ledger.begin(lake, caption_ledger.Wave("20260101T000000-00000000", 0, about))
    assert caption_ledger.known(lake) is None
    assert caption_ledger.settle_all(lake, settings(), "test") == 0


def test_what_a_driver_that_was_killed_after_settling_left_is_put_right(settings: Callable[..., Settings], make_lake: MakeLake) -> None:
    lake, about = make_lake(settings()), {"tier": "all", "fingerprint": "f", "engine": "gemini-batch", "model": MODEL}
    place = caption_ledger.begin(lake, caption_ledger.Wave("20260101T000000-00000000", 0, about, {}))
    lake.opener.write(f"{place}.jobs/studbook-1.json", b'{"k": ["aa", false, {}]}')
    assert caption_ledger.holding(lake, frozenset({"aa"})) == [f"{place}.jobs/studbook-1.json"]
    lake.opener.write(f"{place}.settled.json", b'{"nano_usd": 7, "calls": 0}')
    assert caption_ledger.settle_all(lake, settings(), "test") == 7
    assert caption_ledger.holding(lake, frozenset({"aa"})) == []


def test_a_huge_alt_text_is_reckoned_with_as_it_is_sent(settings: Callable[..., Settings], make_lake: MakeLake) -> None:
    rows = [(["é" * 10] * 100, "x" * 100), (["a", "b" * 1000], "x" * 1_000_000), ([], "")]
    told = caption_plan.notes(make_lake(settings()).spark.createDataFrame(rows, "tags ARRAY<STRING>, alt_text STRING"))
    sent = [60 * 20 + 100, 1 + 4 * 80 + 4 * 1_000, 0]  # 60 tags of 80 characters and 1,000 of alt text, of 4 bytes at most
    assert told == (sum(sent) / 3, max(sent))


def test_a_driver_that_was_taken_for_dead_begins_waves_that_ask_nothing(settings: Callable[..., Settings], make_lake: MakeLake) -> None:
    lake, about = make_lake(settings()), {"tier": "all", "fingerprint": "f", "engine": "gemini", "model": MODEL}
    caption_ledger.begin(lake, caption_ledger.Wave("an-earlier-run", 0, about))
    caption_ledger.close_others(lake, "ours", "taken-over-before-its-first-wave")
    for run, why in {"an-earlier-run": "its run is closed", "taken-over-before-its-first-wave": "its run is closed", "ours": None}.items():
        late = Journal(lake.opener, Place(caption_ledger.begin(lake, caption_ledger.Wave(run, 7, about)), 0, 0), Terms(100, 1, 1, 1, 60.0))
        late.open()
        assert late.fenced() == why


def test_a_gemini_elsewhere_is_another_captioner_and_its_answers_buy_nothing(make_settings: MakeSettings) -> None:
    flash = {"engine": "gemini", "model": MODEL, "key": {"environment": "HOME"}}

    def told(**where: str) -> tuple[str, str]:
        tiers = [{"name": "all", "captioner": "flash"}]
        settings = make_settings(captions={"captioners": {"flash": flash | where}, "tiers": tiers})
        tier = settings.captions.tiers[0]
        request = caption_work.work(caption_rows.of_worker(settings, tier)).render({"image_id": b"", "tags": [], "alt_text": ""})
        return caption_rows.fingerprint(settings, tier), request.key

    own, fake = told(), told(base_url="http://127.0.0.1:8765")
    assert own[0] != fake[0] and own[1] != fake[1] and told() == own
    for wrong in ({"base_url": "127.0.0.1:8765"}, {"base_url": "https://someone:secret@host"}, {"model": "a b"}):
        with pytest.raises(ValidationError, match=r"base_url: expected|model: given") as refused:
            told(**wrong)
        assert "secret" not in refused.value.errors()[0]["msg"]  # what a start says of it
