"""What training prompts are composed from: score, rating, style cluster and captions of each image, as they count now."""

from __future__ import annotations

from contextlib import suppress

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings
from jobs import caption_tiers, centres, flag
from jobs.lake import Lake


def gather(lake: Lake, settings: Settings, scores: str) -> DataFrame:
    """scores: the fingerprint that counts -> (image_id, score INT, rating STRING, cluster INT, captions) of every image that has captions.

    An image's captions are those of one captioner: of the tiers whose captioners have captioned it, the earliest in the config. What a captioner
    wrote that is in no tier, for a comparison, is in no prompt.
    captions: an array of (id, kind, text) in the order of their ids, which name the row of `captions` for ever; `ocr` is among them, for captioners
    that learn from it, and no prompt takes it. NULL: nothing is known.
    """
    scored = lake.read("scores").where(F.col("fingerprint") == scores).select("image_id", F.col("bin").alias("score"))
    known = with_marks(lake, settings, captions(lake, settings).join(scored, "image_id", "left"))
    return known.select("image_id", "score", "rating", "cluster", "captions")


def captions(lake: Lake, settings: Settings) -> DataFrame:
    """-> (image_id, captions) as in `gather`."""
    rows = caption_tiers.counting(settings, lake.read("captions"))
    one = F.struct(F.concat_ws("/", "fingerprint", "kind", "part").alias("id"), "kind", "text")
    return rows.groupBy("image_id").agg(F.sort_array(F.collect_list(one)).alias("captions"))


def with_marks(lake: Lake, settings: Settings, rows: DataFrame) -> DataFrame:
    """Rows with image_id -> the same with rating and cluster, NULL where nothing is known."""
    return rows.join(_ratings(lake, settings), "image_id", "left").join(_clusters(lake, settings), "image_id", "left")


def _ratings(lake: Lake, settings: Settings) -> DataFrame:
    told = flag.evidence(settings).fingerprint
    return lake.read("flags").where(F.col("fingerprint") == told).select("image_id", "rating")


def _clusters(lake: Lake, settings: Settings) -> DataFrame:
    told = ""
    with suppress(Mistake):  # a build without style clusters
        told = centres.fingerprint(centres.current(settings), settings)
    return lake.read("styles").where(F.col("fingerprint") == told).select("image_id", "cluster")
