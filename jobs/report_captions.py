"""captions, and what prompts are composed from -> the report's section on captions: who wrote how many of which length, images with all of theirs.

Bounded: a row a captioner and kind, and `report.images_per_group` images. The prompts are those of udfs/compose_prompt.py: V7's own order, and
three epochs of the varied mix.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, digest, load_prompt
from jobs import caption_ledger, caption_rows, caption_tiers, prompt_facts
from jobs.lake import Lake
from udfs import compose_prompt, token_count
from udfs.compose_prompt import Caption, Known

SECTION_VERSION = 3
EPOCHS = 3
SEED = 7  # of the prompts that are shown
NO_TEXT = "no text in the picture"  # of an empty row of OCR
ORDER = ("short", "medium", "long", "style", "tags", "ocr")

Draw = Callable[[DataFrame, str], dict[Any, list[dict[str, Any]]]]


def identity(settings: Settings) -> str:
    """What the section depends on beside the tables."""
    return digest(
        SECTION_VERSION, compose_prompt.KERNEL_VERSION, [caption_rows.fingerprint(settings, tier) for tier in caption_tiers.tiers(settings)]
    )


def section(lake: Lake, settings: Settings, scores: str, draw: Draw) -> dict[str, Any]:
    """-> what jobs/report_captions.html shows; `absent` says why where there is nothing to show."""
    told = [caption_rows.fingerprint(settings, tier) for tier in caption_tiers.tiers(settings)]
    rows = lake.read("captions").where(F.col("fingerprint").isin(told))
    by = ("tier", "engine", "model", "prompt", "tokenizer", "kind")
    measures = [
        F.count_distinct("image_id").alias("images"),
        F.count("*").alias("texts"),
        F.median("tokens").alias("median"),
        F.max("tokens").alias("most"),
    ]
    counted = [row.asDict() for row in rows.where("text != ''").groupBy(*by).agg(*measures).collect()]  # a row a captioner and kind
    if not counted:
        return {"absent": "no image has a caption under this config yet; run the stage caption"}
    try:
        known = prompt_facts.gather(lake, settings, scores)
    except Mistake as mistake:
        return {"absent": str(mistake)}
    by_whom = F.when(F.col("model") == "none", F.col("engine")).otherwise(F.col("model")).alias("captioner")
    texts = rows.groupBy("image_id").agg(F.sort_array(F.collect_list(F.struct("kind", "part", "tokens", "text", by_whom))).alias("texts"))
    whole = F.to_json(F.struct("score", "rating", "cluster", "captions", "texts"))
    mild = F.coalesce(F.col("rating") != "explicit", F.lit(True))
    shown = (
        known.join(texts, "image_id")
        .where(mild)
        .select("image_id", F.lit("all").alias("group"), F.struct("image_id", whole.alias("told")).alias("caption"))
    )
    images = [_shown(settings, one) for one in draw(shown, "group").get("all", [])]
    return {
        "absent": "",
        "counts": sorted(counted, key=lambda row: (row["tier"], ORDER.index(row["kind"]))),
        "images": images,
        "ledger": [row.asDict() for row in caption_ledger.summed(lake).collect()],  # a row a tier, captioner and code
        "epochs": EPOCHS,
    }


def _shown(settings: Settings, one: dict[str, Any]) -> dict[str, Any]:
    image_id, told = bytes(one["caption"]["image_id"]), json.loads(one["caption"]["told"])
    captions = [Caption(caption["id"], caption["kind"], caption["text"]) for caption in told["captions"]]
    known = Known(image_id, told.get("score"), told.get("rating"), told.get("cluster"), captions)
    options, most = settings.captions, load_prompt(settings.captions.prompt).most_composed
    count = token_count.load(options.tokenizer, options.tokenizer_sha256).count
    prompts = [("V7's order", compose_prompt.compose(known, compose_prompt.V7, SEED, 0, count, most))]
    prompts += [
        (f"epoch {epoch}", compose_prompt.compose(known, compose_prompt.VARIED, SEED, epoch, count, most)) for epoch in range(EPOCHS)
    ]
    texts = sorted(told["texts"], key=lambda text: (ORDER.index(text["kind"]), text["captioner"], text["part"]))
    texts = [text | {"text": text["text"] or NO_TEXT} for text in texts]
    composed = [{"name": name, "tokens": made.tokens, "text": made.text} for name, made in prompts]
    return {"picture": one["picture"], "why": one["why"], "name": one["name"], "texts": texts, "prompts": composed}
