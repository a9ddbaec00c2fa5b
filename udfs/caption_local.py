"""Rows -> staged rows of captions by a model that the worker runs itself: the engine `internvl` for a whole partition. No network, nothing to pay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, cast

import pandas as pd

from udfs import addresses, caption_row, caption_work, internvl, token_count
from udfs.ahead import ahead
from udfs.caption_request import Request
from udfs.caption_row import Row, Work
from udfs.caption_work import Tier
from udfs.opener import Opener
from udfs.reject import Reject


def caption(frames: Iterator[pd.DataFrame], tier: Tier, device: str) -> Iterator[pd.DataFrame]:
    """(image_id, tried, addresses, tags, alt_text, known: None) -> caption_row.SCHEMA, a row an image, in chunks of `captioner.local.chunk`.

    device: "cpu" or "cuda:N". An answer that is refused is asked for once more where `repairs` is 1. Raises ValueError when the model is not there.
    """
    local, work, opener = tier.captioner["local"], caption_work.work(tier), Opener(tier.stores)
    how = internvl.How(
        folder=local["folder"],
        sha256=local["sha256"],
        device=device,
        precision=local["precision"],
        min_tiles=local["min_tiles"],
        max_tiles=local["max_tiles"],
        most_output=tier.captioner["max_output_tokens"],
        batch_tiles=local["batch_tiles"],
        threads=local["threads"],
    )
    count = token_count.load(*tier.tokenizer).count

    def read(row: Row) -> tuple[Row, bytes | Reject]:
        try:
            return row, addresses.read_any({}, row["addresses"], opener, bytes(row["image_id"]))
        except Reject as reject:
            return row, reject

    # the next chunk's bytes are read while the model is at this one's
    found = ahead(read, _rows(frames), local["threads"], local["chunk"])
    while chunk := list(islice(found, local["chunk"])):
        rows = _captioned(chunk, work, tier.limits, how, tier.captioner["repairs"])
        yield pd.DataFrame(caption_row.counted(rows, count), columns=caption_row.COLUMNS)


def _rows(frames: Iterable[pd.DataFrame]) -> Iterator[Row]:
    for frame in frames:
        yield from cast(list[dict[str, Any]], frame.to_dict("records"))


def _captioned(
    chunk: Sequence[tuple[Row, bytes | Reject]], work: Work, limits: Mapping[str, Any], how: internvl.How, repairs: int
) -> list[dict[str, Any]]:
    """Rows with their bytes, or why there are none -> staged rows in the same order."""
    done = {place: _unread(row, work, data) for place, (row, data) in enumerate(chunk) if isinstance(data, Reject)}
    talks = {place: caption_row.conversation(work, row, repairs) for place, (row, _) in enumerate(chunk) if place not in done}
    asked, calls = {place: next(talk) for place, talk in talks.items()}, 0
    while asked:
        calls += 1
        again: dict[int, Request] = {}
        replies = internvl.answers(list(asked.values()), [cast(bytes, chunk[place][1]) for place in asked], limits, how)
        for (place, request), reply in zip(asked.items(), replies, strict=True):
            if isinstance(reply, Reject):
                done[place] = caption_row.failed(chunk[place][0], request.key, reply.code, reply.detail, reply.transient, calls)
                continue
            try:
                again[place] = talks[place].send(reply)
            except StopIteration as said:
                done[place] = ended(said.value) | {"calls": calls}
        asked = again
    return [done[place] for place in range(len(chunk))]


def ended(told: dict[str, Any]) -> dict[str, Any]:
    """A staged row -> the same; an answer without text is for good: the model is greedy, and would say nothing again."""
    return told | {"transient": False} if told["code"] == "no_text" else told


def _unread(row: Row, work: Work, reject: Reject) -> dict[str, Any]:
    return caption_row.failed(row, work.render(row).key, reject.code, reject.detail, reject.transient, calls=0)
