"""A command -> its wall time, the CPU time of its whole process tree, and the peak memory of each kind of process in it.

    python -m benchmarks.measure OUT.json COMMAND ...

CPU is the kernel's own account (rusage of children), complete when the last process of the tree has gone: this process adopts
what the command leaves behind (JVM, Python workers; PR_SET_CHILD_SUBREAPER) and waits for it. A process whose parent ignores
SIGCHLD, as `pyspark.daemon` does, is in nobody's account when it ends before that parent: its last sample stands for it (Spark's
Python workers idle before they end, so no more than one interval of work can be missed). Memory is RSS, sampled. Linux only.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

EVERY = 0.1  # seconds between two samples
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of <linux/prctl.h>


def run(command: list[str], log: Path) -> dict[str, Any]:
    """Runs the command, its output into `log` -> {wall, cpu (seconds), rss (kind -> MB of its largest process), status}."""
    assert ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, 1, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
    start, before = time.monotonic(), _children_cpu()
    with log.open("w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    samples = Samples()
    sampler = threading.Thread(target=samples.take, args=(child.pid,), daemon=True)
    sampler.start()
    status = child.wait()
    wall = time.monotonic() - start
    waited_for = _wait_for_orphans()
    samples.stop.set()
    sampler.join()
    lost = sum(cpu for pid, cpu in samples.unaccounted.items() if pid not in waited_for)
    return {"wall": wall, "cpu": _children_cpu() - before + lost, "rss": samples.peaks, "status": status}


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _wait_for_orphans() -> set[int]:
    """-> the pids of what was left behind, once all of it has ended: the kernel has added their CPU time to ours."""
    waited_for = set()
    while True:
        try:
            waited_for.add(os.waitpid(-1, 0)[0])
        except ChildProcessError:  # none is left
            return waited_for


class Samples:
    """`peaks`: kind of process -> MB of its largest. `unaccounted`: pid -> CPU seconds of processes whose parent ignores SIGCHLD."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}
        self.unaccounted: dict[int, float] = {}
        self.stop = threading.Event()

    def take(self, command: int) -> None:
        """Every EVERY seconds until `stop`, of all processes below this one; `command` is the pid of the measured one."""
        while not self.stop.wait(EVERY):
            for process in psutil.Process().children(recursive=True):
                try:
                    self._one(process, command)
                except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError, ProcessLookupError):
                    continue  # it ended between two calls

    def _one(self, process: psutil.Process, command: int) -> None:
        kind = kind_of(process.cmdline(), process.pid == command)
        self.peaks[kind] = max(self.peaks.get(kind, 0.0), process.memory_info().rss / 2**20)
        if ignores_children(process.ppid()):
            self.unaccounted[process.pid] = sum(process.cpu_times()[:4])


def ignores_children(pid: int) -> bool:
    """Whether a process ignores SIGCHLD: then the kernel keeps no account of its children that end."""
    (told,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn:"))
    return bool(int(told.split()[1], 16) >> (signal.SIGCHLD - 1) & 1)


def kind_of(command: list[str], is_root: bool) -> str:
    """A process of the tree -> "driver" (the command itself), "JVM", "worker" (any other Python) or "other" (a shell, Ray's raylet)."""
    if is_root:
        return "driver"
    program = Path(command[0]).name if command else ""
    if program == "java":
        return "JVM"
    # Ray names its Python workers after what they do
    return "worker" if program.startswith(("python", "ray::")) else "other"


def tree_cpu() -> float:
    """CPU seconds of this process and its descendants so far."""
    here = psutil.Process()
    total = 0.0
    for process in [here, *here.children(recursive=True)]:
        try:
            total += sum(process.cpu_times()[:4])  # user, system, and the same of children that were waited for
        except psutil.NoSuchProcess:
            continue
    return total


def main() -> None:
    out, command = Path(sys.argv[1]), sys.argv[2:]
    out.write_text(json.dumps(run(command, out.with_suffix(".log"))))


if __name__ == "__main__":
    main()
