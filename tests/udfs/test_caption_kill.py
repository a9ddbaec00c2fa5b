"""Attempts that are killed with kill -9 in the middle: what was journaled is not asked again, and what was asked is paid for in the account."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.udfs.test_caption_run import TERMS, Scripted, answer, attempt, journaled, staged, states
from udfs.caption_budget import settle
from udfs.caption_request import Request
from udfs.caption_wave import read_wave
from udfs.opener import Opener, to_uri

ROWS, KILLS = 600, 3
ROOT = Path(__file__).parents[2]


class Counted(Scripted):
    """A captioner that notes every call in a file before it answers: what its server would have billed."""

    def __init__(self, log: Path, seconds: float) -> None:
        super().__init__(lambda number, call, request: answer(), seconds)
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    async def ask(self, request: Request, image: bytes, mime: str):  # type: ignore[no-untyped-def]
        os.write(self._log, request.key.encode() + b"\n")
        return await super().ask(request, image, mime)


def test_after_kills_nothing_journaled_is_asked_again_and_the_account_covers_every_call(tmp_path: Path) -> None:
    wave, log = to_uri(str(tmp_path / "run" / "wave")), tmp_path / "asked"
    log.touch()
    bought_before: list[tuple[int, set[str]]] = []  # calls made, and keys journaled, when an attempt begins
    for number in range(KILLS):
        code = f"""
from pathlib import Path
from tests.udfs.test_caption_kill import ROWS, Counted
from tests.udfs.test_caption_run import attempt
for frame in attempt({wave!r}, Counted(Path({str(log)!r}), 0.01), ROWS, {number}):
    pass
"""
        begun = len(log.read_bytes().splitlines())
        bought_before.append((begun, {record.key for record in journaled(wave)}))
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}) as worker:
            deadline = time.monotonic() + 60
            while len(log.read_bytes().splitlines()) < begun + 90 + 17 * number and time.monotonic() < deadline:
                time.sleep(0.005)
            worker.kill()
    bought_before.append((len(log.read_bytes().splitlines()), {record.key for record in journaled(wave)}))
    rows = staged(attempt(wave, Counted(log, 0.001), ROWS, KILLS))
    assert states(rows) == {("whole", None): ROWS}

    asked = log.read_text().split()
    assert len(set(asked)) == ROWS
    for number, (begin, bought) in enumerate(bought_before):
        end = bought_before[number + 1][0] if number < KILLS else len(asked)
        assert bought.isdisjoint(asked[begin:end])
    assert len(bought_before[-1][1]) >= KILLS * 60
    assert len(asked) <= ROWS + KILLS * TERMS.unsettled
    attempts = read_wave(Opener(), wave).attempts
    assert sorted(attempts) == [(0, number) for number in range(KILLS + 1)]
    assert [attempts[0, number].ended for number in range(KILLS + 1)] == [False] * KILLS + [True]
    spent, most = sum(one.spent for one in attempts.values()), sum(settle(one, over=True) for one in attempts.values())
    assert spent <= 60 * len(asked) <= most
