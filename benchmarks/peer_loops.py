"""A folder of images -> the embed stage's outputs by Daft or Ray Data, as a good user of each would write it. Runs in the peers' environment.

    .cache/peers/bin/python -m benchmarks.peer_loops daft|ray FOLDER OUT --encoder colour-grid

The work is benchmarks/image_work.py, as the bare loop's; only what feeds it differs. Daft: files by `download`, a class UDF within the
process. Ray Data: paths, read in a pool of actors of one core each (no bytes pass its object store). Both write parquet into OUT.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.image_work import STATISTICS, ImageWork, table

os.environ.update({"DAFT_RUNNER": "native", "DAFT_ANALYTICS_ENABLED": "0", "DAFT_PROGRESS_BAR": "0", "RAY_USAGE_STATS_ENABLED": "0"})


def by_daft(options: argparse.Namespace) -> None:
    """The folder's files -> Daft's own reader (native runner) -> one instance of a class, which a thread for each core calls."""
    import daft
    from daft import DataType, col

    kinds = {"vector": DataType.binary(), "phash": DataType.binary(), "mirror": DataType.binary()}
    kinds |= {name: DataType.float64() for name in STATISTICS}

    # in-process: as many threads as cores call one instance; with max_concurrency Daft starts processes and sends them the bytes
    # (3.7 CPU-s in place of 2.1 for 300 small images [measured])
    @daft.cls(use_process=False)
    class Embedder:
        def __init__(self) -> None:
            self._work = ImageWork(options.encoder, options.graph)

        @daft.method.batch(return_dtype=DataType.struct(kinds), unnest=True, batch_size=options.batch_size)
        def embed(self, data: daft.Series) -> Any:
            done = [self._work.prepare(one) for one in data.to_pylist()]
            whole = table([""] * len(done), done, self._work.encode(done)).drop(["path"])
            return whole.to_struct_array().combine_chunks()

    files = daft.from_glob_path(f"{options.folder}/*").select("path")
    files.select("path", Embedder().embed(col("path").download())).write_parquet(str(options.out))


def by_ray(options: argparse.Namespace) -> None:
    """The folder's paths -> a pool of `workers` actors that read, each with its model."""
    import ray
    import ray.data

    class Embedder:
        def __init__(self) -> None:
            self._work = ImageWork(options.encoder, options.graph)

        def __call__(self, batch: Any) -> Any:
            paths = batch["item"].to_pylist()
            done = [self._work.prepare(Path(path).read_bytes()) for path in paths]
            return table(paths, done, self._work.encode(done))

    with tempfile.TemporaryDirectory(prefix="ray-") as session:
        ray.init(num_cpus=options.workers, include_dashboard=False, log_to_driver=False, object_store_memory=2**28, _temp_dir=session)
        ray.data.DataContext.get_current().enable_progress_bars = False
        paths = ray.data.from_items([str(path) for path in sorted(options.folder.iterdir())], override_num_blocks=2 * options.workers)
        pool = ray.data.ActorPoolStrategy(size=options.workers)
        embedded = paths.map_batches(Embedder, compute=pool, num_cpus=1, batch_size=options.batch_size, batch_format="pyarrow")
        embedded.write_parquet(str(options.out))
        ray.shutdown()


LOOPS = {"daft": by_daft, "ray": by_ray}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=list(LOOPS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--encoder", required=True, help="a file in conf/encoders")
    parser.add_argument("--graph", type=Path, help="its exported ONNX file")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    LOOPS[options.peer](options)
    if options.peer == "daft":  # all is written; its threads abort one interpreter in ten that is finalized under them [seen twice in 20]
        os._exit(0)


if __name__ == "__main__":
    main()
