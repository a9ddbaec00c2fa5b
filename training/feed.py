"""An export's files -> batches of numpy columns in a planned order. The only file that knows petastorm.

The order of an epoch is one global sequence of rows, a pure function of (manifest sha256, bucket, seed, epoch): files are
shuffled and dealt into windows of bounded size, and the rows of a window are shuffled together. With `together` (a column), rows
that share its value stay next to each other. The world only cuts that sequence: step s takes its rows [s * G, (s + 1) * G), G =
rows_per_step; of W ranks rank r takes the r-th G / W of them, in micro-batches. So every rank makes equal steps, any world size
makes the same steps, and a training may stop at a row and go on there with another number of ranks. The rows of the last step
that do not exist are copies of one that does, at weight 0.

Every rank reads whole windows (from the page cache, or a spool that the ranks of a machine share) and prepares only its own
rows: reading is cheap beside training, and an order that no rank's share of files bends is what exact resume needs.

petastorm 0.13.1, measured: its default thread pool loses rows, `cur_shard` gives ranks unequal rows, epochs repeat their
order, unsupported columns are dropped with only a warning. Hence a dummy-pool reader a file in threads, no shards, one
epoch a reader, and rows, fields and ids compared with the manifest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from conf.section import Mistake
from training.exports import Export, File
from udfs.ahead import ahead
from udfs.snapshot import id_sum

WINDOW_BYTES = 128 * 2**20  # files whose rows are shuffled together; two windows are in memory at once
READERS = 2  # prefetch threads: one petastorm reader a file in each
AHEAD = 2  # prepared micro-batches that wait, for each thread that prepares

Rows = dict[str, npt.NDArray[Any]]  # column -> [rows]; binary columns hold bytes objects
Arrays = dict[str, npt.NDArray[Any]]
Prepare = Callable[[Rows, int], Arrays]
Index = npt.NDArray[np.intp]


class Batch(NamedTuple):
    """One micro-batch of one rank. `weight` is 0 for copies that fill up the last step, else 1.

    `step` counts from the plan's start; `step_rows` are the real rows of all ranks and micro-batches in it; `last`: it ends the step.
    """

    rows: Rows  # what `prepare` made of them, or the columns
    image_id: npt.NDArray[Any]
    weight: npt.NDArray[np.float32]
    step: int
    step_rows: int
    last: bool


class Places(NamedTuple):
    """Rows of the global order: the file's number in the bucket's list, and the row in it."""

    file: Index
    row: Index


@dataclass(frozen=True)
class Plan:
    """What one rank reads in one epoch, and in which order, from global row `start` on."""

    export: Export
    bucket: str
    seed: int
    epoch: int
    rows_per_step: int
    micro_batch: int
    rank: int = 0
    world: int = 1
    start: int = 0
    together: str | None = None
    apart: str | None = None  # a bucket whose images must not occur: held-out ones

    def __post_init__(self) -> None:
        assert self.rows_per_step % (self.micro_batch * self.world) == 0, self
        assert 0 <= self.start <= self.rows, self

    @property
    def rows(self) -> int:
        """Of the whole epoch."""
        return self.export.rows(self.bucket)

    @property
    def steps(self) -> int:
        """From `start` to the end of the epoch."""
        return -(-(self.rows - self.start) // self.rows_per_step)

    def at(self, epoch: int, start: int = 0) -> Plan:
        return replace(self, epoch=epoch, start=start)

    def generator(self, *what: object) -> np.random.Generator:
        """A random state of its own for each use: nothing of the rank or the world enters the global order."""
        seed = json.dumps([self.export.sha256, self.bucket, self.seed, self.epoch, *what]).encode()
        return np.random.default_rng(int.from_bytes(hashlib.sha256(seed).digest()[:16], "little"))

    def windows(self) -> list[list[int]]:
        """The epoch's files (numbers in the bucket's list) in order, in runs of about WINDOW_BYTES; a larger file is one of its own."""
        files = self.export.files(self.bucket)
        windows: list[list[int]] = []
        room = 0
        for number in self.generator("files").permutation(len(files)):
            if files[number].bytes > room:
                windows.append([])
                room = WINDOW_BYTES
            windows[-1].append(int(number))
            room -= files[number].bytes
        return windows

    def ahead(self) -> list[tuple[int, list[int], int]]:
        """The windows that have rows at or after `start`: their number, files, and how many of their first rows are before it."""
        files, windows = self.export.files(self.bucket), self.windows()
        ends = list(accumulate(sum(files[number].rows for number in window) for window in windows))
        begins = [0, *ends[:-1]]
        return [(i, windows[i], max(0, self.start - begins[i])) for i in range(len(windows)) if ends[i] > self.start]

    def order(self, window: int, count: int, groups: npt.NDArray[Any] | None) -> Index:
        """The order of a window's `count` rows; rows of one group stay together, groups and the rows in them in random order."""
        generator = self.generator("rows", window)
        order = generator.permutation(count)
        if groups is None:
            return order
        _, group = np.unique(groups, return_inverse=True)
        place = generator.permutation(group.max() + 1)
        return order[np.argsort(place[group[order]], kind="stable")]

    def mine(self, step_rows: int) -> tuple[Index, npt.NDArray[np.float32]]:
        """Real rows of a step -> which of them this rank takes (0 for those that do not exist), and their weights."""
        share = self.rows_per_step // self.world
        places = np.arange(self.rank * share, (self.rank + 1) * share)
        real = places < step_rows
        return np.where(real, places, 0), real.astype(np.float32)


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
    fields = [f"^{re.escape(name)}$" for name in wanted]
    with export.held(file) as path:
        url = f"file://{path.resolve()}"  # petastorm does not undo percent-encoding
        reader = make_batch_reader([url], schema_fields=fields, reader_pool_type="dummy", shuffle_row_groups=False, num_epochs=1)
        try:
            # One row group is one batch. Asking for a second could hang (the dummy pool waits for an item that its feeding
            # thread has not yet marked as the last), and `held` has seen that there is none.
            rows: Rows = next(reader)._asdict()
        finally:
            reader.stop()  # not the context manager: its exit prints "Cache cleanup complete."
            reader.join()
    counts = {name: len(column) for name, column in rows.items()}
    if counts != dict.fromkeys(wanted, file.rows):
        raise Mistake(f"{file.file}: petastorm gave {counts}, the manifest says {file.rows} rows of {wanted}")
    if "image_id" in rows and f"{id_sum(rows['image_id']):016x}" != file.ids:
        raise Mistake(f"{file.file}: the checksum of its ids is not the manifest's; export again")
    return rows


