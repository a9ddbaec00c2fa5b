"""What captions of a tier may cost at worst, and are expected to: known before anything is sent, and compared with the ledger afterwards.

Worst is arithmetic over bounds (udfs/caption_work.bounds). Expected is the mean of what the ledger says of the tier's fingerprint, once it knows
PILOT images; before that a rule of thumb: 4 bytes of text a token [ai.google.dev, "Understand and count tokens"], the price list's tokens of an
image, and an answer as long as the middle of the prompt's bands.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.captions import Captioner, Tier
from conf.section import Mistake
from conf.settings import Settings, load_prices, load_prompt
from jobs import caption_rows
from jobs.lake import Lake
from jobs.progress import duration
from udfs import caption_budget, caption_request, caption_work
from udfs.caption_budget import Price

PILOT = 20  # images of the ledger
BYTES_A_TOKEN = 4
CHARACTER = 4  # bytes in UTF-8, at most
TAG_TOKENS, REGION_TOKENS, JSON_TOKENS = 4, 8, 60  # of an answer: a tag, a region of text, keys and quotes
TAGS, REGIONS = 20, 1  # of an image, about


class Notes(NamedTuple):
    """Bytes of the tags and the alt text that are sent of an image."""

    mean: float
    longest: int


class Bill(NamedTuple):
    """What a tier's calls may cost, in nano-dollars. worst: of a call; row: of a row in one attempt of its task, in Batch mode in all of its rounds."""

    price: Price
    image_tokens: int
    worst: int
    row: int


class Expected(NamedTuple):
    """Of one image, in the mean: calls, tokens (text and picture sent, answered, thought), nano-dollars. known_by: where it is from."""

    calls: float
    prompt: float
    image: float
    output: float
    thoughts: float
    nano: float
    known_by: str


def notes(rows: DataFrame) -> Notes:
    """Rows with tags and alt_text -> bytes of what is sent of them, at most: caption_request cuts both, and a character has no more than CHARACTER."""

    def sent(text: Column, characters: int) -> Column:
        return F.least(F.octet_length(text), F.lit(CHARACTER * characters))

    tags = F.slice("tags", 1, caption_request.TAGS)
    of_tags = F.aggregate(tags, F.lit(0), lambda sum_, tag: sum_ + sent(tag, caption_request.TAG))
    each = sent(F.col("alt_text"), caption_request.NOTE) + F.coalesce(of_tags, F.lit(0))
    found = rows.agg(F.mean(each).alias("mean"), F.max(each).alias("longest")).first()
    assert found is not None
    return Notes(float(found["mean"] or 0), int(found["longest"] or 0))


def bill(settings: Settings, tier: Tier, longest: int) -> Bill:
    """longest: Notes.longest. Raises Mistake for a model without a price, or without the tokens of an image."""
    one, prices = settings.captions.captioners[tier.captioner], load_prices(settings.captions.prices)
    model = caption_rows.name_of(one)
    if model not in prices.models:
        raise Mistake(
            f"captions: tier {tier.name}: no price of {model!r}, its captioner {tier.captioner}'s model, in captions.prices ({settings.captions.prices}, "
            f"of {prices.date}); it has {sorted(prices.models)}. Give captions.prices a file with it"
        )
    resolution = one.media_resolution or "high"
    known = [tokens for prefix, tokens in prices.image_tokens.items() if model.startswith(prefix)]
    if not known or resolution not in known[0]:
        raise Mistake(
            f"captions: tier {tier.name}: image_tokens in captions.prices ({settings.captions.prices}) say nothing of {model!r} at "
            f"media_resolution {resolution}"
        )
    listed = prices.models[model]
    share = Decimal(str(listed.batch if one.engine == "gemini-batch" else 1))
    price = caption_budget.price({"input": Decimal(str(listed.input)) * share, "output": Decimal(str(listed.output)) * share})
    worst = caption_budget.worst(price, caption_work.bounds(caption_rows.of_worker(settings, tier), longest, known[0][resolution]))
    row = worst * one.batch.rounds if one.engine == "gemini-batch" else caption_budget.row_worst(worst, one.tries, one.repairs)
    return Bill(price, known[0][resolution], worst, row)


def expected(lake: Lake, settings: Settings, tier: Tier, told: Bill, notes: Notes) -> Expected:
    """-> what one more image of the tier is expected to cost."""
    mine = F.col("fingerprint") == caption_rows.fingerprint(settings, tier)
    sums = {name: F.coalesce(F.sum(f"{name}_tokens"), F.lit(0)) for name in ("prompt", "image", "output", "thought")}
    found = (
        lake.read("caption_calls")
        .where(mine)
        .agg(
            F.count_distinct("image_id").alias("images"),
            F.count("*").alias("calls"),
            *[column.alias(name) for name, column in sums.items()],
        )
    )
    row = found.first()
    assert row is not None
    if row["images"] >= PILOT:
        images = row["images"]
        prompt, image, output, thoughts = (row[name] / images for name in sums)
        return _of(row["calls"] / images, prompt, image, output, thoughts, told.price, f"the ledger's {images:,} images")
    text = (caption_work.words(caption_rows.of_worker(settings, tier)) + notes.mean) / BYTES_A_TOKEN
    bands = load_prompt(settings.captions.prompt).bands
    output = sum(_middle(bands, part) for part in tier.parts) + JSON_TOKENS
    return _of(1.0, text, told.image_tokens, output, 0.0, told.price, "rule of thumb: no pilot of this tier is in the ledger")


