"""Near-duplicates that share a caption (captions.share: near): who leads whom, and the rows of those that are led.

Near are two images whose 256-bit hashes differ in at most BITS bits, whose shapes agree within SHAPE, and whose vectors of the settings' encoder have
a cosine of at least COSINE: the hash proposes, the embedding verifies. An image's leader is the smallest image_id that is near it, when that one has
no leader itself; so every pair that shares was compared, and nothing is passed on from neighbour to neighbour. Of 275 pictures of 11 styles, re-encoded as
JPEG of quality 75 to 95 or WebP of 80, 98 to 99.6 % stay within 7 bits [measured].

Pairs are found by bands: of 8 bands of 32 bits at least one is equal in hashes that differ in 7 bits or less. A band that many images have, as of
pictures that are nearly blank, is compared with its NEAREST smallest image_ids alone.
"""

from __future__ import annotations

from functools import partial

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from conf.settings import Settings
from jobs import caption_rows, caption_sample, caption_tiers, embedding, rejects
from jobs.lake import Lake
from udfs import caption_row, near_pairs
from udfs import embed as kernel

BITS, BANDS = 7, 8
SHAPE = 0.02  # of the ratio of the sides
COSINE = 0.98
NEAREST = 50


def leaders(lake: Lake, settings: Settings) -> DataFrame:
    """-> (image_id, leader) of the images that have one."""
    fingerprints = embedding.outputs(settings)
    hashes = _of(lake.read("pixels"), fingerprints[kernel.PIXELS]).select("image_id", "phash")
    shapes = lake.read("images").select("image_id", (F.col("width") / F.col("height")).alias("shape"))
    vectors = _of(lake.read("embeddings"), embedding.of_scorer(settings)).select("image_id", "vector")
    rows = hashes.join(shapes, "image_id").join(vectors, "image_id")
    banded = rows.select("image_id", "phash", F.posexplode(_bands()).alias("place", "band"))
    firsts = banded.withColumn("rank", F.row_number().over(Window.partitionBy("place", "band").orderBy("image_id")))
    firsts = firsts.where(F.col("rank") <= NEAREST).select(
        "place", "band", F.col("image_id").alias("leader"), F.col("phash").alias("phash_2")
    )
    pairs = banded.join(firsts, ["place", "band"]).where("leader < image_id").select("image_id", "leader", "phash", "phash_2")
    pairs = pairs.mapInPandas(partial(near_pairs.near, bits=BITS), near_pairs.SCHEMA).distinct()
    other = rows.select(F.col("image_id").alias("leader"), F.col("shape").alias("shape_2"), F.col("vector").alias("vector_2"))
    pairs = pairs.join(rows.select("image_id", "shape", "vector"), "image_id").join(other, "leader")
    pairs = pairs.where(F.abs(F.col("shape") / F.col("shape_2") - 1) <= SHAPE).select("image_id", "leader", "vector", "vector_2")
    pairs = pairs.mapInPandas(partial(near_pairs.alike, cosine=COSINE), near_pairs.SCHEMA)
    first = pairs.groupBy("image_id").agg(F.min("leader").alias("leader"))
    return first.join(first.select(F.col("image_id").alias("leader")), "leader", "left_anti").select("image_id", "leader")


def led(lake: Lake, settings: Settings, pending: DataFrame, leaders: DataFrame) -> DataFrame:
    """(image_id, tier) -> those whose leader is in the same tier, and `leader`. An image whose leader is in another tier, or is refused for good, is
    asked about by itself.
    """
    told = F.create_map(*[F.lit(one) for tier in settings.captions.tiers for one in (tier.name, caption_rows.fingerprint(settings, tier))])
    mine = caption_tiers.assigned(lake, settings, caption_sample.images(lake)).withColumn("fingerprint", told[F.col("tier")])
    refused = rejects.settled(lake, caption_rows.NAME).select(F.unhex("input_key").alias("image_id"), "fingerprint")
    mine = mine.join(refused, ["image_id", "fingerprint"], "left_anti").select(
        F.col("image_id").alias("leader"), F.col("tier").alias("of_leader")
    )
    return pending.join(leaders, "image_id").join(mine, "leader").where("tier = of_leader").drop("of_leader")


def staged(lake: Lake, settings: Settings, rows: DataFrame) -> DataFrame:
    """Rows of `led` -> staged rows of those whose leader has captions: the same texts, and the request that they were bought by."""
    made = []
    texts = lake.read("captions").withColumn("one", F.struct("kind", "part", "text", "tokens", F.col("request").alias("key")))
    for tier in settings.captions.tiers:
        of_tier = texts.where(F.col("fingerprint") == caption_rows.fingerprint(settings, tier))
        by_leader = of_tier.groupBy(F.col("image_id").alias("leader")).agg(
            F.collect_list("one").alias("texts"), F.first("language").alias("language")
        )
        mine = rows.where(F.col("tier") == tier.name).select("image_id", "leader").join(by_leader, "leader")
        told = {
            "key": F.col("texts")[0]["key"],
            "state": F.lit(caption_row.WHOLE),
            "transient": F.lit(False),
            "faults": F.array().cast("array<struct<part:string,code:string,detail:string>>"),
            "calls": F.lit(0),
        } | {name: F.lit(None).cast("string") for name in ("code", "detail", "stop")}
        made.append(mine.withColumns(told).select(*caption_row.COLUMNS).withColumns(caption_rows.told(settings, tier)))
    whole = made[0]
    for more in made[1:]:
        whole = whole.unionByName(more)
    return whole


def _of(table: DataFrame, fingerprint: str) -> DataFrame:
    return table.where((F.col("view") == kernel.ORIGINAL) & (F.col("fingerprint") == fingerprint))


def _bands() -> Column:
    size = 32 // BANDS
    return F.array(*[F.substring("phash", 1 + size * number, size) for number in range(BANDS)])
