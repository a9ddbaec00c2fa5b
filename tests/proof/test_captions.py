"""10,000 requests of the paid stage at 30 % injected failures and random kill -9 of Python workers, executors and the driver, on a real cluster.

The driver is started again until it ends by itself. At the end the promises are judged from the server's own count, the journal and the tables
(tests/proof/captioned.py), and one more start asks nothing. `make proof`
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from pyspark.sql import SparkSession

from conf.settings import Settings, load
from jobs import caption, caption_ledger, ingest, session
from jobs.lake import Lake
from tests.cluster.conftest import ROOT, Cluster
from tests.proof.captioned import MENDED, RETRIED, Books, judge, write_config, write_images
from tests.servers.gemini_server import GeminiServer
from udfs.caption_journal import Journal, Place
from udfs.caption_record import Terms

pytestmark = pytest.mark.proof
IMAGES = 8500  # whose first requests, tries and repairs are some 12,000
KILLS = {"worker": 5, "executor": 2, "driver": 2}
MOST_STARTS = 8
QUICK = {key: value for key, value in session.LOCAL.items() if not key.startswith("spark.driver.")} | {
    "spark.driver.extraJavaOptions": session.JAVA,
    "spark.executor.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
}  # a start on a cluster takes minutes without


class Runs:
    """The stage on the cluster, started again and again."""

    def __init__(self, cluster: Cluster, config: Path, folder: Path, books: Books) -> None:
        self._cluster, self._config, self._folder, self._books = cluster, config, folder, books
        self.logs: list[Path] = []

    def start(self) -> None:
        assert len(self.logs) < MOST_STARTS, self.logs[-1].read_text()[-4000:]
        self.logs.append(self._folder / f"start-{len(self.logs)}.log")
        self.job = self._cluster.launch(self.logs[-1], ROOT / "jobs/caption.py", "--config", str(self._config), conf=QUICK)

    def to_the_end(self) -> None:
        """Starts it until it ends by itself."""
        while self.job.wait(900) != 0:
            self.start()

    def kill(self, what: str) -> bool:
        """-> whether there was one to kill."""
        try:
            if what == "driver":
                os.killpg(self.job.pid, signal.SIGKILL)  # its JVM and its Python
                self.job.wait()
            else:
                processes = self._cluster.python_workers() if what == "worker" else self._cluster.executors()
                max(processes, key=lambda process: sum(process.cpu_times()[:2])).kill()
        except (psutil.NoSuchProcess, ValueError):
            return False
        self._books.note(what, 2 if what == "driver" else 1)
        return True

    def stop(self) -> None:
        if self.job.poll() is None:
            os.killpg(self.job.pid, signal.SIGKILL)
            self.job.wait()


def test_10_000_requests_with_failures_and_kills_keep_every_promise(
    cluster: Cluster, spark: SparkSession, make_lake: Callable[[Settings], Lake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        write_images(tmp_path / f"images/{number}.tar", IMAGES // 4, number * (IMAGES // 4))
    script = {"share": 0.3, "modes": [*RETRIED, *MENDED], "latency": 0.1}
    dice = random.Random(6)
    victims = [what for what, times in KILLS.items() for _ in range(times)]
    dice.shuffle(victims)
    began = time.monotonic()
    with GeminiServer(script, process=True) as server:
        settings = load(write_config(tmp_path, server.url, {"master": None}, rows=2500, budget=300.0, tries=4))
        lake = make_lake(settings)
        ingest.run(lake, settings)
        books = Books(lake, settings, server)
        runs = Runs(cluster, tmp_path / "config.yaml", tmp_path, books)
        runs.start()
        try:
            at = 0
            for what in victims:
                at = max(at, books.requests()) + dice.randrange(IMAGES // 20, IMAGES // 8)
                while books.requests() < at and (ended := runs.job.poll()) is None:
                    time.sleep(0.2)
                if ended == 0:
                    break
                if ended is not None:
                    runs.start()
                while not runs.kill(what):  # between two executors there is none
                    assert runs.job.poll() is None
                    time.sleep(0.1)
                if what == "driver":
                    runs.start()
            runs.to_the_end()
        finally:
            runs.stop()
        while "caption: tier all: nothing to do" not in capsys.readouterr().out:  # transient rejects are tried again, three times at most
            requests = books.requests()
            caption.run(lake, settings)
        assert books.requests() == requests
        figures = judge(books)
    with capsys.disabled():
        figures |= {"starts": len(runs.logs), "seconds": round(time.monotonic() - began)}
        print("", *(f"{name}: {value}" for name, value in figures.items()), sep="\n  ")
    assert figures["requests"] >= 10_000
    assert figures["kills"] == KILLS and figures["lost"] > 0
    assert figures["attempts that did not end"] >= len(victims)  # the kills met tasks at work


def test_rows_that_an_attempt_may_not_ask_for_are_asked_for_by_the_same_run(
    spark: SparkSession, make_lake: Callable[[Settings], Lake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An attempt that was taken for dead finds the open part of its heir, which died with its executor. No failure of a task counts it."""
    write_images(tmp_path / "images/0.tar", 48)
    with GeminiServer({"latency": 0.5}, process=True) as server:
        settings = load(write_config(tmp_path, server.url, {"master": None}, rows=48, budget=50.0, in_flight=2))
        lake = make_lake(settings)
        ingest.run(lake, settings)
        books = Books(lake, settings, server)
        stage = threading.Thread(target=caption.run, args=(lake, settings))
        stage.start()
        while not (begun := list((tmp_path / "lake/_captions").glob("*/*/*/000-*-answers.jsonl"))):
            assert stage.is_alive()
            time.sleep(0.02)
        partition = begun[0].parent
        wave = caption_ledger.folder(lake, partition.parts[-3], int(partition.parts[-2]))
        Journal(lake.opener, Place(wave, int(partition.name), 1), Terms(0, 1, 1, 1, 3.0)).open()
        stage.join(120)
        assert not stage.is_alive()
        said = capsys.readouterr().out
        assert said.count(" images asked") == 2, said  # two waves of one run
        assert "caption: tier all: 48/48 images asked" in said
        assert lake.read("captions").select("image_id").distinct().count() == 48
        asked = books.requests()
        caption.run(lake, settings)
        assert books.requests() == asked == 48
