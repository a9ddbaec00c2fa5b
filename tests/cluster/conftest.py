"""A real standalone cluster for the tests of this folder: a master and two workers with a fake GPU each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyspark
import pytest

from tests.jobs.conftest import empty_lake, make_lake, spark

__all__ = ["empty_lake", "make_lake", "spark"]  # fixtures: tables are made and read in this process
ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "infra" / "standalone.sh"
# infra/spark-gpu.conf is for hosts with 64 cores; these workers have one
SMALL = {
    "spark.pyspark.python": sys.executable,
    "spark.executor.cores": "1",
    "spark.task.cpus": "1",
    "spark.executor.memory": "512m",
    "spark.executor.memoryOverhead": "384m",
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.sql.shuffle.partitions": "2",
    "spark.driver.memory": "768m",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.ui.enabled": "false",
    "spark.scheduler.minRegisteredResourcesRatio": "1.0",
}


@dataclass(frozen=True)
class Cluster:
    """`master` is the spark:// URL, `workers` the pids of the worker JVMs, `state` the folder with logs and work folders."""

    master: str
    workers: tuple[int, ...]
    state: Path
    environment: dict[str, str]

    def command(self, script: Path, *arguments: str, conf: dict[str, str] | None = None) -> list[str]:
        """spark-submit of a script with infra/spark-gpu.conf, made small, and the Delta jars."""
        options = [option for key, value in (SMALL | (conf or {})).items() for option in ("--conf", f"{key}={value}")]
        jars = ",".join(str(jar) for jar in sorted((ROOT / ".cache/jars").glob("*.jar")))
        properties = str(ROOT / "infra" / "spark-gpu.conf")
        submit = str(Path(pyspark.__file__).parent / "bin" / "spark-submit")
        return [submit, "--master", self.master, "--properties-file", properties, "--jars", jars, *options, str(script), *arguments]

    def submit(self, script: Path, *arguments: str, conf: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a script to its end; returns what it printed. Fails the test when it fails."""
        command = self.command(script, *arguments, conf=conf)
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done

    def launch(self, log: Path, script: Path, *arguments: str, conf: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Starts a script, whose driver (JVM and Python) is a process group of its own; it prints into `log`."""
        command = self.command(script, *arguments, conf=conf)
        with log.open("wb") as out:
            return subprocess.Popen(command, env=self.environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)

    def executors(self) -> list[psutil.Process]:
        """The executor JVMs of the application that runs now."""
        children = [child for worker in self.workers for child in psutil.Process(worker).children()]
        return [child for child in children if "CoarseGrainedExecutorBackend" in " ".join(command_line(child))]

    def python_workers(self) -> list[psutil.Process]:
        """The Python workers of those executors: children of each one's pyspark.daemon."""
        daemons = [child for executor in self.executors() for child in executor.children() if "pyspark.daemon" in command_line(child)]
        return [worker for daemon in daemons for worker in daemon.children()]


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    state = tmp_path_factory.mktemp("standalone")
    environment = os.environ | {
        "STANDALONE_DIR": str(state),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "PYSPARK_PYTHON": sys.executable,  # else spark-submit runs the python3 on PATH
        "SPARK_HOME": str(Path(pyspark.__file__).parent),
    }
    started = subprocess.run([SCRIPT, "start", "2"], env=environment, capture_output=True, text=True, timeout=240, check=False)
    try:
        assert started.returncode == 0, started.stderr
        workers = tuple(int((state / f"worker-{number}.pid").read_text()) for number in (0, 1))
        yield Cluster(started.stdout.strip(), workers, state, environment)
    finally:
        subprocess.run([SCRIPT, "stop"], env=environment, timeout=60, check=True)
