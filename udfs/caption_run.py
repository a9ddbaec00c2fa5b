"""Rows with requests -> staged rows: one attempt of a partition asks a captioner, many calls at a time, within its share and its lease.

Every row comes out once, when all of its calls are durable in the journal (udfs.caption_journal); what an earlier attempt or run has journaled is
answered from there. The loop runs in the task's own thread, while a frame is asked for: whoever takes frames must not rest longer than the lease.
Memory holds `window` images, and answers that are not durable yet, whatever the number of rows.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import pandas as pd

from udfs import caption_row
from udfs.caption_asking import FAILED, Asking, Ended, settled
from udfs.caption_budget import Price
from udfs.caption_call import CODES, RETRY, STOP, Engine, Reply
from udfs.caption_journal import Journal
from udfs.caption_record import Record
from udfs.caption_request import Request
from udfs.caption_row import Row, Work
from udfs.rate_limit import LONGEST, Rate, pause
from udfs.reject import Reject


class How(NamedTuple):
    """tries: calls that a request may need; repairs: 0 or 1 more for an answer that is refused; backoff, longest_backoff: seconds before the
    second try, doubled for each further one; flush_seconds: the longest that an answer waits for its journal part; window: rows at work;
    threads: that prepare images; frame_rows: of a staged frame; seed: of the backoff's jitter.
    """

    tries: int = 5
    repairs: int = 1
    backoff: float = 1.0
    longest_backoff: float = 60.0
    flush_seconds: float = 2.0
    window: int = 128
    threads: int = 2
    frame_rows: int = 256
    seed: int = 0


def lease_clock() -> float:
    """Seconds that go on while the machine is suspended, where the system has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def run(
    frames: Iterable[pd.DataFrame],
    work: Work,
    engine: Callable[[], Engine],
    journal: Journal,
    price: Price,
    rate: Rate,
    how: How,
    clock: Callable[[], float] = lease_clock,
) -> Iterator[pd.DataFrame]:
    """Frames of rows with an image_id -> caption_row.SCHEMA frames as rows are done, every row once.

    engine: makes the client, inside the running loop; rate: of this task. A row with `stop` says that the job is to end, and why. Raises Reject when
    the journal cannot be written: its attempt is then dead, and what it had asked is settled as such.
    """
    with asyncio.Runner() as runner:
        attempt = runner.run(_begun(frames, work, engine, journal, price, rate, how, clock))
        try:
            while rows := runner.run(attempt.rows()):
                yield pd.DataFrame(rows, columns=caption_row.COLUMNS)
            runner.run(attempt.end())
        finally:
            runner.run(attempt.leave())


async def _begun(
    frames: Iterable[pd.DataFrame],
    work: Work,
    engine: Callable[[], Engine],
    journal: Journal,
    price: Price,
    rate: Rate,
    how: How,
    clock: Callable[[], float],
) -> _Attempt:
    """-> an attempt whose open part is durable. Raises Reject, and RuntimeError when there is such a part."""
    asking = Asking(engine(), journal, price, rate, how.flush_seconds, clock)
    try:
        await asking.parts.open()
    except BaseException:
        await asking.close()
        raise
    return _Attempt(frames, work, asking, how)


class _Life:
    """Of one row: its image while it may be asked for, its calls, when the last of them is durable, and what it learned of the job's end."""

    def __init__(self, known: dict[str, Record]) -> None:
        self.known = known
        self.calls = 0
        self.key: str | None = None
        self.image: tuple[bytes, str] | None = None
        self.durable: asyncio.Future[None] | None = None
        self.stop: str | None = None


