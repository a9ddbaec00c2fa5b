"""images and what is known of them -> captions, caption_calls, rejects: each image by the captioner of its tier (settings.captions).

    spark-submit --jars '.cache/jars/*.jar' jobs/caption.py --config conf/demo.yaml

Paid captioners (gemini, gemini-batch, openai) read their key from the environment variable that the config names, and ask within `budget_usd`: `--plan`
says before what each tier may cost. Status 2: a mistake in the config, or the captioner stopped the job (key, quota, spend cap, policy); 0: also where
images wait because the budget is used up.

The demo's captioner is `tags`: it composes short and medium captions from tags, alt text, rating, style class and the text that a detector read,
says nothing else, and names itself in every row. An image of which nothing is known gets the reject `nothing_known`, and is pending again when
something else is known of it; one that could not be read, when it has another source. Cost of `tags`: a join of narrow tables, under a CPU-millisecond
an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.captions import Tier
from conf.section import Mistake
from conf.settings import Settings, load_prompt
from jobs import (
    caption_batch,
    caption_ledger,
    caption_local,
    caption_paid,
    caption_plan,
    caption_rejects,
    caption_rows,
    caption_sample,
    caption_tiers,
    command,
    embedding,
    progress,
    rejects,
    shared_captions,
    waves,
)
from jobs.caption_rows import NAME
from jobs.lake import Lake
from jobs.waves import Projection, Stage
from udfs import caption_offline, caption_row, token_count
from udfs.reject import CODES


def run(lake: Lake, settings: Settings, plan_only: bool = False) -> None:
    check(settings)
    if plan_only:
        tell_plan(lake, settings)
        return
    caption_tiers.demand(lake, settings)
    for tiers in caption_tiers.rounds(settings):
        with waves.stage(lake, NAME, settings, tables(lake, settings)) as stage:
            if _run(stage, settings, tiers) > 0:
                tell_landed(lake, stage.run_id)
    tell_that_flags_lack(lake, settings)


def _run(stage: Stage, settings: Settings, tiers: Sequence[Tier]) -> int:
    """-> how many waves were landed."""
    lake, (free, paid) = stage.lake, split(settings, tiers)
    pairs = _pairs(stage, settings, tiers)
    number = 0
    if free:
        pending = _asked(lake, settings, pairs).where(F.col("tier").isin(free))
        plan = stage.plan(*ordered(lake, settings, pending, tiers))
        if plan.rows or not paid:
            stage.run(plan, lambda inputs: compute(inputs, settings, tiers))
        number = max(plan.waves, default=-1) + 1
    for tier in paid:
        asks = caption_batch if engine_of(settings, tier) in caption_batch.ENGINES else caption_paid
        pending = _asked(lake, settings, pairs)  # anew: what the last one was told is prohibited is shown to no other
        number = asks.run(stage, settings, tier, pending.where(F.col("tier") == tier.name), number)
    if pairs is not None:
        led = shared_captions.led(lake, settings, caption_tiers.pending(lake, settings), pairs)
        copied = stage.freeze(shared_captions.staged(lake, settings, led), "shared")
        if (count := copied.count()) > 0:
            stage.run_whole(copied, number)
            number += 1
            print(f"{NAME}: {count} near-duplicates got the captions of the image that leads them", flush=True)
    return number


def tell_landed(lake: Lake, run: str) -> None:
    """Prints how many images a run has captioned, and of the others why not."""
    mine = F.col("run") == run
    captioned = lake.read("captions").where(mine).select("image_id").distinct().count()
    refused = lake.read("rejects").where(mine).groupBy("code").count().orderBy("code").collect()
    told = ", ".join(f"{row['count']} {row['code']}" for row in refused)
    print(f"{NAME}: {captioned} images have captions of this run" + (f"; rejects: {told}" if told else ""), flush=True)


def _pairs(stage: Stage, settings: Settings, tiers: Sequence[Tier]) -> DataFrame | None:
    """-> which images are near each other, found once a run; None where captions are not shared: by the config, and of a comparison."""
    if tiers != settings.captions.tiers or not shared_captions.tiers(settings):
        return None
    return stage.freeze(shared_captions.pairs(stage.lake, settings), "pairs")


def _asked(lake: Lake, settings: Settings, pairs: DataFrame | None) -> DataFrame:
    """-> (image_id, tier) of those that are pending and get no other image's captions."""
    pending = caption_tiers.pending(lake, settings)
    if pairs is None:
        return pending
    return pending.join(shared_captions.led(lake, settings, pending, pairs), ["image_id", "tier"], "left_anti")


def split(settings: Settings, tiers: Sequence[Tier]) -> tuple[list[str], list[Tier]]:
    """-> (names of the tiers that cost nothing, the paid tiers)."""
    paid = [tier for tier in tiers if engine_of(settings, tier) in (*caption_paid.ENGINES, *caption_batch.ENGINES)]
    return [tier.name for tier in tiers if tier not in paid], paid


def ordered(lake: Lake, settings: Settings, pending: DataFrame, tiers: Sequence[Tier]) -> tuple[DataFrame, Sequence[str]]:
    """(image_id, tier) of free tiers -> with what is known of them, and the order to take them in: that of the bytes, where they are read."""
    rows = caption_rows.about(lake, settings, pending)
    if not any(engine_of(settings, tier) in caption_local.ENGINES for tier in tiers):
        return rows, ["image_id", "tier"]
    return embedding.placed(lake, rows, settings), embedding.ORDER


def engine_of(settings: Settings, tier: Tier) -> str:
    return settings.captions.captioners[tier.captioner].engine


