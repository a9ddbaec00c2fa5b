"""The journals of paid waves -> what is spent of the budget, the table caption_calls, and the calls that need not be made again.

    _captions/RUN/000003/...              the wave's journal (udfs/caption_journal.py)
    _captions/RUN/000003.about.json       tier, fingerprint, engine and model of the wave, before it begins; of Batch mode also how to find its jobs
    _captions/RUN/000003.jobs/...         of Batch mode: what each job asks (udfs/caption_intent.py), until it is settled
    _captions/RUN/000003.calls/...        a copy of a settled wave's journal in few files, for `known`: parts are many; `forget` drops it
    _captions/RUN/000003.settled.json     what it counts as, once no attempt of it can ask any more

The rule of the cap and its proof stand in udfs/caption_budget.py.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from typing import Any, NamedTuple, cast

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.settings import Settings
from jobs import caption_calls, caption_jobs, caption_stop
from jobs.lake import Lake, hadoop
from jobs.lease import landing
from udfs import caption_budget, caption_journal, caption_wave
from udfs.reject import Reject

AREA = "_captions"
IN_ONE, WHOLE = ".calls", "_SUCCESS"  # the copy, and what Spark writes into it when it is whole
A_FILE = 50_000  # calls of a file of it, about
MARGIN = 0.5  # of a lease: by so much the clocks of driver and workers may differ over it
LOOKS = 30  # at attempts that have not ended, in a lease
TELL = 10.0  # seconds between lines that say so
_ABOUT = re.compile(r"(\d{6})\.about\.json")


class Wave(NamedTuple):
    """One paid wave. about: tier, fingerprint, engine, model; batch: of Batch mode jobs.caption_jobs.Terms as a dict."""

    run: str
    number: int
    about: dict[str, str]
    batch: dict[str, Any] | None = None


def folder(lake: Lake, run: str, number: int) -> str:
    """URI of a wave's journal."""
    return lake.area(AREA, run, f"{number:06d}")


def begin(lake: Lake, wave: Wave) -> str:
    """Notes what a wave is, before its first call -> URI of its journal."""
    lake.opener.write(f"{folder(lake, wave.run, wave.number)}.about.json", json.dumps({"about": wave.about, "batch": wave.batch}).encode())
    return folder(lake, wave.run, wave.number)


def close_others(lake: Lake, run: str, taken_over: str | None) -> None:
    """No wave of another run asks any more, also none that its driver, taken for dead, begins later. Before anything is settled. run: ours;
    taken_over: the run of that driver, which may have begun no wave yet.
    """
    runs = {taken_over, *lake.folders(lake.area(AREA))} - {None, run}
    for other in (lake.area(AREA, str(name)) for name in sorted(runs, key=str)):
        if not lake.opener.exists(f"{other}/{caption_journal.CLOSED}"):
            caption_journal.close(lake.opener, other)


def settle_all(lake: Lake, settings: Settings, run: str) -> int:
    """Settles every wave that is not settled -> nano-dollars that all waves count as. run: that of the stage, which holds its lease. Also finishes
    what a driver that was killed after settling left undone.
    """
    total = 0
    waves = _waves(lake)
    for wave, settled in zip(waves, _settled_of(lake, waves), strict=True):
        if settled is None:
            total += settle(lake, settings, run, wave)
        else:
            total += int(settled["nano_usd"])
            _tidy(lake, wave, settled)
    return total


def told_spent(lake: Lake) -> str:
    """-> what is spent of the budget, in words; what a wave that is not settled has cost is not known yet."""
    settled = _settled_of(lake, _waves(lake))
    nano = sum(int(one["nano_usd"]) for one in settled if one is not None)
    open_ = sum(one is None for one in settled)
    return f"{nano / caption_budget.NANO:.4f} USD are spent" + (f" ({open_} waves are not settled)" if open_ else "")


def _settled(lake: Lake, wave: Wave) -> dict[str, Any] | None:
    """What a settled wave counts as, its calls, where its journal lies, and whether a copy in one piece does; None: it is not settled."""
    place = folder(lake, wave.run, wave.number)
    try:
        told = json.loads(lake.opener.read(f"{place}.settled.json"))
        return told | {"journal": place, "in_one": lake.opener.exists(f"{place}{IN_ONE}/{WHOLE}")}
    except Reject as reject:
        if reject.code != "missing":
            raise
        return None


def _settled_of(lake: Lake, waves: Sequence[Wave]) -> list[dict[str, Any] | None]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(partial(_settled, lake), waves))


def holding(lake: Lake, images: frozenset[str]) -> list[str]:
    """Images (hex) -> URIs of what the journals hold of one of them: parts with answers, and intents of jobs that are not settled."""
    files = list(_files(lake))
    with ThreadPoolExecutor(8) as pool:
        held = pool.map(lambda uri: caption_wave.holds(lake.opener, uri, images), files)
        return [uri for uri, mine in zip(files, held, strict=True) if mine]


def blot(lake: Lake, held: list[str], images: frozenset[str]) -> None:
    """URIs of `holding` -> the journal without its records of the images; what they have cost stays."""
    for place in {uri.rpartition("/")[0].rpartition("/")[0] for uri in held if uri.endswith(caption_wave.ANSWERS)}:
        lake.opener.delete(f"{place}{IN_ONE}/{WHOLE}")  # first: what a killed deletion leaves is no copy
        lake.opener.delete(f"{place}{IN_ONE}")
    for uri in held:
        caption_wave.blot(lake.opener, uri, images)


