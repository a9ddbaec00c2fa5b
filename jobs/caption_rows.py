"""By whom a row of `captions` is (its fingerprint and names), and what captioners are told of an image: tags, alt text, rating, style, text.

What is told enters the request, and so the key of what is paid for, but not the fingerprint: another tagger or alt text makes nothing pending
but what `tags` could say nothing of (jobs/caption_rejects.py); another prompt, engine, model or option of the request does.
"""

from __future__ import annotations

from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.captions import Captioner, PromptFile, Tier
from conf.settings import Settings, digest, load_prompt
from jobs import classify, flag, occurrences
from jobs.lake import Lake
from udfs import caption_answer, caption_request, caption_tags, caption_work, internvl, internvl_prompt, token_count
from udfs.caption_answer import Rules
from udfs.caption_request import Prompt

NAME = "caption"
PACE: dict[str, Any] = dict.fromkeys(  # of a captioner: how fast and at what risk it is asked, not what
    ("key", "base_url", "timeout_seconds", "tries", "repairs", "in_flight", "requests_per_minute", "batch"), True
) | {"local": {"folder", "device", "batch_tiles", "threads", "chunk"}}
ABOUT = ("tags", "alt_text", "rating", "style", "regions")  # what is told of an image


def fingerprint(settings: Settings, tier: Tier) -> str:
    """Of rows of `captions`: engine, model, prompt version, and a digest of all that makes a request or an answer another."""
    one, prompt = settings.captions.captioners[tier.captioner], load_prompt(settings.captions.prompt)
    kernels: dict[str, object] = {
        "tags": caption_tags.KERNEL_VERSION,
        "internvl": [internvl.KERNEL_VERSION, internvl_prompt.KERNEL_VERSION],
    }
    own = [caption_request.REQUEST_VERSION, kernels.get(one.engine), *caption_work.elsewhere(one.model_dump()).values()]
    told = digest(prompt, one.model_dump(mode="json", exclude=PACE), sorted(tier.parts), caption_answer.RULES_VERSION, own)
    return f"{one.engine}:{name_of(one)}:{prompt.name}:{told}"


def of_wave(settings: Settings, tier: Tier) -> dict[str, str]:
    """What the ledger says of a wave's calls."""
    one = settings.captions.captioners[tier.captioner]
    return {"tier": tier.name, "fingerprint": fingerprint(settings, tier), "engine": one.engine, "model": name_of(one)}


def told(settings: Settings, tier: Tier) -> dict[str, Column]:
    """What every staged row of a tier says of its captioner."""
    one, options = settings.captions.captioners[tier.captioner], settings.captions
    names = {"fingerprint": fingerprint(settings, tier), "tier": tier.name, "engine": one.engine, "model": name_of(one)}
    names |= {"prompt": load_prompt(options.prompt).name, "tokenizer": token_count.load(options.tokenizer, options.tokenizer_sha256).name}
    return {name: F.lit(value) for name, value in names.items()}


def of_worker(settings: Settings, tier: Tier) -> caption_work.Tier:
    """What workers get of a tier: no secret."""
    prompt, options = load_prompt(settings.captions.prompt), settings.captions
    words = Prompt(**{name: getattr(prompt, name) for name in Prompt._fields})
    one = options.captioners[tier.captioner].model_dump(mode="json")
    tokenizer = (options.tokenizer, options.tokenizer_sha256)
    return caption_work.Tier(one, words, rules_of(prompt), tier.parts, tokenizer, settings.limits.model_dump(), settings.store_options)


def rules_of(prompt: PromptFile) -> Rules:
    """What captions under a prompt version must be."""
    return caption_answer.rules(prompt.model_dump())


def name_of(one: Captioner) -> str:
    """What the tables name as the model: of a folder its last part, of `tags` none."""
    return (one.model or (one.local.folder if one.local is not None else "none")).rstrip("/").rpartition("/")[2]


def about(lake: Lake, settings: Settings, rows: DataFrame) -> DataFrame:
    """Rows with image_id -> the same with ABOUT: tags of its sources and detectors, the latest alt text, rating, style class, texts in it."""
    sources = lake.read("sources").join(rows.select("image_id"), "image_id", "left_semi")
    tags = sources.groupBy("image_id").agg(F.sort_array(F.array_distinct(F.flatten(F.collect_list("tags")))).alias("source_tags"))
    seen = flags(lake, settings).select("image_id", "rating", "text", F.col("tags").alias("flag_tags"))
    known = rows.join(tags, "image_id", "left").join(occurrences.latest(sources, "alt_text"), "image_id", "left")
    known = known.join(seen, "image_id", "left").join(_styles(lake, settings), "image_id", "left")
    empty = F.array().cast("array<string>")
    told = {
        "tags": F.array_union(F.coalesce("flag_tags", empty), F.coalesce("source_tags", empty)),
        "alt_text": F.coalesce("alt_text", F.lit("")),
        "regions": F.when(F.length("text") > 0, F.split("text", "\n")).otherwise(empty),
    }
    return known.withColumns(told).select(*rows.columns, *ABOUT)


def flags(lake: Lake, settings: Settings) -> DataFrame:
    """-> the rows of `flags` that count now."""
    return lake.read("flags").where(F.col("fingerprint") == flag.evidence(settings).fingerprint)


def _styles(lake: Lake, settings: Settings) -> DataFrame:
    """-> (image_id, style): its class by the classifier of `style`, NULL for `other`."""
    entry = next((entry for entry in settings.classify if entry.label == flag.STYLE), None)
    told = classify.fingerprint(classify.champion(settings, entry)) if entry is not None else ""
    rows = lake.read("classes").where(F.col("fingerprint") == told)
    return rows.select("image_id", F.when(F.col("class") != "other", F.col("class")).alias("style"))
