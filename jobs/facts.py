"""What the tables know of each image, one row an image: the values that selection rules are written over.

A value is a number, or a list of words (all sources of an image together). Each has the version of what it came from. To add one: add its line to
NUMBERS or WORDS and, when it lives in a new table, its reader to _READERS, and to `gather` what its rows count by. An image without a row in a table
has no value there (NULL), which fails every rule but `none_of`; a row with nothing to tell (no tag) is an empty list.

style_size, style_share: images of its style cluster (itself among them), and their share of all that have a cluster: rare styles have little of both,
and lose some as the lake grows. Without a cluster (style_state `none`, `blocked`) there is none. disagreement: of the captioners that are compared
(`compare_captioners`), 1 - the mean agreement over their pairs (udfs/caption_words.py); known once all of them have captioned the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

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
# value -> kernels of detectors of which one tells it
DETECTORS = {"rating": ("nsfw", "tagger"), "tags": ("tagger",), "nsfw": ("nsfw",)} | dict.fromkeys(
    ("has_text", "text_share", "watermark"), ("text",)
)
CLASSIFIERS = {"domain": "style", "style_class": "style"}  # value -> the kind of labels of the classifier that tells it


def used(select: Select) -> list[str]:
    """-> the values that a selection asks for, sorted; those that it always asks for are among them."""
    asked = {rule.value for rule in select.rules} | {cap.value for cap in select.caps} | {cap.per for cap in select.caps if cap.per}
    return sorted(asked | {"opt_out", "denied", "score"})


def tables_read(values: Iterable[str]) -> list[str]:
    """-> the tables that `gather` reads for values, `images` first."""
    versions = {(NUMBERS | WORDS)[name] for name in values}
    return ["images", *(table for table, (version, _) in _READERS.items() if version in versions)]


def tables_used(values: Iterable[str]) -> list[str]:
    """-> the tables of MADE that values live in."""
    return [table for table in tables_read(values) if table in MADE]


def gather(
    lake: Lake, settings: Settings, values: Iterable[str], scores: str, versions: Mapping[str, int] | None, made: Mapping[str, str]
) -> DataFrame:
    """-> image_id and the values (NUMBERS double, WORDS array of strings), each with the version of what it came from. No table is read but those of
    `tables_read`.

    scores: the fingerprint of the scores that count; versions: of the tables; None: as they are now; made: table of MADE -> the fingerprint of the
    rows that count, of every one that a value lives in (select_images.made_by).
    """
    values = sorted(set(values))
    wanted = sorted({(NUMBERS | WORDS)[name] for name in values})
    told_by = {table: f"{table}@{versions[table] if versions else 'now'}" for table in ("sources", "rejects")}
    told_by |= {"scores": scores, "pixels": embedding.outputs(settings)[PIXELS], **made}
    bare = {table: lake.read(table, versions[table] if versions else None) for table in tables_read(values)}
    known = _images(bare.pop("images"))
    for table, rows in bare.items():
        _, rows_of = _READERS[table]
        known = known.join(rows_of(rows, told_by[table]), "image_id", "left")
    if "denied" in values:  # the others are not
        no = {"denied": F.array(F.lit("false")), "denied_version": F.lit(told_by["rejects"])}
        known = known.withColumns({name: F.coalesce(name, value) for name, value in no.items()})
    return known.select("image_id", *values, *wanted)


def _images(rows: DataFrame) -> DataFrame:
    return rows.select(
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


def _sources(rows: DataFrame, told_by: str) -> DataFrame:
    told = rows.groupBy("image_id").agg(
        F.sort_array(F.collect_set("source")).alias("source"),
        F.sort_array(F.collect_set("licence")).alias("licence"),
        F.array(F.max("opt_out").cast("string")).alias("opt_out"),
        F.sort_array(F.array_distinct(F.flatten(F.collect_set("tags")))).alias("source_tags"),
    )
    return told.withColumn("sources_version", F.lit(told_by))


def _pixels(rows: DataFrame, told_by: str) -> DataFrame:
    statistics = [F.col(name).cast("double").alias(name) for name, version in NUMBERS.items() if version == "pixels_version"]
    mine = rows.where((F.col("view") == ORIGINAL) & (F.col("fingerprint") == told_by))
    return mine.select("image_id", *statistics, F.col("fingerprint").alias("pixels_version"))


def _scores(rows: DataFrame, told_by: str) -> DataFrame:
    numbers = [F.col("bin").cast("double").alias("score"), F.col("raw").cast("double").alias("score_raw")]
    return rows.where(F.col("fingerprint") == told_by).select("image_id", *numbers, F.col("fingerprint").alias("score_version"))


def _denied(rows: DataFrame, told_by: str) -> DataFrame:
    denied = deny_lists.denied_by(rows).distinct()
    return denied.withColumns({"denied": F.array(F.lit("true")), "denied_version": F.lit(told_by)})


def _flags(rows: DataFrame, told_by: str) -> DataFrame:
    numbers = [F.col(name).cast("double").alias(name) for name in ("nsfw", "text_share", "watermark")]
    words = [_word(F.col(name).cast("string")).alias(name) for name in ("rating", "ai_generated", "has_text", "domain")]
    mine = rows.where(F.col("fingerprint") == told_by)
    return mine.select("image_id", *numbers, *words, "tags", F.col("fingerprint").alias(MADE["flags"]))


def _styles(rows: DataFrame, told_by: str) -> DataFrame:
    mine = rows.where(F.col("fingerprint") == told_by)
    sizes = mine.where("cluster IS NOT NULL").groupBy("cluster").agg(F.count("*").cast("double").alias("style_size"))
    share = (F.col("style_size") / F.sum("style_size").over(Window.partitionBy())).alias("style_share")  # one row a cluster
    mine = mine.join(F.broadcast(sizes.select("cluster", "style_size", share)), "cluster", "left")
    numbers = [F.col(name).cast("double").alias(f"style_{name}") for name in ("distance", "margin")]
    words = [_word(F.col("state")).alias("style_state"), _word(F.col("tag")).alias("style_cluster")]
    return mine.select("image_id", *numbers, "style_size", "style_share", *words, F.col("fingerprint").alias(MADE["styles"]))


def _classes(rows: DataFrame, told_by: str) -> DataFrame:
    mine = rows.where(F.col("fingerprint") == told_by)
    return mine.select("image_id", _word(F.col("class")).alias("style_class"), F.col("fingerprint").alias(MADE["classes"]))


def _captions(rows: DataFrame, told_by: str) -> DataFrame:
    """told_by: caption_sample.fingerprints."""
    asked = told_by.split(JOINED)
    said = F.collect_list(F.struct("fingerprint", "kind", "text")).alias("said")
    mine = rows.where(F.col("fingerprint").isin(asked) & F.col("kind").isin(*CONTENT)).groupBy("image_id")
    whole = mine.agg(said, F.count_distinct("fingerprint").alias("captioners")).where(F.col("captioners") == len(asked))
    told = whole.select("image_id", "said").mapInPandas(compare_captioners.disagreements, compare_captioners.SCHEMA)
    return told.select("image_id", "disagreement", F.lit(told_by).alias(MADE["captions"]))


def _word(value: Column) -> Column:
    """NULL stays NULL."""
    return F.when(value.isNotNull(), F.array(value))


# table -> the column that holds its values' version, and (its rows, by what they count) -> image_id, its values, that column
_READERS: dict[str, tuple[str, Callable[[DataFrame, str], DataFrame]]] = {
    "sources": ("sources_version", _sources),
    "pixels": ("pixels_version", _pixels),
    "scores": ("score_version", _scores),
    "rejects": ("denied_version", _denied),
    "flags": (MADE["flags"], _flags),
    "styles": (MADE["styles"], _styles),
    "classes": (MADE["classes"], _classes),
    "captions": (MADE["captions"], _captions),
}
TABLES = ("images", *_READERS)
