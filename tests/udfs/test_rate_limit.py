"""The pace of one task against servers that keep a limit to themselves, in seconds that only the test counts."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from udfs import rate_limit
from udfs.rate_limit import Limiter, Rate

Server = Callable[[float], float | None]  # now -> None: accepted; seconds to wait (0: it does not say)
Log = list[tuple[float, bool]]  # when a call began, and whether it was accepted


def bucket(limit: Callable[[float], float], burst: float = 5.0) -> Server:
    """A server that refills `limit(now)` calls a second and refuses when it has none."""
    left, at = burst, 0.0

    def ask(now: float) -> float | None:
        nonlocal left, at
        left, at = min(burst, left + (now - at) * limit(now)), now
        if left < 1:
            return 0.0
        left -= 1
        return None

    return ask


def window(calls: int, seconds: float = 60.0) -> Server:
    """A server that counts calls in fixed windows and says when the next one begins."""
    current, count = -1, 0

    def ask(now: float) -> float | None:
        nonlocal current, count
        if int(now // seconds) != current:
            current, count = int(now // seconds), 0
        count += 1
        return None if count <= calls else (current + 1) * seconds - now

    return ask


def simulate(rate: Rate, server: Server, seconds: float, latency: float = 0.2, refusal: float = 0.05, in_flight: int = 10_000) -> Log:
    """One task that always has more to ask. latency, refusal: seconds that an answer, and a 429, takes."""
    chance = random.Random(3)
    now, number, log = 0.0, 0, Log()
    flying: list[tuple[float, int, float, float | None]] = []
    while now < seconds:
        begins = now + rate.wait(now) if len(flying) < in_flight else float("inf")
        if flying and flying[0][0] <= begins:
            now, _, sent, said = heapq.heappop(flying)
            if said is None:
                rate.accepted(now)
            else:
                rate.refused(now, sent, said or None)
            continue
        now, number = begins, number + 1
        rate.send(now)
        said = server(now)
        log.append((now, said is None))
        heapq.heappush(flying, (now + (latency if said is None else refusal) * chance.uniform(0.7, 1.3), number, now, said))
    return log


def between(log: Log, begin: float, end: float) -> tuple[float, float]:
    """-> (accepted calls a second, share of 429s)."""
    found = [accepted for at, accepted in log if begin <= at < end]
    return sum(found) / (end - begin), 1 - sum(found) / len(found)


@pytest.mark.parametrize("limit", [1, 5, 40])
@pytest.mark.parametrize("overstated", [1.05, 1.5, 4, 10])
@pytest.mark.parametrize("latency", [0.2, 6.0])
def test_a_hidden_limit_is_held_to_95_percent_with_at_most_1_percent_of_429s(limit: float, overstated: float, latency: float) -> None:
    log = simulate(Rate(limit * overstated), bucket(lambda now: limit), 1800, latency)
    accepted, refused = between(log, 600, 1800)
    assert accepted >= 0.95 * limit
    assert refused <= 0.01


@pytest.mark.parametrize("limit", [2, 20, 60])
@pytest.mark.parametrize("latency", [0.2, 6.0])
def test_a_limit_that_is_halved_is_found_within_30_seconds(limit: float, latency: float) -> None:
    log = simulate(Rate(limit * 1.5), bucket(lambda now: limit if now < 600 else limit / 2), 700, latency)
    accepted, refused = between(log, 630, 700)
    assert accepted >= 0.9 * limit / 2
    assert refused <= 0.02


def test_a_limit_that_is_raised_again_is_used_again() -> None:
    log = simulate(Rate(20), bucket(lambda now: 20 if not 100 <= now < 200 else 5), 400)
    assert between(log, 140, 200)[0] >= 0.9 * 5
    assert between(log, 300, 400)[0] >= 0.95 * 20


def test_a_share_that_the_server_allows_is_kept_exactly_and_never_passed() -> None:
    log = simulate(Rate(12.5), bucket(lambda now: 1000, 1000), 100)
    assert between(log, 0, 100) == (pytest.approx(12.5, rel=0.01), 0)
    gaps = [later - earlier for (earlier, _), (later, _) in pairwise(log)]
    assert min(gaps) == pytest.approx(1 / 12.5)


def test_a_share_is_passed_only_where_the_config_allows_it_and_the_server_too() -> None:
    assert between(simulate(Rate(10, most=40), bucket(lambda now: 1000, 1000), 100), 50, 100)[0] == pytest.approx(40, rel=0.02)
    assert between(simulate(Rate(10, most=40), bucket(lambda now: 25), 400), 200, 400)[0] == pytest.approx(25, rel=0.05)


def test_retry_after_holds_the_whole_task_and_no_burst_follows() -> None:
    rate = Rate(10)
    rate.send(0.0)
    rate.refused(0.3, 0.0, retry_after=7.0)
    assert rate.wait(0.3) == 7.0
    rate.send(7.3)
    assert rate.wait(7.3) == pytest.approx(1 / rate.rate)


@pytest.mark.parametrize("said", [1e9, float("inf")])
def test_a_retry_after_beyond_reason_is_cut(said: float) -> None:
    rate = Rate(10)
    rate.hold(5.0, said)
    assert rate.wait(5.0) == rate_limit.LONGEST


@pytest.mark.parametrize("said", [-3.0, 0.0, float("nan"), None])
def test_a_retry_after_that_says_nothing_holds_nothing(said: float | None) -> None:
    rate = Rate(10)
    rate.hold(5.0, said)
    assert rate.wait(5.0) == 0


def test_many_429s_of_one_round_trip_lower_the_rate_once() -> None:
    rate = Rate(100)
    for number in range(50):
        rate.send(number / 100)
    for number in range(50):
        rate.refused(0.6 + number / 1000, number / 100)
    assert rate.rate == pytest.approx(100 * rate_limit.STEP)


def test_the_quota_of_a_minute_is_used_up_and_waited_for() -> None:
    accepted, refused = between(simulate(Rate(30), window(20 * 60), 1800), 600, 1800)
    assert accepted >= 0.95 * 20
    assert refused <= 0.01


def test_a_server_that_refuses_all_for_an_hour_is_asked_seldom_and_used_when_it_is_back() -> None:
    log = simulate(Rate(20), bucket(lambda now: 0 if 100 <= now < 3700 else 20), 3900)
    assert sum(100 <= at < 3700 for at, _ in log) < 400
    assert between(log, 3760, 3900)[0] >= 0.9 * 20


def test_a_late_caller_makes_up_for_a_few_calls_only() -> None:
    rate = Rate(10)
    rate.send(0.0)
    burst = 0
    while rate.wait(60.0) == 0:
        rate.send(60.0)
        burst += 1
    assert burst <= rate_limit.BUCKET + 1


@pytest.mark.parametrize("share", [0, -1, float("inf"), float("nan")])
def test_a_share_that_is_no_rate_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="calls a second"):
        Rate(share)


def test_coroutines_take_turns_at_the_pace_and_in_their_order() -> None:
    async def ask() -> tuple[list[int], float]:
        limiter, stop, order = Limiter(Rate(400)), asyncio.Event(), list[int]()
        begun = asyncio.get_running_loop().time()

        async def one(number: int) -> None:
            sent = await limiter.turn(stop)
            assert sent is not None
            order.append(number)
            limiter.hear(sent, False, None)

        await asyncio.gather(*(one(number) for number in range(100)))
        return order, asyncio.get_running_loop().time() - begun

    order, seconds = asyncio.run(ask())
    assert order == list(range(100))
    assert 0.23 <= seconds < 1.0


def test_who_waits_for_a_turn_is_told_of_a_stop_at_once() -> None:
    async def ask() -> list[float | None]:
        limiter, stop = Limiter(Rate(0.01)), asyncio.Event()
        assert await limiter.turn(stop) is not None
        waiting = [asyncio.create_task(limiter.turn(stop)) for _ in range(5)]
        await asyncio.sleep(0.01)
        stop.set()
        return await asyncio.wait_for(asyncio.gather(*waiting), 1)

    assert asyncio.run(ask()) == [None] * 5
