"""How far a long stage is: done / total, images per second, time left; and how long a plan will take, from the last run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from jobs.lake import Lake
from udfs.reject import Reject

EVERY = 10.0  # seconds between two lines of a wave


class Progress:
    """Prints a line at the end of each wave, and every EVERY seconds within one from Spark's count of finished tasks."""

    def __init__(self, lake: Lake, stage: str, total: int) -> None:
        self._lake, self._stage, self._total = lake, stage, total
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
        print(f"{self._stage}: {done}/{self._total} images, {rate:.1f} images/s{left} ({what})", flush=True)


@contextmanager
def of(lake: Lake, stage: str, total: int) -> Iterator[Progress]:
    """Progress of a run; its rate is kept for the next plan."""
    told = Progress(lake, stage, total)
    yield told
    lake.opener.write(_rates(lake, stage), json.dumps({"images_per_second": told.rate(), "images": total}).encode())


def estimate(lake: Lake, stage: str, rows: int) -> str:
    """Pending rows -> a line for `--plan`."""
    if rows == 0:
        return f"{stage}: nothing to do"
    try:
        last = json.loads(lake.opener.read(_rates(lake, stage)))
    except Reject as reject:
        if reject.code != "missing":
            raise
        return f"{stage}: {rows} pending; how long is unknown, no earlier run of this stage was measured on this lake"
    seconds = rows / last["images_per_second"]
    return f"{stage}: {rows} pending, about {duration(seconds)} at the last run's {last['images_per_second']:.1f} images/s"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _job_stages(tracker: object, job: int) -> list[int]:
    info = tracker.getJobInfo(job)  # type: ignore[attr-defined]
    return list(info.stageIds) if info is not None else []


def _rates(lake: Lake, stage: str) -> str:
    return lake.area("_rates", f"{stage}.json")
