"""images, embeddings -> labels (and the embeddings and pixels of degraded views): targets for the scorer.

    spark-submit --jars '.cache/jars/*.jar' jobs/label.py --config conf/demo.yaml

Synthetic preferences in the manner of RankIQA (Liu et al. 2017): a seeded choice of images, each against its blurred,
noisy, recompressed, over-contrasted and over-saturated copies. They are no human taste, and every row says so: `rater` is the
rule, `view` the copy, `value` the target in [0, 1] that `label.views` gives it. `label.probes` are copies without a label: their vectors
are for jobs/score_bias.py. Cost: one embedding a copy.
"""

from __future__ import annotations

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.build import Label
from conf.settings import Settings, digest
from jobs import command, deny_lists, embedding, progress, waves
from jobs.lake import Lake
from jobs.tables import TABLES
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
        plan = stage.plan(pending(lake, settings), [*embedding.ORDER, "view"])
        stage.run(plan, lambda inputs: compute(inputs, settings))


def rater(settings: Label) -> tuple[str, str]:
    """-> (the rule with its version, the fingerprint of its targets)."""
    return f"{settings.rule}:{degrade.KERNEL_VERSION}", digest(settings.views, settings.seed, degrade.KERNEL_VERSION)


def chosen(lake: Lake, settings: Settings) -> DataFrame:
    """The images to degrade: those with the lowest seeded hash among the embedded ones. -> (image_id)"""
    embedded = lake.read("embeddings").where((F.col("view") == ORIGINAL) & (F.col("fingerprint") == embedding.of_scorer(settings)))
    embedded = deny_lists.allowed(lake, embedded.select("image_id"))
    return embedded.orderBy(F.xxhash64(F.lit(settings.label.seed), "image_id"), "image_id").limit(settings.label.images)


def pending(lake: Lake, settings: Settings) -> DataFrame:
    """(image, view) pairs without a label, or whose view lacks an output of this config -> (image_id, view, want, untried, tried,
    addresses, embedding.ORDER). The original wants nothing; a pair with nothing left but a refused output gets no label.
    """
    rule, told = rater(settings.label)
    probes = settings.label.probes
    views = F.explode(F.array(*[F.lit(view) for view in (ORIGINAL, *settings.label.views, *probes)])).alias("view")
    pairs = chosen(lake, settings).select("image_id", views)
    lacking = embedding.outstanding(lake, pairs.where(F.col("view") != ORIGINAL), settings, NAME, settings.label.seed)
    labelled = lake.read("labels").where((F.col("rater") == rule) & (F.col("fingerprint") == told)).select("image_id", "view")
    lacking = lacking.select("image_id", "view", "want", "untried", "refused")
    judged = pairs.join(lacking, ["image_id", "view"], "left").join(labelled.withColumn("has", F.lit(True)), ["image_id", "view"], "left")
    none = F.array().cast("array<string>")
    judged = judged.withColumns({name: F.coalesce(name, none) for name in ("want", "untried", "refused")})
    unlabelled = F.col("has").isNull() & (F.size("refused") == 0) & ~F.col("view").isin(*probes)
    return embedding.placed(lake, judged.where((F.size("want") > 0) | unlabelled).drop("refused", "has"), settings)


def compute(inputs: DataFrame, settings: Settings) -> DataFrame:
    """The GPU pass over the copies, and with each row its label."""
    rule, told = rater(settings.label)
    targets = {ORIGINAL: 1.0, **settings.label.views}
    target = F.try_element_at(F.create_map(*[F.lit(part) for pair in targets.items() for part in pair]), F.col("view"))
    rows = embedding.compute(inputs, settings, embedding.outputs(settings, settings.label.seed), settings.label.seed)
    # a probe has no target, and so no label
    label = F.struct(target.cast("float").alias("value"), F.lit(rule).alias("rater"), F.lit(told).alias("fingerprint"))
    return rows.withColumn("label", label)


def tables(lake: Lake, settings: Settings) -> dict[str, Projection]:
    def labels_of(staged: DataFrame, run: str) -> DataFrame:
        mine = staged.where(F.col("reject").isNull() & F.col("label.value").isNotNull()).select(
            "image_id", "view", F.lit(KIND).alias("kind"), "label.*"
        )
        # a view that only lacked the output of a new encoder has its label
        known = lake.read("labels", lake.version("labels")).select(*TABLES["labels"].key)
        return mine.join(known, list(TABLES["labels"].key), "left_anti").withColumn("run", F.lit(run))

    return embedding.tables(lake, settings, NAME) | {"labels": labels_of}


if __name__ == "__main__":
    command.main(__doc__, run)
