"""embeddings x the champion of the style centres -> styles, rejects: cluster, distances, margin, top 5 and state of every embedded image.

    spark-submit --jars '.cache/jars/*.jar' jobs/assign_styles.py --config conf/demo.yaml

The alias is resolved to a version once, at the start. A new centre set, block list or policy recomputes this table only. Cost: some
20,000 vectors/s a core with 2048 centres of 768 numbers, no decode and no tower. A vector that is not finite gets the reject `not_finite`.

    state ok       the nearest centre may be used: `cluster`, and the tag style_cluster_ID
    state blocked  the nearest centre is on the block list: no cluster, no tag
    state none     farther from every centre than the threshold of the fit: no cluster, no tag

styles.policy v7 does as V7's released code: the nearest centre that may be used, whatever the distance; the state is always ok.
"""

from __future__ import annotations

from functools import partial

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.settings import Settings
from jobs import centres, command, progress, rejects, waves
from jobs.centres import Set
from jobs.lake import Lake
from jobs.waves import Projection
from udfs import style_centres as kernel

NAME = "assign-styles"


def run(lake: Lake, settings: Settings, plan_only: bool = False, chosen: Set | None = None) -> None:
    """`chosen`: the centre set where the caller has resolved it."""
    chosen = chosen or centres.current(settings)
    if plan_only:
        print(progress.estimate(lake, NAME, pending(lake, settings, chosen).count()))
        return
    with waves.stage(lake, NAME, settings, tables(lake, settings)) as stage:
        stage.run_pending(pending(lake, settings, chosen), lambda vectors: compute(vectors, settings, chosen))


def pending(lake: Lake, settings: Settings, chosen: Set) -> DataFrame:
    """Vectors of the centres' encoder that have no row by them -> (image_id, vector)."""
    told = centres.fingerprint(chosen, settings)
    done = lake.read("styles").where(F.col("fingerprint") == told).select("image_id")
    settled = rejects.settled_images(lake, NAME, told)
    return centres.vectors(lake, settings).join(done, "image_id", "left_anti").join(settled, "image_id", "left_anti")


def compute(vectors: DataFrame, settings: Settings, chosen: Set) -> DataFrame:
    """(image_id, vector) -> staged rows (udfs.style_centres.SCHEMA and which centres it was)."""
    cores = int(vectors.sparkSession.conf.get("spark.task.cpus", "1") or 1)
    worker = partial(kernel.assign, files=chosen.fitted.files, policy=settings.styles.policy, threads=cores)
    told = {"fingerprint": centres.fingerprint(chosen, settings), "centres": chosen.name, "embedding_fingerprint": chosen.centres.encoder}
    rows = vectors.mapInArrow(worker, kernel.SCHEMA)
    return rows.withColumns({name: F.lit(value) for name, value in told.items()})


def tables(lake: Lake, settings: Settings) -> dict[str, Projection]:
    def rejects_of(staged: DataFrame, run: str) -> DataFrame | None:
        return rejects.of_images(lake, staged, NAME, run, settings.waves.attempts)

    def styles_of(staged: DataFrame, run: str) -> DataFrame:
        tag = F.concat(F.lit("style_cluster_"), F.col("cluster").cast("string"))  # NULL where there is no cluster
        return staged.where(F.col("reject").isNull()).withColumns({"tag": tag, "run": F.lit(run)})

    return {"rejects": rejects_of, "styles": styles_of}


if __name__ == "__main__":
    command.main(__doc__, run)
