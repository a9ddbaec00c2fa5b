"""all tables -> one HTML file that opens without a server.

    spark-submit --jars '.cache/jars/*.jar' jobs/report.py --config conf/demo.yaml

Funnel, reject reasons and dropped images with thumbnails, score histogram with images of each bin and what the score follows, style
clusters, flags, pixel statistics, label quality, versions of everything. It reads a bounded number of images, whatever the lake's size; what cannot be drawn is
shown as a box with its reason. Made again only when a table, the champion or the settings changed.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from typing import Any

from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, digest
from jobs import (
    command,
    deny_lists,
    embedding,
    facts,
    funnel,
    occurrences,
    pages,
    report_captioners,
    report_captions,
    report_flags,
    report_scores,
    report_styles,
    score,
    select_images,
)
from jobs.lake import Lake
from jobs.registry import Head
from jobs.tables import TABLES
from udfs import addresses, decode, reject
from udfs.embed import ORIGINAL, PIXELS
from udfs.opener import to_uri

NAME = "report"
REPORT_VERSION = 4
THUMBNAIL = 112  # pixels of the longer side
STATISTICS = {  # name -> unit, as udfs/pixel_statistics.py defines them
    "mean": "luma, levels of 255",
    "contrast": "standard deviation of luma, levels",
    "saturation": "mean of HSV's S, 0 to 1",
    "sharpness": "variance of the Laplacian, log10(1 + x)",
    "entropy": "bits",
}
BARS = 24
SECTIONS = 4  # that are asked for at the same time
PACKAGES = ("pyspark", "delta-spark", "torch", "open_clip_torch", "pillow", "numpy", "pyarrow", "mlflow")


def run(lake: Lake, settings: Settings, plan_only: bool = False, head: Head | None = None) -> None:
    """`head`: the champion where the caller has resolved it."""
    head = head or score.champion(settings)
    versions = lake.versions(TABLES)
    selection = select_images.identity(lake, settings, score.fingerprint(head), {name: versions[name] for name in facts.TABLES})
    identity = digest(
        REPORT_VERSION,
        embedding.outputs(settings),
        versions,
        selection,
        head.version,
        head.tags,
        *(
            settings.report,
            settings.label,
            settings.score,
            report_styles.identity(lake, settings),
            report_flags.identity(settings),
            report_captions.identity(settings),
            report_captioners.identity(settings),
        ),
    )
    if not select_images.is_made(lake, selection):
        raise Mistake(f"report: selection {selection} of this config and these tables is not made; run the stage select first")
    uri = to_uri(settings.report.path)
    if pages.is_current(lake, uri, identity):
        print(f"{NAME}: nothing to do, {settings.report.path} is up to date")
        return
    if plan_only:
        print(f"{NAME}: {settings.report.path} is to be made anew")
        return
    many = settings.report.images_per_group
    outputs = embedding.outputs(settings)
    sections: dict[str, Callable[[], object]] = {
        "funnel": lambda: funnel.measure(lake, settings, selection, score.fingerprint(head)),
        "rejects": lambda: _rejects(lake, settings, score.fingerprint(head), many),
        "drops": lambda: _drops(lake, settings, selection, many),
        "bias": lambda: report_scores.section(lake, settings, head),
        "styles": lambda: report_styles.section(lake, settings),
        "flags": lambda: report_flags.section(lake, settings, partial(pictures, lake, settings)),
        "captions": lambda: report_captions.section(lake, settings, score.fingerprint(head), partial(pictures, lake, settings)),
        "captioners": lambda: report_captioners.section(lake, settings, partial(pictures, lake, settings)),
        "bins": lambda: _bins(lake, settings, score.fingerprint(head), many),
        "statistics": lambda: _statistics(lake, outputs[PIXELS]),
        "labels": lambda: _labels(lake),
    }
    with ThreadPoolExecutor(SECTIONS) as pool:  # hundreds of small queries, most of whose time is the driver's
        made = {name: pool.submit(section) for name, section in sections.items()}
    told = {
        "identity": identity,
        "config": {"lake": settings.lake.root, "selection": f"{settings.select.name} ({selection})"},
        **{name: section.result() for name, section in made.items()},
        "evaluation": json.loads(head.tags["evaluation"]),
        "head": {"model": head.model, "version": head.version, "sha256": head.sha256, **head.tags},
        "versions": versions,
        "fingerprints": outputs | {"scores": score.fingerprint(head)},
        "packages": {name: version(name) for name in PACKAGES},
    }
    lake.opener.write(uri, pages.render("report.html", told))
    print(f"{NAME}: {settings.report.path}")


def pictures(lake: Lake, settings: Settings, rows: DataFrame, group: str) -> dict[Any, list[dict[str, Any]]]:
    """Rows with image_id, a caption and a column that groups them -> group -> what the page shows of some of them."""
    placed, many = _placed(lake, rows), settings.report.images_per_group
    counts = {row[group]: row["count"] for row in placed.groupBy(group).count().collect()}
    return {key: _drawn(lake, settings, some) for key, some in _some(_sampled(placed, group, counts, many), group, many).items()}


def thumbnail(data: bytes, limits: dict[str, Any]) -> str:
    """Image bytes -> data URI of a small JPEG. Raises Reject."""
    image = decode.decode(data, limits).image
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _drawn(lake: Lake, settings: Settings, rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows with an address, a caption and, when they are rejects, a code -> what the page shows of each."""
    shown = []
    for row in (one.asDict() for one in rows):
        picture, why = None, ""
        try:
            if row["uri"] is None or (row["length"] or 0) <= 0:  # -1: there was nothing to measure
                raise reject.Reject(row.get("code", "empty"))
            if row["length"] > settings.limits.max_bytes:
                raise reject.Reject("too_many_bytes")
            picture = thumbnail(addresses.read(row, lake.opener), settings.limits.model_dump())
        except reject.Reject as failed:
            why = failed.code
        shown.append({"picture": picture, "why": why, "caption": row["caption"], "name": (row["uri"] or "").rpartition("/")[2]})
    return shown


