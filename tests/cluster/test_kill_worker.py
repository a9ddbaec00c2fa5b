"""kill -9 of a Python worker in the middle of a wave of `embed`, on a real two-worker cluster with the real tower."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as parquet
import pytest
import yaml
from pyspark.sql import SparkSession

from conf.settings import Settings, load
from jobs import ingest
from jobs.lake import Lake
from tests.cluster.conftest import ROOT, Cluster
from tests.cluster.disturb import complete, is_computing, landing_held, wait_for
from tests.jobs.conftest import keys

IMAGES = 36


def write_config(folder: Path) -> Path:
    """The demo's config over 36 of its images, for spark-submit: three waves, each of two tasks for each worker."""
    told: dict[str, Any] = yaml.safe_load((ROOT / "conf/demo.yaml").read_text())
    told["lake"]["root"] = str(folder / "lake")
    told["spark"] = {"master": None}
    told["waves"] = {"rows": 12, "task_rows": 3}
    told["embed"] |= {"batch_size": 3, "ahead": 6, "detectors": ["open-nsfw"]}  # the demo's rule over ratings asks for it
    lines = (ROOT / "tests/data/sample/metadata.jsonl").read_text().splitlines()[:IMAGES]
    rows = [json.loads(line) for line in lines]
    rows = [row | {"file": str(ROOT / "tests/data/sample" / row["file"])} for row in rows]
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = next(source for source in told["ingest"]["sources"] if source["kind"] == "manifest")
    told["ingest"]["sources"] = [source | {"uri": str(folder / "images.jsonl")}]
    (folder / "config.yaml").write_text(yaml.safe_dump(told))
    return folder / "config.yaml"


def gpus_by_pid(wave: Path) -> dict[int, str]:
    """A staged wave's `worker` column (host:pid:gpuN) -> the address that each Python worker was assigned."""
    told = {value for file in wave.glob("rows/*.parquet") for value in parquet.read_table(file).column("worker").to_pylist()}
    found = [(int(pid), gpu) for _, pid, gpu in (value.split(":") for value in told)]
    assert len(found) == len(dict(found)), f"a Python worker saw two GPUs: {sorted(found)}"
    return dict(found)


@pytest.mark.proof  # two minutes
def test_a_python_worker_killed_in_mid_wave_loses_and_doubles_nothing_and_each_task_has_its_own_gpu(
    cluster: Cluster, spark: SparkSession, make_lake: Callable[[Settings], Lake], tmp_path: Path
) -> None:
    config = write_config(tmp_path)
    settings = load(config)
    lake = make_lake(settings)
    ingest.run(lake, load(config, ["waves.rows=100"]))
    root, log, events = tmp_path / "lake", tmp_path / "embed.log", tmp_path / "events"
    events.mkdir()
    conf = {
        "spark.eventLog.enabled": "true",
        "spark.eventLog.compress": "false",
        "spark.eventLog.dir": events.as_uri(),
        "spark.sql.session.timeZone": "Europe/Berlin",
    }
    job = cluster.launch(log, ROOT / "jobs/embed.py", "--config", str(config), conf=conf)
    try:
        with landing_held(root):  # what is staged can be looked at
            first = wait_for(lambda: complete(root, 0), job, log, "first wave")
            assigned = gpus_by_pid(first)
            own = {worker.pid: f"gpu{worker.environ()['STUDBOOK_FAKE_GPU']}" for worker in cluster.python_workers()}
            assert {pid: own[pid] for pid in assigned} == assigned
            assert set(assigned.values()) == {"gpu0", "gpu1"}
            second = wait_for(lambda: is_computing(root, 1), job, log, "second wave")
            victim = max(cluster.python_workers(), key=lambda worker: sum(worker.cpu_times()[:2]))  # one that holds a model
            victim.kill()
            assert complete(root, 1) is None
            wait_for(lambda: complete(root, 1), job, log, "second wave once more")
            later = gpus_by_pid(second)
            assert set(later.values()) == {"gpu0", "gpu1"}
            assert not psutil.pid_exists(victim.pid) or victim.status() == psutil.STATUS_ZOMBIE
        assert job.wait(120) == 0, log.read_text()[-4000:]
    finally:
        job.kill()
    lines = [line for file in events.rglob("*") if file.is_file() for line in file.read_text().splitlines()]
    failed = [line for line in lines if '"Event":"SparkListenerTaskEnd"' in line and '"Reason":"Success"' not in line]
    assert len(failed) == 1 and re.search("Python worker exited unexpectedly", failed[0])
    assert '"spark.sql.session.timeZone":"Europe/Berlin"' in "".join(lines)  # what spark-submit was told wins
    images = keys(lake, "images", "image_id")
    assert len(images) == IMAGES
    assert keys(lake, "pixels", "image_id") == keys(lake, "embeddings", "image_id") == images
    assert keys(lake, "rejects", "input_key") == []
    assert lake.version("embeddings") == 3
    assert lake.folders(lake.area("_staging", "embed")) == []
