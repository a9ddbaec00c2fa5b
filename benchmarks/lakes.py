"""Folders of images -> ingested lakes that wait for embed, and the `--set` arguments that describe each. One Spark session makes all.

python -m benchmarks.lakes LAKE FOLDER [LAKE FOLDER ...]
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIG = "benchmarks/embed.yaml"


def overrides(lake: Path, folder: Path, encoder: str, waves: tuple[int, int], workers: int = 2) -> list[str]:
    """What the benchmark changes in its settings: one folder, one encoder, `waves` (rows a wave, rows a task), slots.

    A real run's waves are ten minutes long: with one wave, the cost of landing belongs to the start-up of these short runs.
    """
    sections: dict[str, Any] = {
        "lake.root": str(lake),
        "spark.master": f"local[{workers},4]",
        "encoder": encoder,
        "embed.encoders": [encoder],
        "waves": dict(zip(("rows", "task_rows"), waves, strict=True)),
        "ingest.sources": [{"name": "benchmark", "kind": "folder", "uri": str(folder)}],
    }
    return [part for key, value in sections.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def ingest_all(pairs: list[tuple[Path, Path]]) -> None:
    """(lake, folder) pairs -> ingested lakes. Empty tables are made once and copied: making them takes seconds."""
    from conf.settings import load
    from jobs import ingest, session
    from jobs.lake import Lake

    spark = session.start(load(CONFIG).spark)
    made: Path | None = None
    for root, folder in pairs:
        settings = load(CONFIG, overrides(root, folder, "colour-grid", (200_000, 2_000))[1::2])
        if made is None:
            made = root.with_name("empty")
            Lake(spark, settings.model_copy(update={"lake": settings.lake.model_copy(update={"root": str(made)})})).create()
        shutil.copytree(made, root)
        ingest.run(Lake(spark, settings), settings)


def vectors(lake: Path) -> Iterator[tuple[bytes, bytes]]:
    """(image_id, fp16 vector) of every row of `embeddings`, from its parquet files: a new lake's hold nothing else."""
    from pyarrow import parquet

    for path in sorted((lake / "embeddings").glob("*.parquet")):
        table = parquet.read_table(path, columns=["image_id", "vector"])
        yield from zip(table["image_id"].to_pylist(), table["vector"].to_pylist(), strict=True)


def main() -> None:
    given = [Path(argument) for argument in sys.argv[1:]]
    ingest_all(list(zip(given[::2], given[1::2], strict=True)))


if __name__ == "__main__":
    main()
