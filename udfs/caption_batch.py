"""Captioning by Batch mode on workers: rows -> jobs at the service; jobs that ended -> the journal; the journal -> staged rows.

    RUN/000003.jobs/NAME.json     the intent of a job: what it asks, durable before it is created
    RUN/000003/PARTITION/...      what it answered (udfs/caption_journal.py); PARTITION is a number made of its name

A worker creates a job only when it sees, after its intent is durable, that the wave is open: a driver that marks the wave closed, and lists jobs
once a call's timeout has passed, knows all that there will ever be.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import pandas as pd

from udfs import caption_budget, caption_journal, caption_record, caption_row, caption_work, token_count
from udfs.ahead import ahead
from udfs.caption_asking import settled
from udfs.caption_budget import Price
from udfs.caption_call import RETRY, Reply, Usage
from udfs.caption_journal import Journal, Place
from udfs.caption_record import Record, Terms
from udfs.caption_request import Request
from udfs.caption_row import Row, Work
from udfs.gemini_batch import BatchFault, GeminiBatch, write_parts
from udfs.opener import Opener
from udfs.reject import Reject

SUBMITTED = "name STRING, requests INT, stop STRING"
FOUND = "name STRING, job STRING, state STRING, others INT"
COLLECTED = "name STRING, replies INT, missing INT"
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before a call about files or jobs is tried again
T = TypeVar("T")


class Asked(NamedTuple):
    """image_id: hex; repair: it is a second request; most: tokens that it can be billed for."""

    image_id: str
    repair: bool
    most: Usage


class Wave(NamedTuple):
    """folder: URI of its journal; purpose: what makes its jobs its own."""

    folder: str
    purpose: str

    def intent(self, name: str) -> str:
        return f"{self.folder}.jobs/{name}.json"


def submit(frames: Iterator[pd.DataFrame], tier: caption_work.Tier, wave: Wave) -> Iterator[pd.DataFrame]:
    """Frames of (image_id, addresses, tags, alt_text, known) -> SUBMITTED, a row a job. `stop`: why no request of the tier can succeed.

    A row whose image is none is left out: `landed` says why. Raises BatchFault when the service fails for as long as WAITS, and Reject.
    """
    opener, how, lines = Opener(tier.stores), tier.captioner["batch"], _Lines(tier)

    def note(name: str, most: Mapping[str, Usage]) -> None:
        told = {key: [*lines.asked[key], usage._asdict()] for key, usage in most.items()}
        opener.write(wave.intent(name), json.dumps(told).encode())
        for folder in (wave.folder, wave.folder.rpartition("/")[0]):
            if opener.exists(f"{folder}/{caption_journal.CLOSED}"):
                raise RuntimeError(f"{folder} is closed: this attempt is a late one")

    with _client(tier.captioner) as (run, client), tempfile.TemporaryDirectory() as folder:
        options, size = caption_work.gemini_options(tier.captioner), how["megabytes"] << 20
        for part in write_parts(lines.of(frames), options, Path(folder), how["rows"], size, wave.purpose):
            stop = None
            try:
                run(patiently(client.submit, part, partial(note, most=part.most)))
            except BatchFault as fault:
                if fault.reply.outcome == RETRY:
                    raise
                stop = str(fault)
            yield pd.DataFrame([{"name": part.name, "requests": len(part.most), "stop": stop}])
            part.path.unlink()
            if stop is not None:
                return


class _Lines:
    """Rows -> what a job's file is to hold; asked: of each key the image (hex), and whether it is a second request."""

    def __init__(self, tier: caption_work.Tier) -> None:
        self._work, self._repairs = caption_work.work(tier), tier.captioner["repairs"]
        self.asked: dict[str, tuple[str, bool]] = {}

    def of(self, frames: Iterable[pd.DataFrame]) -> Iterator[tuple[Request, bytes, str]]:
        for one in ahead(self._prepared, _rows(frames), 2, 16):
            if one is not None:
                request, second, image = one
                self.asked[request.key] = request.image_id.hex(), second
                yield request, *image

    def _prepared(self, row: Row) -> tuple[Request, bool, tuple[bytes, str]] | None:
        """Runs in threads."""
        heard = hear(self._work, row, self._repairs)
        if isinstance(heard, dict):
            return None
        try:
            return *heard, self._work.prepare(row)
        except Reject:
            return None


def hear(work: Work, row: Row, repairs: int) -> dict[str, Any] | tuple[Request, bool]:
    """A row and what is journaled of it -> its staged row, or the request that is still open."""
    known = settled(work.known(row))
    talk, second = caption_row.conversation(work, row, repairs), False
    request = next(talk)
    while (found := known.get(request.key)) is not None:
        try:
            request, second = talk.send(Reply(found.code, found.detail, found.text)), True
        except StopIteration as said:
            return cast(dict[str, Any], said.value)
    return request, second


