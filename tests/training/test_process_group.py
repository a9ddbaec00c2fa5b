"""How ranks start and end; what they compute is seen in test_train_scorer.py."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.training.conftest import ROOT

LAST_WORDS = """
import atexit
atexit.register(print, "finalization had begun")
from training import engine, process_group
engine.start("cpu")
print("last words", end="")
process_group.leave()
"""


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LAST_WORDS]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | environment
    return subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=120, check=False)


def test_a_launched_rank_ends_before_the_interpreters_finalization_with_all_it_said() -> None:
    with_launcher = run(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    assert (with_launcher.returncode, with_launcher.stdout) == (0, "last words"), with_launcher.stderr


def test_a_process_that_nothing_launched_goes_on_after_leaving() -> None:
    alone = run()
    assert (alone.returncode, alone.stdout) == (0, "last wordsfinalization had begun\n"), alone.stderr
