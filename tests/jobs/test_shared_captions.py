"""Near-duplicates get the captions of one of them, and nobody pays for the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyspark.sql import functions as F

from conf.settings import Settings
from jobs import caption, caption_rows, embed, ingest, rejects, shared_captions
from jobs.lake import Lake
from tests.jobs.conftest import MakeSettings
from tests.servers.gemini_server import GeminiServer

IMAGES, COPIES = 12, 3


@pytest.mark.proof
def test_a_picture_that_is_there_in_several_encodings_is_bought_once(
    images: Path, make_settings: MakeSettings, make_lake: Callable[[Settings], Lake]
) -> None:
    for number in range(IMAGES):  # pictures with details: a hash of nearly nothing is chance
        coarse = np.random.default_rng(number).integers(0, 256, (16, 24, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((192, 128), Image.Resampling.BICUBIC).save(images / f"part-{number % 2}/{number:02d}.png")
    for number in range(COPIES):
        with Image.open(images / f"part-{number % 2}/{number:02d}.png") as one:
            one.save(images / f"copy-{number}.jpg", quality=92)
            one.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(images / f"mirror-{number}.png")
    with GeminiServer({}) as server:
        flash = {"engine": "gemini", "model": "gemini-3.8-flash", "key": {"environment": "HOME"}, "base_url": server.url}
        flash |= {"media_resolution": "low", "in_flight": 4, "max_output_tokens": 2048, "timeout_seconds": 5.0}
        told = {"budget_usd": 5.0, "share": "near", "captioners": {"flash": flash}, "tiers": [{"name": "all", "captioner": "flash"}]}
        settings = make_settings(captions=told)
        lake = make_lake(settings)
        for stage in (ingest, embed, caption):
            stage.run(lake, settings)
        assert server.counts()["requests"] == IMAGES + COPIES  # a mirrored picture is another: left is right in its caption
        names = lake.read("sources").select("image_id", F.regexp_extract("key", r"(\w+-\d)\.jpg|(\d\d)\.png", 0).alias("name"))
        rows = lake.read("captions").join(names, "image_id").select("name", "kind", "part", "text", "request").collect()
        texts = {name: {tuple(row[1:]) for row in rows if row["name"] == name} for name in {row["name"] for row in rows}}
        for number in range(COPIES):
            assert texts[f"copy-{number}.jpg"] == texts[f"{number:02d}.png"] != set()
        assert lake.read("captions").select("image_id").distinct().count() == IMAGES + 2 * COPIES
        version = lake.version("captions")
        caption.run(lake, settings)
        assert server.counts()["requests"] == IMAGES + COPIES and lake.version("captions") == version

        # one that may not be captioned any more leads nobody
        reject = F.struct(F.lit("prohibited").alias("code"), F.lit("").alias("detail"), F.lit(False).alias("transient")).alias("reject")
        one = names.where("name = 'copy-0.jpg'").select("image_id", F.lit("f").alias("fingerprint"), reject)
        refused = rejects.of_images(lake, one, "caption", "test", 1)
        assert refused is not None
        lake.append("rejects", refused, "test", 0)
        assert shared_captions.pairs(lake, settings).count() == COPIES - 1


def test_an_image_is_led_by_one_that_has_captions_of_its_tier_or_will_have_them_and_by_no_other(
    make_settings: MakeSettings, make_lake: Callable[[Settings], Lake]
) -> None:
    flash = {"engine": "gemini", "model": "gemini-3.8-flash", "key": {"environment": "HOME"}}
    tiers = [{"name": name, "captioner": name} for name in ("flash", "other", "tags")]
    captioners = {"flash": flash, "other": flash | {"model": "gemini-9"}, "tags": {"engine": "tags"}}
    settings = make_settings(captions={"share": "near", "captioners": captioners, "tiers": tiers})
    lake = make_lake(settings)
    assert [tier.name for tier in shared_captions.tiers(settings)] == ["flash", "other"]

    def ids(*pairs: tuple[int, int]) -> list[tuple[bytes, bytes]]:
        return [(bytes([one]) * 32, bytes([other]) * 32) for one, other in pairs]

    # 1 and 2 are pending, 3 is near 2 alone; 4 is captioned in another tier; 6 has the tier's captions, 5 is near it; 7 is nowhere
    near = ids((2, 1), (3, 2), (14, 4), (6, 5), (15, 5), (15, 6), (17, 7), (22, 21))
    asked = {"flash": [1, 2, 3, 14, 5, 15, 17], "tags": [21, 22]}
    pending = [(bytes([number]) * 32, tier) for tier, numbers in asked.items() for number in numbers]
    whose = {tier.name: caption_rows.fingerprint(settings, tier) for tier in settings.captions.tiers}
    columns = "image_id BINARY, fingerprint STRING"
    have = lake.spark.createDataFrame([(bytes([4]) * 32, whose["other"]), (bytes([6]) * 32, whose["flash"])], columns)
    lacking = {field.name: F.lit(None).cast(field.dataType) for field in lake.read("captions").schema if field.name not in have.columns}
    said = {
        name: F.lit("short") for name in ("kind", "text", "language", "tokenizer", "engine", "model", "prompt", "tier", "request", "run")
    }
    lake.append("captions", have.withColumns(lacking | said | {"part": F.lit(0), "tokens": F.lit(1)}), "test", 0)
    rows = shared_captions.led(
        lake,
        settings,
        lake.spark.createDataFrame(pending, "image_id BINARY, tier STRING"),
        lake.spark.createDataFrame(near, "image_id BINARY, leader BINARY"),
    ).collect()
    assert {(row["image_id"][0], row["leader"][0], row["tier"]) for row in rows} == {(2, 1, "flash"), (5, 6, "flash"), (15, 6, "flash")}
