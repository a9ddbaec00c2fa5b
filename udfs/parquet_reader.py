"""A parquet file with an image column -> its rows, read by a process of its own.

pyarrow 14 (petastorm asks for it) can be crashed by a damaged page: one in some 7,000 files with one to five wrong bytes ended the process
that read it. So that no file ends a Spark worker, its first reading, which is ingest's, is done by a child: a crash is a reject of the
file from that row on. What a child has read in this state of the file is later read in the worker. A child takes one file after
the other; it starts in half a second and copies the bytes through a pipe at some 1 GB/s.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from udfs.opener import Opener
from udfs.parquet_rows import Row
from udfs.reject import Reject

CHILDREN = 2  # of a worker at a time, each with the memory of a row group
_slots = threading.Semaphore(CHILDREN)
_idle: list[subprocess.Popen[bytes]] = []


def rows(opener: Opener, **keywords: Any) -> Iterator[Row]:
    """As udfs.parquet_rows.rows, raising what that raises. A crash of the reader is parquet_broken, its being killed is unreadable."""
    opener.stat(keywords["uri"])  # credentials that are not there are told here, not by a child
    with _slots:
        child = _idle.pop() if _idle else _started()
        last: Row | None = None
        clean = False
        try:
            for row in _asked(child, (opener.stores, keywords)):
                last = row
                yield row
            clean = True
        except Reject:
            clean = True
            raise
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            refused = _died(child)
            if last is None or refused.transient:
                raise refused from None
            yield Row(last.row_group, last.row + 1, refused=refused)
        finally:
            if clean:
                _idle.append(child)
            else:
                child.kill()
                child.communicate()


def _asked(child: subprocess.Popen[bytes], request: object) -> Iterator[Row]:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(pickle.dumps(request))
    child.stdin.flush()
    while isinstance(answer := pickle.load(child.stdout), Row):
        yield answer
    if answer is not None:
        raise answer


def _started() -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)  # of the worker: Spark adds to it
    command = [sys.executable, "-m", "udfs.parquet_rows"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths})


def _died(child: subprocess.Popen[bytes]) -> Reject:
    status = child.wait()
    if status >= 0:
        raise RuntimeError(f"the process that reads parquet files ended with status {status}; what it said stands in this worker's log")
    if -status in (signal.SIGKILL, signal.SIGTERM):  # no memory, or somebody's order
        return Reject("unreadable", "the process that read the file was killed")
    return Reject("parquet_broken", f"the reader crashed here (signal {-status}); the rest of the file was not read")
