"""Journals of paid waves -> their calls as rows, as the table caption_calls and `known` of jobs/caption_ledger.py want them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.lake import Lake, hadoop
from udfs import caption_record


def rows(lake: Lake, about: Mapping[str, str], run: str, number: int, place: str) -> DataFrame:
    """The journal of a wave (its run and number; what it is; its URI) -> rows of caption_calls."""
    calls = records(lake, [hadoop(place)])
    told: dict[str, Any] = {name: F.lit(value) for name, value in about.items()}
    told |= {
        "request": F.col("key"),
        "image_id": F.unhex("image_id"),
        "attempt": F.concat(F.lit(f"{run}/{number:06d}/"), "part"),
        "estimated": F.coalesce("usage.estimated", F.lit(False)),
        "seconds": F.col("seconds").cast("float"),
        "run": F.lit(run),
    }
    tokens = {"prompt_tokens": "prompt", "image_tokens": "image", "output_tokens": "output", "thought_tokens": "thoughts"}
    return calls.withColumns(told | {name: F.col(f"usage.{field}").cast("bigint") for name, field in tokens.items()})


def records(lake: Lake, places: list[str]) -> DataFrame:
    """Folders of waves, each with an answer part -> their records, and `part`: partition/attempt. A call that the parts of two attempts hold is two rows."""
    parts = [f"{place}/*/*-answers.jsonl" for place in places]
    found = lake.spark.read.schema(caption_record.RECORD_SCHEMA).json(parts).where(F.col("key").isNotNull())
    name = F.regexp_extract(F.input_file_name(), r"(\d{6,})/(\d{3,})-\d{6,}-answers\.jsonl", 0)
    part = F.concat_ws("/", F.regexp_extract(name, r"^(\d+)/", 1), F.regexp_extract(name, r"/(\d+)-", 1))
    return found.withColumn("part", part)
