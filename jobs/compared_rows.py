"""The tables -> what captioners made of the images of the sample, on the driver; and who of them was asked about enough of it to be compared."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any, NamedTuple

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.captions import COMPARED
from conf.section import Mistake
from conf.settings import Settings
from jobs import caption_rejects, caption_rows, caption_sample
from jobs.lake import Lake
from udfs.compare_captioners import NOT_SHOWN, Given, Said

MOST = 5_000  # images of the sample that are compared: their texts are a few KB each
PROHIBITED = "prohibited"
Dicts = list[dict[str, Any]]
TOKENS = {"input_tokens": ("prompt_tokens", "image_tokens"), "output_tokens": ("output_tokens", "thought_tokens")}


class Rows(NamedTuple):
    """Of the sample's images, ids in hex. given: tags, read; texts: a row a text; refusals: a row a reject for good that is the
    captioner's own; calls: their sums, a row an image and captioner.
    """

    given: Dicts
    texts: Dicts
    refusals: Dicts
    calls: Dicts

    @property
    def content(self) -> str:
        """sha256 of all of it."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()


class Asked(NamedTuple):
    """names: fingerprint -> short name, of those that are compared; left_out: short name -> images of the sample that it was asked about;
    images: those that all compared were asked about, or one of them called prohibited, so that the later ones were not: in hex; sample: how many
    there are in it.
    """

    names: dict[str, str]
    left_out: dict[str, int]
    images: list[str]
    sample: int


def gather(lake: Lake, settings: Settings) -> Rows:
    """The sample (MOST images of it at most), and what any captioner made of it. A captioner's reject counts where it is for good and holds, is
    its answer, and no text came since: what will be tried again is not known yet.
    """
    order = F.xxhash64(F.lit(settings.compare_captioners.seed), "image_id")
    sample = caption_sample.sample(lake, settings).orderBy(order, "image_id").limit(MOST)

    def of(table: str, condition: str = "true") -> DataFrame:
        return lake.read(table).where(condition).join(sample, "image_id", "left_semi")

    keys = ["image_id", "fingerprint"]
    given = caption_rows.about(lake, settings, sample).select("image_id", "tags", F.concat_ws("\n", "regions").alias("read"))
    texts = of("captions").select(*keys, "kind", "part", "text", "tokens", "tokenizer")
    why = F.when(F.col("code") == "not_captioned", F.split_part("detail", F.lit(":"), F.lit(1))).otherwise(F.col("code"))
    refused = (
        caption_rejects.standing(lake, settings, F.col("code").isin(*caption_rejects.ANSWERS), sample)
        .groupBy(*keys)
        .agg(F.max_by(why, "attempts").alias("code"))
    )
    sums = [F.sum(F.coalesce(one, F.lit(0)) + F.coalesce(other, F.lit(0))).alias(name) for name, (one, other) in TOKENS.items()]
    calls = of("caption_calls").groupBy(*keys).agg(F.count("*").alias("calls"), *sums, F.sum("nano_usd").alias("nano_usd"))
    return Rows(_listed(given, ["image_id"]), _listed(texts, [*keys, "kind", "part"]), _listed(refused, keys), _listed(calls, keys))


def who(settings: Settings, rows: Rows) -> Asked:
    """-> who is compared, on which images. Raises Mistake where there are not two."""
    asked = {(row["fingerprint"], row["image_id"]) for row in (*rows.texts, *rows.refusals)}
    counts = dict(sorted(Counter(fingerprint for fingerprint, _ in asked).items()))
    names, covers = short_names(settings, list(counts)), settings.compare_captioners.covers
    banned = {(row["fingerprint"], row["image_id"]) for row in rows.refusals if row["code"] == PROHIBITED}
    hidden = {image for _, image in banned}  # from everybody who was not asked about it before

    def enough(one: str) -> bool:
        return counts[one] >= covers * sum(row["image_id"] not in hidden or (one, row["image_id"]) in asked for row in rows.given)

    compared = {one: names[one] for one in sorted(counts, key=lambda one: names[one]) if enough(one)}
    if len(compared) < 2:
        told = ", ".join(f"{names[one]} ({count})" for one, count in counts.items()) or "nobody"
        raise Mistake(
            f"compare_captioners: of the sample's {len(rows.given)} images were asked: {told}; two captioners must have been asked about {covers:.0%} "
            "of them: name them in compare_captioners.captioners and run the stage caption"
        )
    every = [row["image_id"] for row in rows.given]
    images = [image for image in every if any((one, image) in banned for one in compared) or all((one, image) in asked for one in compared)]
    if not images:
        raise Mistake(f"compare_captioners: no image was asked of all of {list(compared.values())}; run the stage caption to its end")
    return Asked(compared, {names[one]: count for one, count in counts.items() if one not in compared}, images, len(rows.given))


def for_kernel(rows: Rows, asked: Asked) -> tuple[list[Given], dict[str, list[Said]]]:
    """-> the images and, by short name, what each captioner said of them; NOT_SHOWN where it has neither text nor reject."""
    given = {row["image_id"]: row for row in rows.given}
    texts: dict[tuple[str, str], dict[str, list[str]]] = {}
    tokens: dict[tuple[str, str], dict[str, list[int]]] = {}
    for row in rows.texts:  # in the order of the parts
        key = (row["fingerprint"], row["image_id"])
        texts.setdefault(key, {}).setdefault(row["kind"], []).append(row["text"])
        tokens.setdefault(key, {}).setdefault(row["kind"], []).append(row["tokens"])
    codes = {(row["fingerprint"], row["image_id"]): row["code"] for row in rows.refusals}
    paid = {(row["fingerprint"], row["image_id"]): row for row in rows.calls}

    def said(key: tuple[str, str]) -> Said:
        spent = [paid[key][name] if key in paid else 0 for name in ("calls", *TOKENS, "nano_usd")]
        return Said(texts.get(key, {}), tokens.get(key, {}), "" if key in texts else codes.get(key, NOT_SHOWN), *spent)

    images = [Given(bytes.fromhex(one), given[one]["tags"], given[one]["read"]) for one in asked.images]
    return images, {name: [said((fingerprint, one)) for one in asked.images] for fingerprint, name in asked.names.items()}


def short_names(settings: Settings, fingerprints: list[str]) -> dict[str, str]:
    """Fingerprints -> what they are called: a captioner of the config by its name there (with its tier's, where it is asked for other parts there),
    another by model (or engine), prompt and six digits.
    """
    names: dict[str, str] = {}
    for tier in (*caption_sample.tiers(settings), *settings.captions.tiers):
        whole = f"{tier.captioner}/{tier.name.removeprefix(COMPARED)}"
        names.setdefault(caption_rows.fingerprint(settings, tier), whole if tier.captioner in names.values() else tier.captioner)
    for one in fingerprints:
        engine, _, rest = one.partition(":")
        model, prompt, told = rest.rsplit(":", 2)
        names.setdefault(one, f"{engine if model == 'none' else model}/{prompt}/{told[:6]}")
    return {one: names[one] for one in fingerprints}


def _listed(rows: DataFrame, order: list[str]) -> Dicts:
    found = rows.withColumn("image_id", F.lower(F.hex("image_id"))).collect()
    return sorted((row.asDict(True) for row in found), key=lambda row: [row[name] for name in order])
