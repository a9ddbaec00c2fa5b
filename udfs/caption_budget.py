"""What calls may cost and have cost, in nano-dollars (integers: sums are exact), and a cap that holds without a coordinator.

Who spends: an attempt of a partition of a wave, `attempts` of them at most a partition, any of which may be killed at any moment, or be taken
for dead and go on (a zombie). Who plans: one driver at a time, to which the same may happen. All they have in common is the journal
(udfs.caption_journal).

The rule
 1. A wave of n rows begins only when n x row_worst x attempts fits what is left: the cap, less what earlier attempts are settled or reserved at.
 2. The share of an attempt is rows of its partition x row_worst; of an attempt with the number `attempts` or a higher one it is 0.
 3. An attempt writes its open part, and goes on only when it then sees no mark that its wave or its run is closed. It begins a call only while
    a. what it has spent + worst x (calls in flight + 1) <= share (`Account.fits`),
    b. fewer than `unsettled` of its calls are begun and not yet durable in its journal (`Account.loose`),
    c. its lease holds (`Lease`): less than `lease` seconds have passed since the write of its last durable part began, and every one of its
       parts was durable before the lease of the part before it had run out.
    It writes its end part when none of its calls is in flight, and begins none after it.
 4. A driver first marks the runs of all others closed: a wave that one of them begins later asks nothing. To settle a wave it marks that closed,
    then lists its journal. An attempt that has ended is settled at what its journal says. One that has not is reserved at its share until a
    listing that began lease + margin seconds after its last new part was seen shows no newer one (`Watch`); then it is over, and is settled at
    what its journal says + unsettled x worst, at most its share (`settle`).

The guarantee: at no time is more billed than the cap. Proof.
 - No attempt is ever billed more than its share: by 3a, as no call is billed more than `worst`.
 - An attempt is never billed more than it is settled at. Ended: it begins no call after its end part, which counts all. Over: let P be its last part
   in that listing. A part after P would have been durable before P's lease ran out (3c), so before P was visible + lease, so before the listing
   began, and would stand in it. So P's lease was never renewed and no call began after it: all of its calls are begun, and those that P does not
   count are at most `unsettled` (3b).
 - An attempt that is not in the listing is never billed: its open part came after the mark, which it then sees (3, 4).
 - So billed <= settled + reserved + the shares of the running wave, and that sum is at most the cap: by 1 and 2 when the wave begins, and settling
   only lowers it.
In Batch mode (udfs/caption_intent.py) nobody asks but the service. A wave of n rows begins only when n x worst x rounds x attempts fits what is left, and
each round only when n x worst x attempts does. A round is settled when all jobs of its intents have ended or are known never to have been made: at the
bills of their replies, at worst for each request of a job that did not succeed that has no reply, and at worst for all requests of a job that was made
twice. A job whose name is noted and that the service does not know any more counts at worst too. So billed <= settled, as above; it rests, besides, on a
listing that names every job of the key once a call's timeout and a margin have passed.
It rests on this: a call is billed at most `worst` (checked for every reply; the first that is not stops the job); whoever reads or lists after a
write has returned sees it (POSIX file systems, S3 since 2020); worker and driver clocks differ by less than `margin` over a lease and go on
while a process is stopped; a driver that takes the stage over knows the run of the one before it (the stage's lease).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from udfs.caption_call import Usage

NANO = 1_000_000_000
MILLION = 1_000_000


class Price(NamedTuple):
    """Nano-dollars for a million tokens; thoughts are output, an image is input."""

    input: int
    output: int


class Bounds(NamedTuple):
    """The most tokens that one call can be billed for. prompt: with the repair's words; output: with thoughts."""

    prompt: int
    image: int
    output: int


class Seen(NamedTuple):
    """What the journal says of an attempt: the terms of its open part, the last part's number, and what its parts count.

    unsettled: calls begun and not durable, at most; spent: nano-dollars; broken: a part of it is not what was written.
    """

    share: int
    worst: int
    unsettled: int
    lease: float
    number: int
    calls: int
    spent: int
    ended: bool
    broken: bool = False


def nano(usd: str | int | float | Decimal) -> int:
    """US dollars -> nano-dollars. Raises ValueError for what is negative, no number, or finer than a nano-dollar."""
    try:
        amount = Decimal(str(usd)) * NANO
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite() or amount < 0 or amount != amount.to_integral_value():
        raise ValueError(f"given {usd!r}, expected US dollars: 0 or more, with at most 9 decimals")
    return int(amount)


