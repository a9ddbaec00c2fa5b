"""A row set -> a frozen export: parquet files of equal rows, one row group each, and a manifest. All of it or nothing.

The files are written under the export's digest; the manifest is written last, and a reader knows an export by its manifest
alone. Then the files' rows land in `exports`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_type

from conf.settings import Settings, digest
from jobs import ordering, waves
from jobs.lake import Lake
from jobs.waves import Projection, Stage
from udfs import snapshot as kernel
from udfs.opener import to_uri

IMAGES = "images"  # the kind whose rows hold the bytes (jobs/export_images.py)


def folder(settings: Settings, kind: str, export: str) -> str:
    """URI of an export."""
    return f"{to_uri(settings.export.root).rstrip('/')}/{kind}-{export}"


def content(columns: Sequence[str]) -> Column:
    """Aggregate over rows -> a number that their content makes, in any order. A NULL counts: xxhash64 alone passes it over."""
    nulls = F.concat(*[F.col(column).isNull().cast("string") for column in columns])
    return F.sum(F.xxhash64(*columns, nulls).cast("decimal(38,0)"))


def identity(kind: str, rows: DataFrame, settings: Settings) -> tuple[str, int]:
    """-> (a digest of the rows' content and of how they are laid out, their number)."""
    summed = rows.agg(F.count("*").alias("n"), content(rows.columns).alias("content")).first()
    assert summed is not None
    images = {"image_rows_per_file", "image_attempt"}
    laid_out = settings.export.model_dump(include={"seed", "held_out"} | (images if kind == IMAGES else {"rows_per_file"}))
    return digest(kernel.FORMAT, kind, str(summed["content"]), summed["n"], laid_out), summed["n"]


def draw(settings: Settings, of: str = "image_id") -> Column:
    """-> a number in [0, 1) by a seeded hash of an id: the same in every export."""
    return F.pmod(F.xxhash64(F.lit(settings.export.seed), F.lit("split"), of), F.lit(1_000_000)) / 1_000_000


def bucket(settings: Settings) -> Column:
    """`train` or `held_out`, by the draw of the image."""
    return F.when(draw(settings) < settings.export.held_out, "held_out").otherwise("train").alias("bucket")


def make(
    lake: Lake, settings: Settings, kind: str, export: str, rows: DataFrame, order: Sequence[str | Column], facts: dict[str, Any]
) -> bool:
    """Rows with a `bucket` -> the export, unless it is there. `facts` go into the manifest. Returns whether anything was done."""
    root = folder(settings, kind, export)
    with waves.stage(lake, f"export-{kind}", settings, TABLES) as stage:
        written = lake.opener.exists(f"{root}/manifest.json")
        if not written:
            _write(stage, settings, root, rows, order, {"export": export, "kind": kind} | facts)
        landed = is_landed(lake, export)
        if not landed:
            stage.run_whole(lines(lake, root))
        return not (written and landed)


TABLES: dict[str, Projection] = {"exports": lambda staged, run: staged.withColumn("run", F.lit(run))}


def is_landed(lake: Lake, export: str) -> bool:
    return not lake.read("exports").where(F.col("export") == export).isEmpty()


def place(numbered: DataFrame, rows_per_file: int) -> DataFrame:
    """Rows with `bucket` and `at`, their global order -> with `file`, a number in the bucket: each of rows_per_file rows but the last."""
    starts = numbered.groupBy("bucket").agg(F.min("at").alias("first"))
    file = F.floor((F.col("at") - F.col("first")) / rows_per_file).cast("int")
    return numbered.join(F.broadcast(starts), "bucket").withColumn("file", file).drop("first")


def write_manifest(
    lake: Lake, settings: Settings, root: str, columns: Mapping[str, str], files: list[dict[str, Any]], facts: dict[str, Any]
) -> None:
    """kernel.SCHEMA rows and facts -> the manifest: from here on the export is there. `columns`: name -> Arrow type."""
    told = sorted(files, key=lambda file: file["file"])
    manifest = facts | {"lake": settings.lake.root, "rows": sum(file["rows"] for file in told), "columns": columns, "files": told}
    lake.opener.write(f"{root}/manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())


def _write(stage: Stage, settings: Settings, root: str, rows: DataFrame, order: Sequence[str | Column], facts: dict[str, Any]) -> None:
    lake = stage.lake
    lake.opener.delete(root)  # what a killed run left: it has no manifest, so nobody reads it
    columns = {field.name: str(to_arrow_type(field.dataType)) for field in rows.schema if field.name != "bucket"}
    numbered, _ = ordering.numbered(lake, rows, [F.col("bucket"), *order], lake.area("_staging", stage.name, stage.run_id, "ordered"))
    filed = place(numbered, settings.export.rows_per_file)
    written = filed.groupBy("bucket", "file").applyInArrow(
        partial(kernel.write_file, root=root, stores=settings.store_options), kernel.SCHEMA
    )
    write_manifest(lake, settings, root, columns, [row.asDict() for row in written.collect()], facts)  # one small row a file


def lines(lake: Lake, root: str) -> DataFrame:
    """The export at `root` -> rows of `exports`, without `run`."""
    raw = lake.opener.read(f"{root}/manifest.json")
    manifest = json.loads(raw)
    shared = (
        manifest["export"],
        manifest["kind"],
        root,
        hashlib.sha256(raw).hexdigest(),
        json.dumps(manifest["made_from"], sort_keys=True),
    )
    rows = [(*shared, file["file"], file["rows"], file["bytes"], file["sha256"], file["ids"]) for file in manifest["files"]]
    names = "export STRING, kind STRING, root STRING, manifest_sha256 STRING, made_from STRING, file STRING, rows BIGINT, bytes BIGINT, "
    names += "sha256 STRING, ids STRING"
    return lake.spark.createDataFrame(rows, names)