def _of(calls: float, prompt: float, image: float, output: float, thoughts: float, price: Price, known_by: str) -> Expected:
    nano = ((prompt + image) * price.input + (output + thoughts) * price.output) / caption_budget.MILLION
    return Expected(calls, prompt, image, output, thoughts, nano, known_by)


def _middle(bands: Mapping[Any, tuple[int, int]], part: str) -> float:
    """-> tokens of a part."""
    if part in bands:
        return sum(bands[part]) / 2
    return TAGS * TAG_TOKENS if part == "tags" else REGIONS * REGION_TOKENS


def lines(lake: Lake, settings: Settings, tier: Tier, pending: DataFrame, attempts: int) -> tuple[list[str], int]:
    """(image_id, tier), how often Spark tries a task -> what is told of a paid tier before anything is sent, and the nano-dollars that it is expected
    to cost.
    """
    rows, one = caption_rows.about(lake, settings, pending), settings.captions.captioners[tier.captioner]
    images = rows.count()
    if images == 0:
        return [f"tier {tier.name}: 0 images by {tier.captioner} ({one.engine})"], 0
    known = notes(rows)
    told = bill(settings, tier, known.longest)
    each = expected(lake, settings, tier, told, known)
    once, whole = usd(images * told.worst), usd(images * told.row)
    resolution = f", media_resolution {one.media_resolution}" if one.media_resolution else ""
    return [
        f"tier {tier.name}: {images} images by {tier.captioner} ({one.engine}, {caption_rows.name_of(one)}{resolution})",
        f"  an image: {each.calls:.2f} calls, tokens: {each.prompt:.0f} of text, {each.image:.0f} of the picture, {each.output:.0f} answered, "
        f"{each.thoughts:.0f} thought ({each.known_by})",
        f"  answered: {_mix(lake, settings, tier)}",
        f"  expected {usd(round(images * each.nano))}: at most {once} with one call an image, {whole} with every try, repair or round",
        f"  budget that must be left: {usd(told.row * attempts)} for one image, {usd(images * told.row * attempts)} for all at once (the worst, times "
        f"{attempts} tries of a task; what is not spent returns)",
        f"  {_time(one, images, each.calls)}",
    ], round(images * each.nano)


def _time(one: Captioner, images: int, calls: float) -> str:
    """-> how long, as far as the config knows it."""
    if one.engine == "gemini-batch":
        return "the service answers a round within a day; most end sooner"
    if one.requests_per_minute is None:
        return "how long is the service's word: the config names no requests_per_minute"
    return f"no less than {duration(60 * images * calls / one.requests_per_minute)} at {one.requests_per_minute} requests_per_minute"


def _mix(lake: Lake, settings: Settings, tier: Tier) -> str:
    """-> tokens of each part an image, by the tokenizer of the config."""
    mine = lake.read("captions").where(F.col("fingerprint") == caption_rows.fingerprint(settings, tier))
    found = mine.groupBy("kind").agg(F.sum("tokens").alias("tokens"), F.count_distinct("image_id").alias("images")).collect()
    if max((row["images"] for row in found), default=0) >= PILOT:
        whole = max(row["images"] for row in found)
        told = {row["kind"]: row["tokens"] / whole for row in found}
    else:
        told = {part: _middle(load_prompt(settings.captions.prompt).bands, part) for part in tier.parts}
    total = sum(told.values())
    mix = ", ".join(f"{part} {told[part]:.0f} ({told[part] / total:.0%})" for part in tier.parts if part in told)
    return f"{mix}; keys and quotes come to it"


def compared(tier: Tier, each: Expected, images: int, spent: int) -> str:
    """What was expected of `images` and what the ledger counts, in nano-dollars -> one line."""
    thought = each.nano * images
    return (
        f"tier {tier.name}: expected {usd(round(thought))} for {images} images ({each.known_by}), the ledger says {usd(spent)} "
        f"({spent / thought - 1:+.1%})"
        if thought
        else f"tier {tier.name}: the ledger says {usd(spent)}"
    )


def narrow(tier: Tier, many: int, most: int) -> str:
    """What is told where the budget makes waves of fewer images than the config allows."""
    return f"tier {tier.name}: {many} images at once, where {most} may be: so many can be paid at their worst; a larger budget_usd makes larger waves"


def usd(nano: int) -> str:
    return f"{nano / caption_budget.NANO:.4f} USD"