def _some(rows: DataFrame, group: str, many: int) -> dict[Any, list[Row]]:
    """At most `many` rows of each group, by a hash of their id, so that the choice is stable and not the first ones."""
    order: Column = F.xxhash64("image_id", *embedding.ORDER)
    ranked = rows.groupBy(group).agg(
        F.slice(F.sort_array(F.collect_list(F.struct(order.alias("order"), F.struct("*").alias("row")))), 1, many).alias("some")
    )
    return {row[group]: [one["row"] for one in row["some"]] for row in ranked.collect()}


def _placed(lake: Lake, rows: DataFrame) -> DataFrame:
    """Adds the latest address of each image, but for denied ones: no page shows them."""
    return deny_lists.allowed(lake, rows).join(occurrences.latest(lake.read("sources"), *addresses.PLACE), "image_id")


def _rejects(lake: Lake, settings: Settings, scores: str, many: int) -> list[dict[str, Any]]:
    rows = funnel.standing(lake, settings, scores)
    denied = deny_lists.ids(lake).withColumn("is_denied", F.lit(True))  # whatever else was wrong with such an image is not shown
    rows = rows.join(denied, "image_id", "left").where(F.col("is_denied").isNull() | (F.col("code") == deny_lists.CODE)).drop("is_denied")
    name = F.element_at(F.split("uri", "/"), -1)
    rows = rows.withColumn("caption", F.concat_ws(" · ", name, "stage", "detail"))
    counts = {row["code"]: row["count"] for row in rows.groupBy("code").count().collect()}
    some = _some(_sampled(rows, "code", counts, many), "code", many)
    return [
        {"code": code, "count": count, "meaning": reject.CODES[code][1], "images": _drawn(lake, settings, some.get(code, []))}
        for code, count in sorted(counts.items(), key=lambda item: -item[1])
    ]


def _sampled(rows: DataFrame, group: str, counts: dict[Any, int], many: int) -> DataFrame:
    """Thins groups out before they are gathered, so that none holds more than some hundred rows on one task."""
    share = {key: min(1.0, 50.0 * many / count) for key, count in counts.items()}
    threshold = F.element_at(F.create_map(*[F.lit(x) for pair in share.items() for x in pair]), F.col(group)) if share else F.lit(1.0)
    draw = F.pmod(F.xxhash64("image_id", *embedding.ORDER), F.lit(1_000_000)) / 1_000_000
    return rows.where(draw < threshold)


def _drops(lake: Lake, settings: Settings, selection: str, many: int) -> list[dict[str, Any]]:
    failed = lake.read("decisions").where(F.col("selection") == selection).select("image_id", F.explode("failed").alias("failed"))
    caption = F.concat_ws(" ", F.col("failed.value"), F.lit("— wanted"), F.col("failed.bound"))
    rows = _placed(lake, failed.select("image_id", F.col("failed.rule").alias("rule"), caption.alias("caption")))
    counts = {row["rule"]: row["count"] for row in rows.groupBy("rule").count().collect()}
    some = _some(_sampled(rows, "rule", counts, many), "rule", many)
    return [{"rule": rule, "count": count, "images": _drawn(lake, settings, some.get(rule, []))} for rule, count in sorted(counts.items())]


def _bins(lake: Lake, settings: Settings, fingerprint: str, many: int) -> list[dict[str, Any]]:
    scored = lake.read("scores").where(F.col("fingerprint") == fingerprint)
    rows = _placed(lake, scored.select("image_id", "bin", F.format_string("%.3f", "raw").alias("caption")))
    counts = {row["bin"]: row["count"] for row in scored.groupBy("bin").count().collect()}
    some = _some(_sampled(rows, "bin", counts, many), "bin", many)
    return [{"bin": b, "count": counts.get(b, 0), "images": _drawn(lake, settings, some.get(b, []))} for b in range(10)]


def _statistics(lake: Lake, fingerprint: str) -> list[dict[str, Any]]:
    rows = lake.read("pixels").where((F.col("view") == ORIGINAL) & (F.col("fingerprint") == fingerprint)).select(*STATISTICS)
    rows = rows.withColumn("sharpness", F.log10(1 + F.col("sharpness")))  # spans five decades
    ends = rows.agg(*[end(name).alias(f"{name}_{end.__name__}") for name in STATISTICS for end in (F.min, F.max)]).first()
    if ends is None or ends["mean_min"] is None:
        return []
    told = []
    for name, unit in STATISTICS.items():
        low, high = ends[f"{name}_min"], ends[f"{name}_max"]
        width = (high - low) / BARS or 1.0
        place = F.least(F.floor((F.col(name) - low) / width), F.lit(BARS - 1)).cast("int").alias("place")
        counts = {row["place"]: row["count"] for row in rows.select(place).groupBy("place").count().collect()}
        bars = [counts.get(place, 0) for place in range(BARS)]
        told.append({"name": name, "unit": unit, "low": low, "high": high, "bars": bars, "most": max(bars)})
    return told


def _labels(lake: Lake) -> list[dict[str, Any]]:
    grouped = lake.read("labels").groupBy("rater", "kind", "view", "value").agg(F.countDistinct("image_id").alias("images"))
    return [row.asDict() for row in grouped.orderBy("rater", F.desc("value"), "view").limit(200).collect()]


if __name__ == "__main__":
    command.main(__doc__, run)
