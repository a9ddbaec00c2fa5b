"""The tables -> how many inputs became what, and why the rest did not: every number small enough for the driver."""

from __future__ import annotations

from typing import NamedTuple

from pyspark.sql import functions as F

from jobs.lake import Lake
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


def measure(lake: Lake, selection: str, embedding: str, scores: str) -> Funnel:
    """`embedding` and `scores`: the fingerprints that count. Inputs are occurrences: members of archives, rows of manifests, files."""
    rejects = lake.read("rejects")
    # a transient reject counts until its input was taken after all
    taken = lake.read("sources").select(F.concat_ws("|", "source", "entry").alias("input_key"))
    made = lake.read("embeddings").select(F.concat_ws("/", F.lower(F.hex("image_id")), "view").alias("input_key"))
    waiting = rejects.where(~F.col("permanent")).join(taken.unionByName(made).distinct(), "input_key", "left_anti")
    settled = rejects.where("permanent").unionByName(waiting)
    latest = settled.groupBy("stage", "input_key", "offset", "code").agg(F.max("permanent").alias("permanent"))
    rejected = latest.groupBy("stage", "code", "permanent").count().orderBy("stage", "code").collect()
    at_ingest = sum(row["count"] for row in rejected if row["stage"] == "ingest")
    decisions = lake.read("decisions").where(F.col("selection") == selection)
    dropped = decisions.select(F.explode("failed.rule").alias("rule")).groupBy("rule").count().orderBy(F.desc("count"), "rule").collect()
    embedded = lake.read("embeddings").where((F.col("view") == ORIGINAL) & (F.col("fingerprint") == embedding))
    return Funnel(
        inputs=lake.read("sources").count() + at_ingest,
        images=lake.read("images").count(),
        embedded=embedded.count(),
        scored=lake.read("scores").where(F.col("fingerprint") == scores).count(),
        kept=decisions.where("kept").count(),
        rejected={(row["stage"], row["code"], row["permanent"]): row["count"] for row in rejected},
        dropped={row["rule"]: row["count"] for row in dropped},
    )


def lines(funnel: Funnel) -> list[str]:
    """The funnel as it is printed."""
    told = [f"  in        {funnel.inputs:>8}  inputs (files, archive members, manifest rows)"]
    for (stage, code, permanent), count in funnel.rejected.items():
        told.append(f"  rejected  {count:>8}  {stage}: {code}{'' if permanent else ' (will be tried again)'}")
    told.append(f"  images    {funnel.images:>8}  distinct by sha256")
    told.append(f"  embedded  {funnel.embedded:>8}")
    told.append(f"  scored    {funnel.scored:>8}")
    told.append(f"  kept      {funnel.kept:>8}  in the selection")
    told += [f"  dropped   {count:>8}  {rule}" for rule, count in funnel.dropped.items()]
    return told
