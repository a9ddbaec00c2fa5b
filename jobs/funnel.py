"""The tables -> how many inputs became what, and why the rest did not: every number small enough for the driver."""

from __future__ import annotations

from typing import NamedTuple

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.settings import Settings
from jobs import embed, embedding, ingest, label, score
from jobs.lake import Lake
from udfs import addresses
from udfs.embed import ORIGINAL


class Funnel(NamedTuple):
    """Counts; `rejected` by (stage, code, permanent), `dropped` by rule (an image may fail several)."""

    inputs: int
    images: int
    embedded: int
    scored: int
    kept: int
    rejected: dict[tuple[str, str, bool], int]
    dropped: dict[str, int]


def standing(lake: Lake, settings: Settings, scores: str) -> DataFrame:
    """The rejects that hold under this config, one row an input of a stage: stage, input_key, place, image_id, its address, code, detail,
    permanent. Left out are those of an older state of an entry, of inputs that were taken after all, and of other
    encoders or heads.
    """
    rejects = lake.read("rejects")
    taken, latest = _entries(lake)
    entry = ["input_key", "seen"]
    read = ingest.states(rejects.where(F.col("stage") == ingest.NAME)).join(latest, entry, "left_semi")
    whole = ~F.col("permanent") | (F.col("place") == 0)  # of an entry, not of one member of an archive or row of a parquet file
    held = read.where(whole).join(taken.select(*entry).distinct(), entry, "left_anti")
    held = held.unionByName(read.where(~whole).join(taken, [*entry, "place"], "left_anti").select(*held.columns)).drop("seen")
    outputs = [*embedding.outputs(settings).values(), *embedding.outputs(settings, settings.label.seed).values()]
    made = lake.read("pixels").select("image_id", "view", "fingerprint")
    for table in ("embeddings", "detections"):
        made = made.unionByName(lake.read(table).select("image_id", "view", "fingerprint"))
    made = made.select(embedding.input_key().alias("input_key"), "fingerprint")
    others = rejects.withColumn("place", F.lit(0).cast("bigint"))
    computed = others.where(F.col("stage").isin(embed.NAME, label.NAME))
    computed = computed.withColumn("fingerprint", embedding.output_of_reject("fingerprint")).where(F.col("fingerprint").isin(*outputs))
    held = held.unionByName(computed.join(made, ["input_key", "fingerprint"], "left_anti").select(*held.columns))
    held = held.unionByName(others.where((F.col("stage") == score.NAME) & (F.col("fingerprint") == scores)).select(*held.columns))
    told = F.struct("image_id", *addresses.PLACE, "code", "detail", "permanent")
    last = F.max_by(told, F.struct("run", "permanent", "attempts", "code"))
    return held.groupBy("stage", "input_key", "place").agg(last.alias("told")).select("stage", "input_key", "place", "told.*")


def _entries(lake: Lake) -> tuple[DataFrame, DataFrame]:
    """-> (what is taken of each entry in its latest state: input_key, seen, place; the latest states: input_key, seen)."""
    taken = lake.read("sources").select(ingest.input_key().alias("input_key"), "seen", ingest.place().alias("place"), "run")
    refused = ingest.states(lake.read("rejects").where(F.col("stage") == ingest.NAME))
    both = taken.select("input_key", "seen", "run").unionByName(refused.select("input_key", "seen", "run"))
    latest = both.groupBy("input_key").agg(F.max_by("seen", "run").alias("seen"))  # a run's id begins with its time
    return taken.drop("run").distinct().join(latest, ["input_key", "seen"], "left_semi"), latest


def measure(lake: Lake, settings: Settings, selection: str, scores: str) -> Funnel:
    """`scores`: the fingerprint that counts. Inputs are occurrences, each in its latest state: files, members of archives, rows of parquet
    files and of manifests.
    """
    refused = standing(lake, settings, scores)
    rejected = refused.groupBy("stage", "code", "permanent").count().orderBy("stage", "code").collect()
    at_ingest = sum(row["count"] for row in rejected if row["stage"] == ingest.NAME)
    decisions = lake.read("decisions").where(F.col("selection") == selection)
    dropped = decisions.select(F.explode("failed.rule").alias("rule")).groupBy("rule").count().orderBy(F.desc("count"), "rule").collect()
    embedded = lake.read("embeddings").where((F.col("view") == ORIGINAL) & (F.col("fingerprint") == embedding.of_scorer(settings)))
    return Funnel(
        inputs=_entries(lake)[0].count() + at_ingest,
        images=lake.read("images").count(),
        embedded=embedded.count(),
        scored=lake.read("scores").where(F.col("fingerprint") == scores).count(),
        kept=decisions.where("kept").count(),
        rejected={(row["stage"], row["code"], row["permanent"]): row["count"] for row in rejected},
        dropped={row["rule"]: row["count"] for row in dropped},
    )


def lines(funnel: Funnel) -> list[str]:
    """The funnel as it is printed."""
    told = [f"  in        {funnel.inputs:>8}  inputs (files, archive members, parquet rows, manifest rows)"]
    for (stage, code, permanent), count in funnel.rejected.items():
        told.append(f"  rejected  {count:>8}  {stage}: {code}{'' if permanent else ' (will be tried again)'}")
    told.append(f"  images    {funnel.images:>8}  distinct by sha256")
    told.append(f"  embedded  {funnel.embedded:>8}")
    told.append(f"  scored    {funnel.scored:>8}")
    told.append(f"  kept      {funnel.kept:>8}  in the selection")
    told += [f"  dropped   {count:>8}  {rule}" for rule, count in funnel.dropped.items()]
    return told
