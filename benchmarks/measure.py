"""A command -> its wall time, the CPU time of its whole process tree, and the peak memory of each kind of process in it.

    python -m benchmarks.measure OUT.json COMMAND ...

CPU is the kernel's own account (rusage of children), complete when the last process of the tree has gone: this process adopts
what the command leaves behind (JVM, Python workers; PR_SET_CHILD_SUBREAPER) and waits for it. Memory is RSS, sampled. Linux only.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

EVERY = 0.25  # seconds between two samples of memory
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of <linux/prctl.h>


def run(command: list[str], log: Path) -> dict[str, Any]:
    """Runs the command, its output into `log` -> {wall, cpu (seconds), rss (kind -> MB of its largest process), status}."""
    assert ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, 1, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
    start, before = time.monotonic(), _children_cpu()
    with log.open("w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    peaks: dict[str, float] = {}
    stop = threading.Event()
    sampler = threading.Thread(target=_sample, args=(child.pid, peaks, stop), daemon=True)
    sampler.start()
    status = child.wait()
    wall = time.monotonic() - start
    stop.set()
    sampler.join()
    _wait_for_orphans()
    return {"wall": wall, "cpu": _children_cpu() - before, "rss": peaks, "status": status}


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _wait_for_orphans() -> None:
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:  # none is left
            return


def _sample(pid: int, peaks: dict[str, float], stop: threading.Event) -> None:
    while not stop.wait(EVERY):
        try:
            tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in tree:
            try:
                kind = kind_of(process.cmdline(), process.pid == pid)
                peaks[kind] = max(peaks.get(kind, 0.0), process.memory_info().rss / 2**20)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # it ended between two calls


def kind_of(command: list[str], is_root: bool) -> str:
    """A process of the tree -> "driver" (the command itself), "JVM", "worker" (any other Python) or "other" (a shell)."""
    if is_root:
        return "driver"
    program = Path(command[0]).name if command else ""
    if program == "java":
        return "JVM"
    return "worker" if program.startswith("python") else "other"


def main() -> None:
    out, command = Path(sys.argv[1]), sys.argv[2:]
    out.write_text(json.dumps(run(command, out.with_suffix(".log"))))


if __name__ == "__main__":
    main()
