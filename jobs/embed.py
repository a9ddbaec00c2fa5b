"""images -> embeddings, detections, pixels, rejects: the one GPU pass over the bytes.

    spark-submit --properties-file infra/spark-gpu.conf jobs/embed.py --config my.yaml

Decodes each image once, in threads that keep ahead of the models, and runs every encoder and detector whose output it lacks. Cost:
see "Measured" in the README; a new encoder or detector runs alone. An image whose bytes changed or cannot be decoded gets a reject.
"""

from __future__ import annotations

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.settings import Settings
from jobs import command, deny_lists, embedding, progress, waves
from jobs.lake import Lake
from udfs.embed import ORIGINAL

NAME = "embed"


def run(lake: Lake, settings: Settings, plan_only: bool = False) -> None:
    if plan_only:
        print(progress.estimate(lake, NAME, pending(lake, settings).count()))
        return
    fingerprints = embedding.outputs(settings)
    with waves.stage(lake, NAME, settings, embedding.tables(lake, settings, NAME)) as stage:
        plan = stage.plan(pending(lake, settings), embedding.ORDER)
        if plan.rows:
            deny_lists.unapply_others(lake, settings)
        stage.run(plan, lambda inputs: embedding.compute(inputs, settings, fingerprints))


def pending(lake: Lake, settings: Settings) -> DataFrame:
    """Images that lack an output -> embedding.outstanding, those with something to make."""
    wanted = deny_lists.allowed(lake, lake.read("images")).select("image_id", F.lit(ORIGINAL).alias("view"))
    return embedding.outstanding(lake, wanted, settings, NAME).where(F.size("want") > 0)


if __name__ == "__main__":
    command.main(__doc__, run)
