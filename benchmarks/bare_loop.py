"""A folder of images -> vectors, hashes and statistics by a bare PyTorch loop: what the embed stage is measured against.

    python -m benchmarks.bare_loop FOLDER OUT --encoder colour-grid --processes 2

The best loop that we know without Spark and Delta: the same kernel functions, the same number of processes, torch threads and
decode threads as the stage has, the model loaded once and shared (processes are forked after that). It writes OUT.0.npz, ....
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conf.settings import Limits, load_encoder
from udfs import decode, perceptual_hash, pixel_statistics
from udfs.ahead import ahead


class Prepared(NamedTuple):
    path: str
    phash: bytes
    mirror: bytes
    statistics: dict[str, float]
    tensor: np.ndarray


def embed(paths: Sequence[Path], tower: Any, model: Any, encoder: Mapping[str, Any], options: argparse.Namespace, out: Path) -> None:
    """One process's share: the decode threads run ahead of the model, results are kept and written once."""
    limits = Limits().model_dump()

    def prepare(path: Path) -> Prepared:
        with decode.decoding(path.read_bytes(), limits) as decoded:
            luma = pixel_statistics.luma_of(decoded.image)
            statistics = pixel_statistics.measure(decoded.image, luma)
            return Prepared(str(path), *perceptual_hash.phash(luma), statistics, tower.prepare(decoded.image, encoder))

    if encoder["model"] is not None:
        import torch

        torch.set_num_threads(options.model_threads)
    prepared = ahead(prepare, paths, options.decode_threads, options.ahead)
    done: list[Prepared] = []
    vectors: list[np.ndarray] = []
    while batch := list(islice(prepared, options.batch_size)):
        vectors.append(tower.encode(model, np.stack([one.tensor for one in batch])).astype("<f2"))
        done += [one._replace(tensor=np.empty(0)) for one in batch]
    statistics = np.array([list(one.statistics.values()) for one in done], np.float32)
    hashes = np.array([[np.void(one.phash), np.void(one.mirror)] for one in done])
    paths_told = np.array([one.path for one in done])
    np.savez(out, path=paths_told, vector=np.concatenate(vectors), statistics=statistics, phash=hashes)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--encoder", required=True, help="a file in conf/encoders")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--model-threads", type=int, default=1, help="torch's threads in each process")
    parser.add_argument("--decode-threads", type=int, default=1, help="in each process")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--ahead", type=int, default=32, help="decoded images that may wait for the model")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    encoder = load_encoder(options.encoder).model_dump()
    tower = import_module(f"udfs.tower_{encoder['kernel']}")
    model = tower.load(encoder, "cpu", "fp32")
    paths = sorted(options.folder.iterdir())
    share = -(-len(paths) // options.processes)
    fork = multiprocessing.get_context("fork")
    children = []
    for number in range(options.processes):
        mine = paths[number * share : (number + 1) * share]
        told = (mine, tower, model, encoder, options, Path(f"{options.out}.{number}.npz"))
        children.append(fork.Process(target=embed, args=told))
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert all(child.exitcode == 0 for child in children), [child.exitcode for child in children]


if __name__ == "__main__":
    main()
