"""The cap holds: whoever is killed, stopped for a while or taken for dead, no more is billed than it; and a rule less would not do."""

from __future__ import annotations

import random
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from udfs import caption_budget as budget
from udfs.caption_budget import Account, Bounds, Lease, Price, Seen, Watch
from udfs.caption_call import Usage

FLASH = {"input": 0.75, "output": 3.75}
LEASE, MARGIN, FLUSH, FLYING = 10.0, 2.0, 1, 2
UNSETTLED = FLYING + 2 * FLUSH


def test_a_call_costs_what_the_price_list_says_to_the_nano_dollar() -> None:
    price = budget.price(FLASH)
    assert price == Price(750_000_000, 3_750_000_000)
    assert budget.cost(price, Usage(400, 1120, 600, 100)) == (1520 * 750 + 700 * 3750)
    assert budget.cost(budget.price({"input": "0.05", "output": 0.2}), Usage(1, 0, 0, 0)) == 50
    assert budget.cost(budget.price({"input": "0.0125", "output": 0}), Usage(1, 0, 0, 0)) == 13  # rounded up, once a call
    assert budget.cost(price, None) == 0


def test_ten_million_tenths_are_a_million() -> None:
    assert 10_000_000 * budget.nano(0.1) == budget.nano(1_000_000)


@pytest.mark.parametrize("usd", [-1, "x", "NaN", float("inf"), "0.0000000001", None])
def test_what_is_no_amount_is_refused(usd: Any) -> None:
    with pytest.raises(ValueError, match="expected US dollars"):
        budget.nano(usd)


