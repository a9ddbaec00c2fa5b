"""Which source speaks for an image."""

from __future__ import annotations

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from jobs import occurrences

COLUMNS = "image_id STRING, source STRING, key STRING, uri STRING, offset BIGINT, mtime_us BIGINT, run STRING, alt_text STRING"
ROWS = "row_group INT, row INT"


def test_the_newest_bytes_speak_and_of_their_states_the_one_that_landed_last(spark: SparkSession) -> None:
    rows = [
        ("a", "shards", "1", "s.tar", 512, 10, "20260101", "before the shard was packed anew"),
        ("a", "shards", "1", "s.tar", 9728, 20, "20260102", "a typo"),
        ("a", "shards", "1", "s.tar", 9728, 20, "20260103", "the corrected caption"),
        ("b", "other", "2", "b.png", 0, 5, "20260101", None),
    ]
    sources = spark.createDataFrame([(*row, None, None) for row in rows], f"{COLUMNS}, {ROWS}").repartition(3)
    told = {row["image_id"]: tuple(row)[1:] for row in occurrences.latest(sources, "offset", "alt_text").collect()}
    assert told == {"a": (9728, "the corrected caption"), "b": (0, None)}
    places = sources.groupBy("image_id").agg(occurrences.newest_first(2, "uri", "offset").alias("places")).where("image_id = 'a'").first()
    assert places is not None
    assert [tuple(place) for place in places["places"]] == [("s.tar", 9728), ("s.tar", 512)]
    assert sources.groupBy("image_id").agg(F.size(occurrences.newest_first(1, "uri", "offset")).alias("n")).agg(F.max("n")).first()[0] == 1  # type: ignore[index]
