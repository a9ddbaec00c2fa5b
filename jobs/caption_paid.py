"""Pending images of a paid tier -> staged captions, wave by wave, within the budget: plan the money, ask on the workers, settle.

A wave begins only when its rows at their worst, times the attempts that a task may have, fit what is left (udfs/caption_budget.py); what it did not
spend returns when it is settled. What is journaled is answered from the journal, whatever the tables say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial, reduce
from typing import Any, NamedTuple, cast

import pandas as pd
from pyspark import TaskContext
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf import captions
from conf.section import Mistake
from conf.settings import Settings
from jobs import caption_ledger, caption_plan, caption_rows, caption_stop, embedding, ordering
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
COLUMNS = ("image_id", "tried", "addresses", "tags", "alt_text", "known")  # of a row on a worker


def check_key(lake: Lake, captioner: captions.Captioner) -> None:
    """Raises Mistake when workers have no key, where that can be known before they are asked: they have this machine's environment."""
    context = lake.spark.sparkContext
    if captioner.key is None or not (context.master or "").startswith("local["):
        return
    name = captioner.key.environment
    if not (os.environ.get(name) or context.environment.get(name)):  # the second is of spark.executorEnv
        raise Mistake(
            f"captions: key of {captioner.model}: the environment variable {name} is not set; set it where this command is started, "
            f"or by spark.conf as spark.executorEnv.{name}"
        )


class Asked(NamedTuple):
    """What became of rows. waves: their number; spent: nano-dollars of all waves of the lake; unasked: (image_id, tier) that may be asked anew."""

    waves: int
    spent: int
    unasked: list[DataFrame]


def run(stage: Stage, settings: Settings, tier: captions.Tier, pending: DataFrame, first: int) -> int:
    """Images of the tier (image_id, tier), the number of the next wave -> the number after the last. Raises Mistake when the captioner stops the job,
    or has no key.

    Rows that an attempt could not ask for (its share is 0 when executors were lost more often than tasks may fail; its lease ran out) are asked for
    in waves of their own, for as long as there are fewer each time.
    """
    caption_ledger.close_others(stage.lake, stage.run_id, stage.taken_over)
    spent = caption_ledger.settle_all(stage.lake, settings, stage.run_id)
    number, before = first, None
    while True:
        waves, spent, unasked = _waves(stage, settings, tier, pending, number, spent)
        number += waves
        if not unasked:
            return number
        pending = reduce(DataFrame.unionByName, unasked)
        left = pending.count()
        if left == before:
            print(f"caption: tier {tier.name}: {left} images wait: no attempt could ask for them", flush=True)
            return number
        before = left


def _waves(stage: Stage, settings: Settings, tier: captions.Tier, pending: DataFrame, first: int, spent: int) -> Asked:
    """Waves for as long as the budget lasts; then what the journal can answer without a call."""
    lake = stage.lake
    rows, total = ordered(stage, settings, tier, pending, first)
    if total == 0:
        print(f"caption: tier {tier.name}: nothing to do", flush=True)
        return Asked(0, spent, [])
    notes = caption_plan.notes(rows)
    told = caption_plan.bill(settings, tier, notes.longest)
    each, start = caption_plan.expected(lake, settings, tier, told, notes), spent
    attempts, at, number, narrow = task_attempts(lake), 0, first, False
    left_over: list[DataFrame] = []
    while at < total:
        left = caption_budget.nano(settings.captions.budget_usd) - spent
        most = min(settings.waves.rows, total - at)
        many = caption_budget.rows_that_fit(left, told.row, attempts, most)
        if 0 < many < most and not narrow:
            narrow = True
            print(f"caption: {caption_plan.narrow(tier, many, most)}", flush=True)
        if many == 0:
            number += land_without_calls(stage, settings, tier, told, rows.where(F.col("at") >= at), number, left)
            break
        wave = _wave(stage, settings, tier, told, rows.where((F.col("at") >= at) & (F.col("at") < at + many)), number)
        number, at, spent = number + 1, at + many, spent + wave.nano
        if wave.unasked:
            left_over.append(wave.rows.where(F.col("state") == caption_row.UNASKED).select("image_id", "tier"))
        usd = f"{caption_plan.usd(wave.nano)} in this wave, {caption_plan.usd(spent)} in all"
        print(f"caption: tier {tier.name}: {at}/{total} images asked, {usd}", flush=True)
        if wave.stop is not None:
            raise caption_stop.stopped(settings, tier, wave.stop)
    new = rows.where((F.col("at") < at) & F.col("known").isNull()).count()  # images of which nothing was journaled
    print(f"caption: {caption_plan.compared(tier, each, new, spent - start)}", flush=True)
    return Asked(number - first, spent, left_over)


