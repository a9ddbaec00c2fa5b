"""What a training saw of each image lands once, and only from the files that it left."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.section import Mistake
from conf.settings import Settings
from jobs import land_train_stats
from jobs.lake import Lake

CAT, DOG = hashlib.sha256(b"cat").digest(), hashlib.sha256(b"dog").digest()
LOSSES = [  # image_id, epoch, step, loss; two files
    [(CAT, 0, 1, 4.0), (DOG, 0, 1, 1.0), (CAT, 0, 2, 3.0)],
    [(DOG, 1, 3, 0.5), (CAT, 1, 4, 0.5), (CAT, 1, 4, 1.5)],
]


def write_training(root: Path, digest: str, files: Sequence[Sequence[tuple[bytes, int, int, float]]] = LOSSES, **told: Any) -> Path:
    """A finished training's folder."""
    folder = root / f"scorer-{digest}"
    (folder / "row_losses").mkdir(parents=True)
    schema = pa.schema([("image_id", pa.binary(32)), ("epoch", pa.int32()), ("step", pa.int32()), ("loss", pa.float32())])
    written: dict[str, str] = {}
    for number, rows in enumerate(files):
        path = folder / f"row_losses/rank-0-{number}.parquet"
        pq.write_table(pa.table(dict(zip(schema.names, zip(*rows, strict=True), strict=True)), schema=schema), path)
        written[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    begun: dict[str, Any] = {"model": "scorer", "digest": digest, "trainer": "train_scorer", "export": "0123", "manifest_sha256": "ab" * 32}
    begun |= {"made_from": {}, "settings": {}}
    (folder / "training.json").write_text(json.dumps(begun))
    done = {"digest": digest, "model": "scorer", "steps": 4, "epochs": 2, "rows_seen": sum(map(len, files)), "files": written} | told
    (folder / "finished.json").write_text(json.dumps(done))
    return folder


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings()


@pytest.fixture
def lake(settings: Settings, make_lake: Callable[[Settings], Lake]) -> Lake:
    return make_lake(settings)


def test_a_finished_training_lands_once_with_its_losses_of_each_image(
    lake: Lake, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(settings.training.root)
    land_train_stats.run(lake, settings)
    assert "land-train-stats: nothing to do" in capsys.readouterr().out  # not even the folder is there
    write_training(root, "one")
    (root / "scorer-going-on").mkdir()
    land_train_stats.run(lake, settings)
    rows = {bytes(row["image_id"]): row.asDict() for row in lake.read("train_stats").drop("run").collect()}
    shared = {"training": "one", "model": "scorer", "export": "0123", "manifest_sha256": "ab" * 32}
    cat = {"times_seen": 4, "loss_mean": 2.25, "loss_first": 4.0, "loss_last": 1.5, "loss_min": 0.5, "loss_max": 4.0}
    dog = {"times_seen": 2, "loss_mean": 0.75, "loss_first": 1.0, "loss_last": 0.5, "loss_min": 0.5, "loss_max": 1.0}
    assert rows == {CAT: {"image_id": CAT} | shared | cat, DOG: {"image_id": DOG} | shared | dog}
    land_train_stats.run(lake, settings)
    assert "land-train-stats: nothing to do" in capsys.readouterr().out
    write_training(root, "two", [[(CAT, 0, 1, 2.0)]])
    land_train_stats.run(lake, settings)
    assert lake.read("train_stats").count() == 3
    assert lake.version("train_stats") == 2


def test_a_training_whose_losses_are_not_what_it_left_stops_the_stage_after_the_others_have_landed(lake: Lake, settings: Settings) -> None:
    root = Path(settings.training.root)
    changed = write_training(root, "changed") / "row_losses/rank-0-1.parquet"
    changed.write_bytes(changed.read_bytes() + b".")
    gone = write_training(root, "gone") / "row_losses/rank-0-0.parquet"
    gone.unlink()
    write_training(root, "more", rows_seen=7)
    write_training(root, "nan", [[(CAT, 0, 1, math.nan)]])
    write_training(root, "sound")
    message = rf"land train stats: file://{changed}: its sha256 is .*, recorded was .* \(3 more trainings are wrong\)"
    with pytest.raises(Mistake, match=message):
        land_train_stats.run(lake, settings)
    assert {row["training"] for row in lake.read("train_stats").select("training").distinct().collect()} == {"sound"}
    problems = [land_train_stats.check(lake, settings, one) for one in land_train_stats.pending(lake, settings)]
    assert [re.sub("sha256 is.*", "", problem) for problem in problems] == [
        f"file://{changed}: its ",
        f"file://{gone}: missing",
        "training more: its files hold 6 losses (0 no number), finished.json says 7 rows",
        "training nan: its files hold 1 losses (1 no number), finished.json says 1 rows",
    ]
