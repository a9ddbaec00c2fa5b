"""A trainer's file and its arguments -> that trainer, run here as one rank: what torchrun is given on an executor.

Spark ends a task by killing its Python worker; torchrun, a child of that, would live on with its rank, hold the training's folder and
meet the ranks that Spark starts anew. So a thread watches the worker and ends this process soon after it.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

EVERY, GRACE = 1.0, 10.0  # seconds between two looks, and for the trainer to end by itself


def main() -> None:
    sys.argv = sys.argv[1:]
    agent = os.getppid()  # torchrun
    threading.Thread(target=_watch, args=(agent, _parent(agent)), daemon=True).start()
    sys.path[0] = os.path.dirname(sys.argv[0])  # as when it is run itself
    runpy.run_path(sys.argv[0], run_name="__main__")


def _watch(agent: int, worker: int) -> None:
    while _parent(agent) == worker and os.getppid() == agent:
        time.sleep(EVERY)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


def _parent(pid: int) -> int:
    """Pid -> its parent's; 0 when it is gone (Linux)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as told:
            return int(told.read().rpartition(b")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


if __name__ == "__main__":
    main()
