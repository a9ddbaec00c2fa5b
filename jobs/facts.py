"""What the tables know of each image, one row an image: the values that selection rules are written over.

A value is a number, or a list of words (all sources of an image together). Each has the version of what it came from. To add
one: add its line to NUMBERS or WORDS and, when it lives in a new table, its reader to `gather`.
"""

from __future__ import annotations

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.settings import Settings
from jobs import embedding
from jobs.lake import Lake
from udfs.embed import ORIGINAL, PIXELS

# name -> the column that holds its version
NUMBERS = {
    "score": "score_version",
    "score_raw": "score_version",
    "min_side": "image_version",
    "max_side": "image_version",
    "pixels": "image_version",
    "bytes": "image_version",
    "frames": "image_version",
    "mean": "pixels_version",
    "contrast": "pixels_version",
    "saturation": "pixels_version",
    "sharpness": "pixels_version",
    "entropy": "pixels_version",
}
WORDS = {
    "format": "image_version",
    "ai_marks": "image_version",
    "source": "sources_version",
    "licence": "sources_version",
    "opt_out": "sources_version",
}
TABLES = ("images", "sources", "pixels", "scores")


def gather(lake: Lake, settings: Settings, scores: str, versions: dict[str, int]) -> DataFrame:
    """Tables at `versions` and scores of one fingerprint -> image_id, NUMBERS (double), WORDS (array of strings), their versions."""
    bare = {table: lake.read(table, versions[table]) for table in TABLES}
    image = bare["images"].select(
        "image_id",
        F.least("width", "height").cast("double").alias("min_side"),
        F.greatest("width", "height").cast("double").alias("max_side"),
        (F.col("width").cast("double") * F.col("height")).alias("pixels"),
        F.col("bytes").cast("double").alias("bytes"),
        F.col("frames").cast("double").alias("frames"),
        F.array("format").alias("format"),
        F.array((F.size("ai_marks") > 0).cast("string")).alias("ai_marks"),
        F.lit("sha256").alias("image_version"),
    )
    told = (
        bare["sources"]
        .groupBy("image_id")
        .agg(
            F.sort_array(F.collect_set("source")).alias("source"),
            F.sort_array(F.collect_set("licence")).alias("licence"),
            F.array(F.max("opt_out").cast("string")).alias("opt_out"),
        )
    )
    told = told.withColumn("sources_version", F.lit(f"sources@{versions['sources']}"))
    pixels_fingerprint = embedding.outputs(settings)[PIXELS]
    statistics = [F.col(name).cast("double").alias(name) for name, version in NUMBERS.items() if version == "pixels_version"]
    pixels = bare["pixels"].where((F.col("view") == ORIGINAL) & (F.col("fingerprint") == pixels_fingerprint))
    pixels = pixels.select("image_id", *statistics, F.col("fingerprint").alias("pixels_version"))
    scored = bare["scores"].where(F.col("fingerprint") == scores)
    number = [F.col("bin").cast("double").alias("score"), F.col("raw").cast("double").alias("score_raw")]
    scored = scored.select("image_id", *number, F.col("fingerprint").alias("score_version"))
    return image.join(told, "image_id", "left").join(pixels, "image_id", "left").join(scored, "image_id", "left")
