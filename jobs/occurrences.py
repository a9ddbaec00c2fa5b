"""Which of an image's sources speaks for it: the one whose bytes are newest, and of its states the one that landed last."""

from __future__ import annotations

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

LATER = ("mtime_us", "run", "source", "key", "uri", "offset", "row_group", "row")  # run ids begin with their time


def latest(sources: DataFrame, *columns: str) -> DataFrame:
    """Rows of `sources` -> one row an image: image_id and the columns of its latest source."""
    told = F.max_by(F.struct(*columns), _order()).alias("told")
    return sources.groupBy("image_id").agg(told).select("image_id", "told.*")


def newest_first(many: int, *columns: str) -> Column:
    """Aggregate over the sources of an image -> array of at most `many` structs of the columns, the latest first, none twice."""
    sorted_ = F.reverse(F.array_sort(F.collect_list(F.struct(_order().alias("order"), F.struct(*columns).alias("told")))))
    return F.slice(F.array_distinct(F.transform(sorted_, lambda one: one["told"])), 1, many)


def _order() -> Column:
    return F.struct(*LATER)
