"""scores (or labels and their vectors) -> a registered rule of bins, per domain: the named alternative to V7's ten fixed bins.

    spark-submit --jars '.cache/jars/*.jar' jobs/calibrate_scores.py --config conf/demo.yaml

calibrate.method quantile: edges at the tenths of a domain's raw scores, approximate to 1e-4 of its images, counted in Spark: a bin says
where an image stands among its like. isotonic: the rising curve from raw scores to the labels of kind `calibrate.targets` (degraded views
among them), and V7's bins of its values: a bin says what the raters' targets make of the score; at most `calibrate.sample` views reach the
driver. A domain with fewer than `calibrate.fewest` images shares the bins of all. Nothing is scored anew: set score.bins to the model and
run the stage score. A version is keyed by its settings, the head and the scores: a second run finds nothing to do. The first version is
the champion, later ones are candidates. Cost: a pass over two narrow tables; isotonic runs the head over its views.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, digest
from jobs import command, domains, embedding, fitted, score, snapshot, waves
from jobs.fitted import Fitted
from jobs.lake import Lake
from jobs.registry import Head
from udfs import score as kernel
from udfs import score_bins
from udfs.embed import ORIGINAL
from udfs.score_bins import STEPS, Edges

NAME = "calibrate-scores"
FIT_VERSION = 1  # raised when the same scores would give other edges
ACCURACY = 10_000  # of the quantiles: an edge is off by at most 1/ACCURACY of the images
MATTERS = {"method", "domain", "label", "fewest", "targets", "sample"}


class Rule(NamedTuple):
    every: Edges
    edges: dict[str, Edges]
    images: dict[str, int]  # domain -> images that it was fitted on; "" all
    metrics: dict[str, float]
    curves: dict[str, Any]  # of isotonic: domain -> its knots


def run(lake: Lake, settings: Settings, plan_only: bool = False, head: Head | None = None) -> None:
    """`head`: the champion under V7's bins, where the caller has resolved it."""
    head = head or score.raw_champion(settings)
    wanted = settings.calibrate
    classes = domains.classifier(settings, wanted.label) if wanted.domain == domains.CLASS else ""
    rows = inputs(lake, settings, head, classes)
    told = rows.agg(F.countDistinct("image_id").alias("images"), snapshot.content(rows.columns).alias("content")).first()
    assert told is not None
    if told["images"] < wanted.fewest:
        needs = "scores by this head" if wanted.method == "quantile" else f"labels of kind {wanted.targets} and vectors"
        raise Mistake(f"calibrate: {told['images']} images have {needs}, calibrate.fewest is {wanted.fewest}; score more, or set it lower")
    recipe = (FIT_VERSION, score_bins.FORMAT, wanted.model_dump(include=MATTERS), score.fingerprint(head))
    identity = digest(*recipe, classes, told["images"], str(told["content"]))
    if made := fitted.find(settings.mlflow, wanted.model, identity):
        print(f"{NAME}: nothing to do, {made.name} was fitted on these {told['images']} images")
        return
    if plan_only:
        print(f"{NAME}: {told['images']} images -> bins by {wanted.method}, pending: a pass over their scores")
        return
    with waves.stage(lake, NAME, settings, {}):
        rule = quantiles(rows, wanted.fewest) if wanted.method == "quantile" else isotonics(rows, settings, head)
        made = register(settings, head, classes, rule, identity)
    tell(settings, made, rule)


def inputs(lake: Lake, settings: Settings, head: Head, classes: str) -> DataFrame:
    """What a rule is fitted on -> (image_id, domain, raw), or for isotonic (image_id, view, domain, value, rater)."""
    wanted = settings.calibrate
    rows = score.raws(lake, head) if wanted.method == "quantile" else _targets(lake, settings, head)
    if wanted.domain == domains.CLASS:
        domains.check_classified(lake, rows, classes, NAME)
    return domains.add(lake, rows, wanted.domain, classes)


def quantiles(rows: DataFrame, fewest: int) -> Rule:
    """(image_id, domain, raw) -> edges at the tenths. One row a domain reaches the driver."""
    tenths = F.percentile_approx(F.col("raw").cast("double"), list(STEPS), ACCURACY).alias("edges")
    told = [F.count("*").alias("images"), tenths]
    whole = rows.agg(*told).first()
    assert whole is not None
    own = rows.where(F.col("domain").isNotNull()).groupBy("domain").agg(*told).where(F.col("images") >= fewest).orderBy("domain").collect()
    images = {"": whole["images"]} | {row["domain"]: row["images"] for row in own}
    return Rule(tuple(whole["edges"]), {row["domain"]: tuple(row["edges"]) for row in own}, images, {}, {})


