"""One attempt's calls: who may begin one and when, what it cost, and its record in the journal; and that no call begins any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import NamedTuple

from udfs import caption_record
from udfs.caption_budget import Account, Price, cost
from udfs.caption_call import RETRY, STOP, Engine, Reply
from udfs.caption_journal import Journal
from udfs.caption_parts import Parts
from udfs.caption_record import Record
from udfs.caption_request import Request
from udfs.rate_limit import Limiter, Rate

# why an attempt begins no call any more, besides the code of a reply whose outcome is stop
BUDGET, LEASE, FENCED, OVER_WORST, FAILED = "budget", "lease", "fenced", "over_worst", "failed"


class Ended(Exception):
    """The attempt begins no call any more."""


class Called(NamedTuple):
    """durable: done when the call is in the journal; stop: why the job is to end, if it is."""

    reply: Reply
    durable: asyncio.Future[None]
    stop: str | None


class Asking:
    """For the coroutines of one loop. `ended` is set when no call begins any more, `why` is then (code, detail)."""

    def __init__(
        self, engine: Engine, journal: Journal, price: Price, rate: Rate, flush_seconds: float, clock: Callable[[], float]
    ) -> None:
        terms = journal.terms
        self._engine, self._price = engine, price
        self._account = Account(terms.share, terms.worst, terms.unsettled)
        self._limiter = Limiter(rate)
        self._places = asyncio.Semaphore(terms.in_flight)
        self._freed = asyncio.Event()  # something of the share
        self.bought: dict[str, Record] = {}  # by earlier attempts
        self.parts = Parts(journal, self._account, flush_seconds, clock, lambda why: self.finish(FENCED, why), self._learn)
        self.ended = asyncio.Event()
        self.why = ("", "")

    def finish(self, code: str, detail: str) -> None:
        """No call begins from now on; the first reason stands."""
        if not self.ended.is_set():
            self.why = (code, detail)
            self.ended.set()
            self._freed.set()

    async def call(self, request: Request, image: tuple[bytes, str], tried: int, repair: bool) -> Called:
        """One try, when the journal, a place, the share, the pace and the lease allow it. Raises Ended when they never will."""
        async with self._places:  # before the journal's: of those there are more, so that they run out only when parts are late
            await self.parts.place()
            try:
                sent = await self._turn()
            except Ended:
                self.parts.give_back()
                raise
            reply = await self._engine.ask(request, *image)
        return self._came_back(reply, sent, request, tried, repair)

    async def close(self) -> None:
        self.parts.close()
        await self._engine.close()

    async def _turn(self) -> float:
        """Reserves the worst that a call can cost, and waits for its turn -> when it begins. Raises Ended."""
        account = self._account
        while not self.ended.is_set() and not account.fits and account.flying:
            self._freed.clear()
            await self._freed.wait()
        if not account.fits:
            self.finish(BUDGET, f"{account.spent} of {account.share} nano-dollars are spent")
        if self.ended.is_set():
            raise Ended
        account.begin()
        sent = await self._limiter.turn(self.ended)
        if not self.parts.lease_holds:
            self.finish(LEASE, "no part of the journal was durable in time")
        if sent is None or self.ended.is_set():
            account.undo()
            self._freed.set()
            raise Ended
        return sent

    def _came_back(self, reply: Reply, sent: float, request: Request, tried: int, repair: bool) -> Called:
        spent, stop = cost(self._price, reply.usage), None
        self._account.end(spent)
        self._freed.set()
        self._limiter.hear(sent, reply.code == "rate_limited", reply.retry_after)
        seconds = asyncio.get_running_loop().time() - sent
        durable = self.parts.keep(caption_record.record(request, tried, repair, reply, spent, seconds))
        if reply.outcome == STOP:
            stop = f"{reply.code}: {reply.detail}"
            self.finish(reply.code, reply.detail)
        elif spent > self._account.worst:
            detail = f"a call cost {spent} nano-dollars, at most {self._account.worst} were reckoned with"
            stop = f"{OVER_WORST}: {detail}"
            self.finish(OVER_WORST, detail)
        return Called(reply, durable, stop)

    def _learn(self, records: list[Record]) -> None:
        self.bought |= settled(records)


def settled(records: Iterable[Record]) -> dict[str, Record]:
    """Calls -> by key, those that need not be made again."""
    return {one.key: one for one in records if one.outcome not in (RETRY, STOP)}
