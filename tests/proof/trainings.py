"""A trainer's real command as a process that a test disturbs: where it stands, its ranks, what is left of it, and what came out."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pyarrow.parquet as pq
import safetensors.torch

from conf.settings import load
from tests.training.conftest import ROOT
from tests.training.mlflow_server import _wait as wait_for_server
from training import tracker

MARK = "STUDBOOK_PROOF"  # in the environment of every process that a start brought up, orphans too
PATIENCE = 150.0  # seconds for what has to happen before a test can disturb it
Found = TypeVar("Found")


def until(find: Callable[[], Found], what: str, seconds: float = PATIENCE, every: float = 0.02) -> Found:
    """Polls until `find` finds something. Fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < deadline, f"no {what} in {seconds:.0f} s"
        time.sleep(every)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def free_store(folder: Path) -> list[str]:
    return [f"mlflow.tracking_uri=sqlite:///{folder}/store/mlflow.db", f"mlflow.artifacts={folder}/artifacts"]


@dataclass
class Training:
    """One training: the same command each time it is started, with other overrides where it is to be run in another way."""

    export: Path
    folder: Path  # of the test's own
    section: tuple[str, ...]  # settings of the trainer's section
    store_at: list[str]  # settings of mlflow
    trainer: str = "train_scorer"
    started: list[Start] = field(default_factory=list)

    def overrides(self) -> list[str]:
        return [*self.store_at, *(f"{self.trainer}.{one}" for one in self.section)]

    def start(self, *more: str, before: list[str] | None = None) -> Start:
        """`before`: another way to start the trainer than `python -m`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        overrides = [*self.overrides(), f"training.root={self.folder}/trainings", *more]
        sets = [part for override in overrides for part in ("--set", override)]
        line = [
            *(before or [sys.executable, "-m", f"training.{self.trainer}"]),
            str(self.export),
            "--config",
            str(ROOT / "conf/demo.yaml"),
            *sets,
        ]
        self.started.append(Start(line, self.folder / f"start-{len(self.started)}.log", self))
        return self.started[-1]

    def finish(self, *more: str, before: list[str] | None = None) -> Start:
        start = self.start(*more, before=before)
        assert start.wait(300) == 0, start.said()
        return start

    @property
    def root(self) -> Path | None:
        """The training's folder, when there is one."""
        return next((path for path in (self.folder / "trainings").glob("*-*") if path.is_dir()), None)

    def checkpoints(self) -> list[Path]:
        return sorted(path for path in (self.folder / "trainings").glob("*/checkpoints/step-????????") if (path / "state.json").is_file())

    def half_written(self) -> bool:
        return any((self.folder / "trainings").glob("*/checkpoints/*.part"))

    def step(self) -> int:
        """Of the newest checkpoint, 0 when there is none."""
        return max((int(path.name.removeprefix("step-")) for path in self.checkpoints()), default=0)

    def finished(self) -> dict[str, Any] | None:
        """finished.json, when it is there."""
        found = list((self.folder / "trainings").glob("*/finished.json"))
        return json.loads(found[0].read_text()) if found else None

    def journal(self) -> list[str]:
        """The kinds of its whole events."""
        lines = [line for path in (self.folder / "trainings").glob("*/journal.jsonl") for line in path.read_bytes().split(b"\n")[:-1]]
        return [json.loads(line)["kind"] for line in lines]

    def delivered(self) -> int:
        """How many events MLflow has."""
        return sum(json.loads(path.read_text())["count"] for path in (self.folder / "trainings").glob("*/journal.sent"))

    def undelivered(self) -> int:
        return len(self.journal()) - self.delivered()

    def rows_seen(self) -> dict[int, Counter[bytes]]:
        """Epoch -> image_id -> how often it was trained on."""
        seen: dict[int, Counter[bytes]] = {}
        for path in (self.folder / "trainings").glob("*/row_losses/*"):
            table = pq.read_table(path)
            for image_id, epoch in zip(table["image_id"].to_pylist(), table["epoch"].to_pylist(), strict=True):
                seen.setdefault(epoch, Counter())[image_id] += 1
        return seen

    def store(self) -> Store:
        return Store(self)

    def end(self) -> None:
        for start in self.started:
            start.kill_all()


