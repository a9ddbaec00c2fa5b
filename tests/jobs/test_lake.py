"""A lake that older code made goes on under this code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from conf.settings import Settings
from jobs.lake import ConstraintViolated, Lake
from jobs.tables import TABLES


def test_a_table_of_older_code_reads_null_in_the_columns_it_lacks_and_gets_them_with_its_first_append(
    spark: SparkSession, make_settings: Callable[..., Settings]
) -> None:
    settings = make_settings()
    lake, path = Lake(spark, settings), f"{settings.lake.root}/exports"
    check = "'delta.constraints.has_rows' = 'rows > 0'"
    spark.sql(f"CREATE TABLE delta.`{path}` ({TABLES['exports'].columns}) USING DELTA TBLPROPERTIES ({check})")
    told = {"export": "a", "kind": "labels", "root": "r", "file": "f", "bytes": 1, "sha256": "s", "manifest_sha256": "m", "made_from": "{}"}
    row = spark.range(1).select(
        *[F.lit(value).alias(name) for name, value in told.items()], F.lit("r").alias("run"), F.lit(1).alias("rows")
    )
    row = row.withColumns({"bytes": F.col("bytes").cast("bigint"), "rows": F.col("rows").cast("bigint")})
    row.write.format("delta").mode("append").save(path)
    assert lake.read("exports").select("export", "ids").collect() == [("a", None)]
    lake.append("exports", row.withColumns({"export": F.lit("b"), "ids": F.lit("0f")}), "run", 0)
    lake.append("exports", row.withColumn("export", F.lit("c")), "run", 1)  # a wave that older code staged
    assert sorted(tuple(one) for one in lake.read("exports").select("export", "ids").collect()) == [("a", None), ("b", "0f"), ("c", None)]
    assert lake.read("exports", 1).select("ids").collect() == [(None,)]
    with pytest.raises(ConstraintViolated, match="has_rows"):
        lake.append("exports", row.withColumn("rows", F.lit(0).cast("bigint")), "run", 2)
