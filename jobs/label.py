"""images, embeddings -> labels (and the embeddings and pixels of degraded views): targets for the scorer.

    spark-submit jobs/label.py --config conf/demo.yaml

Synthetic preferences in the manner of RankIQA (Liu et al. 2017): a seeded choice of images, each against its blurred,
noisy, recompressed, over-contrasted and over-saturated copies. They are no human taste, and every row says so: `rater` is the
rule, `view` the copy, `value` the target in [0, 1] that `label.views` gives it. Cost: one embedding a copy.
"""

from __future__ import annotations

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.settings import Label, Settings, digest
from jobs import command, embedding, progress, rejects, waves
from jobs.lake import Lake
from jobs.waves import Projection
from udfs import degrade
from udfs.embed import ORIGINAL

NAME = "label"
KIND = "degradation"


def run(lake: Lake, settings: Settings, plan_only: bool = False) -> None:
    if plan_only:
        print(progress.estimate(lake, NAME, pending(lake, settings).count()))
        return
    with waves.stage(lake, NAME, settings, tables(lake, settings)) as stage:
        plan = stage.plan(pending(lake, settings), ["uri", "offset", "view"])
        stage.run(plan, lambda inputs: compute(inputs, settings))


def rater(settings: Label) -> tuple[str, str]:
    """-> (the rule with its version, the fingerprint of its targets)."""
    return f"{settings.rule}:{degrade.KERNEL_VERSION}", digest(settings.views, settings.seed, degrade.KERNEL_VERSION)


def chosen(lake: Lake, settings: Settings) -> DataFrame:
    """The images to degrade: those with the lowest seeded hash among the embedded ones. -> (image_id)"""
    embedded = lake.read("embeddings").where((F.col("view") == ORIGINAL) & (F.col("fingerprint") == embedding.of_scorer(settings)))
    return embedded.select("image_id").orderBy(F.xxhash64(F.lit(settings.label.seed), "image_id"), "image_id").limit(settings.label.images)


def pending(lake: Lake, settings: Settings) -> DataFrame:
    """(image, view) pairs without a label -> (image_id, view, want, addresses, uri, offset); the original wants nothing."""
    rule, told = rater(settings.label)
    views = F.explode(F.array(*[F.lit(view) for view in (ORIGINAL, *settings.label.views)])).alias("view")
    pairs = chosen(lake, settings).select("image_id", views)
    labelled = lake.read("labels").where((F.col("rater") == rule) & (F.col("fingerprint") == told)).select("image_id", "view")
    pairs = pairs.join(labelled, ["image_id", "view"], "left_anti")
    fingerprints = embedding.outputs(settings, settings.label.seed)
    lacking = embedding.missing(lake, pairs.where(F.col("view") != ORIGINAL), fingerprints, NAME)
    settled = rejects.settled(lake, NAME).where(F.col("fingerprint").isin(*fingerprints.values())).select("input_key").distinct()
    pairs = pairs.withColumn("input_key", embedding.input_key()).join(settled, "input_key", "left_anti").drop("input_key")
    whole = pairs.join(lacking, ["image_id", "view"], "left")
    return embedding.with_addresses(lake, whole.withColumn("want", F.coalesce("want", F.array().cast("array<string>"))))


def compute(inputs: DataFrame, settings: Settings) -> DataFrame:
    """The GPU pass over the copies, and with each row its label."""
    rule, told = rater(settings.label)
    targets = {ORIGINAL: 1.0, **settings.label.views}
    target = F.element_at(F.create_map(*[F.lit(part) for pair in targets.items() for part in pair]), F.col("view"))
    rows = embedding.compute(inputs, settings, embedding.outputs(settings, settings.label.seed), settings.label.seed)
    label = F.struct(target.cast("float").alias("value"), F.lit(rule).alias("rater"), F.lit(told).alias("fingerprint"))
    return rows.withColumn("label", label)


def tables(lake: Lake, settings: Settings) -> dict[str, Projection]:
    def labels_of(staged: DataFrame, run: str) -> DataFrame:
        mine = staged.where(F.col("reject").isNull()).select("image_id", "view", "label.*")
        return mine.withColumns({"kind": F.lit(KIND), "run": F.lit(run)})

    return embedding.tables(lake, settings, NAME) | {"labels": labels_of}


if __name__ == "__main__":
    command.main(__doc__, run)
