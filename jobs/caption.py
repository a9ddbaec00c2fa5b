"""images and what is known of them -> captions, rejects: each image by the captioner of its tier (settings.captions).

    spark-submit --jars '.cache/jars/*.jar' jobs/caption.py --config conf/demo.yaml

The demo's captioner is `tags`: it composes short and medium captions from tags, alt text, rating, style class and the text that a detector read,
says nothing else, and names itself in every row. An image of which nothing is known gets the reject `nothing_known`. Cost of `tags`: a join of
narrow tables, under a CPU-millisecond an image.
"""

from __future__ import annotations

from functools import partial, reduce

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.captions import PromptFile, Tier
from conf.section import Mistake
from conf.settings import Settings, load_prompt
from jobs import caption_rows, command, progress, rejects, waves
from jobs.caption_rows import NAME
from jobs.lake import Lake
from jobs.waves import Projection
from udfs import caption_offline, caption_row, token_count
from udfs.caption_answer import Rules


def run(lake: Lake, settings: Settings, plan_only: bool = False) -> None:
    check(settings)
    if plan_only:
        counts = {row["tier"]: row["count"] for row in caption_rows.pending(lake, settings).groupBy("tier").count().collect()}
        for tier in settings.captions.tiers:
            print(f"{NAME}: tier {tier.name}: {counts.get(tier.name, 0)} images by {tier.captioner}: nothing to pay")
        print(progress.estimate(lake, NAME, sum(counts.values())))
        return
    with waves.stage(lake, NAME, settings, tables(lake, settings)) as stage:
        plan = stage.plan(caption_rows.about(lake, settings, caption_rows.pending(lake, settings)), ["image_id"])
        stage.run(plan, lambda inputs: compute(inputs, settings))


def check(settings: Settings) -> None:
    """Raises Mistake for a tokenizer that is not there, or is another."""
    try:
        token_count.load(settings.captions.tokenizer, settings.captions.tokenizer_sha256)
    except ValueError as error:
        raise Mistake(f"captions.{error}") from None


def rules_of(prompt: PromptFile) -> Rules:
    return Rules({**prompt.bands}, prompt.banned, prompt.most_tags, prompt.most_ocr, prompt.language, prompt.contradictions)


def compute(inputs: DataFrame, settings: Settings) -> DataFrame:
    """(image_id, tier, caption_rows.ABOUT) -> staged rows."""
    return reduce(
        DataFrame.unionByName, [_of_tier(inputs.where(F.col("tier") == tier.name), settings, tier) for tier in settings.captions.tiers]
    )


def _of_tier(inputs: DataFrame, settings: Settings, tier: Tier) -> DataFrame:
    one, prompt, options = settings.captions.captioners[tier.captioner], load_prompt(settings.captions.prompt), settings.captions
    tokenizer = (options.tokenizer, options.tokenizer_sha256)
    worker = partial(caption_offline.caption, rules=rules_of(prompt), asked=tier.parts, tokenizer=tokenizer)
    told = {
        "fingerprint": caption_rows.fingerprint(settings, tier),
        "tier": tier.name,
        "engine": one.engine,
        "model": caption_rows.name_of(one),
        "prompt": prompt.name,
        "tokenizer": token_count.load(*tokenizer).name,
    }
    rows = inputs.select("image_id", *caption_rows.ABOUT).mapInPandas(worker, caption_row.SCHEMA)
    return rows.withColumns({name: F.lit(value) for name, value in told.items()})


def tables(lake: Lake, settings: Settings) -> dict[str, Projection]:
    def rejects_of(staged: DataFrame, run: str) -> DataFrame | None:
        reject = F.struct("code", "detail", "transient")
        refused = staged.withColumn("reject", F.when(F.col("state") == caption_row.FAILED, reject))
        return rejects.of_images(lake, refused, NAME, run, settings.waves.attempts)

    def captions_of(staged: DataFrame, run: str) -> DataFrame:
        by = ("image_id", "fingerprint", "language", "tokenizer", "engine", "model", "prompt", "tier")
        rows = staged.select(*by, F.explode("texts").alias("one")).select(*by, "one.kind", "one.part", "one.text", "one.tokens", "one.key")
        return rows.withColumnRenamed("key", "request").withColumns({"language": F.coalesce("language", F.lit("und")), "run": F.lit(run)})

    return {"rejects": rejects_of, "captions": captions_of}


if __name__ == "__main__":
    command.main(__doc__, run)
