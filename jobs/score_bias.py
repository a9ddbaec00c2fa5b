"""scores, pixels, images and what groups them -> how much of the score is contrast, saturation, sharpness and resolution; printed.

    python -m jobs.score_bias --config conf/demo.yaml

Reward hacking: a selection by score is a selection by whatever the score follows. Three tables, nothing is written:
- bins by source, class and style cluster (where `classes` and `styles` have rows);
- the share of the raw score's variance that a linear regression on four statistics explains (R2, each alone and all together), overall and
  in each group of FEWEST images: covariances are aggregated in Spark, a row a group reaches the driver;
- a probe: the champion on stored vectors of over-contrasted, over-saturated and smoothed copies (`label.views`, `label.probes`) of at most
  PROBED images against the originals: mean change of the raw score, the share of images whose bin rises.
Cost: two passes over narrow tables; the head over the probe's vectors.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import partial, reduce
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings
from jobs import centres, command, domains, embedding, label, score
from jobs.lake import Lake
from jobs.registry import Head
from udfs import degrade, explained, score_bins
from udfs import score as kernel
from udfs.embed import ORIGINAL, PIXELS

NAME = "score-bias"
STATISTICS = ("contrast", "saturation", "sharpness", "resolution")
UNITS = "contrast and saturation as in udfs/pixel_statistics.py, sharpness as log10(1 + x), resolution as log10(width x height)"
FEWEST = 50  # images of a group whose regression is shown: four slopes through fewer are mostly noise
GROUPS = 2_000  # of each kind that reach the driver, the largest first
PROBED = 2_000  # images
KINDS = ("contrast", "saturation", "smooth")  # of degraded views
SEED = 7  # of the bootstrap


def run(lake: Lake, settings: Settings, plan_only: bool = False, head: Head | None = None) -> None:
    """`head`: the champion where the caller has resolved it."""
    head = head or score.champion(settings)
    if plan_only:
        print(f"{NAME}: reads the scores of {head.model} version {head.version} and writes nothing")
        return
    told = measure(lake, settings, head)
    print("\n".join(lines(told)))


def measure(lake: Lake, settings: Settings, head: Head) -> dict[str, Any]:
    """-> {groups: [{group, value, images, bins, together, adjusted, alone}], probe: [...], bins: the rule's name}; groups: `all` first."""
    rows = [_group(row) for row in aggregate(facts(lake, settings, head)).collect()]
    return {"groups": rows, "probe": probe(lake, settings, head), "bins": head.bins.name, "model": f"{head.model} version {head.version}"}


def facts(lake: Lake, settings: Settings, head: Head) -> DataFrame:
    """-> (raw, bin, STATISTICS, groups: an array of (group, value)), a row a scored image that has statistics."""
    scored = lake.read("scores").where(F.col("fingerprint") == score.fingerprint(head)).select("image_id", "raw", "bin")
    mine = (F.col("view") == ORIGINAL) & (F.col("fingerprint") == embedding.outputs(settings)[PIXELS])
    pixels = (
        lake.read("pixels").where(mine).select("image_id", "contrast", "saturation", F.log10(1 + F.col("sharpness")).alias("sharpness"))
    )
    size = F.log10(F.col("width").cast("double") * F.col("height")).alias("resolution")
    rows = scored.join(pixels, "image_id").join(lake.read("images").select("image_id", size), "image_id")
    kinds = {"source": domains.first_sources(lake)}
    with suppress(Mistake):  # no such classifier in this build: no table by it
        kinds[settings.calibrate.label] = domains.by_class(lake, domains.classifier(settings, settings.calibrate.label))
    with suppress(Mistake):  # nor by centres that this build has not
        styles = lake.read("styles").where(F.col("fingerprint") == centres.fingerprint(centres.current(settings), settings))
        kinds["cluster"] = styles.select("image_id", F.coalesce("tag", "state").alias("domain"))
    for kind, told in kinds.items():
        rows = rows.join(told.withColumnRenamed("domain", f"of {kind}"), "image_id", "left")
    groups = [F.struct(F.lit("all").alias("group"), F.lit("").alias("value"))]
    groups += [F.struct(F.lit(kind).alias("group"), F.col(f"`of {kind}`").alias("value")) for kind in kinds]
    return rows.select("raw", "bin", *STATISTICS, F.array(*groups).alias("groups"))


def aggregate(rows: DataFrame) -> DataFrame:
    """facts rows -> group, value, images, b0..b9, and the covariance of each pair of STATISTICS and raw: c00, c01, ..."""
    names = (*STATISTICS, "raw")
    pairs = [F.covar_pop(names[i], names[j]).alias(f"c{i}{j}") for i, j in combinations_with_replacement(range(len(names)), 2)]
    bins = [F.sum((F.col("bin") == number).cast("int")).alias(f"b{number}") for number in range(10)]
    one = rows.select(F.explode("groups").alias("one"), *[F.col(name).cast("double").alias(name) for name in names], "bin")
    told = one.select("one.*", *names, "bin").where(F.col("value").isNotNull()).groupBy("group", "value")
    counted = told.agg(F.count("*").alias("images"), *bins, *pairs)
    kinds = ["all", *sorted(row["group"] for row in counted.select("group").distinct().collect() if row["group"] != "all")]
    parts = [counted.where(F.col("group") == kind).orderBy(F.desc("images"), "value").limit(GROUPS) for kind in kinds]
    return reduce(DataFrame.unionAll, parts)


def _group(row: Row) -> dict[str, Any]:
    """A row of `aggregate` -> what is told of the group; a regression where it has images enough."""
    told: dict[str, Any] = {name: row[name] for name in ("group", "value", "images")} | {
        "bins": [row[f"b{number}"] for number in range(10)]
    }
    if row["images"] < FEWEST:
        return told | {"together": None, "adjusted": None, "alone": None}
    many = len(STATISTICS) + 1
    covariance = np.array([[row[f"c{min(i, j)}{max(i, j)}"] for j in range(many)] for i in range(many)])
    found = explained.explain(covariance, row["images"])
    return told | {"together": found.together, "adjusted": found.adjusted, "alone": dict(zip(STATISTICS, found.alone, strict=True))}


def probe(lake: Lake, settings: Settings, head: Head) -> list[dict[str, Any]]:
    """-> for each degraded view with vectors: images, change (mean, low, high), rises, falls (shares of images), target of its label or None."""
    degraded = embedding.of_scorer(settings, settings.label.seed)
    views = [view for view, way in degrade.VIEWS.items() if way.kind in KINDS]
    vectors = lake.read("embeddings").select("image_id", "view", "fingerprint", "vector")
    copies = vectors.where((F.col("fingerprint") == degraded) & F.col("view").isin(*views))
    drawn = copies.select("image_id").distinct().orderBy(F.xxhash64(F.lit(SEED), "image_id"), "image_id").limit(PROBED)
    originals = vectors.where((F.col("fingerprint") == head.encoder_fingerprint) & (F.col("view") == ORIGINAL))
    both = copies.unionByName(originals).join(drawn, "image_id", "left_semi").select("image_id", "view", "vector")
    raws = both.mapInPandas(partial(kernel.raw, weights=head.weights), kernel.RAW)
    found = domains.add(lake, raws, head.bins.domain, head.bins.classes).withColumn("image_id", F.hex("image_id")).toPandas()
    targets = lake.read("labels").where((F.col("kind") == label.KIND) & F.col("view").isin(*views))
    told = {row["view"]: row["target"] for row in targets.groupBy("view").agg(F.avg("value").alias("target")).collect()}
    return [dict(_moved(found, view, head), view=view, target=told.get(view)) for view in views if (found.view == view).any()]


def _moved(found: pd.DataFrame, view: str, head: Head) -> dict[str, Any]:
    before = found[found.view == ORIGINAL].set_index("image_id")
    after = found[found.view == view].set_index("image_id")
    pair = before.join(after.raw.rename("after"), how="inner")
    pair = pair[np.isfinite(pair.raw) & np.isfinite(pair.after)]
    moves = [
        score_bins.bin_of(row.after, row.domain, head.bins) - score_bins.bin_of(row.raw, row.domain, head.bins) for row in pair.itertuples()
    ]
    change = explained.interval((pair.after - pair.raw).to_numpy(np.float64), SEED)
    told = {"images": len(pair), "change": change, "higher": float((pair.after > pair.raw).mean())}
    return told | {"rises": float(np.mean(np.array(moves) > 0)), "falls": float(np.mean(np.array(moves) < 0))}


NOTE_PROBE = (
    "A copy with a target is one that labels say is worse than its original: where the head was fitted to such labels, its fall says that the "
    "fitting took, not that a head fitted to people's ratings would be as hard to fool. A copy without one was never shown to it, though "
    "another strength of its kind may have been."
)


def lines(told: dict[str, Any]) -> list[str]:
    """The three tables as they are printed."""
    out = [
        f"{NAME}: {told['model']}, bins {told['bins']}",
        "",
        "Bins (images)",
        f"  {'':<36}{'images':>8}" + "".join(f"{n:>7}" for n in range(10)),
    ]
    out += [f"  {_name(one):<36}{one['images']:>8}" + "".join(f"{count:>7}" for count in one["bins"]) for one in told["groups"]]
    out += ["", f"Share of the raw score's variance explained (R2; {UNITS})"]
    out += [f"  {'':<36}{'images':>8}" + "".join(f"{name:>12}" for name in (*STATISTICS, "together", "adjusted"))]
    shown = [one for one in told["groups"] if one["alone"]]
    for one in shown:
        values = [*one["alone"].values(), one["together"], one["adjusted"]]
        out.append(f"  {_name(one):<36}{one['images']:>8}" + "".join(f"{value:>12.3f}" for value in values))
    if few := len(told["groups"]) - len(shown):
        out.append(f"  {few} groups of fewer than {FEWEST} images are not shown")
    out += ["", "Probe: the same head on worse copies", *_probe_lines(told["probe"])]
    return out


def _probe_lines(probe: Iterable[dict[str, Any]]) -> list[str]:
    out = []
    for one in probe:
        mean, low, high = one["change"]
        target = "no label" if one["target"] is None else f"target {one['target']:.2f}"
        share = f"higher raw score {one['higher']:.0%}, bin rises {one['rises']:.0%}, falls {one['falls']:.0%}"
        out.append(f"  {one['view']:<14}{one['images']:>6} images  raw {mean:+.3f} [{low:+.3f}, {high:+.3f}]  {share}  ({target})")
    if not out:
        return ["  no vectors of such copies: add contrast:*, saturation:* or smooth:* to label.probes, and run the stage label"]
    return [*out, f"  {NOTE_PROBE}"]


def _name(one: dict[str, Any]) -> str:
    return f"{one['group']} {one['value']}".strip()[:34]


if __name__ == "__main__":
    command.main(__doc__, run)
