"""Pending images of a tier of Batch mode -> staged captions: rounds of jobs at the service, then one landing.

A wave is as many images as the budget and `batch.jobs` files allow, not waves.rows: a service may take a day for it. What a round's jobs did not
answer, or whose answer was refused, is asked in the next. A driver that is killed meanwhile loses nothing: the next start watches the jobs of the
waves that are not settled (jobs/caption_jobs.py), and their answers are journaled like any other.
"""

from __future__ import annotations

from functools import partial

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf import captions
from conf.section import Mistake
from conf.settings import Settings
from jobs import caption_jobs, caption_ledger, caption_paid, caption_plan, caption_rows
from jobs.lake import Lake
from jobs.waves import Stage
from udfs import caption_batch, caption_budget, caption_row

ENGINES = ("gemini-batch",)


def run(stage: Stage, settings: Settings, tier: captions.Tier, pending: DataFrame, first: int) -> int:
    """As caption_paid.run."""
    lake, one = stage.lake, settings.captions.captioners[tier.captioner]
    caption_ledger.close_others(lake, stage.run_id, stage.taken_over)
    spent = caption_ledger.settle_all(lake, settings, stage.run_id)
    rows, total = caption_paid.ordered(stage, settings, tier, pending, first)
    if total == 0:
        print(f"caption: tier {tier.name}: nothing to do", flush=True)
        return first
    notes = caption_plan.notes(rows)
    told = caption_plan.bill(settings, tier, notes.longest)
    each, start = caption_plan.expected(lake, settings, tier, told, notes), spent
    new = rows.where(F.col("known").isNull()).count()  # images of which nothing is journaled
    attempts, number, at = caption_paid.task_attempts(lake), first, 0
    while at < total:
        left = caption_budget.nano(settings.captions.budget_usd) - spent
        many = caption_budget.rows_that_fit(left, told.worst, attempts, min(one.batch.rows * one.batch.jobs, total - at))
        if many == 0:
            caption_paid.tell_that_they_wait(tier, total - at, left, told.worst * attempts)
            return number
        mine = rows.where((F.col("at") >= at) & (F.col("at") < at + many)).drop("known")
        for asked_again in range(one.batch.rounds):
            known = _known(lake, mine)
            if caption_budget.nano(settings.captions.budget_usd) - spent < told.worst * attempts * many:
                break  # of the first round it is known that it fits
            before, number = spent, number + 1
            requests = _submit(stage, settings, tier, known, told, number)
            spent = caption_ledger.settle_all(lake, settings, stage.run_id)
            if requests == 0:
                break
            print(
                f"caption: tier {tier.name}: {at + many}/{total} images, round {asked_again + 1}: {requests} requests, "
                f"{caption_plan.usd(spent - before)}, {caption_plan.usd(spent)} in all",
                flush=True,
            )
        worker = partial(caption_batch.landed, tier=caption_rows.of_worker(settings, tier))
        made = _spread(_known(lake, mine), one.batch.rows).mapInPandas(worker, caption_row.SCHEMA)
        stage.run_whole(made.withColumns(caption_rows.told(settings, tier)), number)
        at, number = at + many, number + 1
    print(f"caption: {caption_plan.compared(tier, each, new, spent - start)}", flush=True)
    return number


def _known(lake: Lake, rows: DataFrame) -> DataFrame:
    """Rows -> with what is journaled of them by now."""
    journaled = caption_ledger.known(lake)
    return rows.withColumn("known", F.lit(None).cast("string")) if journaled is None else rows.join(journaled, "image_id", "left")


def _spread(rows: DataFrame, of_a_job: int) -> DataFrame:
    """-> a partition for each job's worth of rows, in the order of the bytes."""
    parts = max(1, -(-rows.count() // of_a_job))
    return rows.repartitionByRange(parts, "at").sortWithinPartitions("at").select(*caption_paid.COLUMNS)


def _submit(stage: Stage, settings: Settings, tier: captions.Tier, rows: DataFrame, told: caption_plan.Bill, number: int) -> int:
    """One round -> how many requests were sent. Raises Mistake when the service says that none can succeed."""
    lake, one = stage.lake, settings.captions.captioners[tier.captioner]
    purpose = f"{stage.run_id}/{number:06d}"
    terms = caption_jobs.Terms(one.model_dump(mode="json"), told.price, purpose)
    about = caption_rows.of_wave(settings, tier)
    folder = caption_ledger.begin(lake, caption_ledger.Wave(stage.run_id, number, about, terms._asdict()))
    worker = partial(caption_batch.submit, tier=caption_rows.of_worker(settings, tier), wave=caption_batch.Wave(folder, purpose))
    sent = stage.freeze(_spread(rows, one.batch.rows).mapInPandas(worker, caption_batch.SUBMITTED), f"sent-{number}").collect()
    if stopped := next((row["stop"] for row in sent if row["stop"] is not None), None):
        raise Mistake(
            f"caption: tier {tier.name}: {one.engine} stopped the job: {stopped}; jobs that were sent before are watched at the next start"
        )
    return sum(row["requests"] for row in sent)
