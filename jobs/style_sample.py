"""Stored vectors -> a seeded sample of them in this process, with the tags and the source of each image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.settings import Settings, load_encoder
from jobs import centres, deny_lists
from jobs.lake import Lake
from jobs.waves import Stage
from udfs import style_centres

TAGS = 64  # the most frequent ones, whose leakage is measured
RARE = 5  # images of the sample that must have a tag


class Sample(NamedTuple):
    """Vectors in the order of their draw: float32 [n, width]; for each, its source and whether it has each tag."""

    vectors: np.ndarray
    sources: np.ndarray
    tags: dict[str, np.ndarray]
    not_finite: int


def draw(lake: Lake, settings: Settings) -> DataFrame:
    """-> (image_id, vector, draw) of a little more than `styles.sample` images: those below a bound of the draw."""
    mine = deny_lists.allowed(lake, centres.vectors(lake, settings))
    drawn = mine.withColumn("draw", F.xxhash64(F.lit(settings.styles.seed), "image_id"))
    wanted, total = settings.styles.sample, drawn.count()
    share = (wanted + 6 * wanted**0.5 + 50) / max(total, 1)  # six standard deviations: fewer come out once in a billion draws
    return drawn if share >= 1 else drawn.where(F.col("draw") <= F.lit(int(share * 2**64) - 2**63))


def gather(stage: Stage, settings: Settings, drawn: DataFrame) -> Sample:
    """Drawn rows -> the sample in this process, by way of staged parquet: the JVM of the driver holds nothing."""
    lake = stage.lake
    sources = lake.read("sources").join(drawn.select("image_id"), "image_id", "left_semi")
    tags = F.array_distinct(F.flatten(F.collect_list("tags"))).alias("tags")
    told = sources.groupBy("image_id").agg(tags, F.min("source").alias("source"))
    counted = told.select(F.explode("tags").alias("tag")).groupBy("tag").count().where(F.col("count") >= RARE)
    names = [row["tag"] for row in counted.orderBy(F.desc("count"), "tag").limit(TAGS).collect()]
    known = F.array(*map(F.lit, names)) if names else F.array().cast("array<string>")
    has = F.transform(F.array_intersect("tags", known), lambda tag: F.array_position(known, tag).cast("int") - 1)
    rows = drawn.join(told.select("image_id", "source", has.alias("has")), "image_id", "left")
    uri = lake.area("_staging", stage.name, stage.run_id, "sample")
    lake.stage(rows, uri)
    files = sorted(entry.uri for entry in lake.opener.entries(uri) if entry.uri.endswith(".parquet"))
    tables = (pa.parquet.read_table(pa.BufferReader(lake.opener.read(file))) for file in files)
    sample = order(
        (batch for table in tables for batch in table.to_batches()), load_encoder(settings.styles.encoder or settings.encoder).width, names
    )
    kept = Sample(sample.vectors[: settings.styles.sample], sample.sources[: settings.styles.sample], {}, sample.not_finite)
    return kept._replace(tags={name: has[: settings.styles.sample] for name, has in sample.tags.items()})


def order(batches: Iterator[pa.RecordBatch], width: int, names: list[str]) -> Sample:
    """Staged batches -> the sample in the order of (draw, image_id), whatever order they came in."""
    stored, draws, ids, sources, has = [], [], [], [], []
    for batch in batches:
        stored.append(style_centres.read_stored(batch.column("vector"), width))
        draws.append(batch.column("draw").to_numpy())
        ids += batch.column("image_id").to_pylist()
        sources += batch.column("source").to_pylist()
        has += batch.column("has").to_pylist()
    whole = np.concatenate(stored)
    finite = np.isfinite(whole).all(axis=1)
    places = np.lexsort((np.array(ids, dtype="S32"), np.concatenate(draws)))
    places = places[finite[places]]
    tags = {name: np.zeros(len(places), bool) for name in names}
    for row, place in enumerate(places):
        for number in has[place] or ():
            tags[names[number]][row] = True
    return Sample(whole[places].astype(np.float32), np.array(sources, dtype=object)[places].astype(str), tags, int((~finite).sum()))
