"""A folder of images -> vectors, hashes and statistics by a bare loop: what the embed stage is measured against.

    python -m benchmarks.bare_loop FOLDER OUT --encoder colour-grid --processes 2

The best loop that we know without Spark and Delta: the same kernel functions on the same engine, the same number of processes, model
threads and decode threads as the stage has, the model loaded once and shared (processes are forked after that). It writes
OUT/0.parquet, ....
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from benchmarks.image_work import ImageWork, Prepared, table
from udfs.ahead import ahead


def embed(paths: Sequence[Path], work: ImageWork, options: argparse.Namespace, out: Path) -> None:
    """One process's share: the decode threads run ahead of the model, results are kept and written once."""
    from pyarrow import parquet

    prepared = ahead(lambda path: work.prepare(path.read_bytes()), paths, options.decode_threads, options.ahead)
    done: list[Prepared] = []
    vectors: list[bytes] = []
    while batch := list(islice(prepared, options.batch_size)):
        vectors += work.encode(batch)
        done += [one._replace(tensor=one.tensor[:0]) for one in batch]
    parquet.write_table(table([str(path) for path in paths], done, vectors), out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--encoder", required=True, help="a file in conf/encoders")
    parser.add_argument("--graph", type=Path, help="its exported ONNX file; without: torch, or no model")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--model-threads", type=int, default=1, help="the model's threads in each process")
    parser.add_argument("--decode-threads", type=int, default=1, help="in each process")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--ahead", type=int, default=32, help="decoded images that may wait for the model")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.processes > 1 and options.model_threads > 1:
        raise SystemExit(
            f"bare_loop: given --processes {options.processes} and --model-threads {options.model_threads}; a model's threads do not survive "
            "the fork: give one of the two as 1"
        )
    work = ImageWork(options.encoder, options.graph, options.model_threads)
    paths = sorted(options.folder.iterdir())
    options.out.mkdir(parents=True, exist_ok=True)
    share = -(-len(paths) // options.processes)
    fork = multiprocessing.get_context("fork")
    children = []
    for number in range(options.processes):
        told = (paths[number * share : (number + 1) * share], work, options, options.out / f"{number}.parquet")
        children.append(fork.Process(target=embed, args=told))
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert all(child.exitcode == 0 for child in children), [child.exitcode for child in children]


if __name__ == "__main__":
    main()
