"""Made-up vectors and centres -> the speed of style assignment and of a fit: vectors/s, and vectors per CPU-second of all threads.

    python -m benchmarks.style_part                    (2048 centres of 768 numbers, half a minute)
    python -m benchmarks.style_part 2048 1024 20000    (centres, width, vectors)

Assignment is what `assign_styles` runs in a Spark task, Arrow batch in, Arrow batch out, with one thread: a task has one core. Its results
are compared with plain numpy in fp64 for the first vectors.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from udfs import style_centres, style_fit
from udfs.style_centres import Centres, Policy

POLICIES: tuple[Policy, ...] = ("states", "v7")
BATCH = 10_000  # rows of an Arrow batch, Spark's default
SEED = 7
CHECKED = 200
REPEATS = 3
BLOCKED = 179 / 2048  # share of V7's clusters that are on its block list
FIT = (256, 16_384)  # centres and vectors of the fit: a 256th of the work of 2048 over 524,288


def main() -> None:
    k, width, n = [int(given) for given in sys.argv[1:4]] or (2048, 768, 20_000)
    random = np.random.default_rng(SEED)
    points = random.normal(size=(k, width)).astype(np.float32)
    stored = (points[random.integers(0, k, n)] + 0.8 * random.normal(size=(n, width))).astype("<f2")
    centres = Centres(points, np.arange(k), 1e9, "made up", "made up", k, tuple(range(round(BLOCKED * k))))
    ids = [number.to_bytes(32, "big") for number in range(n)]
    whole = pa.RecordBatch.from_pydict({"image_id": pa.array(ids), "vector": pa.array([one.tobytes() for one in stored])})
    batches = [whole.slice(start, BATCH) for start in range(0, n, BATCH)]
    files = style_centres.pack(centres)
    for policy in POLICIES:
        for _ in range(REPEATS):
            measure(f"assign, {policy}, {k} centres of {width}", n, partial(assign, batches, files, policy))
    check(centres, stored[:CHECKED], next(style_centres.assign(batches, files, "states")))
    clusters, vectors = FIT
    sample = random.normal(size=(vectors, width)).astype(np.float32)
    measure(f"k-means, {clusters} centres, 25 iterations", vectors, lambda: style_fit.kmeans(sample, clusters, 25, SEED, 1))
    over = points[: k // 2]
    measure(f"merge {k // 2} -> {k // 4}", k // 2, lambda: style_fit.merge(over, np.ones(k // 2, np.int64), k // 4))


def assign(batches: Sequence[pa.RecordBatch], files: Mapping[str, bytes], policy: Policy) -> int:
    return sum(batch.num_rows for batch in style_centres.assign(batches, files, policy))


def measure(what: str, n: int, work: Callable[[], object]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{what}: {n} in {wall:.2f} s, {cpu:.2f} CPU-s; {n / wall:,.0f}/s, {n / cpu:,.0f} a CPU-s", flush=True)


def check(centres: Centres, stored: np.ndarray, found: pa.RecordBatch) -> None:
    true = np.linalg.norm(stored.astype(np.float64)[:, None] - centres.centres.astype(np.float64)[None], axis=2)
    nearest = found.column("nearest").to_numpy()[: len(stored)]
    apart = np.abs(found.column("distance").to_numpy()[: len(stored)] / true.min(axis=1) - 1).max()
    assert np.array_equal(nearest, true.argmin(axis=1)) and apart < 1e-6, apart
    print(f"{len(stored)} compared with numpy in fp64: the same centres, distances within {apart:.1e}")


if __name__ == "__main__":
    main()
