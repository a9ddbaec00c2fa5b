"""kill -9 of an executor and of the driver of `embed` at three moments each, on a real two-worker cluster.

After a run once more the tables hold the keys of an undisturbed run, none twice, none lost. `make proof`
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image
from pyspark.sql import SparkSession

from conf.settings import Settings, load
from jobs import embed, ingest
from jobs.lake import Lake
from tests.cluster.conftest import ROOT, Cluster, command_line
from tests.cluster.disturb import committed, complete, is_computing, landing_held, staged, wait_for
from tests.jobs.conftest import keys

pytestmark = pytest.mark.proof
IMAGES, BROKEN = 36, 3
ATTEMPTS = 4  # at the moment between the last commit of a wave and the deletion of its staging, which lasts some 0.1 s
KEYS = {
    "images": ("image_id",),
    "sources": ("source", "key", "image_id"),
    "pixels": ("image_id", "view", "fingerprint"),
    "embeddings": ("image_id", "view", "fingerprint"),
    "rejects": ("stage", "input_key", "fingerprint", "code"),
}
Keys = dict[str, list[tuple[Any, ...]]]


class Corpus(NamedTuple):
    """`ingested`: a lake after ingest, to copy; `expected`: the keys of an undisturbed run."""

    folder: Path
    ingested: Path
    expected: Keys


def write_images(folder: Path) -> None:
    """36 JPEGs of 2 megapixels (a tenth of a second each), of which three end in the middle; and a file of no bytes."""
    folder.mkdir()
    for number in range(IMAGES):
        coarse = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        path = folder / f"{number:02d}.jpg"
        Image.fromarray(coarse).resize((1600, 1250), Image.Resampling.BICUBIC).save(path, quality=90)
        if number % (IMAGES // BROKEN) == 1:
            path.write_bytes(path.read_bytes()[:60_000])
    (folder / "empty.jpg").touch()


def write_config(corpus: Path, lake: Path) -> Path:
    """Three waves, each of two tasks for each worker; the tower without weights."""
    told: dict[str, Any] = yaml.safe_load((ROOT / "conf/demo.yaml").read_text())
    told |= {"lake": {"root": str(lake)}, "spark": {"master": None}, "waves": {"rows": 12, "task_rows": 3}, "encoder": "colour-grid"}
    told["ingest"] = {"sources": [{"name": "jpegs", "kind": "folder", "uri": str(corpus / "images")}]}
    told["embed"] = {"encoders": ["colour-grid"], "device": "cpu", "batch_size": 3, "decode_threads": 1, "ahead": 3}
    told["select"] = {"name": "killed", "seed": 1, "rules": []}  # the demo's ask for detectors
    config = lake.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(told))
    return config


def read_keys(lake: Lake) -> Keys:
    found = {table: keys(lake, table, *columns) for table, columns in KEYS.items()}
    assert all(len(rows) == len(set(rows)) for rows in found.values()), "a key is there twice"
    return found


@pytest.fixture(scope="module")
def corpus(spark: SparkSession, empty_lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    write_images(folder / "images")
    shutil.copytree(empty_lake, folder / "undisturbed")
    settings = load(write_config(folder, folder / "undisturbed"))
    lake = Lake(spark, settings)
    ingest.run(lake, settings)
    shutil.copytree(folder / "undisturbed", folder / "ingested")
    embed.run(lake, settings)
    expected = read_keys(lake)
    assert len(expected["images"]) == len(expected["sources"]) == IMAGES
    assert len(expected["pixels"]) == len(expected["embeddings"]) == IMAGES - BROKEN
    assert len(expected["rejects"]) == 2 * BROKEN + 1  # an output each, and the empty file
    return Corpus(folder, folder / "ingested", expected)


class Run(NamedTuple):
    """`embed` on the cluster, over a copy of the ingested lake. `root`: of the lake; `job`: spark-submit, which leads the driver's group."""

    cluster: Cluster
    root: Path
    settings: Settings
    job: subprocess.Popen[bytes]
    log: Path

    def wait_for(self, find: Callable[[], Any], what: str, every: float = 0.02) -> Any:
        return wait_for(find, self.job, self.log, what, every)

    def kill_driver(self) -> None:
        """Its JVM and its Python at once."""
        os.killpg(self.job.pid, signal.SIGKILL)
        self.job.wait()

    def kill_executor(self) -> None:
        """The one whose Python worked most."""
        executors = self.cluster.executors()
        max(executors, key=lambda executor: sum(executor.cpu_times()[:2])).kill()

    def python_driver(self) -> psutil.Process:
        return next(child for child in psutil.Process(self.job.pid).children(recursive=True) if "embed.py" in " ".join(command_line(child)))


