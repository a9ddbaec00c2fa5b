"""One loop over an export's training rows, in this process -> what it cost: rows/s, time to the first batch, rows delivered.

    python -m benchmarks.feed_loops OUT.json LOOP KIND EXPORT --passes 2

All loops give prepared micro-batches of the same rows by the same function. Only `feed` keeps an image's rows together, hashes each file
when it first reads it, looks for held-out images and counts rows and ids; beside it only `raw-shuffled` shuffles. The loops:

    feed          training.feed with the trainer's own plan; a pass is an epoch
    raw           pyarrow.parquet.read_table in as many threads as the feed reads in, `prepare` in as many as it prepares in: the best bare loop
    raw-shuffled  the same, with the rows of the feed's windows of files shuffled together: what any shuffle of that reach costs
    petastorm     make_batch_reader as its users get it (thread pool), with as many workers as the feed has readers
    loader-0      torch's DataLoader over an IterableDataset of row groups, read and prepared in this process
    loader-2      the same in two worker processes
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from benchmarks.made_exports import KINDS
from benchmarks.measure import tree_cpu
from conf.build import Limits
from conf.loops import TrainScorer
from training import feed, process_group
from training.exports import open_export
from training.fit_scorer import FitScorer
from training.image_pixels import read_pixels
from udfs.ahead import ahead

MICRO_BATCH = {"labels": 256, "images": 32}
PIXELS = 256
THREADS = TrainScorer().feed_threads


class Work(NamedTuple):
    """What every loop is given: the plan of an epoch, and what is done with a micro-batch's columns."""

    plan: feed.Plan
    prepare: feed.Prepare

    @property
    def paths(self) -> list[str]:
        """The files of the bucket in the manifest's order."""
        export = self.plan.export
        return [f"{export.root.removeprefix('file://')}/{file.file}" for file in export.files(self.plan.bucket)]


def work_on(kind: str, folder: Path) -> Work:
    """The scorer's own task, or that of an image model without its tokenizer."""
    export = open_export(folder, kind, KINDS[kind], ("train", "held_out"))
    size = MICRO_BATCH[kind]
    if kind == "labels":
        task = FitScorer(TrainScorer(rows_per_step=size, micro_batch=size), export, process_group.Ranks(0, 1))
        return Work(task.plan, task.prepare)
    return Work(feed.Plan(export, "train", 7, 0, size, size, apart="held_out"), _Pixels())


class _Pixels:
    """`prepare` as in training.fit_image_model, pixels alone. A class: the loader's workers get it by pickle or fork."""

    def __init__(self) -> None:
        self._limits = Limits().model_dump()

    def __call__(self, rows: feed.Rows, epoch: int) -> feed.Arrays:
        pixels = [read_pixels(data, one, PIXELS, self._limits) for data, one in zip(rows["bytes"], rows["image_id"], strict=True)]
        return {"pixels": np.stack(pixels)}


Pass = Iterator[tuple[feed.Arrays, int]]  # prepared micro-batches, with the number of real rows in each


def by_feed(work: Work) -> Callable[[int], Pass]:
    def one(number: int) -> Pass:
        for batch in feed.batches(work.plan.at(number), work.prepare, THREADS):
            yield batch.rows, int(batch.weight.sum())

    return one


def by_raw(work: Work) -> Callable[[int], Pass]:
    def one(number: int) -> Pass:
        files = ahead(read_columns, work.paths, feed.READERS, feed.READERS)
        return _prepared(work, (part for rows in files for part in cut(rows, work.plan.micro_batch)))

    return one


def by_raw_shuffled(work: Work) -> Callable[[int], Pass]:
    def shuffled(number: int) -> Iterator[feed.Rows]:
        random, windows = np.random.default_rng(number), work.plan.at(number).windows()
        paths = [work.paths[one] for window in windows for one in window]
        files = ahead(read_columns, paths, feed.READERS, max(map(len, windows)))
        for window in windows:
            parts = [next(files) for _ in window]
            order = random.permutation(sum(map(feed.count, parts)))
            whole = {name: np.concatenate([rows[name] for rows in parts])[order] for name in parts[0]}
            yield from cut(whole, work.plan.micro_batch)

    return lambda number: _prepared(work, shuffled(number))


def by_petastorm(work: Work) -> Callable[[int], Pass]:
    from petastorm import make_batch_reader

    def one(number: int) -> Pass:
        with make_batch_reader([f"file://{path}" for path in work.paths], workers_count=feed.READERS) as reader:
            yield from _prepared(work, (part for group in reader for part in cut(group._asdict(), work.plan.micro_batch)))

    return one


def by_loader(work: Work, workers: int) -> Callable[[int], Pass]:
    """Each worker (kept from pass to pass) reads its share of the files and prepares; whole micro-batches pass through shared memory."""
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    class RowGroups(IterableDataset):
        def __iter__(self) -> Pass:
            told = get_worker_info()
            for path in work.paths[told.id :: told.num_workers] if told else work.paths:
                for part in cut(read_columns(path), work.plan.micro_batch):
                    yield work.prepare(part, 0), feed.count(part)

    loader = DataLoader(RowGroups(), batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    return lambda number: iter(loader)


LOOPS: dict[str, Callable[[Work], Callable[[int], Pass]]] = {
    "feed": by_feed,
    "raw": by_raw,
    "raw-shuffled": by_raw_shuffled,
    "petastorm": by_petastorm,
    "loader-0": partial(by_loader, workers=0),
    "loader-2": partial(by_loader, workers=2),
}


# by loop, before the clock starts; pandas by all, for pyarrow imports it at the first `to_numpy`
IMPORTED = {"feed": "petastorm", "raw": "pyarrow.parquet", "petastorm": "petastorm", "loader": "torch"}


def read_columns(path: str) -> feed.Rows:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}


def cut(rows: feed.Rows, size: int) -> Iterator[feed.Rows]:
    for first in range(0, feed.count(rows), size):
        yield {name: column[first : first + size] for name, column in rows.items()}


def _prepared(work: Work, parts: Iterator[feed.Rows]) -> Pass:
    def one(part: feed.Rows) -> tuple[feed.Arrays, int]:
        return work.prepare(part, 0), feed.count(part)

    return ahead(one, parts, THREADS, THREADS * feed.AHEAD)


def one_pass(batches: Pass) -> dict[str, float | None]:
    """-> rows, seconds, CPU seconds of this process and its workers, seconds until the first batch (None: there was none)."""
    began, cpu, first, rows = time.monotonic(), tree_cpu(), None, 0
    for _, count in batches:
        first = time.monotonic() - began if first is None else first
        rows += int(count)
    return {"rows": rows, "wall": time.monotonic() - began, "cpu": tree_cpu() - cpu, "first": first}


def main(given: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("loop", choices=list(LOOPS))
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("export", type=Path)
    parser.add_argument("--passes", type=int, default=1)
    told = parser.parse_args(given)
    feed.quiet()
    for module in ("pandas", IMPORTED[told.loop.partition("-")[0]]):
        import_module(module)
    work, before = work_on(told.kind, told.export), psutil.Process().memory_info().rss / 2**20
    loop = LOOPS[told.loop](work)
    passes = [one_pass(loop(number)) for number in range(told.passes)]
    told.out.write_text(json.dumps({"before": before, "passes": passes}))


if __name__ == "__main__":
    main(sys.argv[1:])
