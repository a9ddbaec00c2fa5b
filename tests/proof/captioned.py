"""A lake whose images are captioned against the fake Gemini while things are killed: its images and config, what journal and server say, the verdict.

For the proof and for the gate. A question is one key of the journal as the server sees it: an image, and whether it is the first request for it or
the repair. Without tags and alt text the words of all first requests are the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image
from pyspark.sql import functions as F

from conf.settings import Settings, load_prices
from jobs import caption_paid, caption_rows
from jobs.lake import Lake
from tests.cluster.conftest import ROOT
from tests.servers.gemini_server import GeminiServer
from udfs import caption_answer, caption_budget, caption_image, caption_request, caption_wave
from udfs.caption_call import RETRY, STOP
from udfs.caption_record import Record

MODEL = "gemini-3.8-flash"
# what is tried again; and what is paid for and asked once more to be mended
RETRIED = ("500", "503", "502_html", "drop_reset", "drop_after_work", "cut_body", "cut_json", "no_candidates", "hang")
MENDED = ("caption_wrong_schema", "caption_cut", "finish_MAX_TOKENS")
TIMEOUT = 2.0  # seconds of a call
IN_FLIGHT = 16  # calls of a task
UNSETTLED = IN_FLIGHT + 2 * caption_paid.FLUSH  # calls that a killed task may have begun without a durable record
LOCAL = {"master": "local[2,4]", "jars": str(ROOT / ".cache/jars"), "conf": {"spark.driver.memory": "1g"}}
Questions = Counter[str]


def write_images(tar: Path, count: int, begin: int = 0) -> None:
    """PNGs of 24 x 16, no two alike, a member each."""
    tar.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tar, "w") as archive:
        for number in range(begin, begin + count):
            pixels = np.random.default_rng(number).integers(0, 256, (4, 6, 3), dtype=np.uint8)
            out = io.BytesIO()
            Image.fromarray(pixels).resize((24, 16), Image.Resampling.BICUBIC).save(out, "PNG", compress_level=1)
            member = tarfile.TarInfo(f"{number:06d}.png")
            member.size = out.tell()
            archive.addfile(member, io.BytesIO(out.getvalue()))


def write_config(
    folder: Path, server: str, spark: Mapping[str, Any], rows: int, budget: float, attempts: int = 3, **captioner: Any
) -> Path:
    """The demo's config, for one source of tars and one paid tier. rows: of a wave, at most; attempts: after which a reject is permanent."""
    told: dict[str, Any] = yaml.safe_load((ROOT / "conf/demo.yaml").read_text())
    told |= {"lake": {"root": str(folder / "lake")}, "spark": dict(spark), "encoder": "colour-grid"}
    told["waves"] = {"rows": rows, "task_rows": rows // 2, "attempts": attempts}
    told["ingest"] = {"sources": [{"name": "tars", "kind": "tar", "uri": str(folder / "images")}]}
    told["embed"] = {"encoders": ["colour-grid"], "device": "cpu"}
    told["select"]["rules"] = []
    told["classify"] = []
    flash = {"engine": "gemini", "model": MODEL, "key": {"environment": "HOME"}, "base_url": server, "media_resolution": "low"}
    flash |= {"in_flight": IN_FLIGHT, "max_output_tokens": 2048, "timeout_seconds": TIMEOUT} | captioner
    told["captions"] = {"budget_usd": budget, "lease_seconds": 3, "captioners": {"flash": flash}}
    told["captions"]["tiers"] = [{"name": "all", "captioner": "flash"}]
    (config := folder / "config.yaml").write_text(yaml.safe_dump(told))
    return config


def start(config: Path, log: Path) -> subprocess.Popen[bytes]:
    """The stage's real command; its driver (JVM and Python) leads a process group of its own, workers have another."""
    with log.open("wb") as out:
        line = [sys.executable, "-m", "jobs.caption", "--config", str(config)]
        return subprocess.Popen(line, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


class Kill(NamedTuple):
    """What was so when something had been killed. durable: questions with an answer in the journal; asked: what the server had been asked; tasks:
    so many it may have ended.
    """

    what: str
    durable: frozenset[str]
    asked: Questions
    tasks: int


class Books:
    """Journal and server of one lake."""

    def __init__(self, lake: Lake, settings: Settings, server: GeminiServer) -> None:
        self.lake, self.settings, self.server = lake, settings, server
        (self._tier,) = settings.captions.tiers
        worker = caption_rows.of_worker(settings, self._tier)
        schema = caption_answer.schema(worker.parts)
        first = caption_request.render(b"", worker.prompt, schema, worker.options)
        self._first = hashlib.sha256(f"{first.system}\n{first.prompt}".encode()).hexdigest()
        places = {bytes(row["image_id"]).hex(): [row.asDict()] for row in lake.read("sources").collect()}
        side = worker.captioner["max_side"]

        def digest(image_id: str) -> str:
            sent, _ = caption_image.render(places[image_id], bytes.fromhex(image_id), lake.opener, worker.limits, side)
            return hashlib.sha256(sent).hexdigest()

        with ThreadPoolExecutor(2) as pool:
            self.digests = dict(zip(places, pool.map(digest, places), strict=True))
        assert len(set(self.digests.values())) == len(places)
        self.kills: list[Kill] = []

    def waves(self) -> list[str]:
        """URIs of their journals."""
        area = self.lake.area("_captions")
        return [f"{area}/{run}/{wave}" for run in self.lake.folders(area) for wave in self.lake.folders(f"{area}/{run}")]

    def records(self) -> list[Record]:
        """Every call in the journal."""
        return [record for wave in self.waves() for _, record in caption_wave.read_records(self.lake.opener, wave, [])]

    def question(self, record: Record) -> str:
        return f"{self.digests[record.image_id]} {'repair' if record.repair else 'first'}"

    def asked(self, counts: Mapping[str, Any] | None = None) -> Questions:
        """What the server was asked."""
        told: Questions = Counter()
        for pair, times in (counts or self.server.counts())["by_question"].items():
            digest, words = pair.split()
            told[f"{digest} {'first' if words == self._first else 'repair'}"] += times
        return told

    def requests(self) -> int:
        return int(self.server.counts()["requests"])

    def note(self, what: str, tasks: int) -> None:
        """Of a kill, right after it. The journal is read first: what it holds is not asked from then on."""
        durable = frozenset(self.question(one) for one in self.records() if one.outcome not in (RETRY, STOP))
        self.kills.append(Kill(what, durable, self.asked(), tasks))

    def settled(self) -> int:
        """Nano-dollars that the settled waves count as."""
        area = Path(self.settings.lake.root) / "_captions"
        return sum(json.loads(path.read_text())["nano_usd"] for path in area.glob("*/*.settled.json"))

    def billed(self, counts: Mapping[str, Any]) -> int:
        """Nano-dollars of the tokens that the server charges, each call's part of one rounded off."""
        price = caption_budget.price(load_prices(self.settings.captions.prices).models[MODEL].model_dump(include={"input", "output"}))
        bill = counts["billed"]
        return (
            (bill["prompt"] + bill["image"]) * price.input + (bill["output"] + bill["thoughts"]) * price.output
        ) // caption_budget.MILLION


def judge(books: Books) -> dict[str, Any]:
    """The issue's promises, each from the server's own count, the journal and the tables -> the figures."""
    lake, counts, records = books.lake, books.server.counts(), books.records()
    asked, journaled = books.asked(counts), Counter(books.question(one) for one in records)
    good = [one for one in records if one.outcome not in (RETRY, STOP)]
    # every image is terminal, by name
    images = {bytes(row["image_id"]).hex() for row in lake.read("images").select("image_id").collect()}
    captioned = {bytes(row["image_id"]).hex() for row in lake.read("captions").select("image_id").distinct().collect()}
    refused = lake.read("rejects").where("stage = 'caption'").select("input_key", "code", "permanent").collect()
    assert captioned | {row["input_key"] for row in refused} == images == set(books.digests)
    assert all(row["code"] for row in refused)
    doubled = lake.read("captions").groupBy("image_id", "kind", "part").count().where("count > 1")
    assert doubled.isEmpty()
    # money
    ledger = lake.read("caption_calls")
    summed = ledger.agg(F.count("*").alias("calls"), F.sum("nano_usd").alias("nano")).first()
    assert summed is not None
    cap, bill, settled = caption_budget.nano(books.settings.captions.budget_usd), books.billed(counts), books.settled()
    assert bill <= settled <= cap and summed["nano"] <= settled, (bill, summed["nano"], settled, cap)
    # asked again
    room = UNSETTLED * sum(kill.tasks for kill in books.kills)
    bought_again = sum(asked[one] - kill.asked[one] for kill in books.kills for one in kill.durable)
    lost = {one: asked[one] - journaled[one] for one in asked if asked[one] != journaled[one]}
    assert journaled.keys() <= asked.keys() and all(times > 0 for times in lost.values()), "the journal has calls that nobody was asked"
    twice = sum(times - 1 for times in Counter(books.question(one) for one in good).values())
    assert bought_again == 0, f"{bought_again} answers that were in the journal were asked again"
    assert sum(lost.values()) + twice <= room, (sum(lost.values()), twice, room)
    # calls
    injected = sum(times for mode, times in counts["modes"].items() if mode in RETRIED)
    mended = sum(times for mode, times in counts["modes"].items() if mode in MENDED)
    answers, repairs = (len({one.key for one in good if one.repair is repair}) for repair in (False, True))
    assert counts["requests"] == sum(asked.values()) <= answers + injected + repairs + room
    assert len(records) == summed["calls"] <= counts["requests"] <= summed["calls"] + room
    worst = caption_paid.bill(books.settings, books._tier, 0).worst
    assert bill <= summed["nano"] + sum(lost.values()) * worst
    attempts = [one for wave in books.waves() for one in caption_wave.read_wave(lake.opener, wave).attempts.values()]
    return {
        "images": len(images),
        "captioned": len(captioned),
        "refused": dict(Counter(f"{row['code']}{'' if row['permanent'] else ' (transient)'}" for row in refused)),
        "kills": dict(Counter(kill.what for kill in books.kills)),
        "waves": len(books.waves()),
        "attempts that did not end": sum(not one.ended for one in attempts),
        "requests": counts["requests"],
        "answers": answers,
        "injected and tried again": injected,
        "injected and mended": mended,
        "repairs": repairs,
        "ledger": summed["calls"],
        "lost": sum(lost.values()),
        "at most": room,
        "journaled answers asked again": bought_again,
        "two answers of one question": twice,
        "USD billed, in the ledger, settled, cap": [round(nano / 1e9, 4) for nano in (bill, summed["nano"], settled, cap)],
    }