@pytest.fixture
def start(cluster: Cluster, corpus: Corpus, tmp_path: Path) -> Iterator[Callable[[], Run]]:
    runs: list[Run] = []

    def start_one() -> Run:
        root = tmp_path / f"lake-{len(runs)}"
        shutil.copytree(corpus.ingested, root)
        config, log = write_config(corpus.folder, root), root.with_suffix(".log")
        job = cluster.launch(log, ROOT / "jobs/embed.py", "--config", str(config))
        runs.append(Run(cluster, root, load(config), job, log))
        return runs[-1]

    yield start_one
    for run in runs:
        if run.job.poll() is None:
            run.kill_driver()


def in_mid_wave(start: Callable[[], Run], kill: Callable[[Run], None]) -> Run:
    """The second wave is half computed, the first one is staged or landed."""
    run = start()
    run.wait_for(lambda: is_computing(run.root, 1), "second wave")
    kill(run)
    assert complete(run.root, 1) is None
    return run


def staged_but_not_landed(start: Callable[[], Run], kill: Callable[[Run], None]) -> Run:
    """Two waves are staged completely and closed, none has landed."""
    run = start()
    with landing_held(run.root):
        run.wait_for(lambda: complete(run.root, 1), "two staged waves")
        assert complete(run.root, 0) is not None and committed(run.root, "embeddings", 1) is None
        kill(run)
    return run


def landed_but_not_marked(start: Callable[[], Run], kill: Callable[[Run], None]) -> Run:
    """The second wave's last table has its commit; its staged rows, whose removal says that it landed, are still there."""
    for _ in range(ATTEMPTS):
        run = start()
        run.wait_for(partial(committed, run.root, "embeddings", 1), "first landing", 0.005)
        driver = run.python_driver()
        run.wait_for(partial(committed, run.root, "embeddings", 2), "second landing", 0.001)
        stop(driver)
        if complete(run.root, 1) is not None:
            kill(run)
            with suppress(psutil.NoSuchProcess):  # it was the victim
                driver.resume()
            return run
        run.kill_driver()
    raise AssertionError(f"{ATTEMPTS} times the wave was marked before the driver could be stopped")


def stop(process: psutil.Process) -> None:
    """SIGSTOP, and waits until its last thread stands still."""
    process.suspend()
    threads = Path(f"/proc/{process.pid}/task")
    while any((thread / "stat").read_text().rpartition(")")[2].split()[0] != "T" for thread in threads.iterdir()):
        time.sleep(0.001)


Moment = Callable[[Callable[[], Run], Callable[[Run], None]], Run]
MOMENTS: list[Moment] = [in_mid_wave, staged_but_not_landed, landed_but_not_marked]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_driver_loses_and_doubles_nothing(
    moment: Moment, start: Callable[[], Run], corpus: Corpus, spark: SparkSession, capsys: pytest.CaptureFixture[str]
) -> None:
    run = moment(start, Run.kill_driver)
    lake = Lake(spark, run.settings)
    assert len(lake.folders(lake.area("_staging", "embed"))) == 1  # what the dead run left
    before = {pair for pair in read_keys(lake)["embeddings"]}
    assert len(before) < len(corpus.expected["embeddings"])
    finished = sum(complete(run.root, wave) is not None for wave in range(3))
    capsys.readouterr()
    embed.run(lake, run.settings)
    told = capsys.readouterr().out
    assert re.search(rf"had stopped early; landed {finished} waves", told), told
    check(lake, run, corpus, capsys)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_executor_loses_and_doubles_nothing(
    moment: Moment, start: Callable[[], Run], corpus: Corpus, spark: SparkSession, capsys: pytest.CaptureFixture[str]
) -> None:
    run = moment(start, Run.kill_executor)
    assert run.job.wait(180) == 0, run.log.read_text()[-4000:]
    assert re.search(r"Lost executor \d", run.log.read_text())  # the kill was no accident of timing
    check(Lake(spark, run.settings), run, corpus, capsys)


def check(lake: Lake, run: Run, corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    """The keys are those of an undisturbed run, nothing staged is left, and one more run finds nothing to do."""
    assert read_keys(lake) == corpus.expected
    assert staged(run.root, 0) is None and lake.folders(lake.area("_staging", "embed")) == []
    capsys.readouterr()
    embed.run(lake, run.settings)
    assert "embed: nothing to do" in capsys.readouterr().out
    assert read_keys(lake) == corpus.expected
