"""Images of a tier whose model the workers run themselves -> staged captions, on the device that Spark assigned to a task."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf import captions
from conf.section import Mistake
from conf.settings import Settings
from jobs import caption_rows, devices
from udfs import caption_local, caption_row, caption_work

ENGINES = ("internvl",)
COLUMNS = ("image_id", "tried", "addresses", "tags", "alt_text")


def check(captioner: captions.Captioner) -> None:
    """Raises Mistake for a folder that is not there; on a cluster only its workers can tell."""
    assert captioner.local is not None
    if captioner.local.device == "cpu" and not Path(captioner.local.folder).is_dir():
        raise Mistake(f"captions: local.folder: given {captioner.local.folder}, which is no folder here; expected transformers' -hf layout")


def compute(inputs: DataFrame, settings: Settings, tier: captions.Tier) -> DataFrame:
    """(image_id, tier, caption_rows.ABOUT, tried, addresses) -> staged rows, by the GPU pandas UDF."""
    one = settings.captions.captioners[tier.captioner]
    assert one.local is not None
    worker = partial(on_worker, device=one.local.device, tier=caption_rows.of_worker(settings, tier))
    rows = inputs.select(*COLUMNS).withColumn("known", F.lit(None).cast("string")).mapInPandas(worker, caption_row.SCHEMA)
    return rows.withColumns(caption_rows.told(settings, tier))


def on_worker(frames: Iterator[pd.DataFrame], device: str, tier: caption_work.Tier) -> Iterator[pd.DataFrame]:
    """Runs the kernel on the device that Spark assigned to this task."""
    return caption_local.caption(frames, tier, devices.of_task(device, "local.device of a captioner").name)
