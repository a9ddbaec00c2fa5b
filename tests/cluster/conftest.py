"""A real standalone cluster for the tests of this folder: a master and two workers with a fake GPU each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyspark
import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "infra" / "standalone.sh"


@dataclass(frozen=True)
class Cluster:
    """`master` is the spark:// URL, `workers` the pids of the worker JVMs, `state` the folder with logs and work folders."""

    master: str
    workers: tuple[int, ...]
    state: Path
    environment: dict[str, str]

    def submit(self, script: Path, *arguments: str, conf: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a script by spark-submit with infra/spark-gpu.conf, made small; returns what it printed. Fails the test when it fails."""
        # the file's numbers are for hosts with 64 cores; these workers have one
        small = {
            "spark.pyspark.python": sys.executable,
            "spark.executor.cores": "1",
            "spark.task.cpus": "1",
            "spark.executor.memory": "512m",
            "spark.executor.memoryOverhead": "384m",
            "spark.databricks.delta.snapshotPartitions": "2",
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.ui.enabled": "false",
            "spark.scheduler.minRegisteredResourcesRatio": "1.0",
        } | (conf or {})
        options = [option for key, value in small.items() for option in ("--conf", f"{key}={value}")]
        submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
        command = [
            str(submit),
            "--master",
            self.master,
            "--properties-file",
            str(ROOT / "infra" / "spark-gpu.conf"),
            *options,
            str(script),
            *arguments,
        ]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done


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