def read_bucket(export: Export, bucket: str, columns: Sequence[str] = (), limit: int | None = None) -> Rows:
    """The first `limit` rows (None: all) of a bucket in the manifest's order, in memory: for evaluation."""
    parts: list[Rows] = []
    for file in export.files(bucket):
        if limit is not None and sum(count(part) for part in parts) >= limit:
            break
        parts.append(read(export, file, columns))
    return {name: column[:limit] for name, column in _join(parts).items()}


def images(export: Export, bucket: str) -> frozenset[bytes]:
    """The image_ids of a bucket that is small enough to be known by heart: held-out ones. Read once."""
    if bucket not in export.images:
        export.images[bucket] = frozenset(read_bucket(export, bucket, ("image_id",))["image_id"])
    return export.images[bucket]


def batches(plan: Plan, prepare: Prepare | None = None, threads: int = 1) -> Iterator[Batch]:
    """Plan -> the micro-batches of this rank's steps. `prepare` (rows, epoch -> arrays) runs in threads, ahead of the consumer.

    Raises Mistake naming the file that is not the manifest's, or an image of the bucket `apart` that is in this one too.
    """
    if prepare is None:
        yield from _micro_batches(plan)
        return

    def work(batch: Batch) -> Batch:
        return batch._replace(rows=prepare(batch.rows, plan.epoch))

    yield from ahead(work, _micro_batches(plan), threads, threads * AHEAD)


def _micro_batches(plan: Plan) -> Iterator[Batch]:
    for step, rows in enumerate(_steps(plan, _windows(plan))):
        step_rows = count(rows)
        mine, weight = plan.mine(step_rows)
        for first in range(0, len(mine), plan.micro_batch):
            part = slice(first, first + plan.micro_batch)
            # neighbours as they are, where all are real: a view costs nothing
            where = slice(mine[first], mine[first] + plan.micro_batch) if weight[part].all() else mine[part]
            taken = {name: column[where] for name, column in rows.items()}
            yield Batch(taken, taken["image_id"], weight[part], step, step_rows, part.stop == len(mine))


def _steps(plan: Plan, windows: Iterator[Rows]) -> Iterator[Rows]:
    """Windows in order -> the rows of one step after another, all ranks' together. Only a step that lies in two windows is copied."""
    size = plan.rows_per_step
    rest: list[Rows] = []
    for window in windows:
        held = sum(count(part) for part in rest)
        first = min(size - held, count(window)) if rest else 0
        if rest:
            rest.append(_cut(window, 0, first))
            if held + first < size:
                continue
            yield _join(rest)
        end = first + (count(window) - first) // size * size
        for start in range(first, end, size):
            yield _cut(window, start, start + size)
        rest = [_cut(window, end, count(window))] if end < count(window) else []
    if rest:
        yield _join(rest)


def _cut(rows: Rows, start: int, end: int) -> Rows:
    return {name: column[start:end] for name, column in rows.items()}


def _windows(plan: Plan) -> Iterator[Rows]:
    """The plan's windows, each read in full and put in order, one ahead of the consumer."""
    files, windows = plan.export.files(plan.bucket), plan.ahead()
    never = images(plan.export, plan.apart) if plan.apart else frozenset()
    with ThreadPoolExecutor(READERS, thread_name_prefix="feed") as pool:
        following: list[Future[Rows]] = []
        for place, (number, window, skip) in enumerate(windows):
            current = following or [pool.submit(read, plan.export, files[one]) for one in window]
            next_files = windows[place + 1][1] if place + 1 < len(windows) else []
            following = [pool.submit(read, plan.export, files[one]) for one in next_files]
            rows = _join([future.result() for future in current])
            if both := never.intersection(rows["image_id"]):
                raise Mistake(
                    f"export {plan.export.root}: {len(both)} images are in both {plan.bucket} and {plan.apart}, e.g. {min(both).hex()}"
                )
            order = plan.order(number, count(rows), rows[plan.together] if plan.together else None)[skip:]
            yield {name: column[order] for name, column in rows.items()}


def places(plan: Plan) -> Iterator[Places]:
    """The same order without its data (only `together` is read): where the rows of one step after another lie, all ranks' together."""
    return (Places(**rows) for rows in _steps(plan, _windows_of_places(plan)))


def _windows_of_places(plan: Plan) -> Iterator[Rows]:
    files = plan.export.files(plan.bucket)
    for number, window, skip in plan.ahead():
        sizes = [files[one].rows for one in window]
        groups = None
        if plan.together:
            groups = np.concatenate([read(plan.export, files[one], (plan.together,))[plan.together] for one in window])
        order = plan.order(number, sum(sizes), groups)[skip:]
        yield {"file": np.repeat(window, sizes)[order], "row": np.concatenate([np.arange(size) for size in sizes])[order]}


def count(rows: Rows) -> int:
    return len(next(iter(rows.values())))


def _join(parts: list[Rows]) -> Rows:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