class Start:
    """A running command. `said` is what it and its ranks printed."""

    def __init__(self, line: list[str], log: Path, training: Training) -> None:
        self.training, self.log, self._mark = training, log, uuid.uuid4().hex
        self.from_step = training.step()  # the newest checkpoint when it began
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= {MARK: self._mark, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as out:
            self.process = subprocess.Popen(line, cwd=log.parent, env=environment, stdout=out, stderr=out, start_new_session=True)

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def wait(self, seconds: float) -> int:
        """-> exit status of the command itself."""
        return self.process.wait(seconds)

    def all(self) -> list[psutil.Process]:
        """Every living process of this start, by its environment: a rank whose parent is gone is found too."""
        return [one for one in psutil.process_iter() if _variable(one, MARK) == self._mark and _lives(one)]

    def ranks(self) -> dict[int, psutil.Process]:
        """Those that a launcher started as ranks, and not the processes that they start."""
        found = [(one, _variable(one, "RANK")) for one in self.all()]
        pids = {one.pid for one, rank in found if rank}
        return {int(rank): one for one, rank in found if rank and _parent(one) not in pids}

    def launcher(self) -> psutil.Process:
        """torch.distributed.run: the child of the command."""
        (launcher,) = psutil.Process(self.process.pid).children()
        assert "torch.distributed.run" in launcher.cmdline()
        return launcher

    def after(self, step: int, seconds: float = 0.0) -> None:
        """Waits until there is a checkpoint after `step`, and then some seconds."""
        until(lambda: self.training.step() > step or self.process.poll() is not None, f"checkpoint after step {step}")
        time.sleep(seconds)
        assert self.process.poll() is None, f"it ended before it could be disturbed:\n{self.said()}"

    def kill_all(self) -> None:
        for one in self.all():
            with suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
        self.process.wait()

    def gone(self, seconds: float) -> float:
        """Waits until no process of it lives -> how long that took."""
        began = time.monotonic()
        until(lambda: not self.all(), f"end of {self.all()}; said:\n{self.said()}", seconds, 0.1)
        return time.monotonic() - began

    def goes_on_after(self) -> int:
        """The step that it said it goes on after, 0 when it began anew."""
        found = re.search(r"goes on after step (\d+) of", self.log.read_text(errors="replace"))
        return int(found[1]) if found else 0


class Store:
    """What a finished training left in MLflow."""

    def __init__(self, training: Training) -> None:
        self.settings = load(ROOT / "conf/demo.yaml", training.overrides())
        self.client = tracker.connect(self.settings.mlflow)
        self.model = getattr(self.settings, training.trainer).model

    def version(self) -> Any:
        """The only one."""
        (version,) = self.client.search_model_versions(f"name = '{self.model}'")
        return self.client.get_model_version(self.model, version.version)

    def run(self) -> Any:
        """The only one, FINISHED, of the only version."""
        experiment = self.client.get_experiment_by_name(self.settings.mlflow.experiment)
        assert experiment is not None
        (run,) = self.client.search_runs([experiment.experiment_id])
        assert run.info.status == "FINISHED"
        assert run.info.run_id == self.version().run_id
        return run

    def steps(self) -> dict[str, list[int]]:
        """Metric -> its history's steps; without those of the machine."""
        run = self.run()
        names = [name for name in run.data.metrics if not name.startswith("system/")]
        return {name: [one.step for one in self.client.get_metric_history(run.info.run_id, name)] for name in names}

    def losses(self) -> list[tuple[int, float]]:
        return [(one.step, one.value) for one in self.client.get_metric_history(self.run().info.run_id, "loss")]

    def weights(self, file: str) -> dict[str, Any]:
        return safetensors.torch.load_file(self.client.download_artifacts(self.run().info.run_id, file))


class Server:
    """A real `mlflow server` on a port of its own, that can be killed and come back with the same store. It is not up at first."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._port = free_port()
        self.settings = [f"mlflow.tracking_uri=http://127.0.0.1:{self._port}", "mlflow.artifacts=null"]
        self._running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db", "--artifacts-destination", str(self._folder / "artifacts")]
        command = [
            str(Path(sys.executable).parent / "mlflow"),
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self._port),
            "--workers",
            "1",
        ]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("wb") as log:
            self._running = subprocess.Popen(
                [*command, *store], stdout=log, stderr=log, cwd=self._folder, env=environment, start_new_session=True
            )
        wait_for_server(self._port, self._running, self._folder / "server.log")

    def kill(self) -> None:
        """kill -9 of it and its workers."""
        if self._running is not None:
            os.killpg(self._running.pid, signal.SIGKILL)
            self._running.wait()
            self._running = None


def _variable(process: psutil.Process, name: str) -> str:
    with suppress(psutil.Error):
        return process.environ().get(name, "")
    return ""


def _parent(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return process.ppid()
    return 0


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
