"""The jobs of a wave of Batch mode: watched until the service has ended them, and what they answered is in the wave's journal.

Everything is asked from a worker, where the key is; the driver sleeps between. A restart goes on watching the jobs of waves that are not settled. A job
whose name is noted and that the service does not know any more (it drops old ones) counts at its worst. An intent without a noted job counts 0 when
the service lists none of its name: so a wave must be settled with the key that it was sent with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
from pyspark.sql import Row

from jobs.lake import Lake
from udfs import caption_collect, caption_intent
from udfs.caption_budget import Price, cost
from udfs.caption_intent import Wave
from udfs.gemini_batch import ENDED

MARGIN = 30.0  # seconds over a call's timeout until a job that a late attempt created is listed
Worker = Callable[[Any], Iterator[pd.DataFrame]]


class Unreachable(Exception):
    """The service does not tell of jobs that it has: its code and words."""


class Terms(NamedTuple):
    """As a wave's about.json keeps it: how to find, read and bill its jobs whatever the config says by then. It holds no secret."""

    captioner: Mapping[str, Any]
    price: Price
    purpose: str


def finish(lake: Lake, folder: str, told: Mapping[str, Any]) -> int:
    """(URI of a closed wave's journal, Terms as a dict) -> nano-dollars that its jobs may have cost beside what the journal says. Raises Unreachable;
    called again it goes on.
    """
    terms = Terms(told["captioner"], Price(*told["price"]), told["purpose"])
    wave = Wave(folder, terms.purpose)
    found = _watched(lake, wave, dict(terms.captioner))
    if not found:
        return 0
    work = partial(caption_collect.collect, captioner=dict(terms.captioner), stores=lake.opener.stores, wave=wave, price=terms.price)
    made = [(row["name"], row["job"]) for row in found if row["job"] is not None]
    got = _on_workers(lake, made, work, caption_collect.COLLECTED)
    replies, missing = sum(row["replies"] for row in got), sum(row["missing"] for row in got)
    print(f"caption: batch jobs: {replies} replies, {missing} requests that no job answered", flush=True)
    for row in got:
        if row["state"] != "SUCCEEDED":
            print(f"caption: batch job {row['name']} ended as {row['state']}; what it did not answer counts at its worst", flush=True)
    return sum(row["lost"] for row in got) + sum(
        row["others"] * _most(lake, wave, row["name"], terms.price) for row in found if row["others"]
    )


def _watched(lake: Lake, wave: Wave, captioner: Mapping[str, Any]) -> list[Row]:
    """-> the jobs of a closed wave (caption_collect.FOUND), when all have ended. An intent of which no job came is left out."""
    noted = caption_intent.names(lake.opener, wave)
    if not noted:
        return []
    closed, before = time.monotonic(), ""
    while True:
        began = time.monotonic()
        found = _on_workers(lake, list(noted.items()), partial(caption_collect.poll, captioner=captioner), caption_collect.FOUND)
        ended = sum(row["state"] in ENDED for row in found)
        states = ", ".join(sorted(row["state"].lower() for row in found)) if len(found) < 4 else f"{len(found) - ended} are at work"
        line = f"caption: {ended} of {len(noted)} batch jobs have ended ({states or 'none is listed'})"
        if line != before:
            print(f"{line}, {began - closed:.0f} s", flush=True)
            before = line
        sure = len(found) == len(noted) or began > closed + captioner["timeout_seconds"] + MARGIN
        if ended == len(found) and sure:
            return found
        time.sleep(captioner["batch"]["poll_seconds"])


def _most(lake: Lake, wave: Wave, name: str, price: Price) -> int:
    return sum(cost(price, one.most) for one in caption_intent.read(lake.opener, wave, name).values())


def _on_workers(lake: Lake, jobs: Sequence[tuple[str, str | None]], work: Worker, schema: str) -> list[Row]:
    """A row a job reaches the driver: a round has conf.captions.Batch.jobs at most. Raises Unreachable."""
    if not jobs:
        return []
    rows = lake.spark.createDataFrame(list(jobs), "name STRING, job STRING")
    told = rows.coalesce(1).mapInPandas(work, schema).collect()
    if (fault := next((row["fault"] for row in told if row["fault"] is not None), None)) is not None:
        raise Unreachable(fault)
    return told
