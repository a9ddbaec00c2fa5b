"""Plan, wave, land; recovery, leases and the fence, on real Delta tables."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.settings import Settings
from jobs import progress, waves
from jobs.lake import ConstraintViolated, Lake
from jobs.lease import Lease, LeaseHeld, LeaseLost
from jobs.waves import Projection, Stage

MakeLake = Callable[[Settings], Lake]
WAVES = {"rows": 5, "task_rows": 2}
TABLE: dict[str, Projection] = {"selections": lambda staged, run: staged.withColumn("run", F.lit(run))}


def rows_of(lake: Lake, first: int, last: int) -> DataFrame:
    number = F.col("id").cast("string")
    told = {"image_id": F.unhex(F.sha2(number, 256)), "selection": F.lit("s"), "name": number, "score": F.lit(1)}
    return lake.spark.range(first, last).withColumns(told)


def landed(lake: Lake) -> list[int]:
    return sorted(int(row["name"]) for row in lake.read("selections").select("name").collect())


@pytest.fixture
def lake(make_settings: Callable[..., Settings], make_lake: MakeLake) -> Lake:
    return make_lake(make_settings(waves=WAVES))


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings(waves=WAVES)


def test_a_plan_is_cut_into_waves_of_contiguous_ranges_and_lands_every_row_once(lake: Lake, settings: Settings) -> None:
    seen: list[list[int]] = []

    def compute(inputs: DataFrame) -> DataFrame:
        seen.append([row["id"] for row in inputs.select("id").collect()])
        return inputs

    with waves.stage(lake, "a", settings, TABLE) as stage:
        stage.run(stage.plan(rows_of(lake, 0, 12).orderBy(F.rand(3)), ["id"]), compute)
    assert seen == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert landed(lake) == list(range(12))
    assert lake.folders(lake.area("_staging", "a")) == []


def test_an_input_that_costs_a_wave_gets_one(lake: Lake, settings: Settings) -> None:
    with waves.stage(lake, "a", settings, TABLE) as stage:
        rows = rows_of(lake, 0, 6).withColumn("cost", F.when(F.col("id") == 2, 7).otherwise(1))
        assert stage.plan(rows, ["id"]).waves == {
            0: 3,
            1: 1,
            2: 2,
        }  # the third starts at 2 and ends at 9: the fourth is in wave 1, the fifth, at 10, in wave 2


def die(stage: Stage, lake: Lake, last_wave_is_complete: bool) -> None:
    """What a driver killed while it landed leaves: staged waves, a lease, nothing landed."""
    stage._stage_wave(0, rows_of(lake, 0, 3))
    stage._stage_wave(1, rows_of(lake, 3, 6))
    if not last_wave_is_complete:
        lake.opener.delete(stage._wave_uri(stage.run_id, 1) + "/complete.json")
    raise KeyboardInterrupt


def test_a_start_lands_what_an_earlier_run_staged_completely_and_deletes_the_rest(lake: Lake, settings: Settings) -> None:
    with pytest.raises(KeyboardInterrupt), waves.stage(lake, "a", settings, TABLE) as stage:
        die(stage, lake, last_wave_is_complete=False)
    assert landed(lake) == []
    with waves.stage(lake, "a", settings, TABLE):
        assert landed(lake) == [0, 1, 2]
    assert lake.folders(lake.area("_staging", "a")) == []


def test_a_wave_that_was_landed_but_not_marked_lands_no_second_time(lake: Lake, settings: Settings) -> None:
    with pytest.raises(KeyboardInterrupt), waves.stage(lake, "a", settings, TABLE) as stage:
        lake.append("selections", TABLE["selections"](rows_of(lake, 0, 3), stage.run_id), stage.run_id, 0)
        die(stage, lake, last_wave_is_complete=True)
    with waves.stage(lake, "a", settings, TABLE):
        assert landed(lake) == [0, 1, 2, 3, 4, 5]


def test_a_second_driver_is_refused_and_told_who_works(lake: Lake, settings: Settings) -> None:
    with waves.stage(lake, "a", settings, TABLE) as stage, pytest.raises(LeaseHeld) as refused, Lease(lake, "a", "other", 60):
        pass
    assert stage.run_id in str(refused.value)
    assert str(os.getpid()) in str(refused.value)
    with Lease(lake, "a", "other", 60):  # released by the first
        pass


def test_a_dead_drivers_lease_is_taken_over_at_once_on_its_own_host(lake: Lake, settings: Settings) -> None:
    dead = {"run": "dead", "host": socket.gethostname(), "pid": 2**22 - 1, "started": 1, "expires": time.time() + 1000}
    lake.opener.write(lake.area("_leases", "a.json"), json.dumps(dead).encode())
    with Lease(lake, "a", "next", 60) as lease:
        assert lease.taken_over == "dead"


def test_a_lease_on_another_host_is_respected_until_it_expires(lake: Lake, settings: Settings) -> None:
    far = {"run": "far", "host": "elsewhere", "pid": 1, "started": 1, "expires": time.time() + 1000}
    lake.opener.write(lake.area("_leases", "a.json"), json.dumps(far).encode())
    with pytest.raises(LeaseHeld), Lease(lake, "a", "next", 60):
        pass
    lake.opener.write(lake.area("_leases", "a.json"), json.dumps(far | {"expires": time.time() - 1}).encode())
    with Lease(lake, "a", "next", 60) as lease:
        assert lease.taken_over == "far"


def test_a_zombie_whose_lease_was_taken_over_lands_nothing_more(lake: Lake, settings: Settings) -> None:
    """The old holder still lives: its complete wave is landed for it, whatever it sends later is refused or skipped."""
    with pytest.raises(LeaseLost, match="run again, complete waves are kept"), waves.stage(lake, "a", settings, TABLE) as zombie:
        zombie._stage_wave(0, rows_of(lake, 0, 3))
        zombie._stage_wave(1, rows_of(lake, 3, 6))
        lake.opener.delete(zombie._wave_uri(zombie.run_id, 1) + "/complete.json")
        expire(lake)
        with waves.stage(lake, "a", settings, TABLE) as heir:
            assert landed(lake) == [0, 1, 2]
            heir.run(heir.plan(rows_of(lake, 3, 8), ["id"]), lambda inputs: inputs)
            late = TABLE["selections"](rows_of(lake, 3, 6), zombie.run_id)
            lake.append("selections", late, zombie.run_id, 1)  # its append was already on the way
            assert landed(lake) == list(range(8))
        zombie._stage_wave(2, rows_of(lake, 6, 9))
    assert landed(lake) == list(range(8))


def test_a_zombie_notices_at_its_next_beat(lake: Lake, settings: Settings) -> None:
    with Lease(lake, "a", "zombie", 1) as lease:
        expire(lake)
        with Lease(lake, "a", "heir", 60):
            time.sleep(0.8)
            with pytest.raises(LeaseLost, match="run again, complete waves are kept"):
                lease.check()


def expire(lake: Lake) -> None:
    uri = lake.area("_leases", "a.json")
    lake.opener.write(uri, json.dumps(json.loads(lake.opener.read(uri)) | {"expires": 0}).encode())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"image_id": b"short"}, "CHECK constraint image_id_is_sha256"), ({"name": None}, "Column name, which has a NOT NULL constraint")],
    ids=["check", "not null"],
)
def test_a_constraint_refuses_what_must_not_be_in_a_table(wrong: dict[str, object], said: str, lake: Lake) -> None:
    row = rows_of(lake, 0, 1).withColumns({name: F.lit(value) for name, value in {"run": "r", **wrong}.items()})
    with pytest.raises(ConstraintViolated, match=f"table selections: {said}"):
        lake.append("selections", row, "app", 1)
    assert landed(lake) == []


def test_a_staged_wave_that_a_table_refuses_stops_the_stage_and_says_what_to_do(lake: Lake, settings: Settings) -> None:
    short = rows_of(lake, 0, 1).withColumn("image_id", F.lit(b"short"))
    with pytest.raises(ConstraintViolated), waves.stage(lake, "s", settings, TABLE) as stage:
        stage.run_whole(short)
    with (
        pytest.raises(ConstraintViolated, match="stage s, wave 0: table selections: CHECK") as again,
        waves.stage(lake, "s", settings, TABLE),
    ):
        pass
    folder = re.search(r"remove (\S+):", str(again.value))
    assert folder is not None
    lake.opener.delete(folder[1])
    with waves.stage(lake, "s", settings, TABLE) as stage:
        stage.run_whole(rows_of(lake, 0, 1))
    assert landed(lake) == [0]


def test_a_table_whose_making_was_cut_is_made_by_the_next_start(lake: Lake, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "lake/labels")
    (tmp_path / "lake/labels/_delta_log").mkdir(parents=True)
    lake.create()
    assert lake.version("labels") == 0


def test_the_rate_of_a_small_run_does_not_replace_that_of_a_large_one(lake: Lake) -> None:
    for rows in (1000, 5):
        with progress.of(lake, "s", rows) as told, told.wave(0, 1, rows):
            pass
        assert "of an earlier run of 1000" in progress.estimate(lake, "s", 10)
    assert progress.estimate(lake, "other", 3) == (
        "other: 3 images pending; how long is unknown, no earlier run of this stage was measured on this lake"
    )


def test_the_lake_is_made_once(lake: Lake, tmp_path: Path) -> None:
    before = lake.versions(["images", "exports"])
    lake.create()
    assert lake.versions(["images", "exports"]) == before == {"images": 0, "exports": 0}
