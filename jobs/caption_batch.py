"""Pending images of a tier of Batch mode -> staged captions: rounds of jobs at the service, then one landing.

A wave is as many images as the budget and `batch.jobs` files of `batch.rows` allow, not waves.rows: a service may take a day for it. Every round may
cost every image's worst: the budget pays for `batch.rounds` of them before the first begins. What a round's jobs did not answer, or whose answer was
refused, is asked in the next; what the service, or the round's number of files, had no room for does not use one up. A driver that is killed
meanwhile loses nothing: the next start watches the jobs of the waves that are not settled (jobs/caption_jobs.py), and their answers are journaled like
any other.
"""

from __future__ import annotations

from functools import partial

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf import captions
from conf.settings import Settings
from jobs import caption_jobs, caption_ledger, caption_paid, caption_plan, caption_rows, caption_stop
from jobs.lake import Lake
from jobs.waves import Stage
from udfs import caption_budget, caption_collect, caption_intent, caption_row, caption_send
from udfs.caption_asking import OVER_WORST

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
    attempts, number, at, narrow = caption_paid.task_attempts(lake), first, 0, False
    while at < total:
        left = caption_budget.nano(settings.captions.budget_usd) - spent
        most = min(one.batch.rows * one.batch.jobs, total - at)
        many = caption_budget.rows_that_fit(left, told.row, attempts, most)
        if 0 < many < most and not narrow:
            narrow = True
            print(f"caption: {caption_plan.narrow(tier, many, most)}", flush=True)
        if many == 0:
            number += caption_paid.land_without_calls(stage, settings, tier, told, rows.where(F.col("at") >= at), number, left)
            break
        mine = rows.where((F.col("at") >= at) & (F.col("at") < at + many)).withColumn("job", F.floor((F.col("at") - at) / one.batch.rows))
        made = _Wave(stage, settings, tier, told, first, number)
        stopped, spent = made.ask(mine, f"{at + many}/{total} images", spent, told.worst * attempts * many)
        worker = partial(caption_collect.landed, tier=caption_rows.of_worker(settings, tier))
        captioned = made.spread(made.known(mine)).mapInPandas(worker, caption_row.SCHEMA)
        stage.run_whole(captioned.withColumns(caption_rows.told(settings, tier)), made.number)
        at, number = at + many, made.number + 1
        if stopped:
            raise caption_stop.stopped(settings, tier, stopped)
    print(f"caption: {caption_plan.compared(tier, each, new, spent - start)}", flush=True)
    return number


class _Wave:
    """Images that are asked about together. `number` counts the rounds; first: of the stage's waves when its rows were frozen."""

    def __init__(self, stage: Stage, settings: Settings, tier: captions.Tier, told: caption_plan.Bill, first: int, number: int) -> None:
        self._stage, self._settings, self._tier, self._told, self._first = stage, settings, tier, told, first
        self._captioner = settings.captions.captioners[tier.captioner]
        self._parts = 1
        self.number = number

    def ask(self, rows: DataFrame, what: str, spent: int, worst: int) -> tuple[str | None, int]:
        """Sends and settles rounds until nothing is open, or no round is left -> (why the job is to end, nano-dollars spent). worst: of a round; what
        is left of the budget pays for it, also where rounds without room were more than `batch.rounds`.
        """
        settings, lake = self._settings, self._stage.lake
        self._parts = 1 + (rows.agg(F.max("job").alias("last")).collect()[0]["last"] or 0)
        rounds = 0
        while rounds < self._captioner.batch.rounds and caption_budget.nano(settings.captions.budget_usd) - spent >= worst:
            self.number += 1
            wave = self._begun()
            requests, full, stopped = self._send(rows, wave)
            nano = caption_ledger.settle(lake, settings, self._stage.run_id, wave)
            spent += nano
            if requests:
                cost = f"{caption_plan.usd(nano)}, {caption_plan.usd(spent)} in all"
                print(f"caption: tier {self._tier.name}: {what}, round {rounds + 1}: {requests} requests, {cost}", flush=True)
            stopped = stopped or self._stopped(lake)
            if stopped or not requests:
                return stopped or ("the service takes no more jobs now" if full else None), spent
            rounds += not full
        return None, spent

    def known(self, rows: DataFrame) -> DataFrame:
        """Rows -> with what is journaled of them by now: what was when they were frozen, and the answers of this run's rounds."""
        fresh = caption_ledger.known(self._stage.lake, (self._stage.run_id, self._first))
        if fresh is None:
            return rows
        joined = rows.join(fresh.withColumnRenamed("known", "fresh"), "image_id", "left")
        both = F.concat(F.expr("substring(known, 1, length(known) - 1)"), F.lit(","), F.expr("substring(fresh, 2)"))
        return joined.withColumn("known", F.coalesce(both, "known", "fresh")).drop("fresh")

    def spread(self, rows: DataFrame) -> DataFrame:
        """-> a partition for each job's worth of rows, in the order of the bytes."""
        return rows.repartitionByRange(self._parts, "job").sortWithinPartitions("at").select(*caption_paid.COLUMNS)

    def _begun(self) -> caption_ledger.Wave:
        """-> a round's wave of the ledger."""
        purpose = f"{self._stage.run_id}/{self.number:06d}"
        terms = caption_jobs.Terms(self._captioner.model_dump(mode="json"), self._told.price, purpose)
        about = caption_rows.of_wave(self._settings, self._tier)
        wave = caption_ledger.Wave(self._stage.run_id, self.number, about, terms._asdict())
        caption_ledger.begin(self._stage.lake, wave)
        return wave

    def _send(self, rows: DataFrame, round_: caption_ledger.Wave) -> tuple[int, bool, str | None]:
        """One round -> how many requests were sent, whether there was no room for more, why no request can succeed."""
        stage, settings = self._stage, self._settings
        assert round_.batch is not None
        wave = caption_intent.Wave(caption_ledger.folder(stage.lake, round_.run, round_.number), round_.batch["purpose"])
        limits = caption_send.Limits(-(-self._captioner.batch.jobs // self._parts))
        worker = partial(caption_send.send, tier=caption_rows.of_worker(settings, self._tier), wave=wave, limits=limits)
        sent = stage.freeze(self.spread(self.known(rows)).mapInPandas(worker, caption_send.SENT), f"sent-{self.number}").collect()
        stopped = next((row["stop"] for row in sent if row["stop"] is not None), None)
        jobs = {row["name"]: row["requests"] for row in sent}  # a task tells of what it found of others too
        return sum(jobs.values()), any(row["full"] for row in sent), stopped

    def _stopped(self, lake: Lake) -> str | None:
        """-> what a reply of this round says that ends the job, or that it cost more than was reckoned with."""
        mine = lake.read("caption_calls").where(F.col("attempt").startswith(f"{self._stage.run_id}/{self.number:06d}/"))
        over = F.col("nano_usd") > self._told.worst
        row = mine.where((F.col("outcome") == "stop") | over).select("code", over.alias("over")).first()
        if row is None:
            return None
        return f"{OVER_WORST}: a call cost more than {self._told.worst} nano-dollars" if row["over"] else str(row["code"])
