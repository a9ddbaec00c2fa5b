"""Near-duplicates that share a caption (captions.share: near): which are near, who leads whom, and the rows of those that are led.

Near are two images whose 256-bit hashes differ in at most BITS bits, whose shapes agree within SHAPE, and whose vectors of the settings' encoder have
a cosine of at least COSINE: the hash proposes, the embedding verifies. In each tier an image is led by one near it that has captions of the tier, or else
by the smallest image_id near it, when that one has no leader itself and is still to be asked about; so every pair that shares was compared, nothing is
passed on from neighbour to neighbour, and nobody waits for captions that will not come. Of 275 pictures of 11 styles, re-encoded as JPEG of quality 75 to
95 or WebP of 80, 98 to 99.6 % stay within 7 bits [measured].

Images that may not be captioned (denied, opted out, prohibited) lead nobody. The captioner `tags` composes from an image's own tags and alt text: its
tiers share nothing. Sharing knows of no split: near-duplicates of which one is held out from training and another is not carry the same text, as they
carry nearly the same picture.

Pairs are found by bands: of 8 bands of 32 bits at least one is equal in hashes that differ in 7 bits or less. A band that many images have, as of
pictures that are nearly blank, is compared with NEAREST of them alone: those that have captions first, then by image_id.
"""

from __future__ import annotations

from functools import partial, reduce

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from conf.captions import Tier
from conf.settings import Settings
from jobs import caption_rows, caption_sample, embedding
from jobs.lake import Lake
from udfs import caption_row, near_pairs
from udfs import embed as kernel

BITS, BANDS = 7, 8
SHAPE = 0.02  # of the ratio of the sides
COSINE = 0.98
NEAREST = 50


def tiers(settings: Settings) -> list[Tier]:
    """-> the tiers whose near-duplicates share; none where the config says so."""
    options = settings.captions
    return [one for one in options.tiers if options.share == "near" and options.captioners[one.captioner].engine != "tags"]


def pairs(lake: Lake, settings: Settings) -> DataFrame:
    """-> (image_id, leader) of images that are near each other, each pair once and in either order."""
    fingerprints = embedding.outputs(settings)
    hashes = _of(lake.read("pixels"), fingerprints[kernel.PIXELS]).select("image_id", "phash")
    shapes = lake.read("images").select("image_id", (F.col("width") / F.col("height")).alias("shape"))
    vectors = _of(lake.read("embeddings"), embedding.of_scorer(settings)).select("image_id", "vector")
    rows = caption_sample.images(lake).join(hashes, "image_id").join(shapes, "image_id").join(vectors, "image_id")
    told = _captioned(lake, settings).select("image_id").distinct().withColumn("has", F.lit(True))
    ranked = rows.join(told, "image_id", "left").withColumn("turn", F.struct(F.col("has").isNull().alias("late"), "image_id"))
    banded = ranked.select("image_id", "turn", "phash", F.posexplode(_bands()).alias("place", "band"))
    firsts = banded.withColumn("rank", F.row_number().over(Window.partitionBy("place", "band").orderBy("turn")))
    firsts = firsts.where(F.col("rank") <= NEAREST).select(
        "place", "band", F.col("image_id").alias("leader"), F.col("turn").alias("turn_2"), F.col("phash").alias("phash_2")
    )
    found = banded.join(firsts, ["place", "band"]).where("turn_2 < turn").select("image_id", "leader", "phash", "phash_2")
    found = found.mapInPandas(partial(near_pairs.near, bits=BITS), near_pairs.SCHEMA).distinct()
    other = rows.select(F.col("image_id").alias("leader"), F.col("shape").alias("shape_2"), F.col("vector").alias("vector_2"))
    found = found.join(rows.select("image_id", "shape", "vector"), "image_id").join(other, "leader")
    found = found.where(F.abs(F.col("shape") / F.col("shape_2") - 1) <= SHAPE).select("image_id", "leader", "vector", "vector_2")
    return found.mapInPandas(partial(near_pairs.alike, cosine=COSINE), near_pairs.SCHEMA)


def led(lake: Lake, settings: Settings, pending: DataFrame, pairs: DataFrame) -> DataFrame:
    """(image_id, tier) -> those that get the captions of `leader`: it has them in the same tier, or is pending in it and led by nobody."""
    mine = pending.where(F.col("tier").isin([tier.name for tier in tiers(settings)])).select("image_id", "tier")
    able = _captioned(lake, settings).withColumn("waits", F.lit(False)).unionByName(mine.withColumn("waits", F.lit(True)))
    able = able.groupBy(F.col("image_id").alias("leader"), "tier").agg(F.min("waits").alias("waits"))
    ways = [
        F.struct(F.col(one).alias("image_id"), F.col(other).alias("leader"))
        for one, other in (("image_id", "leader"), ("leader", "image_id"))
    ]
    near = pairs.select(F.explode(F.array(*ways)).alias("one")).select("one.*")
    found = mine.join(near, "image_id").join(able, ["leader", "tier"]).where("NOT waits OR leader < image_id")
    first = found.groupBy("image_id", "tier").agg(F.min(F.struct("waits", "leader")).alias("one")).select("image_id", "tier", "one.*")
    themselves_led = first.select(F.col("image_id").alias("leader"), "tier", F.lit(True).alias("led"))
    kept = first.join(themselves_led, ["leader", "tier"], "left").where("NOT waits OR led IS NULL")
    return kept.select("image_id", "tier", "leader")


def staged(lake: Lake, settings: Settings, rows: DataFrame) -> DataFrame:
    """Rows of `led` -> staged rows of those whose leader has captions: the same texts, and the request that they were bought by."""
    made = []
    texts = lake.read("captions").withColumn("one", F.struct("kind", "part", "text", "tokens", F.col("request").alias("key")))
    for tier in tiers(settings):
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
        } | {name: F.lit(None).cast("string") for name in ("code", "detail", "stop", "tried")}
        made.append(mine.withColumns(told).select(*caption_row.COLUMNS).withColumns(caption_rows.told(settings, tier)))
    return reduce(DataFrame.unionByName, made)


def _captioned(lake: Lake, settings: Settings) -> DataFrame:
    """-> (image_id, tier) of captions that count for a tier that shares; of two tiers that ask the same, for both."""
    of = [(caption_rows.fingerprint(settings, tier), tier.name) for tier in tiers(settings)]
    by = F.broadcast(lake.spark.createDataFrame(of, "fingerprint STRING, tier STRING"))
    return lake.read("captions").select("image_id", "fingerprint").distinct().join(by, "fingerprint").select("image_id", "tier")


def _of(table: DataFrame, fingerprint: str) -> DataFrame:
    return table.where((F.col("view") == kernel.ORIGINAL) & (F.col("fingerprint") == fingerprint))


def _bands() -> Column:
    size = 32 // BANDS
    return F.array(*[F.substring("phash", 1 + size * number, size) for number in range(BANDS)])
