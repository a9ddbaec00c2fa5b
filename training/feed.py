"""An export's files -> batches of numpy columns in a planned order. The only file that knows petastorm.

The order of an epoch is one global sequence of rows, a pure function of (manifest sha256, seed, epoch): files are
shuffled and dealt into windows of bounded size, and the rows of a window are shuffled together. The world size only
cuts that sequence: step s of W ranks with batches of B takes rows [s*B*W, (s+1)*B*W), rank r the r-th B of them. So every
rank makes equal steps, and the rows of the last one that do not exist are copies with weight 0. With `together` (a column),
rows that share its value stay next to each other, and so meet in one batch unless a batch ends between them.

petastorm 0.13.1, measured: its default thread pool loses rows, `cur_shard` gives ranks unequal rows, epochs repeat their
order, unsupported columns are dropped with only a warning. Hence a dummy-pool reader a file in threads, no shards, one
epoch a reader, and rows and fields compared with the manifest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from conf.settings import Mistake
from training.exports import Export, File

WINDOW_BYTES = 128 * 2**20  # files whose rows are shuffled together; two windows are in memory at once
READERS = 2  # prefetch threads: one petastorm reader a file in each

Rows = dict[str, npt.NDArray[Any]]  # column -> [rows]; binary columns hold bytes objects


class Batch(NamedTuple):
    """`weight` is 0 for copies that fill up the last step; `step_rows` counts the real rows of all ranks in this step."""

    rows: Rows
    weight: npt.NDArray[np.float32]
    step_rows: int


@dataclass(frozen=True)
class Plan:
    """What one rank reads in one epoch, and in which order."""

    export: Export
    bucket: str
    seed: int
    epoch: int
    batch_size: int  # of one rank
    rank: int = 0
    world: int = 1
    together: str | None = None

    @property
    def steps(self) -> int:
        return -(-self.export.rows(self.bucket) // (self.batch_size * self.world))

    def generator(self, *what: object) -> np.random.Generator:
        """A random state of its own for each use: nothing of the rank or the world enters the global order."""
        seed = json.dumps([self.export.sha256, self.bucket, self.seed, self.epoch, *what]).encode()
        return np.random.default_rng(int.from_bytes(hashlib.sha256(seed).digest()[:16], "little"))

    def windows(self) -> list[list[File]]:
        """The epoch's files in order, in runs of about WINDOW_BYTES (a larger file is a window of its own)."""
        files = self.export.files(self.bucket)
        windows: list[list[File]] = []
        room = 0
        for index in self.generator("files").permutation(len(files)):
            if files[index].bytes > room:
                windows.append([])
                room = WINDOW_BYTES
            windows[-1].append(files[index])
            room -= files[index].bytes
        return windows


def quiet() -> None:
    """Keep off the screen what petastorm's calls into pyarrow's legacy dataset warn of: 15 deprecations a file.

    By a logging filter: warnings filters are lost now and then when several threads enter `catch_warnings` [seen].
    """
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addFilter(_not_petastorm)


def _not_petastorm(record: logging.LogRecord) -> bool:
    return "/petastorm/" not in record.getMessage()


def read(export: Export, file: File, columns: Sequence[str] = ()) -> Rows:
    """One verified file -> its columns (all, or those named), by one petastorm reader. Strings become numpy text."""
    from petastorm import make_batch_reader

    wanted = list(columns or export.manifest.columns)
    url = f"file://{(export.root / file.file).resolve()}"  # petastorm does not undo percent-encoding
    fields = [f"^{re.escape(name)}$" for name in wanted]
    reader = make_batch_reader([url], schema_fields=fields, reader_pool_type="dummy", shuffle_row_groups=False, num_epochs=1)
    try:
        # One row group is one batch. Asking for a second could hang (the dummy pool waits for an item that its feeding
        # thread has not yet marked as the last), and `verify` has seen that there is none.
        rows: Rows = next(reader)._asdict()
    finally:
        reader.stop()  # not the context manager: its exit prints "Cache cleanup complete."
        reader.join()
    counts = {name: len(column) for name, column in rows.items()}
    if counts != dict.fromkeys(wanted, file.rows):
        raise Mistake(f"{file.file}: petastorm gave {counts}, the manifest says {file.rows} rows of {wanted}")
    return rows


def read_bucket(export: Export, bucket: str, columns: Sequence[str] = ()) -> Rows:
    """All rows of a bucket in the manifest's order, in memory: for evaluation."""
    return _join([read(export, file, columns) for file in export.files(bucket)])


def batches(plan: Plan) -> Iterator[Batch]:
    """Plan -> its `steps` batches of `batch_size` rows. Files of the next window are read while this one is used."""
    whole = plan.batch_size * plan.world
    rest: list[Rows] = []
    seen = 0
    for window in _windows(plan):
        seen += len(window[plan.together or next(iter(window))])
        rows = _join([*rest, window])
        ready = len(next(iter(rows.values()))) // whole * whole
        for start in range(0, ready, whole):
            yield _cut(plan, {name: column[start : start + whole] for name, column in rows.items()}, whole)
        rest = [{name: column[ready:] for name, column in rows.items()}]
    left = len(next(iter(rest[0].values())))
    if left:
        yield _cut(plan, rest[0], left)
    assert seen == plan.export.rows(plan.bucket), (seen, plan)


def _windows(plan: Plan) -> Iterator[Rows]:
    """The plan's windows, each read in full and shuffled, one ahead of the consumer."""
    windows = plan.windows()
    with ThreadPoolExecutor(READERS, thread_name_prefix="feed") as pool:
        ahead: list[Future[Rows]] = []
        for index, _ in enumerate(windows):
            current = ahead or [pool.submit(read, plan.export, file) for file in windows[index]]
            following = windows[index + 1] if index + 1 < len(windows) else []
            ahead = [pool.submit(read, plan.export, file) for file in following]
            rows = _join([future.result() for future in current])
            order = _shuffle(rows[plan.together] if plan.together else None, len(next(iter(rows.values()))), plan.generator("rows", index))
            yield {name: column[order] for name, column in rows.items()}


def _shuffle(groups: npt.NDArray[Any] | None, count: int, generator: np.random.Generator) -> npt.NDArray[np.intp]:
    """A random order of `count` rows; rows of one group stay together, groups and the rows in them in random order."""
    order = generator.permutation(count)
    if groups is None:
        return order
    _, group = np.unique(groups, return_inverse=True)
    place = generator.permutation(group.max() + 1)
    return order[np.argsort(place[group[order]], kind="stable")]


def _cut(plan: Plan, rows: Rows, step_rows: int) -> Batch:
    """The rows of one step -> this rank's share, filled up with copies of the step's first row at weight 0."""
    mine = np.arange(plan.rank * plan.batch_size, (plan.rank + 1) * plan.batch_size)
    real = mine < step_rows
    take = np.where(real, mine, 0)
    return Batch({name: column[take] for name, column in rows.items()}, real.astype(np.float32), step_rows)


def _join(parts: list[Rows]) -> Rows:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
