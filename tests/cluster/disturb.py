"""What the fault tests watch and hold from outside: the landing lock, staged waves, a table's commits. No hook in the product."""

from __future__ import annotations

import fcntl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")
PATIENCE = 300  # seconds; a first landing took 80 on a quiet machine and over 100 beside another Spark job


def wait_for(find: Callable[[], Found | None], job: subprocess.Popen[bytes], log: Path, what: str, every: float = 0.02) -> Found:
    """Polls until `find` finds something. Fails when the job ends before, or after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while (found := find()) is None:
        assert job.poll() is None, f"the job ended before {what}:\n{log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"no {what} in {PATIENCE} s:\n{log.read_text()[-4000:]}"
        time.sleep(every)
    return found


def staged(lake: Path, wave: int) -> Path | None:
    """The folder of a wave of `embed` that some run is computing or has staged."""
    return next(iter(lake.glob(f"_staging/embed/*/wave-{wave:06d}")), None)


def complete(lake: Path, wave: int) -> Path | None:
    """... once it is staged completely."""
    folder = staged(lake, wave)
    return folder if folder is not None and (folder / "complete.json").exists() else None


def is_computing(lake: Path, wave: int) -> Path | None:
    """... while tasks write it."""
    folder = staged(lake, wave)
    is_written = folder is not None and any(folder.glob("rows/_temporary/*/_temporary/*/*.parquet"))
    return folder if is_written and complete(lake, wave) is None else None


def committed(lake: Path, table: str, version: int) -> Path | None:
    """The file that makes a table's version."""
    log = lake / table / "_delta_log" / f"{version:020d}.json"
    return log if log.exists() else None


@contextmanager
def landing_held(lake: Path) -> Iterator[None]:
    """Nothing lands while this is held: the lock is the one that drivers take, as another driver's landing would hold it."""
    with (lake / "_leases" / "landing.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
