"""Captioning by Batch mode on workers, its second half: jobs that ended -> the journal; the journal -> staged rows (udfs/caption_intent.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import pandas as pd

from udfs import caption_budget, caption_intent, caption_record, caption_row, caption_work, token_count
from udfs.caption_budget import Price
from udfs.caption_call import RETRY, Reply
from udfs.caption_intent import Asked, Wave
from udfs.caption_journal import Journal, Place
from udfs.caption_record import Record, Terms
from udfs.caption_request import Request
from udfs.caption_row import Row, Work
from udfs.caption_send import WAITS, client_of, hear, patiently, rows_of
from udfs.gemini_batch import BatchFault, GeminiBatch
from udfs.opener import Opener
from udfs.reject import Reject

FOUND = "name STRING, job STRING, state STRING, others INT, fault STRING"
COLLECTED = "name STRING, state STRING, replies INT, missing INT, lost BIGINT, fault STRING"
PATIENCE = (*WAITS, 60.0, 60.0, 60.0)  # seconds before results are asked for again: they are bought, and kept for days
UNKNOWN = "UNKNOWN"  # a state: the service did not say


def poll(frames: Iterator[pd.DataFrame], captioner: Mapping[str, Any]) -> Iterator[pd.DataFrame]:
    """Frames of (name, job or NULL) -> FOUND: the state of each job; one whose name is not noted is looked for, and told when there is one. others: jobs
    of the same name, which are cancelled. A service that fails for now gives UNKNOWN; fault: what no waiting cures, in one row without more.
    """
    rows = list(rows_of(frames))
    if not rows:
        return
    try:
        with client_of(captioner) as (run, client):
            told = run(_states(client, {row["name"]: row["job"] for row in rows}))
    except BatchFault as fault:
        yield _at_fault(FOUND, fault)
        return
    yield pd.DataFrame(told, columns=["name", "job", "state", "others"]).assign(fault=None)


async def _states(client: GeminiBatch, noted: Mapping[str, str | None]) -> list[tuple[str, str | None, str, int]]:
    told: list[tuple[str, str | None, str, int]] = []
    unsure = [name for name, job in noted.items() if job is None]
    try:
        found = await client.find(unsure) if unsure else {}
    except BatchFault as fault:
        if fault.reply.outcome != RETRY:
            raise
        told, found = [(name, None, UNKNOWN, 0) for name in unsure], {}
    told += [(name, jobs[0].name, jobs[0].state, len(jobs) - 1) for name, jobs in found.items() if jobs]
    for name, job in noted.items():
        if job is not None:
            try:
                told.append((name, job, await client.state(job), 0))
            except BatchFault as fault:
                if fault.reply.outcome != RETRY:
                    raise
                told.append((name, job, UNKNOWN, 0))
    return told


def collect(
    frames: Iterator[pd.DataFrame], captioner: Mapping[str, Any], stores: Mapping[str, Any], wave: Wave, price: Price
) -> Iterator[pd.DataFrame]:
    """Frames of (name, job) of jobs that ended -> their replies in the journal, and COLLECTED. Done again it writes the same. lost: nano-dollars that the
    ledger does not tell: of what a job that did not succeed may have answered all the same, and of images that were forgotten meanwhile; fault: why no
    more is collected, in a last row without more.
    """
    opener = Opener(stores)
    with client_of(captioner) as (run, client):
        for row in rows_of(frames):
            asked = caption_intent.read(opener, wave, row["name"])
            try:
                got = run(patiently(client.collect, row["job"], {key: one.most for key, one in asked.items()}, waits=PATIENCE))
            except BatchFault as fault:
                yield _at_fault(COLLECTED, fault)
                return
            assert got is not None, f"{row['job']} has not ended"
            records = [_record(key, asked[key], reply, price) for key, reply in got.replies.items()]
            kept = [one for one in records if one.image_id]
            worst = {key: caption_budget.cost(price, one.most) for key, one in asked.items()}
            terms = Terms(share=sum(worst.values()), worst=max(worst.values(), default=0), in_flight=0, flush=max(1, len(kept)), lease=0.0)
            Journal(opener, Place(wave.folder, caption_intent.partition_of(row["name"]), 0), terms).whole(kept)
            lost = sum(one.nano_usd for one in records if not one.image_id)
            lost += sum(worst[key] for key in got.missing) if got.state != "SUCCEEDED" else 0
            told = {"name": row["name"], "state": got.state, "replies": len(records), "missing": len(got.missing), "lost": lost}
            yield pd.DataFrame([told | {"fault": None}])


def _at_fault(schema: str, fault: BatchFault) -> pd.DataFrame:
    names = [column.split()[0] for column in schema.split(", ")]
    return pd.DataFrame([dict.fromkeys(names) | {"fault": str(fault)}], dtype=object)


def landed(frames: Iterator[pd.DataFrame], tier: caption_work.Tier) -> Iterator[pd.DataFrame]:
    """Frames as for udfs.caption_send.send, when no more is asked -> caption_row.SCHEMA, a row an image."""
    work, count = caption_work.work(tier), token_count.load(*tier.tokenizer).count
    for frame in frames:
        rows = [_landed(work, row, tier.captioner["repairs"]) for row in rows_of([frame])]
        yield pd.DataFrame(caption_row.counted(rows, count), columns=caption_row.COLUMNS)


def _landed(work: Work, row: Row, repairs: int) -> dict[str, Any]:
    heard, known = hear(work, row, repairs), work.known(row)
    calls = len(known)
    if isinstance(heard, dict):
        return heard | {"calls": calls}
    request, second = heard
    try:
        work.prepare(row)
    except Reject as reject:
        return caption_row.failed(row, request.key, reject.code, reject.detail, reject.transient, calls)
    if second:  # what the first answer is worth, without a better one
        first = cast(dict[str, Any], hear(work, row, 0))
        return first | {"calls": calls, "transient": first["state"] == caption_row.FAILED}
    last = next((one for one in reversed(known) if one.key == request.key), None)
    code, detail = ("no_reply", "no job answered it") if last is None else (last.code, last.detail)
    return caption_row.failed(row, request.key, code, detail, True, calls)


def _record(key: str, asked: Asked, reply: Reply, price: Price) -> Record:
    request = Request(key, bytes.fromhex(asked.image_id), "", "", {}, {}, noted=False)
    return caption_record.record(request, 1, asked.repair, reply, caption_budget.cost(price, reply.usage), seconds=0.0)