def price(entry: Mapping[str, Any]) -> Price:
    """{input, output} in US dollars for a million tokens -> Price. Raises ValueError that names the one that is missing or no price."""
    found = {}
    for name in Price._fields:
        if entry.get(name) is None:
            raise ValueError(f"{name}: no price; given {sorted(entry)}, expected US dollars for a million tokens")
        try:
            found[name] = nano(entry[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return Price(**found)


def cost(price: Price, usage: Usage | None) -> int:
    """-> nano-dollars of one call, rounded up; 0 when nothing was billed."""
    if usage is None:
        return 0
    tokens = max(0, usage.prompt) + max(0, usage.image), max(0, usage.output) + max(0, usage.thoughts)
    return -(-(tokens[0] * price.input + tokens[1] * price.output) // MILLION)


def worst(price: Price, bounds: Bounds) -> int:
    """-> nano-dollars of the dearest call."""
    return cost(price, Usage(bounds.prompt, bounds.image, bounds.output, 0))


def row_worst(worst: int, tries: int, repairs: int) -> int:
    """-> nano-dollars of a row in one attempt: it may make tries + repairs calls."""
    return worst * (tries + repairs)


def rows_that_fit(left: int, row_worst: int, attempts: int, rows: int) -> int:
    """-> how many of `rows` a wave may have (rule 1)."""
    return rows if row_worst == 0 else max(0, min(rows, left // (row_worst * attempts)))


def share(rows: int, row_worst: int, attempt: int, attempts: int) -> int:
    """-> nano-dollars that an attempt of a partition may spend (rule 2). attempt: from 0, counted over the stage's attempts too.

    Spark counts some losses of an executor as no failure, so that numbers can exceed spark.task.maxFailures.
    """
    return rows * row_worst if attempt < attempts else 0


def settle(seen: Seen, over: bool) -> int:
    """-> nano-dollars to count for an attempt (rule 4); over: it can begin no call any more (Watch). A broken journal counts as the share."""
    if seen.ended:
        return seen.spent
    if not over or seen.broken:
        return max(seen.spent, seen.share)
    return max(seen.spent, min(seen.share, seen.spent + seen.unsettled * seen.worst))


class Account:
    """What one attempt has spent and may still spend (rules 3a, 3b). Journal answers of others cost it nothing."""

    def __init__(self, share: int, worst: int, unsettled: int) -> None:
        self.share, self.worst, self.unsettled = share, worst, unsettled
        self.spent = self.flying = self.loose = 0

    @property
    def fits(self) -> bool:
        """Whether the share pays for one more call."""
        return self.spent + self.worst * (self.flying + 1) <= self.share

    def begin(self) -> None:
        assert self.fits and self.loose < self.unsettled, (self.spent, self.flying, self.loose)
        self.flying += 1
        self.loose += 1

    def undo(self) -> None:
        """The call that was to begin did not."""
        self.flying -= 1
        self.loose -= 1

    def end(self, spent: int) -> None:
        """A call has come back. One that never does stays in flight."""
        self.flying -= 1
        self.spent += spent

    def durable(self, calls: int) -> None:
        self.loose -= calls


class Lease:
    """Until when an attempt may begin calls (rule 3c), in seconds of its own clock."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.until = float("-inf")

    def opened(self, began: float) -> None:
        """The open part is durable; its write began at `began`."""
        self.until = began + self.seconds

    def renewed(self, began: float, done: float) -> None:
        """A further part is durable. After the lease has run out nothing brings it back."""
        if done < self.until:
            self.until = began + self.seconds

    def holds(self, now: float) -> bool:
        return now < self.until


class Watch:
    """The driver's eye on attempts, by its own clock: which can begin no call any more (rule 4). A new driver begins a new Watch."""

    def __init__(self, margin: float) -> None:
        self._margin = margin
        self._last: dict[Hashable, tuple[int, float]] = {}

    def over(self, began: float, done: float, seen: Mapping[Any, Seen]) -> set[Any]:
        """A listing that took from `began` to `done` -> the attempts in it that have ended or can begin no call."""
        found = set()
        for name, one in seen.items():
            number, at = self._last.get(name, (-1, done))
            if number != one.number:
                self._last[name] = one.number, done
            elif began > at + one.lease + self._margin:
                found.add(name)
            if one.ended:
                found.add(name)
        return found
