"""Captioning by Batch mode on workers, its first half: rows -> jobs at the service (udfs/caption_intent.py)."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import pandas as pd

from udfs import caption_intent, caption_row, caption_work
from udfs.ahead import ahead
from udfs.caption_asking import settled
from udfs.caption_call import RETRY, Reply
from udfs.caption_intent import Asked, Wave
from udfs.caption_request import Request
from udfs.caption_row import Row, Work
from udfs.gemini_batch import BatchFault, GeminiBatch, Part, write_parts
from udfs.opener import Opener
from udfs.reject import Reject

SENT = "name STRING, requests INT, full BOOLEAN, stop STRING"
NOTHING = {"name": "", "requests": 0, "full": False, "stop": None}  # of SENT
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before a call about files or jobs is tried again
T = TypeVar("T")


class Limits(NamedTuple):
    """files: that this attempt may send; waits: as WAITS."""

    files: int
    waits: Sequence[float] = WAITS


def send(frames: Iterator[pd.DataFrame], tier: caption_work.Tier, wave: Wave, limits: Limits) -> Iterator[pd.DataFrame]:
    """Frames of (image_id, tried, addresses, tags, alt_text, known) -> SENT, a row a job. full: there is more, and the service, or this round, takes no more
    now; stop: why no request of the tier can succeed.

    What an earlier attempt has sent is not sent again. A row whose image is none is left out: udfs.caption_collect.landed says why. Raises Reject.
    """
    opener, how = Opener(tier.stores), tier.captioner["batch"]
    with client_of(tier.captioner) as (run, client), tempfile.TemporaryDirectory() as folder:
        try:
            sent, taken = run(_earlier(opener, wave, client, limits.waits))
        except BatchFault as fault:
            yield pd.DataFrame([NOTHING | _ended(fault)])
            return
        if sent:
            yield pd.DataFrame([NOTHING | {"name": name, "requests": many} for name, many in sent.items()])
        lines = _Lines(tier, taken)
        options, size = caption_work.gemini_options(tier.captioner), how["megabytes"] << 20
        for number, part in enumerate(write_parts(lines.of(frames), options, Path(folder), how["rows"], size, wave.purpose)):
            row = NOTHING | {"name": part.name, "full": number >= limits.files}
            if not row["full"]:
                asked = {key: Asked(*lines.asked[key], most) for key, most in part.most.items()}
                try:
                    run(_sent(opener, wave, client, part, asked, limits.waits))
                    row["requests"] = len(asked)
                except BatchFault as fault:
                    row |= _ended(fault)
            yield pd.DataFrame([row])
            part.path.unlink()
            if row["full"] or row["stop"]:
                return


def _ended(fault: BatchFault) -> dict[str, Any]:
    """-> what it means for the round: the service takes no more now, or no request can succeed."""
    return {"full": True} if fault.reply.outcome == RETRY else {"stop": str(fault)}


async def _earlier(opener: Opener, wave: Wave, client: GeminiBatch, waits: Sequence[float]) -> tuple[dict[str, int], set[str]]:
    """-> what other attempts, and other tasks of the wave, have sent: the requests of each job, and their keys."""
    noted = caption_intent.names(opener, wave)
    if not noted:
        return {}, set()
    unsure = [name for name, job in noted.items() if job is None]
    found = await patiently(client.find, unsure, waits=waits) if unsure else {}
    keys = {name: caption_intent.read(opener, wave, name).keys() for name, job in noted.items() if job is not None or found[name]}
    return {name: len(some) for name, some in keys.items()}, {key for some in keys.values() for key in some}


async def _sent(opener: Opener, wave: Wave, client: GeminiBatch, part: Part, asked: Mapping[str, Asked], waits: Sequence[float]) -> None:
    """Upload, intent, job, the job's name. Raises BatchFault. A create whose answer was lost is not made again before it is looked for."""
    file = await patiently(client.upload, part, waits=waits)
    caption_intent.note(opener, wave, part.name, asked)

    async def create() -> str:
        if tries[0] and (found := (await client.find([part.name]))[part.name]):
            return found[0].name
        tries[0] += 1
        return await client.create(part.name, file)

    tries = [0]
    opener.write(wave.made(part.name), (await patiently(create, waits=waits)).encode())


class _Lines:
    """Rows -> what a job's file is to hold; asked: of each key the image (hex), and whether it is a second request. taken: keys that are sent."""

    def __init__(self, tier: caption_work.Tier, taken: set[str]) -> None:
        self._work, self._repairs, self._taken = caption_work.work(tier), tier.captioner["repairs"], taken
        self.asked: dict[str, tuple[str, bool]] = {}

    def of(self, frames: Iterable[pd.DataFrame]) -> Iterator[tuple[Request, bytes, str]]:
        for one in ahead(self._prepared, rows_of(frames), 2, 16):
            if one is not None:
                request, second, image = one
                self.asked[request.key] = request.image_id.hex(), second
                yield request, *image

    def _prepared(self, row: Row) -> tuple[Request, bool, tuple[bytes, str]] | None:
        """Runs in threads."""
        heard = hear(self._work, row, self._repairs)
        if isinstance(heard, dict) or heard[0].key in self._taken:
            return None
        try:
            return *heard, self._work.prepare(row)
        except Reject:
            return None


def hear(work: Work, row: Row, repairs: int) -> dict[str, Any] | tuple[Request, bool]:
    """A row and what is journaled of it -> its staged row, or the request that is still open and whether it is the second."""
    known = settled(work.known(row))
    talk, second = caption_row.conversation(work, row, repairs), False
    request = next(talk)
    while (found := known.get(request.key)) is not None:
        try:
            request, second = talk.send(Reply(found.code, found.detail, found.text)), True
        except StopIteration as said:
            return cast(dict[str, Any], said.value)
    return request, second


def rows_of(frames: Iterable[pd.DataFrame]) -> Iterator[Row]:
    for frame in frames:
        yield from cast(Sequence[Row], frame.to_dict("records"))


async def patiently(ask: Callable[..., Awaitable[T]], *told: Any, waits: Sequence[float] = WAITS) -> T:
    """A call about files or jobs, again after each of `waits` while the service fails. Raises BatchFault."""
    for seconds in waits:
        try:
            return await ask(*told)
        except BatchFault as fault:
            if fault.reply.outcome != RETRY:
                raise
            await asyncio.sleep(max(seconds, fault.reply.retry_after or 0.0))
    return await ask(*told)


@contextmanager
def client_of(captioner: Mapping[str, Any]) -> Iterator[tuple[Callable[[Any], Any], GeminiBatch]]:
    """-> what runs the client's calls in a loop of their own, and the client; both closed after."""
    with asyncio.Runner() as runner:
        client = caption_work.batch(captioner)
        try:
            yield runner.run, client
        finally:
            runner.run(client.close())
