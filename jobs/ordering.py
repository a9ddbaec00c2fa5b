"""Rows -> the same rows, frozen in a global order, with their place in it: what waves and exports are cut from."""

from __future__ import annotations

from collections.abc import Sequence

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from jobs.lake import Lake


def numbered(lake: Lake, rows: DataFrame, order: Sequence[str | Column], uri: str, cost: str | None = None) -> tuple[DataFrame, int]:
    """-> (rows with `at`, the sum of `cost` over all rows before this one; the whole sum). cost None: every row costs 1.

    Writes the sorted rows at `uri` and numbers what was written, so that a second evaluation cannot number them otherwise;
    a window over all rows would pull them through one task.
    """
    place = [F.spark_partition_id().alias("_part"), F.monotonically_increasing_id().alias("_place")]
    lake.stage(rows.orderBy(*order).select("*", *place), uri)
    ordered = lake.staged(uri)
    each = F.col(cost) if cost else F.lit(1)
    starts, total = {-1: 0}, 0
    for part in ordered.groupBy("_part").agg(F.sum(each).alias("cost")).orderBy("_part").collect():
        starts[part["_part"]] = total
        total += part["cost"]
    start = F.element_at(F.create_map(*[F.lit(x) for pair in starts.items() for x in pair]), F.col("_part"))
    before = Window.partitionBy("_part").orderBy("_place").rowsBetween(Window.unboundedPreceding, -1)
    at = start + F.coalesce(F.sum(each).over(before), F.lit(0))
    return ordered.withColumn("at", at).drop("_part", "_place"), total
