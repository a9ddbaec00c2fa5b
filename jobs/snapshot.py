"""A row set -> a frozen export: parquet files of equal rows, one row group each, and a manifest. All of it or nothing.

The files are written under the export's digest; the manifest is written last, and a reader knows an export by its manifest
alone. Then the files' rows land in `exports`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.settings import Settings, digest
from jobs import ordering, waves
from jobs.lake import Lake
from jobs.waves import Projection, Stage
from udfs import snapshot as kernel
from udfs.opener import to_uri


def folder(settings: Settings, kind: str, export: str) -> str:
    """URI of an export."""
    return f"{to_uri(settings.export.root).rstrip('/')}/{kind}-{export}"


def content(columns: Sequence[str]) -> Column:
    """Aggregate over rows -> a number that their content makes, in any order. A NULL counts: xxhash64 alone passes it over."""
    nulls = F.concat(*[F.col(column).isNull().cast("string") for column in columns])
    return F.sum(F.xxhash64(*columns, nulls).cast("decimal(38,0)"))


def identity(kind: str, rows: DataFrame, settings: Settings) -> tuple[str, int]:
    """-> (a digest of the rows' content and the export's settings, their number)."""
    summed = rows.agg(F.count("*").alias("n"), content(rows.columns).alias("content")).first()
    assert summed is not None
    return digest(kind, str(summed["content"]), summed["n"], settings.export.model_dump(exclude={"root"})), summed["n"]


def make(
    lake: Lake, settings: Settings, kind: str, export: str, rows: DataFrame, order: Sequence[str | Column], facts: dict[str, Any]
) -> bool:
    """Rows with a `bucket` -> the export, unless it is there. `facts` go into the manifest. Returns whether anything was done."""
    root = folder(settings, kind, export)
    with waves.stage(lake, f"export-{kind}", settings, TABLES) as stage:
        written = lake.opener.exists(f"{root}/manifest.json")
        if not written:
            _write(stage, settings, root, rows, order, {"export": export, "kind": kind, "lake": settings.lake.root} | facts)
        landed = not lake.read("exports").where(F.col("export") == export).isEmpty()
        if not landed:
            stage.run_whole(_lines(lake, root))
        return not (written and landed)


TABLES: dict[str, Projection] = {"exports": lambda staged, run: staged.withColumn("run", F.lit(run))}


def _write(stage: Stage, settings: Settings, root: str, rows: DataFrame, order: Sequence[str | Column], facts: dict[str, Any]) -> None:
    lake = stage.lake
    lake.opener.delete(root)  # what a killed run left: it has no manifest, so nobody reads it
    columns = {field.name: field.dataType.simpleString() for field in rows.schema if field.name != "bucket"}
    numbered, _ = ordering.numbered(lake, rows, [F.col("bucket"), *order], lake.area("_staging", stage.name, stage.run_id, "ordered"))
    starts = numbered.groupBy("bucket").agg(F.min("at").alias("first"))
    place = F.floor((F.col("at") - F.col("first")) / settings.export.rows_per_file).cast("int")
    filed = numbered.join(F.broadcast(starts), "bucket").withColumn("file", place).drop("first")
    written = filed.groupBy("bucket", "file").applyInArrow(
        partial(kernel.write_file, root=root, stores=settings.store_options), kernel.SCHEMA
    )
    files = sorted(
        (row.asDict() for row in written.collect()), key=lambda row: row["file"]
    )  # one small row a file; no orderBy: it runs a UDF twice
    manifest = facts | {"rows": sum(file["rows"] for file in files), "columns": columns, "files": files}
    lake.opener.write(f"{root}/manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())


def _lines(lake: Lake, root: str) -> DataFrame:
    raw = lake.opener.read(f"{root}/manifest.json")
    manifest = json.loads(raw)
    shared = (
        manifest["export"],
        manifest["kind"],
        root,
        hashlib.sha256(raw).hexdigest(),
        json.dumps(manifest["made_from"], sort_keys=True),
    )
    rows = [(*shared, file["file"], file["rows"], file["bytes"], file["sha256"]) for file in manifest["files"]]
    names = "export STRING, kind STRING, root STRING, manifest_sha256 STRING, made_from STRING, file STRING, rows BIGINT, bytes BIGINT, sha256 STRING"
    return lake.spark.createDataFrame(rows, names)
