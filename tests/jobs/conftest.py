"""A real Spark session, an empty lake a test, and settings over images made in the test's folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyspark.sql import SparkSession

from conf.build import Spark
from conf.settings import Settings
from jobs import session
from jobs.lake import Lake

REPOSITORY = Path(__file__).parents[2]
MakeSettings = Callable[..., Settings]


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    jars = str(REPOSITORY / ".cache/jars")
    started = session.start(Spark(master="local[2,4]", jars=jars, conf={"spark.driver.memory": "1500m"}))
    yield started
    started.stop()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 12 small images in two sub-folders."""
    folder = tmp_path / "images"
    for number in range(12):
        write_image(folder / f"part-{number % 2}" / f"{number:02d}.png", number)
    return folder


@pytest.fixture
def make_settings(tmp_path: Path) -> MakeSettings:
    """Settings over `tmp_path`: source `folder` of tmp_path/images, the colour-grid tower, one wave of two tasks."""

    def make(**sections: Any) -> Settings:
        whole: dict[str, Any] = {
            "lake": {"root": str(tmp_path / "lake")},
            "mlflow": {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "artifacts": str(tmp_path / "artifacts")},
            "waves": {"rows": 40, "task_rows": 20},
            "encoder": "colour-grid",
            "ingest": {"sources": [{"name": "folder", "kind": "folder", "uri": str(tmp_path / "images")}]},
            "embed": {"encoders": ["colour-grid"], "device": "cpu", "batch_size": 4},
            "label": {"images": 6, "views": {"blur:1": 0.6, "contrast:1": 0.5}},
            "select": {"name": "test", "seed": 1, "rules": []},
            "export": {"root": str(tmp_path / "exports"), "rows_per_file": 4},
            "training": {"root": str(tmp_path / "trainings")},
            "report": {"path": str(tmp_path / "report.html")},
        }
        return Settings.model_validate(whole | sections, strict=False)

    return make


@pytest.fixture(scope="session")
def empty_lake(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty tables, made once: creating them takes seconds."""
    root = tmp_path_factory.mktemp("empty") / "lake"
    text = (REPOSITORY / "conf/demo.yaml").read_text()
    (root.parent / "empty.yaml").write_text(text.replace("demo/lake", str(root)))
    from conf.settings import load

    Lake(spark, load(root.parent / "empty.yaml")).create()
    return root


@pytest.fixture
def make_lake(spark: SparkSession, empty_lake: Path) -> Callable[[Settings], Lake]:
    """A Lake for these settings; its tables are there."""

    def make(settings: Settings) -> Lake:
        if not Path(settings.lake.root).exists():
            shutil.copytree(empty_lake, settings.lake.root)
        return Lake(spark, settings)

    return make


def write_image(path: Path, seed: int, size: tuple[int, int] = (48, 32)) -> Path:
    """A small smooth random picture; the same seed gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def keys(lake: Lake, table: str, *columns: str) -> list[tuple[Any, ...]]:
    """A table's key columns as sorted tuples (bytes as hex)."""
    rows = lake.read(table).select(*columns).collect()
    return sorted(tuple(value.hex() if isinstance(value, bytes | bytearray) else value for value in row) for row in rows)
