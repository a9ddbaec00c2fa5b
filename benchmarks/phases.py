"""A lake that waits for embed -> wall and CPU seconds of each step of the stage, timed from outside.

    python -m benchmarks.phases OUT.json --config FILE --set ...

CPU is the whole process tree's (living processes and those that their parents have waited for) between the start and the end of a
step; the landing of a single wave does not overlap with its computation, so steps add up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import tree_cpu
from conf.settings import command_line
from jobs import embed, session, waves
from jobs.lake import Lake

STEPS = {"recover": "look for earlier runs", "plan": "plan", "_stage_wave": "compute and stage the wave", "_land": "land the wave"}


class Clock:
    """Sums wall and CPU seconds by step."""

    def __init__(self) -> None:
        self.steps: dict[str, tuple[float, float]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        wall, cpu = time.monotonic(), tree_cpu()
        yield
        before = self.steps.get(name, (0.0, 0.0))
        self.steps[name] = (before[0] + time.monotonic() - wall, before[1] + tree_cpu() - cpu)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*given: Any, **named: Any) -> Any:
            with self.step(name):
                return function(*given, **named)

        return timed


def main() -> None:
    doc = __doc__ or ""
    settings, arguments = command_line(doc, {"out": "where the figures go, as JSON"})
    clock = Clock()
    started = psutil.Process()
    clock.steps["start Python, import, read settings"] = (time.time() - started.create_time(), tree_cpu())
    with clock.step("start the session (JVM)"):
        lake = Lake(session.start(settings.spark), settings)
    with clock.step("look for the tables"):
        lake.create()
    for method, name in STEPS.items():
        setattr(waves.Stage, method, clock.wrap(name, getattr(waves.Stage, method)))
    wall, cpu = time.monotonic(), tree_cpu()
    embed.run(lake, settings)
    inside = [clock.steps[name] for name in STEPS.values()]
    rest = (time.monotonic() - wall - sum(step[0] for step in inside), tree_cpu() - cpu - sum(step[1] for step in inside))
    clock.steps["the rest (lease, pending query's plan, cleaning up)"] = rest
    Path(arguments.out).write_text(json.dumps(clock.steps))


if __name__ == "__main__":
    main()
