"""Calls that have come back -> parts of the attempt's journal, written as they are due; and the lease that durable parts give."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from udfs.caption_budget import Account, Lease
from udfs.caption_journal import Journal
from udfs.caption_record import Record
from udfs.rate_limit import pause
from udfs.reject import Reject

Result = TypeVar("Result")
RETRY, LONGEST_RETRY = 0.2, 5.0  # seconds before a failed write is tried again: at first, at most


class Parts:
    """The journal of one attempt, for the coroutines of its loop. A part is written when `flush` records are kept, when the oldest has waited
    flush_seconds, when nobody would add to it, and as a sign of life four times a lease; then it also looks whether the attempt is fenced off
    (`fenced` is told why) and what earlier attempts have bought since (`bought`).
    """

    def __init__(
        self,
        journal: Journal,
        account: Account,
        flush_seconds: float,
        clock: Callable[[], float],
        fenced: Callable[[str], None],
        bought: Callable[[list[Record]], None],
    ) -> None:
        self._journal, self._account, self._flush_seconds, self._clock = journal, account, flush_seconds, clock
        self._fenced, self._bought = fenced, bought
        self._lease, self._flush = Lease(journal.terms.lease), journal.terms.flush
        self._loose = asyncio.Semaphore(journal.terms.unsettled)
        self._kept: list[tuple[Record, asyncio.Future[None]]] = []  # not durable, oldest first
        self._since = 0.0  # from when the oldest waits, on the loop's clock
        self._due = asyncio.Event()
        self._hurry = self._last = False
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="journal")  # one part after the other

    @property
    def lease_holds(self) -> bool:
        return self._lease.holds(self._clock())

    async def open(self) -> None:
        """Writes the open part. Raises Reject, and RuntimeError when there is one."""
        began = self._clock()
        await self._on_disk(self._journal.open)
        self._lease.opened(began)
        await self._look_around()

    async def place(self) -> None:
        """Waits until one more call may be begun and not durable. It is given back by `give_back`, or when the call's record is durable."""
        if self._loose.locked():
            self._due.set()
        await self._loose.acquire()

    def give_back(self) -> None:
        self._loose.release()

    def keep(self, record: Record) -> asyncio.Future[None]:
        """-> done when it is durable."""
        loop = asyncio.get_running_loop()
        if not self._kept:
            self._since = loop.time()
        self._kept.append((record, loop.create_future()))
        if len(self._kept) in (1, self._flush) or self._loose.locked():
            self._due.set()
        return self._kept[-1][1]

    def hurry(self, hurry: bool) -> None:
        """Nobody would add to the next part: it need not wait."""
        self._hurry = hurry
        if hurry:
            self._due.set()

    async def write(self) -> None:
        """Until `flushed`. Raises Reject when the store has failed for as long as the lease held."""
        loop = asyncio.get_running_loop()
        beat = self._lease.seconds / 4
        written = looked = loop.time()
        while self._kept or not self._last:
            now = loop.time()
            quick = self._hurry or self._last or self._loose.locked()
            full = len(self._kept) >= self._flush or (bool(self._kept) and (quick or now >= self._since + self._flush_seconds))
            if not full and now < written + beat:
                self._due.clear()
                until = min(written + beat, self._since + self._flush_seconds) if self._kept else written + beat
                await pause(until - now, self._due)
                continue
            if now >= looked + beat:
                await self._look_around()
                looked = now
            await self._write_part()
            written = self._since = now

    async def flushed(self, writer: asyncio.Task[None]) -> None:
        """All that is kept is durable. Raises as `write`."""
        self._last = True
        self._due.set()
        await writer

    async def end(self, reason: str) -> None:
        """Writes the end part: no call is in flight. Raises Reject."""
        await self._durably(partial(self._journal.end, reason))

    def close(self) -> None:
        self._disk.shutdown(wait=False)

    async def _write_part(self) -> None:
        batch = self._kept[: self._flush]
        began = self._clock()
        await self._durably(partial(self._journal.answers, [record for record, _ in batch]))
        self._lease.renewed(began, self._clock())
        del self._kept[: len(batch)]
        self._account.durable(len(batch))
        for _, durable in batch:
            self._loose.release()
            if not durable.done():  # its row was given up
                durable.set_result(None)

    async def _durably(self, work: Callable[[], Result]) -> Result:
        """Writes or looks, again and again while the lease holds. Raises Reject when the store fails for longer."""
        tried = 0
        while True:
            try:
                return await self._on_disk(work)
            except Reject:
                wait = min(RETRY * 2**tried, LONGEST_RETRY)
                if not self._lease.holds(self._clock() + wait):
                    raise
                await asyncio.sleep(wait)
                tried += 1

    async def _look_around(self) -> None:
        if (why := await self._durably(self._journal.fenced)) is not None:
            self._fenced(why)
        if self._journal.place.attempt:
            records, _ = await self._durably(self._journal.earlier)
            self._bought(records)

    def _on_disk(self, work: Callable[[], Result]) -> Awaitable[Result]:
        return asyncio.get_running_loop().run_in_executor(self._disk, work)
