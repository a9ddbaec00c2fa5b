"""500 requests of the paid stage at 30 % injected failures, with a Python worker and then the driver killed (kill -9). The proof has 10,000."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from conf.settings import Settings, load
from jobs import caption, ingest
from jobs.lake import Lake
from tests.cluster.conftest import command_line
from tests.proof.captioned import LOCAL, MENDED, RETRIED, Books, judge, start, write_config, write_images
from tests.servers.gemini_server import GeminiServer

IMAGES = 400  # whose first requests, tries and repairs are some 500


def wait_for(books: Books, requests: int, job: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while books.requests() < requests:
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)


def kill_worker(job: subprocess.Popen[bytes]) -> None:
    """The Python worker that worked most."""
    processes = psutil.Process(job.pid).children(recursive=True)
    daemons = {process.pid for process in processes if "pyspark.daemon" in command_line(process)}
    workers = [process for process in processes if process.ppid() in daemons]
    max(workers, key=lambda worker: sum(worker.cpu_times()[:2])).kill()


def test_after_kills_every_image_is_captioned_or_refused_and_nothing_is_bought_twice(
    make_lake: Callable[[Settings], Lake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images/0.tar", IMAGES)
    script = {"share": 0.3, "modes": [mode for mode in (*RETRIED, *MENDED) if mode != "hang"], "latency": 0.03}
    with GeminiServer(script, process=True) as server:
        config = write_config(
            tmp_path, server.url, LOCAL, IMAGES, budget=150.0, attempts=1, tries=3
        )  # three failures are a refusal for good
        settings = load(config)
        lake = make_lake(settings)
        ingest.run(lake, settings)
        books, log = Books(lake, settings, server), tmp_path / "log"
        job = start(config, log)
        try:
            wait_for(books, 100, job, log)
            kill_worker(job)
            books.note("worker", 1)
            wait_for(books, 430, job, log)
        finally:
            os.killpg(job.pid, signal.SIGKILL)
        books.note("driver", 2)
        job.wait()
        caption.run(lake, settings)
        requests = books.requests()
        caption.run(lake, settings)
        assert "caption: tier all: nothing to do" in capsys.readouterr().out and books.requests() == requests
        figures = judge(books)
    with capsys.disabled():
        print("", *(f"{name}: {value}" for name, value in figures.items()), sep="\n  ")
    assert figures["requests"] >= 500 and figures["lost"] > 0 and figures["attempts that did not end"] >= 2
