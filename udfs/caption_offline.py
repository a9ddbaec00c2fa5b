"""What is known of images -> staged rows of captions composed from it: the engine `tags` for a whole partition. No model, no network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from udfs import caption_answer, caption_row, caption_tags, token_count
from udfs.caption_answer import Rules
from udfs.caption_request import Request
from udfs.caption_tags import Known
from udfs.reject import Reject


def caption(
    frames: Iterator[pd.DataFrame], rules: Rules, asked: Sequence[str], tokenizer: tuple[str, str | None]
) -> Iterator[pd.DataFrame]:
    """(image_id, tried, tags, alt_text, rating, style, regions) -> caption_row.SCHEMA, a row an image. asked: the parts of the tier."""
    counter = token_count.load(*tokenizer)
    for frame in frames:
        rows = [_caption(row, rules, asked, counter) for row in frame.to_dict("records")]
        yield pd.DataFrame(caption_row.counted(rows, counter.count), columns=caption_row.COLUMNS)


def _caption(row: Mapping[Any, Any], rules: Rules, asked: Sequence[str], counter: token_count.Counter) -> dict[str, Any]:
    known = Known(list(row["tags"]), row["alt_text"], row["style"], row["rating"], list(row["regions"]))
    key = hashlib.sha256(json.dumps(["tags", caption_tags.KERNEL_VERSION, row["image_id"].hex(), known]).encode()).hexdigest()
    wanted = [part for part in caption_tags.PARTS if part in asked or part == "language"]
    try:
        text = caption_tags.answer(known, rules, counter.count)
    except Reject as reject:
        return caption_row.failed(row, key, reject.code, reject.detail, reject.transient, calls=0)
    checked = caption_answer.check(text, rules, counter.count, tags=known.tags, asked=[part for part in wanted if part in json.loads(text)])
    request = Request(key, bytes(row["image_id"]), "", "", {}, {}, noted=False)
    return caption_row.answered(row, [caption_row.Answer(request, checked, suspect=False)], calls=0)
