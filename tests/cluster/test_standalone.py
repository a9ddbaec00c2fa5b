"""infra/standalone.sh and infra/spark-gpu.conf on a real two-worker cluster."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.cluster.conftest import SCRIPT, Cluster


def test_each_task_is_assigned_one_gpu_and_both_workers_share_the_tasks(cluster: Cluster) -> None:
    done = cluster.submit(Path(__file__).with_name("gpu_addresses.py"))
    assigned = json.loads(done.stdout.splitlines()[-1])
    assert len(assigned) == 6
    assert {tuple(addresses) for addresses in assigned} == {("0",), ("1",)}


def test_a_second_start_over_a_running_cluster_is_refused(cluster: Cluster) -> None:
    again = subprocess.run([SCRIPT, "start"], env=cluster.environment, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "stop it first" in again.stderr


def test_stop_ends_only_spark_daemons_even_when_a_pid_has_passed_to_another_process(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as bystander:
        (tmp_path / "worker-0.pid").write_text(str(bystander.pid))
        subprocess.run([SCRIPT, "stop"], env=os.environ | {"STANDALONE_DIR": str(tmp_path)}, check=True)
        assert bystander.poll() is None
        assert not (tmp_path / "worker-0.pid").exists()
        bystander.kill()
