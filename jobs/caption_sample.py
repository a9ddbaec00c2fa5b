"""The images that several captioners are asked about (`compare_captioners`), so that they can be compared; each of them is a tier of its own.

The sample: of the images that are neither denied nor opted out, the `compare_captioners.images` with the lowest hash of seed and image id. New images
displace a few of it, as many as fall among the lowest; what these were captioned with stays.
"""

from __future__ import annotations

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.captions import COMPARED, Tier
from conf.settings import Settings
from jobs import caption_rejects, caption_rows, deny_lists, facts
from jobs.lake import Lake


def tiers(settings: Settings) -> tuple[Tier, ...]:
    """-> a tier for each captioner of the comparison, with the parts of the first tier that names it, so that nothing is bought twice."""
    parts = {tier.captioner: tier.parts for tier in reversed(settings.captions.tiers)}
    every = Tier.model_fields["parts"].default
    return tuple(
        Tier(name=f"{COMPARED}{name}", captioner=name, parts=parts.get(name, every)) for name in settings.compare_captioners.captioners
    )


def fingerprints(settings: Settings) -> str:
    """-> the fingerprints of the captioners that are compared, as one text; "" for fewer than two, who cannot disagree."""
    told = sorted({caption_rows.fingerprint(settings, tier) for tier in tiers(settings)})
    return facts.JOINED.join(told) if len(told) > 1 else ""


def images(lake: Lake) -> DataFrame:
    """-> image_id of every image that may be captioned: neither denied nor opted out, and none that a service has called prohibited."""
    return _permitted(lake).join(prohibited(lake), "image_id", "left_anti")


def prohibited(lake: Lake) -> DataFrame:
    """-> image_id of what a captioner's service refuses as prohibited: no other captioner is shown it."""
    return lake.read("rejects").where((F.col("stage") == caption_rows.NAME) & (F.col("code") == "prohibited")).select("image_id").distinct()


def _permitted(lake: Lake) -> DataFrame:
    """-> image_id of every image that is neither denied nor opted out."""
    rows = deny_lists.allowed(lake, lake.read("images").select("image_id"))
    return rows.join(lake.read("sources").where("opt_out").select("image_id"), "image_id", "left_anti")


def sample(lake: Lake, settings: Settings) -> DataFrame:
    """-> image_id of the sample. Images that are prohibited are of it: that one captioner was refused them is a finding."""
    wanted, rows = settings.compare_captioners, _permitted(lake)
    if wanted.images is None:
        return rows
    return rows.orderBy(F.xxhash64(F.lit(wanted.seed), "image_id"), "image_id").limit(wanted.images)


def wanted(lake: Lake, settings: Settings) -> DataFrame | None:
    """-> (image_id, tier, fingerprint) of the sample and each captioner that is compared; None where the config compares none."""
    if not (asked := tiers(settings)):
        return None
    drawn = sample(lake, settings).join(prohibited(lake), "image_id", "left_anti")
    by = {caption_rows.fingerprint(settings, tier): tier.name for tier in reversed(asked)}  # two that ask the same are one
    told = [F.struct(F.lit(name).alias("tier"), F.lit(fingerprint).alias("fingerprint")) for fingerprint, name in by.items()]
    return drawn.select("image_id", F.explode(F.array(*told)).alias("one")).select("image_id", "one.*")


def lacking(lake: Lake, settings: Settings, rows: DataFrame) -> DataFrame:
    """(image_id, tier, fingerprint) -> (image_id, tier) of those that the captioner has neither captioned nor refused for good, by a reject that
    holds. An image that flags wait for waits too.
    """
    if settings.embed.detectors:
        rows = rows.join(caption_rows.flags(lake, settings).select("image_id"), "image_id", "left_semi")
    done = lake.read("captions").select("image_id", "fingerprint").distinct()
    asked = {caption_rows.fingerprint(settings, tier) for tier in (*tiers(settings), *settings.captions.tiers)}
    settled = caption_rejects.standing(lake, settings, F.col("fingerprint").isin(*sorted(asked))).select("image_id", "fingerprint")
    left = rows.join(done, ["image_id", "fingerprint"], "left_anti").join(settled, ["image_id", "fingerprint"], "left_anti")
    return left.select("image_id", "tier")


def pending(lake: Lake, settings: Settings) -> DataFrame:
    """-> (image_id, tier) of the sample that a captioner of the comparison is still to be asked about."""
    rows = wanted(lake, settings)
    assert rows is not None
    return lacking(lake, settings, rows)
