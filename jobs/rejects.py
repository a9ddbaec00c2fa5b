"""The rejects of a stage: what is settled and no longer pending, and how a refused input becomes a row."""

from __future__ import annotations

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.lake import Lake


def settled(lake: Lake, stage: str) -> DataFrame:
    """-> (input_key, fingerprint) that the stage has refused for good."""
    mine = lake.read("rejects").where((F.col("stage") == stage) & F.col("permanent"))
    return mine.select("input_key", "fingerprint").distinct()


def settled_images(lake: Lake, stage: str, fingerprint: str) -> DataFrame:
    """-> image_id that a stage over stored vectors has refused for good under a fingerprint."""
    return settled(lake, stage).where(F.col("fingerprint") == fingerprint).select(F.unhex("input_key").alias("image_id"))


def rows(lake: Lake, refused: DataFrame, stage: str, run: str, attempts: int) -> DataFrame | None:
    """(input_key, fingerprint, image_id, uri, offset, length, code, detail, transient) and, of a parquet row, its place -> rows of `rejects`;
    None when there are none.

    A transient reject counts its attempts from what the table holds and is permanent at `attempts`. The table is read at
    a pinned version: an append whose plan reads the table it writes conflicts with every other append.
    """
    if refused.isEmpty():  # most waves: a look at the staged rows instead of a join
        return None
    earlier = lake.read("rejects", lake.version("rejects")).where(F.col("stage") == stage)
    counted = earlier.groupBy("input_key", "fingerprint").agg(F.max("attempts").alias("earlier"))
    attempt: Column = F.coalesce(F.col("earlier"), F.lit(0)) + 1
    joined = refused.join(counted, ["input_key", "fingerprint"], "left").withColumn("attempts", attempt.cast("int"))
    named = joined.withColumn("permanent", ~F.col("transient") | (F.col("attempts") >= attempts))
    named = named.withColumns({"stage": F.lit(stage), "run": F.lit(run)})
    return with_place(named)


def of_images(lake: Lake, staged: DataFrame, stage: str, run: str, attempts: int) -> DataFrame | None:
    """Staged rows of a stage over stored vectors (image_id, fingerprint, reject) -> rows of `rejects`, keyed by the image's id."""
    refused = staged.where(F.col("reject").isNotNull()).select("image_id", "fingerprint", "reject.*")
    absent = {"uri": F.lit(None).cast("string"), "offset": F.lit(None).cast("bigint"), "length": F.lit(None).cast("bigint")}
    return rows(lake, refused.withColumns(absent | {"input_key": F.lower(F.hex("image_id"))}), stage, run, attempts)


def with_place(rows: DataFrame) -> DataFrame:
    """Rows -> with row_group, row and column, NULL where they are lacking."""
    kinds = {"row_group": "int", "row": "int", "column": "string"}
    return rows.withColumns({name: F.lit(None).cast(kind) for name, kind in kinds.items() if name not in rows.columns})
