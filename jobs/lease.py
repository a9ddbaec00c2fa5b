"""One driver a stage: a lease file with a heartbeat, on any store; and the landing lock of a lake.

The file says who holds the stage. It is taken by writing it and reading it back after a pause, renewed by a thread,
and read again before every landing, so that of two drivers that race at most one goes on. A holder whose lease expired
(or whose process on this host is gone) is taken over; what it may still send is fenced in the tables (jobs/waves.py).
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from conf.section import Mistake
from udfs.opener import to_path
from udfs.reject import Reject

if TYPE_CHECKING:
    from jobs.lake import Lake

SETTLE_LOCAL, SETTLE_REMOTE = 0.05, 2.0  # seconds for a racing writer's file to become visible


class LeaseHeld(Mistake):
    """Another driver works on the stage."""


class LeaseLost(RuntimeError):
    """Another driver took the stage over while this one was silent."""


class Lease:
    """`with Lease(lake, "embed", run, seconds) as lease`: `lease.taken_over` is the dead holder's run, or None."""

    def __init__(self, lake: Lake, stage: str, run: str, seconds: int) -> None:
        self._opener, self._uri = lake.opener, lake.area("_leases", f"{stage}.json")
        self._stage, self._run, self._seconds = stage, run, seconds
        self._settle = SETTLE_LOCAL if lake.root.startswith("file://") else SETTLE_REMOTE
        self._stop = threading.Event()
        self._lost: str | None = None
        self.taken_over: str | None = None

    def refuse_holder(self) -> str | None:
        """-> the run of a dead holder, None when there is none. Raises LeaseHeld when one is alive."""
        holder = self._holder()
        if holder is not None and _is_alive(holder):
            raise LeaseHeld(self._refusal(holder))
        return None if holder is None else str(holder["run"])

    def __enter__(self) -> Lease:
        self.taken_over = self.refuse_holder()
        self._write()
        time.sleep(self._settle)
        if (holder := self._holder()) is None or holder["run"] != self._run:
            raise LeaseHeld(
                self._refusal(holder) if holder else f"stage {self._stage}: the lease was removed while it was taken; run again"
            )
        self._thread = threading.Thread(target=self._beat, daemon=True, name=f"lease-{self._stage}")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        holder = self._holder()
        if holder is not None and holder["run"] == self._run:
            self._opener.delete(self._uri)

    def check(self) -> None:
        """Before a landing: raises LeaseLost when the stage is no longer ours."""
        holder = self._holder()
        if self._lost is None:
            if holder is None:
                self._lost = "the lease file is gone"
            elif holder["run"] != self._run:
                self._lost = f"taken over by run {holder['run']} on {holder['host']}"
            elif holder["expires"] < time.time():  # this process slept past it: an heir may be reading the same file
                self._lost = "the lease expired before it was renewed"
        if self._lost is not None:
            raise LeaseLost(f"stage {self._stage}: {self._lost}; this run ({self._run}) stops; run again, complete waves are kept")

    def _beat(self) -> None:
        while not self._stop.wait(self._seconds / 3):
            try:
                self.check()
                self._write()
            except LeaseLost:
                return  # the next check() says so to the stage
            except Reject:
                continue  # the store did not answer: the next beat tries again, and check() decides

    def _write(self) -> None:
        told = {"run": self._run, "host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        told |= {"expires": math.ceil(time.time() + self._seconds)}  # of one length: a beat while it is read cannot cut it
        self._opener.write(self._uri, json.dumps(told).encode())

    def _holder(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._opener.read(self._uri))
        except Reject as reject:
            if reject.code != "missing":
                raise
            return None

    def _refusal(self, holder: dict[str, Any]) -> str:
        left = max(0, round(holder["expires"] - time.time()))
        return (
            f"stage {self._stage} is held by run {holder['run']} (pid {holder['pid']} on {holder['host']}); "
            f"its lease ends in {left} s unless renewed: wait for it, or stop that process and run again"
        )


def _is_alive(holder: dict[str, Any]) -> bool:
    if holder["host"] == socket.gethostname() and holder["started"] is not None:
        return _started(holder["pid"]) == holder["started"] and holder["expires"] > time.time()
    return holder["expires"] > time.time()


def _started(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot: with the pid it names one process (Linux; else None)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as told:
            fields = told.read().rpartition(b")")[2].split()
            return int(fields[19]) if fields[0] not in (b"Z", b"X") else None  # killed, but not yet reaped by its parent
    except (FileNotFoundError, ProcessLookupError):
        return None


@contextmanager
def landing(lake: Lake, run: str, seconds: int) -> Iterator[None]:
    """One landing at a time where Delta's log store is safe for one JVM only: on a local disk, and on S3 as Delta comes. A dead
    holder's lock is free: at once on a local disk, on S3 when its `seconds` are over. A catalog orders commits itself.
    """
    if lake.has_catalog:
        yield
    elif lake.root.startswith("file://"):
        path = to_path(lake.area("_leases", "landing.lock"))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    else:
        with _wait_for(lambda: Lease(lake, "landing", run, seconds)) as lock_of_all:
            yield
            lock_of_all.check()


@contextmanager
def _wait_for(lease: Callable[[], Lease]) -> Iterator[Lease]:
    """Holds a lease as soon as its holder lets it go."""
    with ExitStack() as stack:
        held: Lease | None = None
        while held is None:
            try:
                held = stack.enter_context(lease())
            except LeaseHeld:
                time.sleep(SETTLE_REMOTE)
        yield held
