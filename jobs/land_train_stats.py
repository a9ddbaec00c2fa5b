"""finished trainings -> train_stats: how often each image was trained on, and its losses, so that selection can learn from training.

    spark-submit --jars '.cache/jars/*.jar' jobs/land_train_stats.py --config conf/demo.yaml

A training that is through says in `finished.json` which files hold the loss of every row it trained on. They are compared with
their sha256, summed up per image, and landed once a training, whether its model was registered or not. A file that is missing or
changed stops the stage, named, after the other trainings have landed. Cost: one pass over some 50 bytes a row and epoch.
"""

from __future__ import annotations

import json
from functools import partial
from typing import NamedTuple

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings
from jobs import command, deny_lists, waves
from jobs.lake import Lake, hadoop
from jobs.waves import Projection
from udfs import snapshot as kernel
from udfs.opener import to_uri

NAME = "land-train-stats"
TABLES: dict[str, Projection] = {"train_stats": lambda staged, run: staged.withColumn("run", F.lit(run))}


class Training(NamedTuple):
    """A training that is through, as its folder says; `losses`: uri -> sha256 of its files of row losses; `rows`: in all of them, where it says so."""

    training: str
    model: str
    export: str
    manifest_sha256: str
    rows: int | None
    losses: dict[str, str]


def run(lake: Lake, settings: Settings, plan_only: bool = False) -> None:
    unlanded = pending(lake, settings)
    if not unlanded:
        print(f"{NAME}: nothing to do")
        return
    if plan_only:
        print(f"{NAME}: {len(unlanded)} trainings pending, {sum(len(one.losses) for one in unlanded)} files of losses")
        return
    wrong: list[str] = []
    with waves.stage(lake, NAME, settings, TABLES) as stage:
        for number, training in enumerate(pending(lake, settings)):  # after the stage has landed what an earlier run had staged
            if problem := check(lake, settings, training):
                wrong.append(problem)
                continue
            stage.run_whole(stats(lake, training), number)
            print(f"{NAME}: {training.model} {training.training}, {len(training.losses)} files of losses", flush=True)
    if wrong:
        more = f" ({len(wrong) - 1} more trainings are wrong)" if len(wrong) > 1 else ""
        raise Mistake(f"land train stats: {wrong[0]}{more}; put the file back, or remove the training's folder and train again")


def pending(lake: Lake, settings: Settings) -> list[Training]:
    """The trainings that are through and in no row of the table, by the names of their folders."""
    root = to_uri(settings.training.root).rstrip("/")
    landed = {row["training"] for row in lake.read("train_stats").select("training").distinct().collect()}
    through = [f"{root}/{name}" for name in lake.folders(root) if lake.opener.exists(f"{root}/{name}/finished.json")]
    return [training for training in (read(lake, folder) for folder in through) if training.training not in landed]


def read(lake: Lake, folder: str) -> Training:
    """URI of a finished training's folder -> what it says."""
    begun, done = (json.loads(lake.opener.read(f"{folder}/{name}.json")) for name in ("training", "finished"))
    losses = {f"{folder}/row_losses/{name}": sha256 for name, sha256 in done["files"].items()}
    return Training(begun["digest"], begun["model"], begun["export"], begun["manifest_sha256"], done.get("rows_seen"), losses)


def check(lake: Lake, settings: Settings, training: Training) -> str:
    """-> what is wrong with its files, naming one; empty when nothing is."""
    if not training.losses:
        return f"training {training.training}: finished.json names no file of losses"
    files = lake.spark.createDataFrame(list(training.losses.items()), "uri STRING, sha256 STRING").repartition(len(training.losses))
    worker = partial(kernel.changed_files, stores=settings.store_options)
    wrong = files.mapInArrow(worker, "uri STRING, problem STRING").orderBy("uri").first()
    if wrong is not None:
        return f"{wrong['uri']}: {wrong['problem']}"
    found = _losses(lake, training).agg(F.count("loss").alias("rows"), F.count_if(F.isnan("loss")).alias("nan")).first()
    assert found is not None
    if found["nan"] == 0 and training.rows in (None, found["rows"]):
        return ""
    return f"training {training.training}: its files hold {found['rows']} losses ({found['nan']} no number), finished.json says {training.rows} rows"


def stats(lake: Lake, training: Training) -> DataFrame:
    """-> rows of train_stats, without `run`."""
    when, loss = F.struct("step", "epoch", "loss"), F.col("loss")  # an image may be in a step twice
    summed = {
        "times_seen": F.count("*").cast("int"),
        "loss_mean": F.avg(loss),
        "loss_first": F.min_by(loss, when),
        "loss_last": F.max_by(loss, when),
        "loss_min": F.min(loss),
        "loss_max": F.max(loss),
    }
    rows = (
        deny_lists.allowed(lake, _losses(lake, training)).groupBy("image_id").agg(*[column.alias(name) for name, column in summed.items()])
    )
    told = {name: F.lit(getattr(training, name)) for name in ("training", "model", "export", "manifest_sha256")}
    return rows.withColumns(told).withColumn("loss_mean", F.col("loss_mean").cast("float"))


def _losses(lake: Lake, training: Training) -> DataFrame:
    """-> image_id, epoch, step, loss: a row each time a row was trained on."""
    return lake.spark.read.parquet(*map(hadoop, training.losses))


if __name__ == "__main__":
    command.main(__doc__, run)
