"""How far a long stage is: done / total, rate, time left; and how long a plan will take, from an earlier run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jobs.lake import Lake
from udfs.reject import Reject

EVERY = 10.0  # seconds between two lines of a wave
SMALL = 0.1  # of the rows of the run whose rate is kept: a smaller run does not replace it


class Progress:
    """Prints a line at the end of each wave, and every EVERY seconds within one from Spark's count of finished tasks."""

    def __init__(self, lake: Lake, stage: str, total: int, unit: str) -> None:
        self._lake, self._stage, self._total, self._unit = lake, stage, total, unit
        self._done = 0
        self._start = time.monotonic()

    @contextmanager
    def wave(self, number: int, waves: int, rows: int) -> Iterator[None]:
        group = f"{self._stage}-wave-{number}-{id(self)}"
        context = self._lake.spark.sparkContext
        context.setJobGroup(group, f"studbook {self._stage}, wave {number + 1} of {waves}")
        stop = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(group, rows, f"wave {number + 1} of {waves}", stop), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()
        self._done += rows
        self._tell(self._done, f"wave {number + 1} of {waves} computed")

    def rate(self) -> float:
        return self._done / max(time.monotonic() - self._start, 1e-9)

    def _watch(self, group: str, rows: int, what: str, stop: threading.Event) -> None:
        tracker = self._lake.spark.sparkContext.statusTracker()
        while not stop.wait(EVERY):
            stages = [stage for job in tracker.getJobIdsForGroup(group) for stage in _job_stages(tracker, job)]
            infos = [info for info in map(tracker.getStageInfo, stages) if info is not None]
            if infos:
                last = max(infos, key=lambda info: info.stageId)  # the one that writes the wave
                self._tell(self._done + round(rows * last.numCompletedTasks / max(last.numTasks, 1)), what)

    def _tell(self, done: int, what: str) -> None:
        seconds = time.monotonic() - self._start
        rate = done / seconds
        left = f", about {duration((self._total - done) / rate)} left" if 0 < done < self._total else ""
        print(f"{self._stage}: {done}/{self._total} {self._unit}, {rate:.1f} {self._unit}/s{left} ({what})", flush=True)


@contextmanager
def of(lake: Lake, stage: str, total: int, unit: str = "images") -> Iterator[Progress]:
    """Progress of a run. Its rate is kept for the next plan, unless a much larger run's is known: a small run is all start-up."""
    told = Progress(lake, stage, total, unit)
    yield told
    known = _measured(lake, stage)
    if known is None or total >= SMALL * known["rows"]:
        lake.opener.write(_rates(lake, stage), json.dumps({"per_second": told.rate(), "rows": total}).encode())


def estimate(lake: Lake, stage: str, rows: int, unit: str = "images") -> str:
    """Pending rows -> a line for `--plan`."""
    if rows == 0:
        return f"{stage}: nothing to do"
    known = _measured(lake, stage)
    if known is None:
        return f"{stage}: {rows} {unit} pending; how long is unknown, no earlier run of this stage was measured on this lake"
    rate = f"{known['per_second']:.1f} {unit}/s of an earlier run of {known['rows']}"
    return f"{stage}: {rows} {unit} pending, about {duration(rows / known['per_second'])} at the {rate}"


def _measured(lake: Lake, stage: str) -> dict[str, Any] | None:
    try:
        return json.loads(lake.opener.read(_rates(lake, stage)))
    except Reject as reject:
        if reject.code != "missing":
            raise
        return None


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _job_stages(tracker: object, job: int) -> list[int]:
    info = tracker.getJobInfo(job)  # type: ignore[attr-defined]
    return list(info.stageIds) if info is not None else []


def _rates(lake: Lake, stage: str) -> str:
    return lake.area("_rates", f"{stage}.json")
