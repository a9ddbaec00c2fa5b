"""Who captions which image: the tiers of `captions` over the values of jobs/facts.py, and before them those of the comparison's sample.

An image belongs to the first tier whose rules it passes. Values change (a style grows common, captioners come to disagree): an image that comes into
an earlier tier is captioned by that tier's captioner too, one that falls into a later tier keeps what the earlier captioner gave it and costs nothing.
An image that a service called prohibited is shown to nobody any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.captions import Tier
from conf.section import Mistake
from conf.settings import Settings
from jobs import caption_rows, caption_sample, facts, score, select_images
from jobs.lake import Lake


def tiers(settings: Settings) -> tuple[Tier, ...]:
    """-> all tiers: of the comparison, and of `captions`."""
    return (*caption_sample.tiers(settings), *settings.captions.tiers)


def rounds(settings: Settings) -> list[tuple[Tier, ...]]:
    """-> all tiers in the order of their work. The comparison comes first: rules may ask how much its captioners disagree."""
    return [some for some in (caption_sample.tiers(settings), settings.captions.tiers) if some]


def pending(lake: Lake, settings: Settings) -> DataFrame:
    """-> (image_id, tier) of what a captioner is to be asked, each image at most once by each: neither captioned by it, nor refused for good, nor by
    the captioner of an earlier tier.
    """
    rows = _own(lake, settings, caption_sample.images(lake))
    if (compared := caption_sample.wanted(lake, settings)) is not None:
        rows = compared.unionByName(rows.join(compared, ["image_id", "fingerprint"], "left_anti"))
    return caption_sample.lacking(lake, settings, rows)


def demand(lake: Lake, settings: Settings) -> None:
    """Raises Mistake when a stage has not given yet what tiers' rules ask for: an image without the value would fall to a later tier, be captioned
    there, and perhaps be paid for twice. Disagreement is none of it: it comes of the comparison, which is captioned first.
    """
    values = sorted(_asked(settings) - {"disagreement"})
    if not values:
        return
    head = score.champion(settings) if {"score", "score_raw"} & set(values) else None
    if late := select_images.late(lake, settings, values, head):
        raise Mistake(
            f"captions: tiers ask for {', '.join(values)}, and images have no such value yet; run the stages {', '.join(late)} first"
        )


def assigned(lake: Lake, settings: Settings, images: DataFrame) -> DataFrame:
    """Rows with image_id -> (image_id, tier) of those that are in a tier of `captions`. Of caption_sample.images: who captions what."""
    tiers = settings.captions.tiers
    values = sorted(_asked(settings))
    if values:
        images = images.join(_values(lake, settings, values), "image_id")
    tier: Column = F.lit(None).cast("string")
    for one in reversed(tiers):
        passes = F.lit(True)
        for rule in one.rules:
            passes = passes & select_images.failure(rule).isNull()
        tier = F.when(passes, F.lit(one.name)).otherwise(tier)
    return images.select("image_id", tier.alias("tier")).where(F.col("tier").isNotNull())


def counting(settings: Settings, captions: DataFrame) -> DataFrame:
    """Rows of `captions` -> those that count for an image: of all that captioners of the tiers gave it, the earliest tier's."""
    rows = captions.where(F.col("fingerprint").isin([caption_rows.fingerprint(settings, tier) for tier in settings.captions.tiers]))
    if len(settings.captions.tiers) == 1:
        return rows
    rows = rows.withColumn("rank", _rank(settings))
    return rows.join(rows.groupBy("image_id").agg(F.min("rank").alias("rank")), ["image_id", "rank"], "left_semi").drop("rank")


def _own(lake: Lake, settings: Settings, allowed: DataFrame) -> DataFrame:
    """-> (image_id, tier, fingerprint) of the images of each tier that no captioner of an earlier one has captioned."""
    names = settings.captions.tiers
    told = _map((tier.name, caption_rows.fingerprint(settings, tier)) for tier in names)
    rows = assigned(lake, settings, allowed).withColumn("fingerprint", told[F.col("tier")])
    if len(names) == 1:
        return rows
    best = lake.read("captions").groupBy("image_id").agg(F.min(_rank(settings)).alias("best"))
    mine = _map((tier.name, number) for number, tier in enumerate(names))[F.col("tier")]
    return rows.join(best, "image_id", "left").where(F.col("best").isNull() | (F.col("best") >= mine)).drop("best")


def _rank(settings: Settings) -> Column:
    """Of a row of `captions`: the number of the tier that it was written for; of one that no tier of the config wrote (a comparison's), that of the
    last tier with its captioner; NULL: of none.
    """
    told = [(tier.name, caption_rows.fingerprint(settings, tier)) for tier in settings.captions.tiers]
    whole = _map((f"{name}\n{fingerprint}", number) for number, (name, fingerprint) in enumerate(told))
    last = _map({fingerprint: number for number, (_, fingerprint) in enumerate(told)}.items())
    return F.coalesce(whole[F.concat_ws("\n", "tier", "fingerprint")], last[F.col("fingerprint")])


def _map(pairs: Iterable[tuple[str, object]]) -> Column:
    return F.create_map(*[F.lit(one) for pair in pairs for one in pair])


def _asked(settings: Settings) -> set[str]:
    """-> the values that rules of tiers are over."""
    return {rule.value for tier in settings.captions.tiers for rule in tier.rules}


def _values(lake: Lake, settings: Settings, values: Sequence[str]) -> DataFrame:
    scores = score.fingerprint(score.champion(settings)) if {"score", "score_raw"} & set(values) else ""
    return facts.gather(lake, settings, values, scores, None, select_images.made_by(settings, values))