class Wave(NamedTuple):
    """One that is settled and landed. rows: staged; nano: dollars that it cost; unasked: how many of its rows; stop: why the job is to end."""

    rows: DataFrame
    nano: int
    unasked: int
    stop: str | None


def _wave(stage: Stage, settings: Settings, tier: captions.Tier, told: caption_plan.Bill, inputs: DataFrame, number: int) -> Wave:
    lake = stage.lake
    wave = caption_ledger.Wave(stage.run_id, number, caption_rows.of_wave(settings, tier))
    journal = caption_ledger.begin(lake, wave)
    made = stage.freeze(_asked(lake, inputs, settings, tier, told, journal, task_attempts(lake)), f"asked-{number}")
    nano = caption_ledger.settle(lake, settings, stage.run_id, wave)
    stage.run_whole(made, number)
    unasked = F.count_if(F.col("state") == caption_row.UNASKED)
    found = made.agg(unasked.alias("unasked"), F.first("stop", ignorenulls=True).alias("stop")).first()
    assert found is not None
    return Wave(made, nano, found["unasked"], found["stop"])


def land_without_calls(
    stage: Stage, settings: Settings, tier: captions.Tier, told: caption_plan.Bill, rows: DataFrame, number: int, left: int
) -> int:
    """Rows that the budget does not pay for, of which `left` nano-dollars are left -> the number of waves that landed what the journal answers, since a
    share of 0 allows no call. Tells how many wait.
    """
    size = settings.waves.rows
    mine = rows.where(F.col("known").isNotNull()).withColumn("of", F.floor(F.col("at") / size))
    landed, counts = 0, {row["of"]: row["count"] for row in mine.groupBy("of").count().orderBy("of").collect()}  # one row a wave
    for made, (of, count) in enumerate(counts.items()):
        wave = _wave(stage, settings, tier, told._replace(row=0), mine.where(F.col("of") == of).drop("of"), number + made)
        landed += count - wave.unasked
    if landed:
        print(f"caption: tier {tier.name}: {landed} images from the journal, without a call", flush=True)
    if (waiting := rows.count() - landed) > 0:
        need = caption_plan.usd(told.row * task_attempts(stage.lake))
        had = f"{caption_plan.usd(max(left, 0))} of the budget are left"
        print(
            f"caption: tier {tier.name}: {waiting} images wait: {had}, one of them may need {need}; raise captions.budget_usd", flush=True
        )
    return len(counts)


def ordered(stage: Stage, settings: Settings, tier: captions.Tier, pending: DataFrame, first: int) -> tuple[DataFrame, int]:
    """-> (image_id, tier, ABOUT, tried, addresses, known, at) in the order of the bytes, frozen; how many. Raises Mistake when there are some, and no key."""
    lake = stage.lake
    rows = embedding.placed(lake, caption_rows.about(lake, settings, pending), settings)
    journaled = caption_ledger.known(lake)
    rows = rows.withColumn("known", F.lit(None).cast("string")) if journaled is None else rows.join(journaled, "image_id", "left")
    name = f"tier-{tier.name}-{first}"
    uri = lake.area("_staging", stage.name, stage.run_id, name)
    rows, total = ordering.numbered(lake, rows, embedding.ORDER, uri)
    if total:
        check_key(lake, settings.captions.captioners[tier.captioner])
    # with its numbers, about a file a wave: each wave reads its own, instead of numbering all of them again
    files = max(1, -(-total // settings.waves.rows))
    rows = stage.freeze(rows.repartitionByRange(files, "at").sortWithinPartitions("at"), f"{name}-numbered")
    lake.opener.delete(uri)
    return rows, total


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
