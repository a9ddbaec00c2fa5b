"""Pending images of a paid tier -> staged captions, wave by wave, within the budget: plan the money, ask on the workers, settle.

A wave begins only when its rows at their worst, times the attempts that a task may have, fit what is left (udfs/caption_budget.py); what it did not
spend returns when it is settled. What is journaled is answered from the journal, whatever the tables say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial, reduce
from typing import Any, cast

import pandas as pd
from pyspark import TaskContext
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf import captions
from conf.section import Mistake
from conf.settings import Settings
from jobs import caption_ledger, caption_plan, caption_rows, embedding, ordering
from jobs.lake import Lake
from jobs.waves import Stage
from udfs import caption_budget, caption_journal, caption_row, caption_run, caption_work, token_count
from udfs.caption_budget import Price
from udfs.caption_journal import Journal, Place
from udfs.caption_record import Terms
from udfs.caption_run import How
from udfs.opener import Opener
from udfs.rate_limit import Rate

ENGINES = ("gemini", "openai")
FLUSH = 16  # records of a journal part
QUICKEST = 0.1  # seconds of an answer, for a first pace where the config names no limit: one from which a 429 can bring it down
COLUMNS = ("image_id", "addresses", "tags", "alt_text", "known")  # of a row on a worker


def check_key(lake: Lake, captioner: captions.Captioner) -> None:
    """Raises Mistake when workers have no key, where that can be known before they are asked: they have this machine's environment."""
    if captioner.key is None or not (lake.spark.sparkContext.master or "").startswith("local["):
        return
    if not os.environ.get(captioner.key.environment):
        raise Mistake(f"captions: key: the environment variable {captioner.key.environment} is not set; set it before the session starts")


def run(stage: Stage, settings: Settings, tier: captions.Tier, pending: DataFrame, first: int) -> int:
    """Images of the tier (image_id, tier), the number of the next wave -> the number after the last. Raises Mistake when the captioner stops the job.

    Rows that an attempt could not ask for (its share is 0 when executors were lost more often than tasks may fail; its lease ran out) are asked for
    in waves of their own, for as long as there are fewer each time.
    """
    caption_ledger.close_others(stage.lake, stage.run_id, stage.taken_over)
    number, before = first, None
    while True:
        made = _waves(stage, settings, tier, pending, number)
        number += len(made)
        if not made:
            return number
        pending = reduce(DataFrame.unionByName, made).where(F.col("state") == caption_row.UNASKED).select("image_id", "tier")
        left = pending.count()
        if left == 0 or left == before:
            if left:
                print(f"caption: tier {tier.name}: {left} images wait: no attempt could ask for them", flush=True)
            return number
        before = left


def _waves(stage: Stage, settings: Settings, tier: captions.Tier, pending: DataFrame, first: int) -> list[DataFrame]:
    """-> what each wave staged, for as long as the budget lasts."""
    lake, one = stage.lake, settings.captions.captioners[tier.captioner]
    spent = caption_ledger.settle_all(lake, settings, stage.run_id)
    rows, total = ordered(stage, settings, tier, pending, first)
    if total == 0:
        print(f"caption: tier {tier.name}: nothing to do", flush=True)
        return []
    notes = caption_plan.notes(rows)
    told = caption_plan.bill(settings, tier, notes.longest)
    each, start = caption_plan.expected(lake, settings, tier, told, notes), spent
    attempts, at = task_attempts(lake), 0
    waves: list[DataFrame] = []
    while at < total:
        left = caption_budget.nano(settings.captions.budget_usd) - spent
        many = caption_budget.rows_that_fit(left, told.row, attempts, min(settings.waves.rows, total - at))
        if many == 0:
            tell_that_they_wait(tier, total - at, left, told.row * attempts)
            break
        number = first + len(waves)
        journal = caption_ledger.begin(lake, caption_ledger.Wave(stage.run_id, number, caption_rows.of_wave(settings, tier)))
        inputs = rows.where((F.col("at") >= at) & (F.col("at") < at + many))
        waves.append(made := stage.freeze(_asked(lake, inputs, settings, tier, told, journal, attempts), f"asked-{number}"))
        before, spent = spent, caption_ledger.settle_all(lake, settings, stage.run_id)
        stage.run_whole(made, number)
        at += many
        print(
            f"caption: tier {tier.name}: {at}/{total} images asked, {caption_plan.usd(spent - before)} in this wave, {caption_plan.usd(spent)} in all",
            flush=True,
        )
        if (stopped := made.where(F.col("stop").isNotNull()).select("stop").first()) is not None:
            raise Mistake(
                f"caption: tier {tier.name}: {one.engine} stopped the job: {stopped['stop']}; what was answered is landed, and the rest waits"
            )
    new = rows.where((F.col("at") < at) & F.col("known").isNull()).count()  # images of which nothing was journaled
    print(f"caption: {caption_plan.compared(tier, each, new, spent - start)}", flush=True)
    return waves