def poll(frames: Iterator[pd.DataFrame], captioner: Mapping[str, Any]) -> Iterator[pd.DataFrame]:
    """Frames of names -> FOUND: the job of each that has one, and how many others of its name were cancelled."""
    names = [str(name) for frame in frames for name in frame["name"]]
    if not names:
        return
    with _client(captioner) as (run, client):
        found = run(patiently(client.find, names))
    told = [(name, *jobs[0], len(jobs) - 1) for name, jobs in found.items() if jobs]
    yield pd.DataFrame(told, columns=["name", "job", "state", "others"])


def collect(
    frames: Iterator[pd.DataFrame], captioner: Mapping[str, Any], stores: Mapping[str, Any], wave: Wave, price: Price
) -> Iterator[pd.DataFrame]:
    """Frames of (name, job) of jobs that ended -> their replies in the journal, and COLLECTED. Done again it writes the same."""
    opener = Opener(stores)
    with _client(captioner) as (run, client):
        for row in _rows(frames):
            asked = read_intent(opener, wave.intent(row["name"]))
            most = {key: one.most for key, one in asked.items()}
            got = run(patiently(client.collect, row["job"], most))
            assert got is not None, f"{row['job']} has not ended"
            records = [_record(key, asked[key], reply, price) for key, reply in got.replies.items()]
            worst = max((caption_budget.cost(price, one) for one in most.values()), default=0)
            terms = Terms(share=sum(one.nano_usd for one in records), worst=worst, in_flight=0, flush=max(1, len(records)), lease=0.0)
            Journal(opener, Place(wave.folder, partition_of(row["name"]), 0), terms).whole(records)
            yield pd.DataFrame([{"name": row["name"], "replies": len(records), "missing": len(got.missing)}])


def read_intent(opener: Opener, uri: str) -> dict[str, Asked]:
    """-> key -> what was asked. Raises Reject."""
    told = json.loads(opener.read(uri))
    return {key: Asked(image_id, repair, Usage(**most)) for key, (image_id, repair, most) in told.items()}


def partition_of(name: str) -> int:
    """A job's name -> the number of its folder in the journal: 48 bits of it."""
    return int(name.rpartition("-")[2][:12], 16)


def landed(frames: Iterator[pd.DataFrame], tier: caption_work.Tier) -> Iterator[pd.DataFrame]:
    """Frames as for `submit`, when no more is asked -> caption_row.SCHEMA, a row an image."""
    work, count = caption_work.work(tier), token_count.load(*tier.tokenizer).count
    for frame in frames:
        rows = [_landed(work, row, tier.captioner["repairs"]) for row in _rows([frame])]
        yield pd.DataFrame(caption_row.counted(rows, count), columns=caption_row.COLUMNS)


def _landed(work: Work, row: Row, repairs: int) -> dict[str, Any]:
    heard = hear(work, row, repairs)
    calls = len(work.known(row))
    if isinstance(heard, dict):
        return heard | {"calls": calls}
    request, second = heard
    try:
        work.prepare(row)
    except Reject as reject:
        return caption_row.failed(row, request.key, reject.code, reject.detail, reject.transient, calls)
    if second:  # what the first answer is worth, without a better one
        first = cast(dict[str, Any], hear(work, row, 0))
        return first | {"calls": calls, "transient": first["state"] == caption_row.FAILED}
    last = next((one for one in reversed(work.known(row)) if one.key == request.key), None)
    code, detail = ("no_reply", "no job answered it") if last is None else (last.code, last.detail)
    return caption_row.failed(row, request.key, code, detail, True, calls)


def _record(key: str, asked: Asked, reply: Reply, price: Price) -> Record:
    spent = caption_budget.cost(price, reply.usage)
    return caption_record.record(
        Request(key, bytes.fromhex(asked.image_id), "", "", {}, {}, noted=False), 1, asked.repair, reply, spent, seconds=0.0
    )


def _rows(frames: Iterable[pd.DataFrame]) -> Iterator[Row]:
    for frame in frames:
        yield from cast(Sequence[Row], frame.to_dict("records"))


async def patiently(ask: Callable[..., Awaitable[T]], *told: Any) -> T:
    """A call about files or jobs, again after each of WAITS while the service fails. Raises BatchFault."""
    for seconds in WAITS:
        try:
            return await ask(*told)
        except BatchFault as fault:
            if fault.reply.outcome != RETRY:
                raise
            await asyncio.sleep(max(seconds, fault.reply.retry_after or 0.0))
    return await ask(*told)


class _client:
    """`with _client(captioner) as (run, client)`: a loop that runs the client's calls, and both closed after."""

    def __init__(self, captioner: Mapping[str, Any]) -> None:
        self._runner, self._client = asyncio.Runner(), caption_work.batch(captioner)

    def __enter__(self) -> tuple[Callable[[Any], Any], GeminiBatch]:
        return self._runner.run, self._client

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()
