"""The newest comparison of captioners -> the report's section on them: measures beside each other, and the images about which they disagree most.

Bounded: one MLflow run, and the captions of `report.images_per_group` images.
"""

from __future__ import annotations

import io
import json
from typing import Any

import pandas as pd
from pyspark.sql import functions as F

from conf.settings import Settings, digest
from jobs import caption_rows, compare_captioners, runs
from jobs.lake import Lake
from jobs.report_captions import ORDER, Draw
from udfs import explained

SECTION_VERSION = 2
KINDS = ("short", "medium", "long", "tags")  # that are shown of an image
SPARE = 4  # times the images that are shown: denied and explicit ones are left out


def identity(settings: Settings) -> str:
    """What the section depends on beside the tables."""
    return digest(SECTION_VERSION, compare_captioners.latest(settings))


def section(lake: Lake, settings: Settings, draw: Draw) -> dict[str, Any]:
    """-> what jobs/report_captioners.html shows; `absent` says why where there is nothing to show."""
    if (made := compare_captioners.latest(settings)) is None:
        return {
            "absent": "no captioners have been compared; name two in compare_captioners, run the stage caption and then compare_captioners"
        }
    files = runs.files(settings.mlflow, made)
    told = json.loads(files[compare_captioners.JSON])
    images = _apart(lake, settings, pd.read_parquet(io.BytesIO(files[compare_captioners.IMAGES])), told["fingerprints"], draw)
    return {
        "absent": "",
        "run": made,
        "coverage": round(100 * explained.COVERAGE),
        "resamples": explained.RESAMPLES,
        "apart": images,
    } | told


def _apart(lake: Lake, settings: Settings, pairs: pd.DataFrame, fingerprints: dict[str, str], draw: Draw) -> list[dict[str, Any]]:
    """(image_id, first, second, agreement) -> the images of the least mean agreement, with what each captioner wrote."""
    if pairs.empty:  # no two have a kind of text in common
        return []
    many = settings.report.images_per_group
    lowest = pairs.groupby("image_id")["agreement"].mean().nsmallest(SPARE * many)
    ids = [(bytearray(row["image_id"]), row["agreement"]) for row in lowest.reset_index().to_dict("records")]
    chosen = lake.spark.createDataFrame(ids, "image_id BINARY, agreement DOUBLE")
    names = F.create_map(*[F.lit(part) for name, one in fingerprints.items() for part in (one, name)])
    texts = lake.read("captions").where(F.col("fingerprint").isin(*fingerprints.values()) & F.col("kind").isin(*KINDS))
    one = F.struct(names[F.col("fingerprint")].alias("captioner"), "kind", "text")
    said = texts.join(chosen, "image_id", "left_semi").groupBy("image_id").agg(F.collect_list(one).alias("texts"))
    rated = caption_rows.flags(lake, settings).select("image_id", "rating")
    rows = chosen.join(said, "image_id").join(rated, "image_id", "left").where("coalesce(rating != 'explicit', true)")
    shown = rows.orderBy("agreement", "image_id").limit(many)
    shown = shown.select("image_id", F.lit("all").alias("group"), F.to_json(F.struct("agreement", "texts")).alias("caption"))
    drawn = [one | json.loads(one["caption"]) for one in draw(shown, "group").get("all", [])]
    for image in drawn:
        image["texts"].sort(key=lambda text: (ORDER.index(text["kind"]), text["captioner"]))
    return sorted(drawn, key=lambda image: image["agreement"])
