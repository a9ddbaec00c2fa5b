"""A trainer's file is started by Spark with one rank a task slot, or refused before anything waits; it gets this command line."""

from __future__ import annotations

import json
import re
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from conf.section import Mistake
from conf.settings import Settings
from jobs import train_distributed

MakeSettings = Callable[..., Settings]
# stands for a trainer: says how it was started. In its first life the second rank ends, and the first waits on for it
RANK = """
    import json, os, pathlib, sys, time
    place, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
    life = len(list(place.glob(f"rank-{rank}-*")))
    told = {"arguments": sys.argv[2:], "world": os.environ["WORLD_SIZE"], "local": os.environ["LOCAL_RANK"], "pid": os.getpid()}
    (place / f"rank-{rank}-{life}").write_text(json.dumps(told))
    while life == 0 and not (rank == "1" and (place / "rank-0-0").exists()):
        time.sleep(0.1)
    sys.exit(1 if life == 0 else 0)
"""


def launch_of(make_settings: MakeSettings, folder: Path, ranks: int) -> tuple[train_distributed.Launch, Settings]:
    settings = make_settings(train_scorer={"ranks": ranks, "micro_batch": 8, "rows_per_step": 48, "device": "cuda" if ranks > 3 else "cpu"})
    (folder / "train_scorer.py").write_text(textwrap.dedent(RANK))
    (folder / "build.yaml").touch()
    overrides = [f"train_scorer.ranks={ranks}", "train_scorer.epochs=1"]
    return train_distributed.plan(settings, str(folder / "train_scorer.py"), str(folder), str(folder / "build.yaml"), overrides), settings


def test_the_ranks_get_the_trainers_command_line_and_when_one_ends_all_of_them_end_and_start_again(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_distributed, "PAUSE", 0.0)
    launch, settings = launch_of(make_settings, tmp_path, 2)
    train_distributed.check_cluster(launch, settings, dict(spark.sparkContext.getConf().getAll()))
    assert train_distributed.wait_for_slots(lambda: train_distributed.count_slots(spark), launch, 0) == 2
    train_distributed.run(launch)
    given = ["--config", str(tmp_path / "build.yaml"), "--set", "train_scorer.ranks=2", "--set", "train_scorer.epochs=1", "--deepspeed"]
    told = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("rank-*")}
    assert set(told) == {f"rank-{rank}-{life}" for rank in (0, 1) for life in (0, 1)}
    pids = [one.pop("pid") for one in told.values()]
    assert all(one == {"arguments": given, "world": "2", "local": "0"} for one in told.values())
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)  # the first rank did not outlive its task


def test_a_trainer_that_was_given_a_mistake_is_not_started_again(spark: SparkSession, make_settings: MakeSettings, tmp_path: Path) -> None:
    launch, _ = launch_of(make_settings, tmp_path, 1)
    (tmp_path / "train_scorer.py").write_text("import sys; print('studbook: no such export', file=sys.stderr); sys.exit(2)")
    with pytest.raises(Mistake, match="train_scorer: a rank ended with status 2; what it said stands above"):
        train_distributed.run(launch)


def test_more_ranks_than_task_slots_are_refused_with_the_figures(spark: SparkSession, make_settings: MakeSettings, tmp_path: Path) -> None:
    launch, _ = launch_of(make_settings, tmp_path, 3)
    words = "train_scorer.ranks: given 3, but Spark can run 2 tasks at once (cores / spark.task.cpus)"
    with pytest.raises(Mistake, match=re.escape(words)) as refused:
        train_distributed.wait_for_slots(lambda: train_distributed.count_slots(spark), launch, 0)
    assert "--set train_scorer.ranks=2" in str(refused.value)
    registered = iter([0, 1, 3])  # executors register one after the other
    assert train_distributed.wait_for_slots(lambda: next(registered), launch, 60) == 3


def test_what_would_fail_on_the_executors_only_is_refused_by_its_key(make_settings: MakeSettings, tmp_path: Path) -> None:
    launch, settings = launch_of(make_settings, tmp_path, 6)
    cluster = {"spark.master": "spark://host:7077", "spark.task.resource.gpu.amount": "1"}
    train_distributed.check_cluster(launch, settings, cluster)
    for conf, words in (
        (cluster | {"spark.dynamicAllocation.enabled": "true"}, "spark.dynamicAllocation.enabled: given true"),
        ({"spark.master": "spark://host:7077"}, "spark.task.resource.gpu.amount: given nothing, expected 1"),
    ):
        with pytest.raises(Mistake, match=words):
            train_distributed.check_cluster(launch, settings, conf)
    relative = settings.model_copy(update={"training": settings.training.model_copy(update={"root": "demo/trainings"})})
    with pytest.raises(Mistake, match=r"training\.root: given 'demo/trainings'; executors have folders of their own"):
        train_distributed.check_cluster(launch, relative, cluster)
    train_distributed.check_cluster(launch, relative, {"spark.master": "local[2,4]"})


@pytest.mark.parametrize("file", ["training/loop.py", "training/label.py", "training/train_diffusion_again.py"])
def test_a_file_that_is_no_trainer_is_refused_with_what_is_one(make_settings: MakeSettings, file: str) -> None:
    names = ["train_captioner", "train_classifier", "train_diffusion", "train_scorer"]
    words = f"trainer: given '{file}', expected the path of a trainer's file: training/NAME.py, NAME one of {names}"
    with pytest.raises(Mistake, match=re.escape(words)):
        train_distributed.plan(make_settings(), file, "export", "build.yaml", [])


def test_a_trainer_that_is_not_there_is_refused(make_settings: MakeSettings, tmp_path: Path) -> None:
    with pytest.raises(Mistake, match=r"trainer: no file at .*/train_scorer\.py"):
        train_distributed.plan(make_settings(), str(tmp_path / "train_scorer.py"), "s3://bucket/labels-1", "build.yaml", [])