def ordered(stage: Stage, settings: Settings, tier: captions.Tier, pending: DataFrame, first: int) -> tuple[DataFrame, int]:
    """-> (image_id, tier, ABOUT, addresses, known, at) in the order of the bytes, frozen; how many."""
    rows = embedding.placed(stage.lake, caption_rows.about(stage.lake, settings, pending), settings)
    journaled = caption_ledger.known(stage.lake)
    rows = rows.withColumn("known", F.lit(None).cast("string")) if journaled is None else rows.join(journaled, "image_id", "left")
    uri = stage.lake.area("_staging", stage.name, stage.run_id, f"tier-{tier.name}-{first}")
    return ordering.numbered(stage.lake, rows, embedding.ORDER, uri)


def task_attempts(lake: Lake) -> int:
    """-> how often Spark tries a task: spark.task.maxFailures, of local[N,F] F."""
    context = lake.spark.sparkContext
    if local := re.fullmatch(r"local(?:\[[^,\]]+(?:,(\d+))?\])?", context.master or ""):
        return int(local[1] or 1)
    return int(context.getConf().get("spark.task.maxFailures") or 4)


def _asked(
    lake: Lake, inputs: DataFrame, settings: Settings, tier: captions.Tier, told: caption_plan.Bill, journal: str, attempts: int
) -> DataFrame:
    """The wave's rows -> staged rows, by asking on the workers."""
    one, tasks = settings.captions.captioners[tier.captioner], lake.spark.sparkContext.defaultParallelism
    worker = partial(
        on_worker,
        tier=caption_rows.of_worker(settings, tier),
        price=told.price,
        terms={"worst": told.worst, "in_flight": one.in_flight, "flush": FLUSH, "lease": float(settings.captions.lease_seconds)},
        row_worst=told.row,
        attempts=attempts,
        journal=journal,
        rate=pace(one, tasks),
        how=How(tries=one.tries, repairs=one.repairs, window=2 * one.in_flight),
    )
    rows = inputs.repartitionByRange(tasks, "at").sortWithinPartitions("at").select(*COLUMNS).mapInPandas(worker, caption_row.SCHEMA)
    return rows.withColumns(caption_rows.told(settings, tier))


def pace(one: captions.Captioner, tasks: int) -> float:
    """-> calls a second of a task."""
    return one.in_flight / QUICKEST if one.requests_per_minute is None else one.requests_per_minute / 60 / tasks


def on_worker(
    frames: Iterator[pd.DataFrame],
    tier: caption_work.Tier,
    price: Price,
    terms: dict[str, Any],
    row_worst: int,
    attempts: int,
    journal: str,
    rate: float,
    how: How,
) -> Iterator[pd.DataFrame]:
    """One attempt of a task. All of its rows are taken first: its share of the money is by their number."""
    rows = pd.concat(list(frames) or [pd.DataFrame()])
    if rows.empty:
        return
    context = TaskContext.get()
    assert context is not None
    opener, partition = Opener(tier.stores), context.partitionId()
    attempt = caption_journal.next_attempt(opener, journal, partition)
    share = caption_budget.share(len(rows), row_worst, attempt, attempts)
    place = Place(journal, partition, attempt)
    kept = Journal(opener, place, Terms(share=share, **terms))
    count = token_count.load(*tier.tokenizer).count
    for frame in caption_run.run(
        [rows], caption_work.work(tier), lambda: caption_work.engine(tier.captioner), kept, price, Rate(rate), how
    ):
        yield pd.DataFrame(caption_row.counted(cast(list[dict[str, Any]], frame.to_dict("records")), count), columns=caption_row.COLUMNS)


def tell_that_they_wait(tier: captions.Tier, images: int, left: int, need: int) -> None:
    """Images that the budget does not pay for. left, need: nano-dollars, of the budget and for one of them at worst."""
    print(
        f"caption: tier {tier.name}: {images} images wait: {caption_plan.usd(max(left, 0))} of the budget are left, "
        f"one of them may need {caption_plan.usd(need)}; raise captions.budget_usd",
        flush=True,
    )
