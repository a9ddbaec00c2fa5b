"""The domain of an image, under which bins of the score are fitted and scores are compared: none, its first source, or its class."""

from __future__ import annotations

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings
from jobs import classify, rejects
from jobs.lake import Lake

NONE, SOURCE, CLASS = "none", "source", "class"


def add(lake: Lake, rows: DataFrame, domain: str, classes: str = "") -> DataFrame:
    """Rows with image_id -> the same with `domain` (NULL: it has none). classes: fingerprint of the rows of `classes` that count."""
    if domain == NONE:
        return rows.withColumn("domain", F.lit(None).cast("string"))
    return rows.join(first_sources(lake) if domain == SOURCE else by_class(lake, classes), "image_id", "left")


def first_sources(lake: Lake) -> DataFrame:
    """-> (image_id, domain): the source that brought the image first. A source that brings it again later does not move it."""
    first = F.min_by("source", F.struct("run", "source"))  # run ids begin with their time
    return lake.read("sources").groupBy("image_id").agg(first.alias("domain"))


def by_class(lake: Lake, classes: str) -> DataFrame:
    """-> (image_id, domain): its class, `other` among them."""
    return lake.read("classes").where(F.col("fingerprint") == classes).select("image_id", F.col("class").alias("domain"))


def classifier(settings: Settings, label: str) -> str:
    """The kind of labels -> the fingerprint of the classes that its champion gives. Raises Mistake when no classifier is configured."""
    entry = next((entry for entry in settings.classify if entry.label == label), None)
    if entry is None:
        known = [one.label for one in settings.classify]
        raise Mistake(f"domain class: no entry of `classify` has the label {label!r} (it has {known}); add one, or take another domain")
    return classify.fingerprint(classify.champion(settings, entry))


def check_classified(lake: Lake, rows: DataFrame, classes: str, what: str) -> None:
    """Raises Mistake when images of the rows have not been through the classifier: their rows would stay without a domain for good."""
    refused = rejects.settled(lake, classify.NAME).where(F.col("fingerprint") == classes).select(F.unhex("input_key").alias("image_id"))
    waiting = rows.select("image_id").join(by_class(lake, classes), "image_id", "left_anti").join(refused, "image_id", "left_anti")
    if not waiting.isEmpty():
        raise Mistake(
            f"{what}: images have no class by {classes} yet; run the stage classify first. Where its champion is another by now, "
            f"fit bins anew (python -m jobs.calibrate_scores) and score with these"
        )
