"""An image -> its whole story: where it came from, what was measured, how it was scored, why it was kept or not, which models saw it.

    python -m jobs.why IMAGE --config conf/demo.yaml

IMAGE is an id (hex, 8 digits or more), a file (its bytes are hashed), or a key or address as a source gave it; a row of a parquet
file is FILE#ROW_GROUP/ROW, both counted from 0.
"""

from __future__ import annotations

import hashlib
import re
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, command_line, stop
from jobs import registry, session
from jobs.lake import Lake
from jobs.tables import TABLES

HIDDEN = ("image_id", "vector", "phash", "phash_mirror")
MANY = 20  # rows a table; an image has a handful
TRAININGS = 1_000


def main() -> None:
    settings, arguments = command_line(__doc__ or "", {"image": "id, file, key or address"})
    try:
        tell(Lake(session.start(settings.spark), settings), settings, arguments.image)
    except Mistake as mistake:
        stop(str(mistake))


def tell(lake: Lake, settings: Settings, image: str) -> None:
    """Prints the story. Raises Mistake when no table knows the image."""
    lake.create()
    ids = find(lake, image)
    if not ids and not (refused := _rows(lake.read("rejects").where(_named(image, ("input_key", "uri"))))):
        raise Mistake(f"no table knows the image {image!r}; expected a hex id (8 digits or more), a file, or a source's key or address")
    if not ids:
        print(f"{image} was never taken:")
        _print("rejects", refused)
    for image_id in ids:
        print(f"image {image_id.hex()}")
        mine = F.col("image_id") == F.lit(image_id)
        for table in TABLES:
            if table == "rejects":
                mine_or_named = mine | F.col("input_key").startswith(image_id.hex())
                _print(table, _rows(lake.read(table).where(mine_or_named)))
            elif "image_id" in lake.read(table).columns:
                _print(table, _rows(lake.read(table).where(mine)))
        tell_models(lake, settings, image_id)


def tell_models(lake: Lake, settings: Settings, image_id: bytes) -> None:
    """Prints every registered version whose training saw the image, by the rows of train_stats."""
    seen = lake.read("train_stats").where(F.col("image_id") == F.lit(image_id)).orderBy("model", "training").limit(TRAININGS).collect()
    silent = registry.silence(settings.mlflow) if seen else ""
    if not seen or silent:
        _say(silent or "no training that has landed has seen it")
        return
    for row in seen:
        told = f"saw it {row['times_seen']} times, mean loss {row['loss_mean']:.4g}"
        versions = registry.made_by(settings.mlflow, row["model"], row["training"])
        for version in versions:
            _say(f"{version} {told}")
        if not versions:
            _say(f"training {row['training']} of {row['model']} {told}; no registered version was made by it")


def _say(line: str) -> None:
    print(f"  models      {line}")


def find(lake: Lake, image: str) -> list[bytes]:
    """-> ids of the images that are meant (several when a short id or a key is ambiguous)."""
    images = lake.read("images").select("image_id")
    if Path(image).is_file():
        digest = hashlib.sha256(Path(image).read_bytes()).hexdigest()
        found = images.where(F.lower(F.hex("image_id")) == digest)
    elif len(image) >= 8 and all(letter in "0123456789abcdef" for letter in image.lower()):
        found = images.where(F.lower(F.hex("image_id")).startswith(image.lower()))
    else:
        found = lake.read("sources").where(_named(image, ("key", "uri"))).select("image_id").distinct()
    return [bytes(row["image_id"]) for row in found.limit(MANY).collect()]


def _named(image: str, columns: tuple[str, ...]) -> Column:
    """Rows of `sources` or `rejects` that are called so, or are that row of that parquet file."""
    tests = [_ends(column, image) for column in columns]
    if cell := re.fullmatch(r"(.+)#(\d{1,9})/(\d{1,9})", image):
        tests.append(_ends("uri", cell[1]) & (F.col("row_group") == int(cell[2])) & (F.col("row") == int(cell[3])))
    return reduce(or_, tests)


def _ends(column: str, name: str) -> Column:
    return (F.col(column) == name) | F.col(column).endswith(f"/{name}")


def _rows(rows: DataFrame) -> list[dict[str, Any]]:
    return [row.asDict(recursive=True) for row in rows.limit(MANY).collect()]


def _print(table: str, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        told = {name: value for name, value in row.items() if name not in HIDDEN and value not in (None, [])}
        print(f"  {table:<12}" + ", ".join(f"{name} {_short(value)}" for name, value in told.items()))


def _short(value: Any) -> str:
    if isinstance(value, bytes | bytearray):
        return bytes(value).hex()[:16]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