def known(lake: Lake, since: tuple[str, int] | None = None) -> DataFrame | None:
    """-> (image_id, known: JSON of every call for it in settled waves); None before the first one. since: (run, number) for the later waves of a run."""
    asked = [wave for wave in _waves(lake) if since is None or (wave.run == since[0] and wave.number > since[1])]
    waves = [one for one in _settled_of(lake, asked) if one is not None and one["calls"]]
    parts = [hadoop(one["journal"]) for one in waves if not one["in_one"]]
    copies = [hadoop(one["journal"] + IN_ONE) for one in waves if one["in_one"]]
    read = [caption_calls.records(lake, parts)] if parts else []  # Spark refuses to read none
    read += [lake.spark.read.parquet(*copies)] if copies else []
    if not read:
        return None
    rows = reduce(DataFrame.unionByName, read)
    one = F.struct(*[field for field in rows.columns if field != "part"])
    told = rows.groupBy("image_id").agg(F.to_json(F.collect_list(one)).alias("known"))
    return told.select(F.unhex("image_id").alias("image_id"), "known")


def summed(lake: Lake) -> DataFrame:
    """-> what the ledger says, a row a tier, captioner and code: images, calls, tokens, usd."""
    tokens = {"input_tokens": ("prompt_tokens", "image_tokens"), "output_tokens": ("output_tokens", "thought_tokens")}
    sums = [F.sum(F.coalesce(one, F.lit(0)) + F.coalesce(other, F.lit(0))).alias(name) for name, (one, other) in tokens.items()]
    counts = [F.count_distinct("image_id").alias("images"), F.count("*").alias("calls")]
    usd = (F.sum("nano_usd") / F.lit(caption_budget.NANO)).alias("usd")
    by = ("tier", "engine", "model", "code")
    return lake.read("caption_calls").groupBy(*by).agg(*counts, *sums, usd).orderBy(*by)


def _files(lake: Lake) -> Iterator[str]:
    """-> URIs of the files that name images: in the journals, and of jobs."""
    for wave in _waves(lake):
        place = folder(lake, wave.run, wave.number)
        for partition in lake.folders(place):
            yield from (entry.uri for entry in lake.opener.entries(f"{place}/{partition}") if entry.uri.endswith(caption_wave.ANSWERS))
        if wave.batch is not None:
            yield from _intents(lake, place)


def _intents(lake: Lake, place: str) -> list[str]:
    try:
        return [entry.uri for entry in lake.opener.entries(f"{place}.jobs") if entry.uri.endswith(".json")]
    except Reject as reject:
        if reject.code != "missing":
            raise
        return []


def _waves(lake: Lake) -> list[Wave]:
    found = []
    for run in lake.folders(lake.area(AREA)):
        for entry in lake.opener.entries(lake.area(AREA, run)):
            if matched := _ABOUT.fullmatch(entry.uri.rpartition("/")[2]):
                found.append(Wave(run, int(matched[1]), **json.loads(lake.opener.read(entry.uri))))
    return sorted(found, key=lambda wave: (wave.run, wave.number))


def settle(lake: Lake, settings: Settings, run: str, wave: Wave) -> int:
    """Closes a wave, waits until its attempts can ask no more, and lands its calls -> nano-dollars that it counts as. Raises Mistake where the service
    does not tell of the wave's jobs.
    """
    place = folder(lake, wave.run, wave.number)
    caption_journal.close(lake.opener, place)
    try:
        lost = 0 if wave.batch is None else caption_jobs.finish(lake, place, wave.batch)
    except caption_jobs.Unreachable as why:
        raise caption_stop.unsettled(wave.about["tier"], cast(dict[str, Any], wave.batch)["captioner"], str(why)) from None
    lease = settings.captions.lease_seconds
    watch = caption_budget.Watch(MARGIN * lease)
    first = tell = time.monotonic()
    while True:
        began = time.monotonic()
        seen = caption_wave.read_wave(lake.opener, place)
        over = watch.over(began, time.monotonic(), seen.attempts)
        if over >= seen.attempts.keys():
            break
        if began >= tell:
            tell = began + TELL
            print(
                f"caption: {len(seen.attempts.keys() - over)} tasks that were killed may still ask: waiting about {(1 + MARGIN) * lease:.0f} s "
                f"(1.5 x captions.lease_seconds), {began - first:.0f} s so far",
                flush=True,
            )
        time.sleep(lease / LOOKS)
    nano = lost + sum(caption_budget.settle(one, True) for one in seen.attempts.values())
    for strange in seen.strange:
        if strange.harm:
            print(f"caption: {strange.uri}: {strange.why}; its attempt counts as its whole share", flush=True)
    calls, answered = (sum(getattr(one, name) for one in seen.attempts.values()) for name in ("calls", "spent"))
    if nano > answered:
        usd = f"{(nano - answered) / caption_budget.NANO:.4f} USD"
        print(
            f"caption: wave {wave.number} of {wave.run}: {usd} count as spent for calls whose answers are lost, at their worst", flush=True
        )
    if calls:
        with landing(lake, run, settings.waves.lease_seconds):
            lake.append(
                "caption_calls", caption_calls.rows(lake, wave.about, wave.run, wave.number, place), f"captions/{wave.run}", wave.number
            )
    settled = {"nano_usd": nano, "calls": calls}
    lake.opener.write(f"{place}.settled.json", json.dumps(settled).encode())
    _tidy(lake, wave, settled | {"in_one": False})
    return nano


def _tidy(lake: Lake, wave: Wave, settled: dict[str, Any]) -> None:
    """What follows after a wave is settled: its journal in one piece, and its jobs' intents go."""
    place = folder(lake, wave.run, wave.number)
    if settled["calls"] and not settled["in_one"]:
        lake.stage(caption_calls.records(lake, [hadoop(place)]).coalesce(1 + settled["calls"] // A_FILE), f"{place}{IN_ONE}")
    if wave.batch is not None:
        lake.opener.delete(f"{place}.jobs")
