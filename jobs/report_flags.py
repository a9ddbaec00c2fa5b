"""flags, detections -> the report's section on flags: ratings by domain, origin with its evidence, text, watermark candidates, tags.

`section` gives plain values for jobs/report_flags.html, which renders them as `flags`. Bounded: counts, the most frequent tags and strings, and
pictures of a few groups. No denied image is shown (`draw` leaves them out), and none that is rated explicit: those are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, digest
from jobs import flag
from jobs.flag import Evidence
from jobs.lake import Lake
from udfs.flags import SEVERITY

SECTION_VERSION = 1
TAGS, STRINGS, EVIDENCE = 30, 12, 8  # of each the most frequent are shown
UNKNOWN = "unknown"
LIKELY = 0.5  # of the watermark heuristic: pictures from here are shown
STEPS = (0.8, 0.5, 0.25)  # of the same, for the counts
MUCH = 0.05  # share of a picture that is text

# (rows with image_id, a group's column and `caption`; that column's name) -> group -> its pictures as jobs/report.html's `strip` takes them
Draw = Callable[[DataFrame, str], dict[Any, list[dict[str, Any]]]]


def identity(settings: Settings) -> str:
    """What the section depends on beside the tables."""
    try:
        return digest(SECTION_VERSION, flag.evidence(settings).fingerprint)
    except Mistake as mistake:
        return digest(SECTION_VERSION, str(mistake))


def section(lake: Lake, settings: Settings, draw: Draw) -> dict[str, Any]:
    """-> what jobs/report_flags.html shows; `absent` says why where there is nothing to show."""
    try:
        known = flag.evidence(settings)
    except Mistake as mistake:
        return {"absent": str(mistake)}
    rows = lake.read("flags").where(F.col("fingerprint") == known.fingerprint)
    total = rows.count()
    if total == 0:
        return {"absent": "no image has flags under this config yet; run the stage flag"}
    told = {
        "absent": "",
        "images": total,
        "versions": known.versions,
        "ratings": _ratings(rows),
        "origin": _origin(rows),
        "text": _text(rows),
        "steps": _steps(rows),
        "strings": _strings(lake, settings, known),
        "tags": _top(rows.select(F.explode("tags").alias("name")), TAGS),
        "thresholds": settings.flags.model_dump(),
    }
    return told | {"groups": _groups(rows, draw)}


def _ratings(rows: DataFrame) -> dict[str, Any]:
    """-> a row of counts a domain, and who decided how often."""
    domain, rating = F.coalesce("domain", F.lit(UNKNOWN)).alias("domain"), F.coalesce("rating", F.lit(UNKNOWN)).alias("rating")
    counts = {(row["domain"], row["rating"]): row["count"] for row in rows.groupBy(domain, rating).count().collect()}
    names = [*SEVERITY, UNKNOWN]
    table = [{"domain": one, "counts": [counts.get((one, name), 0) for name in names]} for one in sorted({key[0] for key in counts})]
    by = rows.where(F.col("rating").isin(*SEVERITY[1:])).select(F.concat_ws(" by ", "rating", "rating_by").alias("name"))
    return {"names": names, "table": table, "by": _top(by, EVIDENCE)}


def _origin(rows: DataFrame) -> dict[str, Any]:
    counts = _top(rows.select(F.col("ai_generated").alias("name")), 3)
    kind = F.regexp_replace("one", r"(: |, ).*$", "")  # `declared by png:parameters: a horse` -> `declared by png:parameters`
    return {"counts": counts, "evidence": _top(rows.select(F.explode("ai_evidence").alias("one")).select(kind.alias("name")), EVIDENCE)}


def _text(rows: DataFrame) -> list[dict[str, Any]]:
    """-> how much text there is, in all and by domain; nothing where no text detector ran."""
    seen = rows.where(F.col("has_text").isNotNull()).withColumn("domain", F.coalesce("domain", F.lit(UNKNOWN)))
    measures = [
        F.count("*").alias("images"),
        F.avg(F.col("has_text").cast("int")).alias("with_text"),
        F.avg("text_share").alias("share"),
        F.avg((F.col("text_share") >= MUCH).cast("int")).alias("much"),
    ]
    whole = seen.agg(*measures).withColumn("domain", F.lit("all")).collect()
    parts = seen.groupBy("domain").agg(*measures).orderBy("domain").collect()
    return [row.asDict() for row in (*whole, *parts) if row["images"]]


def _steps(rows: DataFrame) -> list[dict[str, Any]]:
    sums = [F.sum((F.col("watermark") >= step).cast("int")).alias(str(at)) for at, step in enumerate(STEPS)]
    row = rows.agg(*sums).first()
    assert row is not None
    return [{"from": step, "n": row[str(at)] or 0} for at, step in enumerate(STEPS)]


def _strings(lake: Lake, settings: Settings, known: Evidence) -> list[dict[str, Any]]:
    """-> the strings that most pictures show at an edge."""
    if all(one.kernel != "text" for one in known.detectors.values()):
        return []
    repeated = flag.repeated(lake, settings, known)
    return _top(repeated.select(F.explode("repeated").alias("name")), STRINGS)


def _groups(rows: DataFrame, draw: Draw) -> list[dict[str, Any]]:
    """-> pictures of the groups that a person should look at."""
    mild = F.coalesce(F.col("rating") != "explicit", F.lit(True))
    marked = F.format_string("%.2f %s", "watermark", F.coalesce(F.substring("text", 1, 60), F.lit("")))
    origin = F.concat_ws("; ", "ai_evidence")
    choices = (
        ("likely watermarked", F.col("watermark") >= LIKELY, marked),
        ("AI-generated, declared", F.col("ai_generated") == "declared", origin),
        ("AI-generated, detected", F.col("ai_generated") == "detected", origin),
        ("questionable", F.col("rating") == "questionable", F.concat_ws(" by ", "rating", "rating_by")),
    )
    groups = []
    for name, condition, caption in choices:
        mine = rows.where(condition)
        some = draw(mine.where(mild).select("image_id", F.lit(name).alias("group"), caption.alias("caption")), "group")
        groups.append({"name": name, "n": mine.count(), "images": some.get(name, [])})
    return [group for group in groups if group["n"]]


def _top(names: DataFrame, many: int) -> list[dict[str, Any]]:
    """Rows with `name` -> the `many` most frequent, with their number."""
    counted = names.groupBy("name").agg(F.count("*").alias("n")).orderBy(F.desc("n"), "name").limit(many)
    return [row.asDict() for row in counted.collect()]
