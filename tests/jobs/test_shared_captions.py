"""Near-duplicates get the captions of one of them, and nobody pays for the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from pyspark.sql import functions as F

from conf.settings import Settings
from jobs import caption, embed, ingest
from jobs.lake import Lake
from tests.jobs.conftest import MakeSettings
from tests.servers.gemini_server import GeminiServer

IMAGES, COPIES = 12, 3


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