class _Attempt:
    def __init__(self, frames: Iterable[pd.DataFrame], work: Work, asking: Asking, how: How) -> None:
        self._frames, self._work, self._asking, self._how = frames, work, asking, how
        self._threads = ThreadPoolExecutor(how.threads, thread_name_prefix="prepare")
        self._window, self._some = asyncio.Semaphore(how.window), asyncio.Event()
        self._at_work = 0  # rows that may still begin calls
        self._done: list[dict[str, Any]] = []
        self._rows: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._writer = self._task(asking.parts.write())
        self._feeder = self._task(self._feed())

    async def rows(self) -> list[dict[str, Any]]:
        """-> the next frame's rows; none: that was all."""
        while True:
            if self._failure is not None:
                raise self._failure
            through = self._feeder.done() and not self._rows
            if through or len(self._done) >= self._how.frame_rows:
                taken, self._done = self._done[: self._how.frame_rows], self._done[self._how.frame_rows :]
                return taken
            self._some.clear()
            await self._some.wait()

    async def end(self) -> None:
        """All rows are out: the end part says that no call is in flight."""
        await self._asking.parts.flushed(self._writer)
        await self._asking.parts.end(self._asking.why[0] or "done")

    async def leave(self) -> None:
        """Also when it was not taken to its end: calls in flight are given up, what has come back is made durable, and there is no end part."""
        waiting = [task for task in (self._feeder, *self._rows) if not task.done()]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        try:
            await self._asking.parts.flushed(self._writer)
        except Reject:
            if self._failure is None:
                raise
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)
            await self._asking.close()

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(self._noticed)
        return task

    def _noticed(self, task: asyncio.Task[None]) -> None:
        self._rows.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and self._failure is None:
            self._failure = error
            self._asking.finish(FAILED, type(error).__name__)
        self._some.set()

    async def _feed(self) -> None:
        for frame in self._frames:
            for row in cast(list[dict[str, Any]], frame.to_dict("records")):
                await self._window.acquire()
                while len(self._done) >= 2 * self._how.frame_rows:  # the frame that is ready is taken first
                    self._some.set()
                    await asyncio.sleep(0)
                self._at_work += 1
                self._asking.parts.hurry(False)
                self._rows.add(self._task(self._row(row)))

    async def _row(self, row: Row) -> None:
        life = _Life(settled(self._work.known(row)))
        try:
            result = await self._caption(row, life)
        except Ended:
            code, detail = self._asking.why
            code, detail = (caption_row.STOPPED, f"{code}: {detail}") if CODES.get(code) == STOP else (code, detail)
            result = caption_row.unasked(row, life.key, code, detail, life.calls)
        except Reject as reject:
            result = caption_row.failed(row, life.key, reject.code, reject.detail, reject.transient, life.calls)
        finally:
            life.image = None
            self._window.release()
            self._at_work -= 1
            if self._at_work == 0:
                self._asking.parts.hurry(True)
        if life.durable is not None:
            await life.durable
        self._done.append(result | {"stop": life.stop})

    async def _caption(self, row: Row, life: _Life) -> dict[str, Any]:
        talk, most, is_repair = caption_row.conversation(self._work, row, self._how.repairs), self._how.tries, False
        request = next(talk)
        while True:
            reply = await self._reply(row, life, request, most, is_repair)
            try:
                request = talk.send(reply)
            except StopIteration as said:
                return said.value | {"calls": life.calls}
            most, is_repair = self._how.tries + self._how.repairs, True

    async def _reply(self, row: Row, life: _Life, request: Request, most: int, repair: bool = False) -> Reply:
        """-> the reply that settles a request, or the last of its tries, until the row has made `most` calls. Raises Ended, or Reject of its image."""
        life.key = request.key
        tried = 0
        while True:
            if (found := self._asking.bought.pop(request.key, None) or life.known.get(request.key)) is not None:
                return Reply(found.code, found.detail, found.text)
            if self._asking.ended.is_set():
                raise Ended
            if life.image is None:
                life.image = await asyncio.get_running_loop().run_in_executor(self._threads, self._work.prepare, row)
            tried += 1
            reply, life.durable, stop = await self._asking.call(request, life.image, tried, repair)
            life.calls += 1
            life.stop = life.stop or stop
            if reply.outcome == STOP:
                raise Ended
            if reply.outcome != RETRY or life.calls >= most:
                return reply
            await pause(backoff(self._how, request.key, tried, reply.retry_after), self._asking.ended)


def backoff(how: How, key: str, tried: int, retry_after: float | None = None) -> float:
    """-> seconds before the next try: doubled each time, between half and all of it by the key, and no less than the server asked for."""
    chance = random.Random(f"{how.seed}|{key}|{tried}").random()
    own = min(how.longest_backoff, how.backoff * 2.0 ** (tried - 1)) * (0.5 + chance / 2)
    return own if retry_after is None or not retry_after > own else min(retry_after, LONGEST)
