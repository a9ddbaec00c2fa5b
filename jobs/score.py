"""embeddings + the champion -> scores, rejects: a raw score and score_0..9 for every embedded image.

    spark-submit --jars '.cache/jars/*.jar' jobs/score.py --config conf/demo.yaml

Aliases are resolved to versions once, at the start. A new champion recomputes this table only. Another rule of bins (`score.bins`) runs
no model at all: it takes the raw scores that the head has given before. Cost: some 20,000 vectors/s a core by a head, several times that
by a rule. A score that is no number gets the reject `not_finite`.
"""

from __future__ import annotations

from functools import partial

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings
from jobs import command, domains, embedding, fitted, progress, registry, rejects, waves
from jobs.lake import Lake
from jobs.registry import Head
from jobs.waves import Projection
from udfs import score as kernel
from udfs import score_bins, score_head
from udfs.embed import ORIGINAL

NAME = "score"
BY_BINS = "/bins:"  # in a fingerprint, before the hash of a rule that is not V7's


def run(lake: Lake, settings: Settings, plan_only: bool = False, head: Head | None = None) -> None:
    """`head`: the champion where the caller has resolved it."""
    head = head or champion(settings)
    if plan_only:
        print(progress.estimate(lake, NAME, pending(lake, settings, head).count()))
        return
    with waves.stage(lake, NAME, settings, tables(lake, settings)) as stage:
        stage.run_pending(pending(lake, settings, head), lambda vectors: compute(lake, vectors, head))


def champion(settings: Settings) -> Head:
    """The head that scores now, with the rule of bins. Raises Mistake when one does not fit the other, or the vectors."""
    head = raw_champion(settings)
    if settings.score.bins == score_bins.V7.name:
        return head
    found = fitted.load(settings.mlflow, settings.score.bins, settings.score.bins_alias)
    if score_bins.FILE not in found.files:
        raise Mistake(f"score.bins: {found.name} holds {sorted(found.files)}, no rule of bins; give a model of jobs.calibrate_scores")
    bins = score_bins.unpack(found.files[score_bins.FILE], found.name, found.sha256)
    if bins.scores != fingerprint(head):
        raise Mistake(
            f"score.bins: {bins.name} was fitted on the raw scores {bins.scores}, the head gives {fingerprint(head)}; "
            f"fit bins for this head (python -m jobs.calibrate_scores) and make them the {settings.score.bins_alias}, or set score.bins=v7"
        )
    return head._replace(bins=bins)


def raw_champion(settings: Settings) -> Head:
    """The head that scores now, under V7's bins. Raises Mistake when it reads the vectors of another encoder."""
    head = registry.resolve(settings.mlflow, settings.score.model, settings.score.alias)
    ours = embedding.of_scorer(settings)
    if head.encoder_fingerprint != ours:
        raise Mistake(
            f"{head.model} version {head.version} was trained on vectors {head.encoder_fingerprint}, this config embeds {ours}; "
            f"train a head on these vectors and make it the {settings.score.alias} (training.train_scorer prints the command), "
            f"or set `encoder` and `embed.precision` to those of the head"
        )
    return head


def fingerprint(head: Head) -> str:
    told = f"{head.model}:{head.sha256[:12]}:{score_head.KERNEL_VERSION}/{head.encoder_fingerprint}"
    return told if head.bins.is_v7 else f"{told}{BY_BINS}{head.bins.sha256[:12]}"


def raws(lake: Lake, head: Head) -> DataFrame:
    """What the head has scored, under whatever bins -> (image_id, raw), a row an image."""
    plain = fingerprint(head._replace(bins=score_bins.V7))
    mine = (F.col("fingerprint") == plain) | F.col("fingerprint").startswith(f"{plain}{BY_BINS}")
    return lake.read("scores").where(mine).groupBy("image_id").agg(F.first("raw").alias("raw"))


def pending(lake: Lake, settings: Settings, head: Head) -> DataFrame:
    """Vectors of the head's encoder that it has not scored -> (image_id, vector)."""
    vectors = lake.read("embeddings").where((F.col("view") == ORIGINAL) & (F.col("fingerprint") == head.encoder_fingerprint))
    done = lake.read("scores").where(F.col("fingerprint") == fingerprint(head)).select("image_id")
    settled = rejects.settled_images(lake, NAME, fingerprint(head))
    return vectors.select("image_id", "vector").join(done, "image_id", "left_anti").join(settled, "image_id", "left_anti")


def compute(lake: Lake, vectors: DataFrame, head: Head) -> DataFrame:
    """(image_id, vector) -> staged rows (udfs.score.SCHEMA and which head and bins it was)."""
    told = {
        "fingerprint": fingerprint(head),
        "model": head.model,
        "model_version": head.version,
        "embedding_fingerprint": head.encoder_fingerprint,
        "bins": head.bins.name,
    }
    if head.bins.domain == domains.CLASS:
        domains.check_classified(lake, vectors, head.bins.classes, NAME)
    placed = domains.add(lake, vectors, head.bins.domain, head.bins.classes)
    known = raws(lake, head)
    rest = placed if known.isEmpty() else placed.join(known, "image_id", "left_anti")
    rows = rest.mapInPandas(partial(kernel.score, weights=head.weights, bins=head.bins), kernel.SCHEMA)
    if rest is not placed:
        stored = placed.select("image_id", "domain").join(known, "image_id")
        rows = rows.unionByName(stored.mapInPandas(partial(kernel.rebin, bins=head.bins), kernel.SCHEMA))
    return rows.withColumns({name: F.lit(value) for name, value in told.items()})


def tables(lake: Lake, settings: Settings) -> dict[str, Projection]:
    def rejects_of(staged: DataFrame, run: str) -> DataFrame | None:
        return rejects.of_images(lake, staged, NAME, run, settings.waves.attempts)

    def scores_of(staged: DataFrame, run: str) -> DataFrame:
        tag = F.concat(F.lit("score_"), F.col("bin").cast("string"))
        return staged.where(F.col("reject").isNull()).withColumns({"tag": tag, "run": F.lit(run)})

    return {"rejects": rejects_of, "scores": scores_of}


if __name__ == "__main__":
    command.main(__doc__, run)
