"""Who captions which image, and what captioners are told of it: the tiers of `captions` over jobs/facts.py; tags, alt text, rating, text.

An image belongs to the first tier whose rules it passes. What is told of it enters the request, and so the key of what is paid for, but not the
fingerprint: another tagger or alt text makes nothing pending; another prompt, engine, model or option of the request does.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.captions import Captioner, PromptFile, Tier
from conf.settings import Settings, digest, load_prompt
from jobs import classify, deny_lists, facts, flag, occurrences, rejects, score, select_images
from jobs.lake import Lake
from udfs import caption_answer, caption_request, caption_tags, token_count
from udfs.caption_answer import Rules

NAME = "caption"
PACE = frozenset(  # of a captioner: how fast and at what risk it is asked, not what
    {"key", "base_url", "timeout_seconds", "tries", "repairs", "in_flight", "requests_per_minute"}
)
ABOUT = ("tags", "alt_text", "rating", "style", "regions")  # what is told of an image


def fingerprint(settings: Settings, tier: Tier) -> str:
    """Of rows of `captions`: engine, model, prompt version, and a digest of all that makes a request or an answer another."""
    one, prompt = settings.captions.captioners[tier.captioner], load_prompt(settings.captions.prompt)
    own = caption_tags.KERNEL_VERSION if one.engine == "tags" else caption_request.REQUEST_VERSION
    told = digest(prompt, one.model_dump(mode="json", exclude=set(PACE)), sorted(tier.parts), caption_answer.RULES_VERSION, own)
    return f"{one.engine}:{name_of(one)}:{prompt.name}:{told}"


def told(settings: Settings, tier: Tier) -> dict[str, Column]:
    """What every staged row of a tier says of its captioner."""
    one, options = settings.captions.captioners[tier.captioner], settings.captions
    names = {"fingerprint": fingerprint(settings, tier), "tier": tier.name, "engine": one.engine, "model": name_of(one)}
    names |= {"prompt": load_prompt(options.prompt).name, "tokenizer": token_count.load(options.tokenizer, options.tokenizer_sha256).name}
    return {name: F.lit(value) for name, value in names.items()}


def rules_of(prompt: PromptFile) -> Rules:
    """What captions under a prompt version must be."""
    return caption_answer.rules(prompt.model_dump())


def name_of(one: Captioner) -> str:
    """What the tables name as the model: of a folder its last part, of `tags` none."""
    return (one.model or "none").rstrip("/").rpartition("/")[2]


def pending(lake: Lake, settings: Settings) -> DataFrame:
    """-> (image_id, tier) of the images that their tier's captioner has not captioned, nor refused for good. An image that flags wait for waits too."""
    rows = assigned(lake, settings)
    if settings.embed.detectors:
        rows = rows.join(_flags(lake, settings).select("image_id"), "image_id", "left_semi")
    told = F.create_map(*[F.lit(part) for tier in settings.captions.tiers for part in (tier.name, fingerprint(settings, tier))])
    rows = rows.withColumn("fingerprint", told[F.col("tier")])
    done = lake.read("captions").select("image_id", "fingerprint").distinct()
    settled = rejects.settled(lake, NAME).select(F.unhex("input_key").alias("image_id"), "fingerprint")
    lacking = rows.join(done, ["image_id", "fingerprint"], "left_anti").join(settled, ["image_id", "fingerprint"], "left_anti")
    return lacking.select("image_id", "tier")


def assigned(lake: Lake, settings: Settings) -> DataFrame:
    """-> (image_id, tier) of every image that is neither denied nor opted out and is in a tier."""
    tiers = settings.captions.tiers
    images = deny_lists.allowed(lake, lake.read("images").select("image_id"))
    images = images.join(lake.read("sources").where("opt_out").select("image_id"), "image_id", "left_anti")
    values = sorted({rule.value for tier in tiers for rule in tier.rules})
    if values:
        images = images.join(_values(lake, settings, values), "image_id")
    tier: Column = F.lit(None).cast("string")
    for one in reversed(tiers):
        passes = F.lit(True)
        for rule in one.rules:
            passes = passes & select_images.failure(rule).isNull()
        tier = F.when(passes, F.lit(one.name)).otherwise(tier)
    return images.select("image_id", tier.alias("tier")).where(F.col("tier").isNotNull())


def about(lake: Lake, settings: Settings, rows: DataFrame) -> DataFrame:
    """Rows with image_id -> the same with ABOUT: tags of its sources and detectors, the latest alt text, rating, style class, texts in it."""
    sources = lake.read("sources").join(rows.select("image_id"), "image_id", "left_semi")
    tags = sources.groupBy("image_id").agg(F.sort_array(F.array_distinct(F.flatten(F.collect_list("tags")))).alias("source_tags"))
    flags = _flags(lake, settings).select("image_id", "rating", "text", F.col("tags").alias("flag_tags"))
    known = rows.join(tags, "image_id", "left").join(occurrences.latest(sources, "alt_text"), "image_id", "left")
    known = known.join(flags, "image_id", "left").join(_styles(lake, settings), "image_id", "left")
    empty = F.array().cast("array<string>")
    told = {
        "tags": F.array_union(F.coalesce("flag_tags", empty), F.coalesce("source_tags", empty)),
        "alt_text": F.coalesce("alt_text", F.lit("")),
        "regions": F.when(F.length("text") > 0, F.split("text", "\n")).otherwise(empty),
    }
    return known.withColumns(told).select(*rows.columns, *ABOUT)


def _values(lake: Lake, settings: Settings, values: Sequence[str]) -> DataFrame:
    scores = score.fingerprint(score.champion(settings)) if {"score", "score_raw"} & set(values) else ""
    made = select_images.made_by(settings, values)
    known = facts.gather(lake, settings, scores, lake.versions(facts.TABLES), made)
    versions = {(facts.NUMBERS | facts.WORDS)[value] for value in values}
    return known.select("image_id", *values, *sorted(versions))


def _flags(lake: Lake, settings: Settings) -> DataFrame:
    return lake.read("flags").where(F.col("fingerprint") == flag.evidence(settings).fingerprint)


def _styles(lake: Lake, settings: Settings) -> DataFrame:
    """-> (image_id, style): its class by the classifier of `style`, NULL for `other`."""
    entry = next((entry for entry in settings.classify if entry.label == flag.STYLE), None)
    told = classify.fingerprint(classify.champion(settings, entry)) if entry is not None else ""
    rows = lake.read("classes").where(F.col("fingerprint") == told)
    return rows.select("image_id", F.when(F.col("class") != "other", F.col("class")).alias("style"))
