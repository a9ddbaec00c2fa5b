"""The wheel holds everything that runs, and its entry points run from a folder that is not the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("conf", "jobs", "training", "udfs")
# what only runs leave behind must not reach the wheel through the copy
LEFT_BEHIND = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy: setuptools writes beside its sources."""
    source = tmp_path_factory.mktemp("source")
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=LEFT_BEHIND)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist"), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (made,) = (source / "dist").iterdir()
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, by uv (`make env` has one, on PATH or its own); without, as any installer unpacks it."""
    target = tmp_path_factory.mktemp("installed")
    own = ROOT / ".uv/bin/uv"
    uv = shutil.which("uv") or (str(own) if own.exists() else None)
    if uv is None:
        zipfile.ZipFile(wheel).extractall(target)
    else:
        options = ["--offline", "--no-deps", "--no-cache", "--quiet", "--python", sys.executable]
        subprocess.run([uv, "pip", "install", *options, "--target", str(target), str(wheel)], check=True)
    return target


def run(installed: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Python in `folder`, with nothing but the wheel and the dependencies to import from."""
    environment = os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_holds_every_module_the_settings_and_the_reports_page(installed: Path) -> None:
    def files(root: Path) -> set[str]:
        kinds = ("*.py", "*.yaml", "*.html")
        return {str(path.relative_to(root)) for room in ROOMS for kind in kinds for path in (root / room).rglob(kind)}

    assert files(installed) == files(ROOT)
    assert {"conf/demo.yaml", "conf/encoders/colour-grid.yaml", "jobs/report.html", "training/train_scorer.py"} <= files(installed)


def test_modules_come_from_the_wheel_in_another_folder(installed: Path, tmp_path: Path) -> None:
    told = run(installed, tmp_path, "-c", "import conf.settings, jobs.lake, udfs.reject; print(jobs.lake.__file__)")
    assert told.stdout.strip() == str(installed / "jobs/lake.py"), told.stderr


def test_a_stage_plans_from_another_folder(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    shutil.copy(next((ROOT / "tests/data/sample/images").glob("*.jpg")), tmp_path / "images")
    done = run(installed, tmp_path, "-m", "jobs.ingest", "--config", str(config(tmp_path)), "--plan")
    assert done.returncode == 0, done.stderr
    assert "ingest: 1 inputs pending" in done.stdout


def test_a_wrong_config_is_one_line_and_status_2_from_another_folder(installed: Path, tmp_path: Path) -> None:
    wrong = config(tmp_path)
    wrong.write_text(wrong.read_text().replace("device: cpu", "devise: cpu"))
    done = run(installed, tmp_path, "-m", "jobs.ingest", "--config", str(wrong), "--plan")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("studbook: ") and "devise" in line and "device" in line


def config(folder: Path) -> Path:
    """The config of a build in `folder`, by absolute paths."""
    path = folder / "build.yaml"
    path.write_text(f"""\
lake: {{root: {folder}/lake}}
spark: {{master: "local[2,4]", jars: {ROOT}/.cache/jars, conf: {{spark.driver.memory: 1g}}}}
mlflow: {{tracking_uri: "sqlite:///{folder}/mlflow.db"}}
encoder: colour-grid
ingest: {{sources: [{{name: folder, kind: folder, uri: {folder}/images}}]}}
embed: {{encoders: [colour-grid], device: cpu}}
label: {{views: {{"blur:1": 0.5}}}}
select: {{name: one, seed: 1, rules: []}}
export: {{root: {folder}/exports}}
training: {{root: {folder}/trainings}}
report: {{path: {folder}/report.html}}
""")
    return path
