"""What the published figures rest on: the pictures, the bare loop's work, the account of CPU time, the arithmetic."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from benchmarks import bench, feed_loops, feed_part, lakes, linear_part, made_exports, pictures, results, step_part
from benchmarks.results import Run
from conf.build import Limits
from conf.settings import load, load_encoder
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
    shares = [parquet.read_table(tmp_path / f"out/{number}.parquet").to_pylist() for number in range(2)]
    assert [Path(row["path"]) for share in shares for row in share] == sorted((tmp_path / "images").iterdir())
    row = shares[1][0]
    image = decode(Path(row["path"]).read_bytes(), LIMITS).image
    prepared = tower_colour_grid.prepare(image, load_encoder("colour-grid").model_dump())
    assert row["vector"] == tower_colour_grid.encode(None, prepared[None])[0].astype("<f2").tobytes()
    assert (row["phash"], row["mirror"]) == phash(image)


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


@pytest.mark.parametrize(("kind", "column", "rows", "file_rows"), [("labels", "vectors", 1000, 300), ("images", "pixels", 48, 20)])
def test_the_feed_and_the_loops_it_is_measured_against_give_the_same_rows(
    kind: str, column: str, rows: int, file_rows: int, tmp_path: Path
) -> None:
    made_exports.make(tmp_path / "export", kind, rows, file_rows)
    work = feed_loops.work_on(kind, tmp_path / "export")
    given = {}
    for loop in ("feed", "raw", "raw-shuffled", "loader-0"):
        batches = [(np.asarray(arrays[column])[:count], count) for arrays, count in feed_loops.LOOPS[loop](work)(0)]
        assert sum(count for _, count in batches) == rows
        given[loop] = sorted(row.tobytes() for part, _ in batches for row in part)
    assert len(set(given["raw"])) == rows
    assert given["feed"] == given["raw"] == given["raw-shuffled"] == given["loader-0"]


def feed_run(loop: str, rows: int, repeat: int, delivered: int, wall: float) -> feed_part.Run:
    passes = [{"rows": delivered, "wall": wall, "cpu": 2 * wall, "first": wall if delivered else None}] * feed_part.PASSES
    return feed_part.Run("labels", loop, rows, repeat, 100.0, passes, 9.0, 9.0, {"driver": 200.0 + rows})


def test_a_loop_that_lost_rows_has_no_rate_and_the_loss_is_told() -> None:
    seconds = {loop: 2.0 for loop in feed_loops.LOOPS} | {"feed": 2.5, "raw": 2.0}
    runs = [feed_run(loop, 100, repeat, 100, wall) for loop, wall in seconds.items() for repeat in (0, 1) if loop != "petastorm"]
    runs += [feed_run("petastorm", 100, 0, 100, 4.0), feed_run("petastorm", 100, 1, 30, 0.1)]
    runs += [feed_run(loop, 300, 0, 300, 1.0) for loop in seconds]
    assert feed_part.ratios(runs, "feed", 1, "wall", "raw") == [0.8, 0.8]
    assert feed_part.ratios(runs, "petastorm", 1, "cpu", "raw") == [0.5]
    rows = {row[0]: row[1:] for row in feed_part.rate_rows(runs)}
    assert rows["petastorm"][0] == "25" and rows["petastorm"][-2:] == ["2 of 4", "140"]
    assert rows["feed"][-2:] == ["0 of 4", "0"]
    memory = feed_part.memory_rows(runs)
    assert memory[:2] == [["feed", "100", "100", "300", "-"], ["feed", "300", "100", "500", "-"]]
    tables = [results.markdown(feed_part.HEAD, feed_part.rate_rows(runs)), results.markdown(feed_part.MEMORY_HEAD, memory)]
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)


def test_a_step_is_compared_with_the_bare_one_of_its_repeat_and_only_when_both_end_alike() -> None:
    times = {"ddp-memory": 1.0, "ddp-feed": 1.25, "zero-1": 1.5}
    runs = [
        step_part.Run(how, repeat, *2 * [[step * (1 + repeat)] * 3], [0.01], [2.0] * (how == "zero-1"), 50.0, 9.0, 9.0, {"worker": 700.0})
        for how, step in times.items()
        for repeat in (0, 1)
    ]
    assert step_part.ratios(runs, "zero-1", "ddp-memory") == [1.5, 1.5]
    assert step_part.ratios(runs, "zero-1", "ddp-feed") == pytest.approx([1.2, 1.2])
    rows = step_part.step_rows(runs)
    assert [row[0] for row in rows] == list(times)
    assert {len(row) for row in rows} == {len(step_part.HEAD)}
    step_part.check_same(runs)
    with pytest.raises(RuntimeError, match=r"weights of norm 50.1 by zero-1, 50.0 by ddp-memory"):
        step_part.check_same([*runs, runs[-1]._replace(weights=50.1)])


def runs_of(costs: dict[str, tuple[float, float]], sizes: tuple[int, ...] = (100, 500)) -> list[Run]:
    """kind -> (start-up, CPU seconds an image) as measured twice, the second time at twice the cost."""
    return [
        Run("p", kind, images, repeat, 0.0, (start + images * each) * (1 + repeat), {"driver": 100.0 * repeat})
        for kind, (start, each) in costs.items()
        for images in sizes
        for repeat in (0, 1)
    ]


def test_the_ratio_is_of_the_slopes_and_start_up_stands_apart() -> None:
    runs = runs_of({"ray": (30.0, 0.02), "bare": (1.0, 0.010), "spark": (20.0, 0.0125)})
    assert results.ratios(runs, "p") == pytest.approx([1.25, 1.25])
    assert results.ratios(runs, "p", "spark", "ray") == pytest.approx([0.625, 0.625])
    first = [run for run in results.of(runs, "p", "spark") if run.repeat == 0]
    assert results.slope(first)[:2] == pytest.approx((12.5, 20.0))
    rows = results.cost_rows(runs)
    assert [row[1] for row in rows] == ["bare loop", "Studbook", "Ray Data"]
    assert {len(row) for row in rows} == {len(results.COST_HEAD)}
    assert "| 500 | 100 | - | - |" in results.markdown(results.MEMORY_HEAD, results.memory_rows(runs))


def test_a_cost_that_grows_with_the_lake_is_told_whatever_start_up_costs() -> None:
    sizes = (300, 3_000, 30_000)
    assert linear_part.growth(runs_of({"spark": (20.0, 0.004)}, sizes), sizes) == pytest.approx([1.0, 1.0])
    grown = [
        run._replace(cpu=run.cpu + (run.images == 30_000) * 27.0 * (1 + run.repeat)) for run in runs_of({"spark": (20.0, 0.004)}, sizes)
    ]
    assert linear_part.growth(grown, sizes) == pytest.approx([1.25, 1.25])
    assert {len(row) for row in linear_part.rows(grown)} == {len(linear_part.HEAD)}


def test_pipelines_that_made_other_vectors_or_other_images_are_not_compared() -> None:
    def made(*values: float) -> dict[bytes, bytes]:
        return {bytes([number]): np.array([value], "<f2").tobytes() for number, value in enumerate(values)}

    bench.check_same("p", 2, {"bare": made(0.5, 0.25), "daft": made(0.5, 0.252)})
    with pytest.raises(RuntimeError, match=r"daft and bare differ by 0\.25"):
        bench.check_same("p", 2, {"bare": made(0.5, 0.25), "daft": made(0.5, 0.5)})
    with pytest.raises(RuntimeError, match="2 images; daft embedded 1, bare 2"):
        bench.check_same("p", 2, {"bare": made(0.5, 0.25), "daft": made(0.5)})
    with pytest.raises(RuntimeError, match="differ by nan"):
        bench.check_same("p", 1, {"bare": made(0.5), "daft": made(float("nan"))})


def test_the_measured_stage_runs_under_settings_that_are_whole(tmp_path: Path) -> None:
    told = lakes.overrides(tmp_path / "lake", tmp_path / "images", "clip-vit-b-16-demo", (300, 75))
    settings = load(ROOT / lakes.CONFIG, told[1::2])
    assert settings.embed.encoders == ("clip-vit-b-16-demo",) and settings.embed.model_threads == 1
    assert (settings.waves.rows, settings.waves.task_rows) == (300, 75)


def test_the_peers_run_the_kernel_on_the_projects_own_versions() -> None:
    pinned = {
        line.split(" ")[0].partition("==")[0]: line.split(" ")[0].partition("==")[2]
        for line in (ROOT / "benchmarks/peers.lock").read_text().splitlines()
        if line[:1].isalnum()
    }
    assert pinned["daft"] and pinned["ray"]
    for name in ("numpy", "onnxruntime", "pillow", "simplejpeg", "pandas"):
        assert f"\n{name}=={pinned[name]} " in (ROOT / "requirements.lock").read_text()


def test_the_stages_of_an_empty_run_are_read_from_what_it_said() -> None:
    said = "== 1/2 ingest\ningest: nothing to do\n   ingest: 3.1 s\n== 2/2 train scorer\n   train scorer: 0.5 s\nThe funnel\n"
    assert results.stage_rows(said) == [["ingest", "3.1", "ingest: nothing to do"], ["train scorer", "0.5", ""]]
