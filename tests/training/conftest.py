"""A small labels export in the format of the Spark side, and one real training of it that the tests share."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from udfs.snapshot import id_sum

ROOT = Path(__file__).parents[2]
WIDTH = 32
VIEWS = {"original": 1.0, "blur:1": 0.6, "blur:2": 0.2, "noise:1": 0.6, "noise:2": 0.2, "contrast:1": 0.5}
STATISTICS = ("mean", "contrast", "saturation", "sharpness", "entropy")
ARROW = {"binary": pa.binary(), "string": pa.string(), "float": pa.float32()}
COLUMNS = {
    **{"image_id": "binary", "view": "string", "kind": "string", "value": "float", "rater": "string", "vector": "binary"},
    **dict.fromkeys(STATISTICS, "float"),
}
EPOCHS = 6

Spoil = Callable[[dict[str, Any]], object]


class Trained(NamedTuple):
    """One finished training: the export, the store it went to, the command line's end and what it printed."""

    export: Path
    store: str
    overrides: list[str]
    output: str


def image_id(image: int) -> bytes:
    return hashlib.sha256(b"%d" % image).digest()


def make_rows(images: range) -> list[list[Any]]:
    """Each kind of view moves its image's vector in a direction of its own, by how much worse it is; sharpness knows blur alone."""
    rng = np.random.default_rng(0)
    directions = {view.split(":")[0]: rng.normal(size=WIDTH) for view in VIEWS}
    rows = []
    for image in images:
        own = np.random.default_rng([1, image])
        base = own.normal(size=WIDTH)
        for view, value in VIEWS.items():
            vector = base + 2.0 * (1.0 - value) * directions[view.split(":")[0]]
            packed = (vector / np.linalg.norm(vector)).astype("<f2").tobytes()
            sharp = 3.0 * value if view.startswith("blur") else 3.0
            statistics = own.normal(size=len(STATISTICS)) + np.array([0, 0, 0, sharp, 0])
            rows.append([image_id(image), view, "quality", value, "rankiqa:1", packed, *statistics])
    return rows


def write_export(
    folder: Path, train: int = 16, held_out: range = range(100, 106), rows_per_file: int = 40, spoil: Spoil | None = None
) -> Path:
    """An export of images 0..train-1 and the held_out ones; `spoil` may change the manifest before it is written."""
    folder.mkdir(parents=True)
    schema = pa.schema([(name, ARROW[kind]) for name, kind in COLUMNS.items()])
    files = []
    for bucket, images in (("train", range(train)), ("held_out", held_out)):
        columns = zip(*make_rows(images), strict=True)
        table = pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema)
        for number, start in enumerate(range(0, table.num_rows, rows_per_file)):
            part, path = table.slice(start, rows_per_file), folder / f"{bucket}-{number:05d}.parquet"
            pq.write_table(part, path)
            about = {"rows": part.num_rows, "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            about["ids"] = f"{id_sum(part.column('image_id').to_pylist()):016x}"
            files.append({"file": path.name, "bucket": bucket, **about})
    manifest: dict[str, Any] = {
        "export": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12],
        "kind": "labels",
        "rows": sum(file["rows"] for file in files),
        "columns": dict(COLUMNS),
        "made_from": {"labels": 3, "embeddings": 4, "pixels": 4},
        "lake": "demo/lake",
        "encoder": {"name": "made-up", "fingerprint": "abc123", "width": WIDTH},
        "files": files,
    }
    if spoil:
        spoil(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return folder


def command(export: Path, overrides: list[str], *more: str) -> list[str]:
    sets = [part for override in overrides for part in ("--set", override)]
    return [str(export), "--config", str(ROOT / "conf/demo.yaml"), *sets, *more]


def run_child(arguments: list[str], hidden: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where importing any of `hidden` (and in every process it starts) fails."""
    folder.mkdir(exist_ok=True)
    hook = f"import sys\nsys.modules.update(dict.fromkeys({hidden!r}))\n"
    (folder / "sitecustomize.py").write_text(hook)
    variables = {"PYTHONPATH": f"{folder}:{ROOT}", "HOME": str(folder), **environment}
    line = [sys.executable, "-m", "training.train_scorer", *arguments]
    return subprocess.run(line, env=variables, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trained in this process by the real entry point: the heavy imports are paid once."""
    from training import train_scorer

    folder = tmp_path_factory.mktemp("trained")
    store = f"sqlite:///{folder}/store/mlflow.db"
    overrides = [f"mlflow.tracking_uri={store}", f"mlflow.artifacts={folder}/artifacts", f"train_scorer.epochs={EPOCHS}"]
    overrides.append(f"training.root={folder}/trainings")
    export = write_export(folder / "export")
    output, given = io.StringIO(), sys.argv
    sys.argv = ["train_scorer", *command(export, overrides)]
    try:
        with contextlib.redirect_stdout(output):
            train_scorer.main()
    finally:
        sys.argv = given
    return Trained(export, store, overrides, output.getvalue())