def isotonics(rows: DataFrame, settings: Settings, head: Head) -> Rule:
    """(image_id, view, domain, value, vector) -> edges where the curve reaches V7's. calibrate.sample rows reach the driver."""
    wanted = settings.calibrate
    drawn = rows.orderBy(F.xxhash64(F.lit("sample"), "image_id", "view")).limit(wanted.sample)
    raws = drawn.select("image_id", "view", "vector").mapInPandas(partial(kernel.raw, weights=head.weights), kernel.RAW)
    kept = drawn.select("image_id", "view", "domain", "value").distinct()
    joined = kept.join(raws.distinct(), ["image_id", "view"]).where(~F.isnan("raw"))
    found = joined.withColumn("image_id", F.hex("image_id")).toPandas()
    raw, target = found.raw.to_numpy(np.float64), found.value.to_numpy(np.float64)
    chosen = {"": np.ones(len(found), bool)}
    for name, part in found[found.domain.notna()].groupby("domain"):
        if part.image_id.nunique() >= wanted.fewest:
            chosen[str(name)] = (found.domain == name).to_numpy()
    edges, curves, images = {}, {}, {}
    calibrated = raw.copy()
    for name, rows_of in chosen.items():
        knots, values = score_bins.isotonic(raw[rows_of], target[rows_of])
        calibrated[rows_of] = np.interp(raw[rows_of], knots, values)
        edges[name], curves[name] = score_bins.edges_of(knots, values), {"raw": knots.tolist(), "calibrated": values.tolist()}
        images[name] = int(found.image_id[rows_of].nunique())
    metrics = {"mse_raw": float(np.mean((raw - target) ** 2)), "mse_calibrated": float(np.mean((calibrated - target) ** 2))}
    return Rule(edges.pop(""), edges, images, metrics, curves)


def _targets(lake: Lake, settings: Settings, head: Head) -> DataFrame:
    """Labels of the kind, by whatever rater, with the vector of their view -> (image_id, view, value, vector)."""
    degraded = embedding.of_scorer(settings, settings.label.seed)
    mine = F.col("fingerprint") == F.when(F.col("view") == ORIGINAL, F.lit(head.encoder_fingerprint)).otherwise(F.lit(degraded))
    vectors = lake.read("embeddings").where(mine).select("image_id", "view", "vector")
    labels = lake.read("labels").where(F.col("kind") == settings.calibrate.targets)
    latest = labels.groupBy("image_id", "view", "rater").agg(F.max_by("value", F.struct("run", "fingerprint")).alias("value"))
    return latest.groupBy("image_id", "view").agg(F.round(F.avg("value"), 6).alias("value")).join(vectors, ["image_id", "view"])


def register(settings: Settings, head: Head, classes: str, rule: Rule, identity: str) -> Fitted:
    wanted, scores = settings.calibrate, score.fingerprint(head)
    file = score_bins.pack(wanted.method, scores, wanted.domain, classes, rule.every, rule.edges)
    score_bins.unpack(file, wanted.model, "")  # what the stage score will read
    tags = {"method": wanted.method, "domain": wanted.domain, "scores": scores}
    plots = {"curves.json": json.dumps(rule.curves).encode()} if rule.curves else {}
    metrics = rule.metrics | {"images": float(rule.images[""]), "domains": float(len(rule.edges))}
    params = wanted.model_dump(include=MATTERS) | {"head": f"{head.model}:{head.version}"}
    return fitted.register(settings.mlflow, wanted.model, {score_bins.FILE: file}, identity, params, metrics, tags, plots)


def tell(settings: Settings, made: Fitted, rule: Rule) -> None:
    """Prints the edges and what is to be done with them."""
    print(f"{NAME}: {made.name}, by {settings.calibrate.method}, domain {settings.calibrate.domain}; a bin begins at the raw score")
    for name, edges in {"": rule.every, **rule.edges}.items():
        print(f"  {name or 'all':<24} {rule.images[name]:>9} images  {' '.join(map(_edge, edges))}")
    if rule.metrics:
        print("  " + ", ".join(f"{name} {value:.4f}" for name, value in rule.metrics.items()))
    standing = fitted.standing(settings.mlflow, made)
    print(f"{NAME}: {standing}; score with it: jobs.score --set score.bins={made.model}", flush=True)


def _edge(edge: float) -> str:
    if abs(edge) == score_bins.LARGEST:
        return "never" if edge > 0 else "always"
    return f"{edge:.3f}"


if __name__ == "__main__":
    command.main(__doc__, run)
