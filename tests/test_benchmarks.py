"""What the published figures rest on: the pictures, the bare loop's work, the account of CPU time, the arithmetic."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import pictures, results
from benchmarks.results import Run
from conf.settings import Limits, load_encoder
from udfs import tower_colour_grid
from udfs.decode import decode
from udfs.perceptual_hash import phash

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "tests/data/sample/images"
LIMITS = Limits().model_dump()


def test_a_drawn_photograph_is_the_same_for_its_seed_and_weighs_what_photographs_weigh() -> None:
    data = pictures.photograph(1, pictures.TWO_MEGAPIXELS)
    assert data == pictures.photograph(1, pictures.TWO_MEGAPIXELS) != pictures.photograph(2, pictures.TWO_MEGAPIXELS)
    image = decode(data, LIMITS).image
    assert image.size == pictures.TWO_MEGAPIXELS
    assert 1.5 < len(data) * 8 / (image.width * image.height) < 4


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_copy_is_another_file_with_the_same_pixels(suffix: str) -> None:
    data = next(path for path in sorted(SAMPLE.iterdir()) if path.suffix == f".{suffix}").read_bytes()
    copies = [pictures.copy_of(data, number) for number in range(3)]
    assert copies[0] == data
    assert len({hashlib.sha256(copy).digest() for copy in copies}) == 3
    assert {decode(copy, LIMITS).image.tobytes() for copy in copies} == {decode(data, LIMITS).image.tobytes()}


def test_the_bare_loop_gives_every_image_the_kernels_own_numbers(tmp_path: Path) -> None:
    pictures.write_photographs(tmp_path / "images", 5, pictures.SMALL)
    command = [sys.executable, "-m", "benchmarks.bare_loop", str(tmp_path / "images"), str(tmp_path / "out")]
    subprocess.run([*command, "--encoder", "colour-grid", "--processes", "2", "--batch-size", "2"], cwd=ROOT, check=True)
    shares = [np.load(tmp_path / f"out.{number}.npz") for number in range(2)]
    paths = [Path(path) for share in shares for path in share["path"]]
    assert paths == sorted((tmp_path / "images").iterdir())
    image = decode(paths[3].read_bytes(), LIMITS).image
    prepared = tower_colour_grid.prepare(image, load_encoder("colour-grid").model_dump())
    assert (shares[1]["vector"][0] == tower_colour_grid.encode(None, prepared[None])[0].astype("<f2")).all()
    assert tuple(bytes(value) for value in shares[1]["phash"][0]) == phash(image)


def test_the_cpu_time_of_a_process_that_outlives_its_parent_is_counted(tmp_path: Path) -> None:
    busy = "import time; [None for _ in iter(lambda: time.process_time() < 0.6, False)]"
    leaves_it = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {busy!r}])"
    out = tmp_path / "measured.json"
    subprocess.run([sys.executable, "-m", "benchmarks.measure", str(out), sys.executable, "-c", leaves_it], cwd=ROOT, check=True)
    told = json.loads(out.read_text())
    assert told["status"] == 0
    assert told["cpu"] > 0.6


def test_the_cpu_time_of_a_child_that_its_parent_ignores_is_counted_once(tmp_path: Path) -> None:
    """As Spark's Python daemon does: one worker ends before its parent, one after."""
    worker = "import time; [None for _ in iter(lambda: time.process_time() < {}, False)]; time.sleep({})"
    daemon = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
first, _ = (subprocess.Popen([sys.executable, "-c", work]) for work in ({worker.format(1, 0.5)!r}, {worker.format(1, 5)!r}))
while first.poll() is None:
    time.sleep(0.1)
"""
    out = tmp_path / "measured.json"
    subprocess.run([sys.executable, "-m", "benchmarks.measure", str(out), sys.executable, "-c", daemon], cwd=ROOT, check=True)
    told = json.loads(out.read_text())
    assert 2 < told["cpu"] < 2.9


def test_the_ratio_is_of_the_slopes_and_start_up_stands_apart() -> None:
    costs = {"bare": (1.0, 0.010), "spark": (20.0, 0.0125)}
    runs = [
        Run("p", kind, images, repeat, 0.0, (start + images * each) * (1 + repeat), {"driver": 100.0 * repeat})
        for kind, (start, each) in costs.items()
        for images in (100, 500)
        for repeat in (0, 1)
    ]
    assert results.ratios(runs, "p") == pytest.approx([0.8, 0.8])
    first = [run for run in results.of(runs, "p", "spark") if run.repeat == 0]
    assert results.slope(first)[:2] == pytest.approx((12.5, 20.0))
    table = results.markdown(results.COST_HEAD, results.cost_rows(runs))
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "| 500 | 100 | - | - |" in results.markdown(results.MEMORY_HEAD, results.memory_rows(runs))


def test_the_stages_of_an_empty_run_are_read_from_what_it_said() -> None:
    said = "== 1/2 ingest\ningest: nothing to do\n   ingest: 3.1 s\n== 2/2 train scorer\n   train scorer: 0.5 s\nThe funnel\n"
    assert results.stage_rows(said) == [["ingest", "3.1", "ingest: nothing to do"], ["train scorer", "0.5", ""]]
