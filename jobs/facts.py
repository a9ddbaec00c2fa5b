"""What the tables know of each image, one row an image: the values that selection rules are written over.

A value is a number, or a list of words (all sources of an image together). Each has the version of what it came from. To add
one: add its line to NUMBERS or WORDS and, when it lives in a new table, its reader to `gather`. An image without a row in a table has no value
there (NULL), which fails every rule but `none_of`; a row with nothing to tell (no tag) is an empty list.

style_size, style_share: images of its style cluster (itself among them), and their share of all that have a cluster: rare styles have little of both,
and lose some as the lake grows. Without a cluster (style_state `none`, `blocked`) there is none. disagreement: of the captioners that are compared
(`compare_captioners`), 1 - the mean agreement over their pairs (udfs/caption_words.py); known once all of them have captioned the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from conf.build import Select
from conf.settings import Settings
from jobs import deny_lists, embedding
from jobs.lake import Lake
from udfs import compare_captioners
from udfs.caption_words import CONTENT
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
    "nsfw": "flags_version",
    "text_share": "flags_version",
    "watermark": "flags_version",
    "style_distance": "styles_version",
    "style_margin": "styles_version",
    "style_size": "styles_version",
    "style_share": "styles_version",
    "disagreement": "captions_version",
}
WORDS = {
    "format": "image_version",
    "ai_marks": "image_version",
    "source": "sources_version",
    "licence": "sources_version",
    "opt_out": "sources_version",
    "source_tags": "sources_version",
    "denied": "denied_version",
    "rating": "flags_version",
    "tags": "flags_version",
    "ai_generated": "flags_version",
    "has_text": "flags_version",
    "domain": "flags_version",
    "style_state": "styles_version",
    "style_cluster": "styles_version",
    "style_class": "classes_version",
}
JOINED = " + "  # between the fingerprints of captioners that are compared: captions_version
_TRUTH = ("true", "false")
CLOSED = {  # value -> all the words that it can be
    "rating": ("safe", "questionable", "explicit"),
    "ai_generated": ("declared", "detected", "unknown"),
    "style_state": ("ok", "blocked", "none"),
    **dict.fromkeys(("ai_marks", "opt_out", "denied", "has_text"), _TRUTH),
}
# tables that need not be there for a selection
MADE = {"flags": "flags_version", "styles": "styles_version", "classes": "classes_version", "captions": "captions_version"}
TABLES = ("images", "sources", "pixels", "scores", "rejects", *MADE)
# value -> kernels of detectors of which one tells it
DETECTORS = {"rating": ("nsfw", "tagger"), "tags": ("tagger",), "nsfw": ("nsfw",)} | dict.fromkeys(
    ("has_text", "text_share", "watermark"), ("text",)
)
CLASSIFIERS = {"domain": "style", "style_class": "style"}  # value -> the kind of labels of the classifier that tells it


def used(select: Select) -> list[str]:
    """-> the values that a selection asks for, sorted; those that it always asks for are among them."""
    asked = {rule.value for rule in select.rules} | {cap.value for cap in select.caps} | {cap.per for cap in select.caps if cap.per}
    return sorted(asked | {"opt_out", "denied", "score"})


def tables_used(values: Iterable[str]) -> list[str]:
    """-> the tables of MADE that values live in."""
    versions = {(NUMBERS | WORDS)[name] for name in values}
    return [table for table, version in MADE.items() if version in versions]


def gather(lake: Lake, settings: Settings, scores: str, versions: dict[str, int], made: Mapping[str, str] | None = None) -> DataFrame:
    """Tables at `versions` and scores of one fingerprint -> image_id, NUMBERS (double), WORDS (array of strings), their versions.

    made: table of MADE -> the fingerprint of the rows that count; values of one that is not named are NULL.
    """
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
            F.sort_array(F.array_distinct(F.flatten(F.collect_set("tags")))).alias("source_tags"),
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
    known = image.join(told, "image_id", "left").join(pixels, "image_id", "left").join(scored, "image_id", "left")
    known = _with_denied(known, bare["rejects"], versions["rejects"])
    for table, rows in (("flags", _flags), ("styles", _styles), ("classes", _classes), ("captions", _captions)):
        told_by = (made or {}).get(table)
        mine = rows(bare[table], told_by)
        if told_by is None:
            known = known.withColumns({name: F.lit(None).cast(kind) for name, kind in mine.dtypes if name != "image_id"})
        else:
            known = known.join(mine, "image_id", "left")
    return known


def _with_denied(known: DataFrame, rejects: DataFrame, version: int) -> DataFrame:
    denied = deny_lists.denied_by(rejects).distinct()
    marked = known.join(denied.withColumn("is_denied", F.lit(True)), "image_id", "left")
    told = F.array(F.coalesce("is_denied", F.lit(False)).cast("string"))
    return marked.withColumns({"denied": told, "denied_version": F.lit(f"rejects@{version}")}).drop("is_denied")


def _flags(rows: DataFrame, told_by: str | None) -> DataFrame:
    numbers = [F.col(name).cast("double").alias(name) for name in ("nsfw", "text_share", "watermark")]
    words = [_word(F.col(name).cast("string")).alias(name) for name in ("rating", "ai_generated", "has_text", "domain")]
    mine = rows.where(F.col("fingerprint") == F.lit(told_by))
    return mine.select("image_id", *numbers, *words, "tags", F.col("fingerprint").alias(MADE["flags"]))


def _styles(rows: DataFrame, told_by: str | None) -> DataFrame:
    mine = rows.where(F.col("fingerprint") == F.lit(told_by))
    sizes = mine.where("cluster IS NOT NULL").groupBy("cluster").agg(F.count("*").cast("double").alias("style_size"))
    share = (F.col("style_size") / F.sum("style_size").over(Window.partitionBy())).alias("style_share")  # one row a cluster
    mine = mine.join(F.broadcast(sizes.select("cluster", "style_size", share)), "cluster", "left")
    numbers = [F.col(name).cast("double").alias(f"style_{name}") for name in ("distance", "margin")]
    words = [_word(F.col("state")).alias("style_state"), _word(F.col("tag")).alias("style_cluster")]
    return mine.select("image_id", *numbers, "style_size", "style_share", *words, F.col("fingerprint").alias(MADE["styles"]))


def _classes(rows: DataFrame, told_by: str | None) -> DataFrame:
    mine = rows.where(F.col("fingerprint") == F.lit(told_by))
    return mine.select("image_id", _word(F.col("class")).alias("style_class"), F.col("fingerprint").alias(MADE["classes"]))


def _captions(rows: DataFrame, told_by: str | None) -> DataFrame:
    """told_by: caption_sample.fingerprints."""
    asked = (told_by or "").split(JOINED)
    said = F.collect_list(F.struct("fingerprint", "kind", "text")).alias("said")
    mine = rows.where(F.col("fingerprint").isin(asked) & F.col("kind").isin(*CONTENT)).groupBy("image_id")
    whole = mine.agg(said, F.count_distinct("fingerprint").alias("captioners")).where(F.col("captioners") == len(asked))
    told = whole.select("image_id", "said").mapInPandas(compare_captioners.disagreements, compare_captioners.SCHEMA)
    return told.select("image_id", "disagreement", F.lit(told_by).cast("string").alias(MADE["captions"]))


def _word(value: Column) -> Column:
    """NULL stays NULL."""
    return F.when(value.isNotNull(), F.array(value))
