"""How fast one task may ask a server whose limit is not known exactly: a pace that gives way to 429 and creeps back.

`Rate` is the arithmetic, pure in the `now` (seconds of one clock) that it is given; `Limiter` is the same for coroutines.

- Calls are paced evenly at `rate`; a late caller makes up for at most BUCKET calls.
- A 429 lowers the rate once a round trip: what was sent before the last step says nothing of the new rate. The first SMALL steps are small
  (STEP), for a rate just above the limit. Where 429s go on, the limit has fallen: of ENOUGH calls the accepted share says how far.
- Where all of them are refused, no pace would do (a minute's quota is used up and the server does not say for how long): the task waits, 1 s,
  then 2, 4, ... up to PATIENCE, and keeps its rate.
- It climbs back quickly to NEAR of the knee (the rate at which the last 429 came) and creeps from there: so slowly that the next 429 is
  hundreds of calls away whatever the rate. Well PAST the knee the knee is forgotten and it climbs quickly again.
- A server's Retry-After holds the whole task, for at most LONGEST seconds.
- The rate never exceeds `most`: the task's share of the quota, or what the config allows when other tasks are idle.
"""

from __future__ import annotations

import asyncio
import contextlib

BUCKET = 2.0  # calls that may be made up for: timers wake late
STEP, LEAST = 0.92, 0.5  # factors of the first step, and of the largest
SMALL = 2  # small steps in a row: a server that takes nothing early refuses every second call of a pace that is a little too quick
FEW = 24  # calls since a step within which another 429 belongs to it
ENOUGH = 8  # calls whose accepted share is an estimate
NEAR, PAST = 0.96, 1.04  # shares of the knee between which the rate creeps
SLOW, SLOW_SECOND = (
    0.0002,
    0.004,
)  # of the knee, a success and a second, whichever is less: from NEAR to PAST in 400 calls and 20 s at least
QUICK = 0.05  # of `most`, a second, and of the rate, a success, whichever is less
LOWEST = 0.01  # of `most`: a server that refuses everything is still asked now and then
PATIENCE = 30.0  # seconds between calls to a server that refuses all
LONGEST = 120.0  # seconds of a Retry-After that are honoured


class Rate:
    """share: calls a second that this task begins with, quota / tasks; most: what it may climb to (None: its share)."""

    def __init__(self, share: float, most: float | None = None) -> None:
        if not 0 < share < float("inf"):
            raise ValueError(f"calls a second of a task: given {share}, expected more than 0 (the quota divided by the number of tasks)")
        self.most = share if most is None else max(share, most)
        self.rate = share
        self._knee: float | None = None
        self._due = self._held = self._stepped = self._heard = float("-inf")
        self._sent, self._refused = FEW, 0  # calls begun, and refused, since the last step
        self._row = 0  # small steps in a row
        self._in_vain = 0  # waits in a row after which all was refused again

    def wait(self, now: float) -> float:
        """-> seconds until the next call may begin; 0: now."""
        return max(0.0, self._due - now, self._held - now)

    def send(self, now: float) -> None:
        """A call begins. Only when `wait` was 0."""
        begun = self._due > float("-inf")  # the first calls are as even as the later ones
        self._due = max(self._due, now - BUCKET / self.rate if begun else now) + 1 / self.rate
        self._sent += 1

    def accepted(self, now: float) -> None:
        """A reply that is no 429."""
        passed, self._heard = min(max(0.0, now - self._heard), 1.0), max(now, self._heard)
        self._in_vain = 0
        if self._knee is not None and self.rate > PAST * self._knee:
            self._knee = None
        quick = self.rate + min(QUICK * self.most * passed, QUICK * self.rate)
        if self._knee is None:
            self._set(quick)
        elif self.rate < NEAR * self._knee:
            self._set(min(quick, NEAR * self._knee))
        else:
            self._set(self.rate + min(SLOW, SLOW_SECOND * passed) * self._knee)

    def refused(self, now: float, sent: float, retry_after: float | None = None) -> None:
        """A 429 to a call that began at `sent`."""
        self.hold(now, retry_after)
        if sent < self._stepped:
            return
        self._heard = max(now, self._heard)
        self._refused += 1
        self._row = self._row if self._sent <= FEW else 0
        if self._row < SMALL:
            self._row += 1
            self._knee = self.rate
            self._step(now, STEP)
        elif self._refused == self._sent and (self._in_vain or self._sent >= ENOUGH):
            self.hold(now, min(2.0**self._in_vain, PATIENCE))
            self._in_vain += 1
            self._step(now, 1.0)
        elif self._sent >= ENOUGH:
            self._step(now, min(STEP, max(LEAST, 1 - self._refused / self._sent)))
            self._knee = self.rate / NEAR  # somewhere here: it creeps from where this step leads

    def hold(self, now: float, retry_after: float | None) -> None:
        """Any reply in which the server asks to wait."""
        if retry_after is not None and retry_after > 0:  # not NaN
            self._held = max(self._held, now + min(retry_after, LONGEST))
            self._due = max(self._due, self._held)  # nothing is made up for afterwards

    def _step(self, now: float, factor: float) -> None:
        self._set(self.rate * factor)
        self._stepped, self._sent, self._refused = now, 0, 0
        self._due = max(self._due, now + 1 / self.rate)

    def _set(self, rate: float) -> None:
        self.rate = min(self.most, max(LOWEST * self.most, rate))


class Limiter:
    """A Rate for the coroutines of one loop: they take turns in the order in which they came."""

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self._turn = asyncio.Lock()

    async def turn(self, stop: asyncio.Event) -> float | None:
        """Waits until a call may begin -> when it begins, on the loop's clock; None: `stop` was set before."""
        clock = asyncio.get_running_loop().time
        async with self._turn:
            while not stop.is_set():
                if (seconds := self.rate.wait(now := clock())) <= 0:
                    self.rate.send(now)
                    return now
                await pause(seconds, stop)
            return None

    def hear(self, sent: float, refused: bool, retry_after: float | None) -> None:
        """What came back for a call that began at `sent`."""
        now = asyncio.get_running_loop().time()
        if refused:
            self.rate.refused(now, sent, retry_after)
        else:
            self.rate.hold(now, retry_after)
            self.rate.accepted(now)


async def pause(seconds: float, stop: asyncio.Event) -> None:
    """Sleeps, or until `stop` is set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()