@pytest.mark.parametrize(
    ("entry", "name"), [({"input": 1}, "output"), ({"output": 1}, "input"), ({"input": 1, "output": "free"}, "output")]
)
def test_a_missing_price_is_named(entry: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        budget.price(entry)


def test_a_wave_shrinks_to_what_every_attempt_of_every_row_can_cost() -> None:
    worst = budget.worst(budget.price(FLASH), Bounds(4_000, 1_120, 2_048))
    assert worst == 5_120 * 750 + 2_048 * 3_750
    row = budget.row_worst(worst, tries=4, repairs=1)
    assert budget.rows_that_fit(row * 4 * 100, row, 4, 1_000) == 100
    assert budget.rows_that_fit(row * 4 * 100 - 1, row, 4, 1_000) == 99
    assert budget.rows_that_fit(-5, row, 4, 1_000) == 0
    assert budget.rows_that_fit(0, 0, 4, 1_000) == 1_000  # an engine of one's own costs nothing
    assert budget.rows_that_fit(budget.nano(10**9), row, 4, 1_000) == 1_000


def test_an_attempt_beyond_those_that_were_counted_has_no_share() -> None:
    assert [budget.share(10, 7, attempt, 3) for attempt in range(5)] == [70, 70, 70, 0, 0]


def test_an_attempt_stops_before_its_share_could_be_passed() -> None:
    account = Account(share=100, worst=30, unsettled=10)
    for _ in range(3):
        account.begin()
    assert not account.fits  # 3 in flight may cost 90
    account.end(5)
    assert account.fits
    account.begin()
    assert account.loose == 4
    with pytest.raises(AssertionError):
        account.begin()


def seen(**changes: Any) -> Seen:
    return Seen(share=1_000, worst=30, unsettled=10, lease=60, number=4, calls=9, spent=200, ended=False)._replace(**changes)


def test_an_attempt_is_settled_by_what_can_still_come_of_it() -> None:
    assert budget.settle(seen(ended=True), over=True) == 200
    assert budget.settle(seen(), over=False) == 1_000  # it may be at work
    assert budget.settle(seen(), over=True) == 200 + 10 * 30
    assert budget.settle(seen(spent=900), over=True) == 1_000
    assert budget.settle(seen(broken=True), over=True) == 1_000
    assert budget.settle(seen(spent=1_100, broken=True), over=True) == 1_100


def test_a_lease_that_has_run_out_is_not_renewed_by_a_write_that_comes_late() -> None:
    lease = Lease(10)
    assert not lease.holds(0)
    lease.opened(100)
    assert lease.holds(109.9) and not lease.holds(110)
    lease.renewed(began=105, done=109)
    assert lease.holds(114.9)
    lease.renewed(began=114, done=116)
    assert not lease.holds(116)


def test_an_attempt_is_over_when_it_has_ended_or_been_silent_for_its_lease_and_the_margin() -> None:
    watch = Watch(margin=5)
    assert watch.over(0, 1, {"a": seen(), "b": seen(ended=True)}) == {"b"}
    assert watch.over(65, 66, {"a": seen(number=5)}) == set()
    assert watch.over(130, 131, {"a": seen(number=5)}) == set()  # 64 s
    assert watch.over(132, 133, {"a": seen(number=5)}) == {"a"}
    assert Watch(margin=5).over(132, 133, {"a": seen(number=5)}) == set()  # another driver has seen nothing yet


class Worker:
    """An attempt at work in a world of its own clock; every call is billed in the world at once."""

    def __init__(self, world: World, name: tuple[int, int, int], share: int) -> None:
        self.world, self.name, self.account, self.lease = world, name, Account(share, world.worst, UNSETTLED), world.lease_of(LEASE)
        self.flying: list[int] = []
        self.buffer: list[int] = []
        self.writing: tuple[float, float, list[int]] | None = None  # began, durable at, costs
        self.number = self.calls = self.counted = 0
        self.asleep = self.billed = 0.0
        self.opened = self.fenced = self.ended = self.killed = False

    def step(self) -> None:
        chance = self.world.chance
        if self.killed or self.ended or self.world.now < self.asleep:
            return
        if self.writing is None and not self.opened:
            self._write([])
        if self.writing is not None and self.world.now >= self.writing[1]:
            self._durable()
        roll = chance.random()
        if roll < 0.01:
            self.asleep = self.world.now + chance.uniform(0, 3 * LEASE)  # stopped, swapped out, cut off
        elif roll < 0.65:
            self._ask()
        elif roll < 0.9 and self.flying:
            price = self.flying.pop(chance.randrange(len(self.flying)))
            self.account.end(price)
            self.buffer.append(price)
        elif self.writing is None and self.opened:
            taken, self.buffer = self.buffer[:FLUSH], self.buffer[FLUSH:]
            if not taken and not self.flying and not self.account.fits:
                self.ended = True
                self.world.show(self, self.world.now, end=True)
            else:
                self._write(taken)

    def _ask(self) -> None:
        world = self.world
        may = self.opened and not self.fenced and self.lease.holds(world.now)
        while may and self.account.fits and self.account.loose < UNSETTLED and len(self.flying) < FLYING:
            self.account.begin()
            price = world.worst if world.chance.random() < 0.7 else world.chance.randint(0, world.worst)
            self.billed += price
            self.flying.append(price)

    def _write(self, costs: list[int]) -> None:
        delay = self.world.chance.choice([0, 0.2, 1, LEASE / 2, 2 * LEASE] if self.opened else [0, LEASE / 2, 0.9 * LEASE])
        self.writing = self.world.now, self.world.now + delay, costs

    def _durable(self) -> None:
        assert self.writing is not None
        began, done, costs = self.writing
        self.writing = None
        self.calls, self.counted = self.calls + len(costs), self.counted + sum(costs)
        self.world.show(self, done)
        self.account.durable(len(costs))
        self.number += 1
        if self.opened:
            self.lease.renewed(began, self.world.now)
        else:
            self.lease.opened(began)
            self.opened, self.fenced = True, self.world.closed(self.name[0])

    def kill(self) -> None:
        if not self.killed and self.writing is not None and self.world.chance.random() < 0.5:  # the store had it already
            _, done, costs = self.writing
            self.calls, self.counted = self.calls + len(costs), self.counted + sum(costs)
            self.world.show(self, done)
        self.killed = True


class World:
    """Workers, a journal, and a driver that plans waves until the money is gone."""

    def __init__(self, seed: int, settle: Callable[[Seen, bool], int], lease: type[Lease], fence: bool, watch: type[Watch]) -> None:
        self.chance = random.Random(seed)
        self.settle, self.lease_of, self.fence, self.watch_of = settle, lease, fence, watch
        self.now = 0.0
        self.worst = self.chance.randint(1, 50)
        self.attempts = self.chance.randint(1, 2)
        self.row = budget.row_worst(self.worst, self.chance.randint(1, 3), 1)
        self.cap = self.row * self.attempts * self.chance.randint(2, 40)
        self.workers: list[Worker] = []
        self.journal: dict[tuple[int, int, int], list[tuple[float, Seen]]] = {}
        self.closing: dict[int, float] = {}
        self.wave, self.running = -1, dict[int, int]()
        self.watch, self.planned = self.watch_of(MARGIN), 0.0

    def show(self, worker: Worker, at: float, end: bool = False) -> None:
        number = worker.number + end
        told = Seen(worker.account.share, self.worst, UNSETTLED, LEASE, number, worker.calls, worker.counted, end)
        self.journal.setdefault(worker.name, []).append((at, told))

    def closed(self, wave: int) -> bool:
        return self.fence and wave in self.closing

    def listed(self) -> dict[tuple[int, int, int], Seen]:
        parts = {name: [told for at, told in shown if at <= self.now] for name, shown in self.journal.items()}
        return {name: max(told, key=lambda one: one.number) for name, told in parts.items() if told}

    def left(self) -> int:
        found = self.listed()
        over = self.watch.over(self.now, self.now, found)
        return self.cap - sum(self.settle(one, name in over) for name, one in found.items())

    @property
    def billed(self) -> float:
        return sum(worker.billed for worker in self.workers)

    def drive(self) -> None:
        chance = self.chance
        if chance.random() < 0.03:  # another driver: it knows the journal only, and closes what it finds
            self.watch, self.running = self.watch_of(MARGIN), {}
        if not self.running and self.now > self.planned + 1:
            self.planned = self.now
            self.closing.setdefault(self.wave, self.now)
            rows = budget.rows_that_fit(self.left(), self.row, self.attempts, chance.randint(1, 60))
            if rows:
                self.wave += 1
                cut = chance.randint(0, rows)
                self.running = {number: size for number, size in enumerate((cut, rows - cut)) if size}
                for partition in self.running:
                    self._launch(partition, 0)
        for partition in list(self.running):
            mine = [worker for worker in self.workers if worker.name[:2] == (self.wave, partition)]
            if mine[-1].ended or len(mine) > self.attempts + 1:
                del self.running[partition]
            elif mine[-1].killed or chance.random() < 0.02:  # or it is taken for dead, and goes on
                self._launch(partition, len(mine))

    def _launch(self, partition: int, attempt: int) -> None:
        share = budget.share(self.running[partition], self.row, attempt, self.attempts)
        self.workers.append(Worker(self, (self.wave, partition, attempt), share))

    def run(self, steps: int) -> float:
        """-> the most that was billed, as a share of the cap."""
        for _ in range(steps):
            self.now += self.chance.choice([0.01, 0.05, 1.0])
            self.drive()
            for worker in [worker for worker in self.workers if not (worker.killed or worker.ended)]:
                worker.step()
                if self.chance.random() < 0.003:
                    worker.kill()
        return self.billed / self.cap


RULES: dict[str, Any] = {"settle": budget.settle, "lease": Lease, "fence": True, "watch": Watch}


def test_random_kills_zombies_and_new_drivers_never_make_the_bill_pass_the_cap() -> None:
    billed = [World(seed, **RULES).run(600) for seed in range(300)]
    assert 0.8 < max(billed) <= 1  # and the money is used


class Forever(Lease):
    def holds(self, now: float) -> bool:
        return True


class Late(Lease):
    def renewed(self, began: float, done: float) -> None:
        self.until = max(self.until, began + self.seconds)


class Hasty(Watch):
    def over(self, began: float, done: float, seen: Any) -> set[Any]:
        return set(seen)


LESS: dict[str, dict[str, Any]] = {
    "calls in flight count": {"settle": lambda one, over: one.spent if one.ended or over else one.share},
    "zombies are reserved": {"settle": lambda one, over: budget.settle(one, True)},
    "silence is waited for": {"watch": Hasty},
    "a lease runs out": {"lease": Forever},
    "a late write renews nothing": {"lease": Late},
    "a closed wave opens nothing": {"fence": False},
}


@pytest.mark.parametrize("rule", LESS)
def test_with_a_rule_less_the_cap_is_passed(rule: str) -> None:
    assert any(World(seed, **RULES | LESS[rule]).run(600) > 1 for seed in range(600))


def test_exact_decimals_are_read_as_they_are_written() -> None:
    assert budget.nano(Decimal("1.000000001")) == 1_000_000_001
    assert budget.nano("2500") == 2_500 * budget.NANO
