"""A fit that is cut and goes on: on the same ranks to the bit, on other numbers of ranks to the rounding, every row once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from tests.training.conftest import COLUMNS, ROOT, write_export
from training import feed
from training.exports import open_export

CUT = 35  # of 48 steps, in the middle of an epoch of 3
KINDS = [(1, "fp32"), (2, "fp32"), (3, "fp32"), (3, "bf16")]  # the whole matrix: tests/proof
WORLDS = [1]


def launch(ranks: int, *arguments: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(ROOT / "tests/training/fit_on_ranks.py"), *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each kind fitted straight by 2 ranks, and once more from its checkpoint of step CUT; then from there by 1 and by 4 ranks."""
    out = tmp_path_factory.mktemp("resume")
    export = write_export(out / "export")
    launch(2, export, out, *(f"{stage}:{precision}:{stage}-{precision}:{CUT}" for stage, precision in KINDS))
    for world in WORLDS:
        for stage, precision in KINDS:
            straight, here = out / f"{stage}-{precision}", out / f"{stage}-{precision}-world-{world}"
            shutil.copytree(straight / f"checkpoints/step-{CUT:08d}", here / f"checkpoints/step-{CUT:08d}")
            shutil.copytree(straight / "row_losses", here / "row_losses")
        launch(world, export, out, *(f"{stage}:{precision}:{stage}-{precision}-world-{world}" for stage, precision in KINDS))
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "weights.safetensors")


@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_the_same_number_of_ranks_goes_on_to_the_same_bits(fitted: Path, stage: int, precision: str) -> None:
    straight, cut = weights(fitted / f"{stage}-{precision}"), weights(fitted / f"{stage}-{precision}-{CUT}")
    assert all(torch.equal(straight[name], cut[name]) for name in straight)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_another_number_of_ranks_goes_on_to_the_same_weights_but_for_rounding(fitted: Path, stage: int, precision: str, world: int) -> None:
    straight, other = weights(fitted / f"{stage}-{precision}"), weights(fitted / f"{stage}-{precision}-world-{world}")
    assert straight.keys() == other.keys()
    worst = max(float((straight[name] - other[name]).abs().max()) for name in straight)
    assert worst < (1e-5 if precision == "fp32" else 2e-3), worst


def test_the_stages_agree(fitted: Path) -> None:
    first = weights(fitted / "1-fp32")
    for stage in (2, 3):
        other = weights(fitted / f"{stage}-fp32")
        assert max(float((first[name] - other[name]).abs().max()) for name in first) < 1e-5


@pytest.mark.parametrize("folder", [f"1-fp32-{CUT}", "3-fp32-world-1"])
def test_every_row_is_trained_on_once_an_epoch_whoever_went_on(fitted: Path, folder: str) -> None:
    export = open_export(fitted / "export", "labels", COLUMNS, ("train", "held_out"))
    expected = Counter(feed.read_bucket(export, "train", ("image_id",))["image_id"])
    tables = [pq.read_table(path).to_pandas() for path in (fitted / folder / "row_losses").iterdir()]
    for epoch in range(16):
        seen = Counter(image_id for table in tables for image_id in table["image_id"][table["epoch"] == epoch])
        assert seen == expected, epoch
