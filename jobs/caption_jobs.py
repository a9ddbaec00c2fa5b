"""The jobs of a wave of Batch mode: watched until the service has ended them, and what they answered is in the wave's journal.

Everything is asked from a worker, where the key is; the driver sleeps between. A restart goes on watching the jobs of waves that are not settled.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from pyspark.sql import DataFrame

from jobs.lake import Lake
from udfs import caption_batch
from udfs.caption_budget import Price, cost
from udfs.gemini_batch import ENDED
from udfs.reject import Reject

MARGIN = 30.0  # seconds over a call's timeout until a job that a late attempt created is listed


class Terms(NamedTuple):
    """As a wave's about.json keeps it: how to find, read and bill its jobs whatever the config says by then. It holds no secret."""

    captioner: Mapping[str, Any]
    price: Price
    purpose: str


def finish(lake: Lake, folder: str, told: Mapping[str, Any]) -> int:
    """(URI of a closed wave's journal, Terms as a dict) -> nano-dollars that jobs made twice may have cost: their answers are not read."""
    terms = Terms(told["captioner"], Price(*told["price"]), told["purpose"])
    wave, captioner = caption_batch.Wave(folder, terms.purpose), dict(terms.captioner)
    names = _intents(lake, wave)
    if not names:
        return 0
    began, before = time.monotonic(), ""
    while True:
        found = {row["name"]: row for row in _on_worker(lake, names, partial(caption_batch.poll, captioner=captioner), caption_batch.FOUND)}
        running = sum(row["state"] not in ENDED for row in found.values())
        lacking = len(names) - len(found)
        states = ", ".join(f"{row['state'].lower()}" for row in found.values()) if len(found) < 4 else f"{running} still at work"
        line = f"caption: {len(found) - running} of {len(names)} batch jobs have ended ({states or 'none is listed'})"
        if line != before:
            print(f"{line}, {time.monotonic() - began:.0f} s", flush=True)
            before = line
        if not running and (not lacking or time.monotonic() > began + captioner["timeout_seconds"] + MARGIN):
            break
        time.sleep(captioner["batch"]["poll_seconds"])
    work = partial(caption_batch.collect, captioner=captioner, stores=lake.opener.stores, wave=wave, price=terms.price)
    rows = [(row["name"], row["job"]) for row in found.values()]
    got = _gathered(lake, lake.spark.createDataFrame(rows, "name STRING, job STRING"), work, caption_batch.COLLECTED) if rows else []
    replies, missing = sum(row["replies"] for row in got), sum(row["missing"] for row in got)
    print(f"caption: batch jobs: {replies} replies, {missing} requests that no job answered", flush=True)
    return sum(row["others"] * _most(lake, wave, row["name"], terms.price) for row in found.values() if row["others"])


def _intents(lake: Lake, wave: caption_batch.Wave) -> list[str]:
    try:
        entries = list(lake.opener.entries(f"{wave.folder}.jobs"))
    except Reject as reject:
        if reject.code != "missing":
            raise
        return []
    names = [entry.uri.rpartition("/")[2] for entry in entries]
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def _most(lake: Lake, wave: caption_batch.Wave, name: str, price: Price) -> int:
    asked = caption_batch.read_intent(lake.opener, wave.intent(name))
    return sum(cost(price, one.most) for one in asked.values())


def _on_worker(lake: Lake, names: list[str], work: Any, schema: str) -> list[Any]:
    return _gathered(lake, lake.spark.createDataFrame([(name,) for name in names], "name STRING").coalesce(1), work, schema)


def _gathered(lake: Lake, rows: DataFrame, work: Any, schema: str) -> list[Any]:
    """A row a job reaches the driver: there are conf.captions.Batch.jobs at most."""
    return rows.mapInPandas(work, schema).collect()
