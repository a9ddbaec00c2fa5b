"""Plan, wave, land: how a stage turns pending rows into table rows, exactly once, whatever is killed.

A run freezes its pending inputs as a plan (ordered by where the bytes lie), computes them wave by wave into staged
parquet closed by a marker, and lands each staged wave in the tables with one append a table, numbered by the wave,
while the next wave computes. A start first lands what earlier runs staged completely, deletes what they did not,
and plans anew: what counts as done is the rows in the tables, never a marker.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.settings import Settings
from jobs import ordering, progress
from jobs.lake import ConstraintViolated, Lake, hadoop
from jobs.lease import Lease, landing

Projection = Callable[[DataFrame, str], DataFrame | None]  # (staged rows, run) -> rows of one table; None: it has none


class Plan(NamedTuple):
    """Pending inputs, frozen as parquet with one folder a wave; `waves` maps its number to its rows."""

    uri: str
    waves: dict[int, int]

    @property
    def rows(self) -> int:
        return sum(self.waves.values())


class Stage:
    """A stage that holds its lease. `tables`: what lands where, in landing order; the table that says "done" comes last."""

    def __init__(self, lake: Lake, name: str, settings: Settings, tables: Mapping[str, Projection], lease: Lease, run: str) -> None:
        self.lake, self.name, self.run_id = lake, name, run
        self._waves, self._tables, self._lease = settings.waves, tables, lease
        self.taken_over = lease.taken_over  # the run of the holder that was dead

    def freeze(self, rows: DataFrame, name: str) -> DataFrame:
        """Rows computed once and kept for this run: what is planned from a UDF's output would run it again for every use."""
        uri = self._area(name)
        self.lake.stage(rows, uri)
        return self.lake.staged(uri)

    def plan(self, pending: DataFrame, order: Sequence[str | Column]) -> Plan:
        """Pending inputs (with a `cost` in images, else 1 each) -> waves and tasks that are contiguous ranges in `order`."""
        if "cost" not in pending.columns:
            pending = pending.withColumn("cost", F.lit(1))
        numbered, total = ordering.numbered(self.lake, pending, order, self._area("ordered"), "cost")
        size, task = self._waves.rows, self._waves.task_rows
        numbered = numbered.withColumn("wave", F.floor(F.col("at") / size).cast("int"))
        numbered = numbered.withColumn("task", F.floor((F.col("at") % size) / task).cast("int")).drop("cost")
        uri = self._area("plan")
        numbered.write.partitionBy("wave").parquet(hadoop(uri))
        if total == 0:
            return Plan(uri, {})
        counts = self.lake.staged(uri).groupBy("wave").count().orderBy("wave").collect()
        return Plan(uri, {row["wave"]: row["count"] for row in counts})

    def run(self, plan: Plan, compute: Callable[[DataFrame], DataFrame], unit: str = "images") -> None:
        """Computes and lands every wave; an error of a wave or of its landing ends the run after the landing under way.

        unit: what the rows are, for the lines of progress.
        """
        if plan.rows == 0:
            print(f"{self.name}: nothing to do", flush=True)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="landing") as pool, progress.of(self.lake, self.name, plan.rows, unit) as told:
            under_way: Future[None] | None = None
            for wave, rows in plan.waves.items():
                with told.wave(wave, len(plan.waves), rows):
                    self._stage_wave(wave, compute(self._inputs(plan, wave)))
                if under_way is not None:
                    under_way.result()
                under_way = pool.submit(self._land, self.run_id, wave)
            if under_way is not None:
                under_way.result()

    def run_pending(self, pending: DataFrame, compute: Callable[[DataFrame], DataFrame]) -> None:
        """Pending rows of a stage that is cheap enough for one wave, computed and landed; says so when there are none.

        pending: asked of the tables inside `stage`, when what an earlier run had staged has landed.
        """
        count = pending.count()
        if count == 0:
            print(f"{self.name}: nothing to do", flush=True)
            return
        with progress.of(self.lake, self.name, count) as told, told.wave(0, 1, count):
            self.run_whole(compute(pending))

    def run_whole(self, rows: DataFrame, wave: int = 0) -> None:
        """One wave for a stage that is cheap enough to be done again as a whole: its output rows, staged and landed."""
        self._stage_wave(wave, rows)
        self._land(self.run_id, wave)

    def finish(self) -> None:
        """The run is through: its plan and staging go."""
        self.lake.opener.delete(self._area())

    def recover(self) -> None:
        """Lands the complete waves of earlier runs, deletes the rest; fences the run whose lease was taken over."""
        dead = set(self.lake.folders(self.lake.area("_staging", self.name)))
        for run in sorted(dead | {self.taken_over or self.run_id} - {self.run_id}):
            waves = self._complete_waves(run)
            for wave in waves:
                self._land(run, wave)
            with landing(self.lake, self.run_id, self._waves.lease_seconds):
                self._lease.check()
                for table in self._tables:
                    self.lake.fence(table, run)
            self.lake.opener.delete(self.lake.area("_staging", self.name, run))
            print(f"{self.name}: run {run} had stopped early; landed {len(waves)} waves that it had finished", flush=True)

    def _stage_wave(self, wave: int, rows: DataFrame) -> None:
        """Writes one wave under a path of its own and closes it with a marker."""
        self._lease.check()
        uri = self._wave_uri(self.run_id, wave)
        self.lake.stage(rows, f"{uri}/rows")
        self.lake.opener.write(f"{uri}/complete.json", json.dumps({"run": self.run_id, "wave": wave}).encode())

    def _inputs(self, plan: Plan, wave: int) -> DataFrame:
        """The wave's inputs, about a partition a task, each of contiguous ranges in the order of the plan."""
        tasks = -(-self._waves.rows // self._waves.task_rows)
        mine = self.lake.staged(f"{plan.uri}/wave={wave}")
        return mine.repartitionByRange(tasks, "task").sortWithinPartitions("at").drop("at", "task")

    def _land(self, run: str, wave: int) -> None:
        """Every table's rows of one staged wave, then the staged wave goes. Landing it again is skipped by the tables."""
        staged = self.lake.staged(f"{self._wave_uri(run, wave)}/rows")
        with landing(self.lake, self.run_id, self._waves.lease_seconds):
            self._lease.check()
            self.lake.spark.sparkContext.setLocalProperty("spark.scheduler.pool", "landing")
            for table, project in self._tables.items():
                rows = project(staged, run)
                if rows is not None and not rows.isEmpty():  # no commit without rows: a table's version changes only when its content does
                    self._append(table, rows, run, wave)
        self.lake.opener.delete(self._wave_uri(run, wave))

    def _append(self, table: str, rows: DataFrame, run: str, wave: int) -> None:
        try:
            self.lake.append(table, rows, run, wave)
        except ConstraintViolated as violated:
            raise ConstraintViolated(
                f"stage {self.name}, wave {wave}: {violated}\nA kernel computed what the tables forbid, and every start of the stage will "
                f"stop here. Mend the kernel, raise its KERNEL_VERSION, and remove {self._wave_uri(run, wave)}: its inputs are then pending again"
            ) from violated

    def _area(self, *parts: str) -> str:
        return self.lake.area("_staging", self.name, self.run_id, *parts)

    def _wave_uri(self, run: str, wave: int) -> str:
        return self.lake.area("_staging", self.name, run, f"wave-{wave:06d}")

    def _complete_waves(self, run: str) -> list[int]:
        names = [name for name in self.lake.folders(self.lake.area("_staging", self.name, run)) if name.startswith("wave-")]
        waves = sorted(int(name.removeprefix("wave-")) for name in names)
        return [wave for wave in waves if self.lake.opener.exists(f"{self._wave_uri(run, wave)}/complete.json")]


@contextmanager
def stage(lake: Lake, name: str, settings: Settings, tables: Mapping[str, Projection]) -> Iterator[Stage]:
    """Takes the stage's lease under a new run id and puts the lake right. Raises LeaseHeld when another driver is at work."""
    run = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}"
    with Lease(lake, name, run, settings.waves.lease_seconds) as lease:
        here = Stage(lake, name, settings, tables, lease, run)
        here.recover()
        yield here
        here.finish()