def tell_plan(lake: Lake, settings: Settings) -> None:
    """Prints images, and of paid tiers tokens and money, before anything is sent."""
    pairs = shared_captions.pairs(lake, settings) if shared_captions.tiers(settings) else None
    pending, tiers = _asked(lake, settings, pairs), caption_tiers.tiers(settings)
    counts = {row["tier"]: row["count"] for row in pending.groupBy("tier").count().collect()}
    free, paid = split(settings, tiers)
    whole = 0
    for tier in tiers:
        if tier.name in free:
            engine = engine_of(settings, tier)
            print(f"{NAME}: tier {tier.name}: {counts.get(tier.name, 0)} images by {tier.captioner} ({engine}): nothing to pay")
        else:
            mine = pending.where(F.col("tier") == tier.name)
            lines, nano = caption_plan.lines(lake, settings, tier, mine, caption_paid.task_attempts(lake))
            whole += nano
            print("\n".join(f"{NAME}: {line}" for line in lines))
    if paid:
        budget = settings.captions.budget_usd
        print(f"{NAME}: expected in all {caption_plan.usd(whole)}; budget_usd {budget}, of which {caption_ledger.told_spent(lake)}")
    if (rows := sum(counts.get(name, 0) for name in free)) or not paid:
        print(progress.estimate(lake, NAME, rows) + (" (the paid tiers are not in it)" if paid else ""))
    tell_that_flags_lack(lake, settings)


def tell_that_flags_lack(lake: Lake, settings: Settings) -> None:
    """Says how many images wait for the stage `flag`: among them are those that a detector has refused for good, and that wait for ever."""
    if not settings.embed.detectors:
        return
    fingerprints = {caption_rows.fingerprint(settings, tier) for tier in caption_tiers.tiers(settings)}
    captioned = lake.read("captions").where(F.col("fingerprint").isin(*sorted(fingerprints)))
    rows = caption_sample.images(lake).join(caption_rows.flags(lake, settings), "image_id", "left_anti")
    if (count := rows.join(captioned, "image_id", "left_anti").count()) > 0:
        print(f"{NAME}: {count} images wait for flags: run flag; what a detector refused for good, the table rejects says", flush=True)


def check(settings: Settings) -> None:
    """Raises Mistake for a tokenizer or a model that is not there, or is another, or one to be paid that has no price."""
    try:
        token_count.load(settings.captions.tokenizer, settings.captions.tokenizer_sha256)
    except ValueError as error:
        raise Mistake(f"captions.{error}") from None
    for name, one in settings.captions.captioners.items():
        if one.engine in caption_local.ENGINES and name in {tier.captioner for tier in caption_tiers.tiers(settings)}:
            caption_local.check(one)
    for tier in split(settings, caption_tiers.tiers(settings))[1]:
        caption_plan.bill(settings, tier, 0)  # of all before the first is paid for


def compute(inputs: DataFrame, settings: Settings, tiers: Sequence[Tier]) -> DataFrame:
    """(image_id, tier, caption_rows.ABOUT, and addresses where a tier reads bytes) -> staged rows of the free ones of the tiers."""
    free, _ = split(settings, tiers)
    return reduce(
        DataFrame.unionByName, [_of_tier(inputs.where(F.col("tier") == tier.name), settings, tier) for tier in tiers if tier.name in free]
    )


def _of_tier(inputs: DataFrame, settings: Settings, tier: Tier) -> DataFrame:
    if engine_of(settings, tier) in caption_local.ENGINES:
        return caption_local.compute(inputs, settings, tier)
    prompt, options = load_prompt(settings.captions.prompt), settings.captions
    tokenizer = (options.tokenizer, options.tokenizer_sha256)
    worker = partial(caption_offline.caption, rules=caption_rows.rules_of(prompt), asked=tier.parts, tokenizer=tokenizer)
    rows = inputs.withColumn("tried", caption_rejects.told()).select("image_id", "tried", *caption_rows.ABOUT)
    rows = rows.mapInPandas(worker, caption_row.SCHEMA)
    return rows.withColumns(caption_rows.told(settings, tier))


def tables(lake: Lake, settings: Settings) -> dict[str, Projection]:
    def rejects_of(staged: DataFrame, run: str) -> DataFrame | None:
        named = F.col("code").isin(*CODES)
        detail = F.when(named, F.coalesce("detail", F.lit(""))).otherwise(F.concat_ws(": ", "code", "detail"))
        reject = F.struct(F.when(named, F.col("code")).otherwise("not_captioned").alias("code"), detail.alias("detail"), "transient")
        refused = staged.withColumn("reject", F.when(F.col("state") == caption_row.FAILED, reject))
        if "tried" not in refused.columns:  # a wave that an older version had staged
            refused = refused.withColumn("tried", F.lit(None).cast("string"))
        refused = refused.withColumn("fingerprint", caption_rejects.fingerprint(F.col("reject.code")))
        return rejects.of_images(lake, refused, NAME, run, settings.waves.attempts)

    def captions_of(staged: DataFrame, run: str) -> DataFrame:
        by = ("image_id", "fingerprint", "language", "tokenizer", "engine", "model", "prompt", "tier")
        rows = staged.select(*by, F.explode("texts").alias("one")).select(*by, "one.kind", "one.part", "one.text", "one.tokens", "one.key")
        return rows.withColumnRenamed("key", "request").withColumns({"language": F.coalesce("language", F.lit("und")), "run": F.lit(run)})

    return {"rejects": rejects_of, "captions": captions_of}


if __name__ == "__main__":
    command.main(__doc__, run)
