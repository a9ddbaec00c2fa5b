"""Pillow's own odd, broken and hostile test files through ingest's and embed's kernels -> whether each ends as a row or a named reject.

    make hostile                                   (fetches the files, 47 MB)
    python -m benchmarks.hostile_part FOLDER [--config FILE] [--set embed.decode_threads=2]

In a process of its own, as Spark's worker is one: listing, ingest, embed (the colour-grid tower: its model is a few KB, so what the process grows by
is what the files cost), with the config's limits and number of decode threads, over all files at once; then file by file, for the
slowest. Exit status 1 when a goal is missed: every file a row or a reject with a code, no death, growth below GROWTH, no file above SLOWEST.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from conf.settings import Settings, load, load_encoder
from udfs import embed, ingest, listing
from udfs.opener import Opener
from udfs.reject import CODES

GROWTH = 300  # MB
SLOWEST = 2.0  # seconds
DEMO = "conf/demo.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", default=DEMO)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--worker", action="store_true", help="this is the process that is measured")
    told = parser.parse_args()
    if told.worker:
        print(json.dumps(measure(told.folder, load(told.config, told.set))))
        return 0
    command = [
        sys.executable,
        "-m",
        "benchmarks.hostile_part",
        str(told.folder),
        "--config",
        told.config,
        "--worker",
        *(part for one in told.set for part in ("--set", one)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"hostile: the worker died with status {done.returncode}\n{done.stderr[-2000:]}")
        return 1
    return judge(json.loads(done.stdout.splitlines()[-1]))


def judge(found: dict[str, Any]) -> int:
    """Prints the figures -> 0, or 1 when a goal is missed."""
    rejected = ", ".join(f"{count} {code}" for code, count in sorted(found["rejected"].items()))
    print(
        f"hostile: {found['files']} files, {found['threads']} threads: {found['rows']} rows, {sum(found['rejected'].values())} rejects ({rejected})"
    )
    print(
        f"hostile: {found['seconds']:.1f} s, the process grew by {found['growth']:.0f} MB; slowest file {found['slowest'][0]:.2f} s ({found['slowest'][1]})"
    )
    missed = [f"{name} is neither a row nor a reject" for name in found["lost"]]
    missed += [f"growth {found['growth']:.0f} MB, goal {GROWTH}"] * (found["growth"] >= GROWTH)
    missed += [f"{found['slowest'][1]} took {found['slowest'][0]:.2f} s, goal {SLOWEST}"] * (found["slowest"][0] >= SLOWEST)
    for one in missed:
        print(f"hostile: MISSED: {one}")
    return 1 if missed else 0


def measure(folder: Path, settings: Settings) -> dict[str, Any]:
    """All files at once, then one by one. What the imports, the tower and one small file cost comes before the first figure."""
    entries = pd.concat(_listed(folder))
    list(_through(entries.head(1), settings))
    before = _memory()
    began = time.perf_counter()
    rows = list(_through(entries, settings))
    seconds, growth = time.perf_counter() - began, _memory() - before
    ends: dict[str, list[str]] = {}
    for key, code in rows:
        ends.setdefault(key, []).append(code)
    lost = [key for key in entries["key"] if len(ends.get(key, [])) != 1 or ends[key][0] not in ("row", *CODES)]
    slowest = max((_timed(entries[entries["key"] == key], settings), key) for key in entries["key"])
    codes = Counter(code for _, code in rows)
    taken = codes.pop("row", 0)
    told = {"files": len(entries), "threads": settings.embed.decode_threads, "rows": taken, "rejected": codes, "lost": lost}
    return told | {"seconds": seconds, "growth": growth, "slowest": slowest}


def _listed(folder: Path) -> Iterator[pd.DataFrame]:
    work = pd.DataFrame(listing.split_tree(str(folder), Opener()), columns=["uri", "recursive"])
    return listing.list_folders(iter([work]), source="hostile", root=str(folder), kind="file", licence=None, stores={})


def _through(entries: pd.DataFrame, settings: Settings) -> Iterator[tuple[str, str]]:
    """Entries -> (key, `row` or the code of its reject) of each, by the kernels that Spark maps."""
    limits = settings.limits.model_dump()
    taken: dict[bytes, list[str]] = {}
    wanted = []
    for frame in ingest.ingest(iter([entries]), limits=limits, stores={}, columns={}):
        for row in frame.to_dict("records"):
            if row["reject"] is not None:
                yield row["key"], row["reject"]["code"]
                continue
            if row["image_id"] not in taken:
                address = {name: row[name] for name in ("uri", "offset", "length", "size", "mtime_us", "row_group", "row", "column")}
                wanted.append({"image_id": row["image_id"], "view": embed.ORIGINAL, "addresses": [address]})
            taken.setdefault(row["image_id"], []).append(row["key"])  # one image under several names is decoded once
    tower = load_encoder("colour-grid").model_dump()
    frame = pd.DataFrame(wanted, columns=["image_id", "view", "addresses"]).assign(tried="hostile")
    frame["want"] = [[embed.PIXELS, tower["name"]] for _ in wanted]
    options = settings.embed
    for done in embed.embed(
        iter([frame]),
        encoders=[tower],
        detectors=[],
        limits=limits,
        stores={},
        device="cpu",
        precision="fp32",
        batch_size=options.batch_size,
        decode_threads=options.decode_threads,
        window=options.ahead,
    ):
        for row in done.to_dict("records"):
            is_row = row["reject"] is None and row["pixels"] is not None and len(row["embeddings"]) == 1
            code = "row" if is_row else (row["reject"] or {"code": "lost"})["code"]
            yield from ((key, code) for key in taken[row["image_id"]])


def _timed(entry: pd.DataFrame, settings: Settings) -> float:
    """Seconds, the best of three where they are many: on a shared machine others' work is in them."""
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        list(_through(entry, settings))
        best = min(best, time.perf_counter() - began)
        if best < SLOWEST / 4:
            break
    return best


def _memory() -> float:
    """The most that this process has held so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    sys.exit(main())
