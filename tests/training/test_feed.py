"""The feed: every row exactly once, in an order that only the manifest, seed and epoch decide."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.conftest import COLUMNS, write_export
from training import exports, feed

ROWS = 16 * 6


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> exports.Export:
    folder = write_export(tmp_path_factory.mktemp("feed") / "with space and 100%", rows_per_file=20)
    opened = exports.open_export(folder, "labels", COLUMNS, ("train", "held_out"))
    exports.verify(opened)
    return opened


def plan(export: exports.Export, **given: Any) -> feed.Plan:
    return feed.Plan(export, **({"bucket": "train", "seed": 7, "epoch": 1, "batch_size": 14} | given))


def keys(batches: list[feed.Batch]) -> list[tuple[bytes, str]]:
    """(image, view) of the real rows, in order."""
    return [
        (image, str(view))
        for batch in batches
        for image, view, weight in zip(batch.rows["image_id"], batch.rows["view"], batch.weight, strict=True)
        if weight
    ]


def read(export: exports.Export, **given: Any) -> list[feed.Batch]:
    return list(feed.batches(plan(export, **given)))


def changes(images: list[bytes]) -> int:
    return sum(one != other for one, other in itertools.pairwise(images))


def test_an_epoch_has_every_row_once(export: exports.Export) -> None:
    seen = keys(read(export))
    assert len(seen) == len(set(seen)) == ROWS


def test_an_epoch_is_the_same_again_and_every_other_epoch_and_seed_differs(export: exports.Export) -> None:
    first = keys(read(export))
    assert keys(read(export)) == first
    others = [keys(read(export, epoch=2)), keys(read(export, seed=8))]
    assert all(other != first and sorted(other) == sorted(first) for other in others)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_cut_one_global_order_into_equal_steps(export: exports.Export, world: int) -> None:
    ranks = [read(export, rank=rank, world=world) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {plan(export, world=world).steps}
    assert {len(batch.weight) for batches in ranks for batch in batches} == {14}
    assert [key for step in zip(*ranks, strict=True) for key in keys(list(step))] == keys(read(export))
    assert [sum(batch.weight.sum() for batch in step) for step in zip(*ranks, strict=True)] == [batch.step_rows for batch in ranks[0]]


def test_only_rows_that_fill_up_the_last_step_have_weight_0(export: exports.Export) -> None:
    batches = read(export, batch_size=36)
    assert [batch.weight.sum() for batch in batches] == [36, 36, 24]
    assert [batch.step_rows for batch in batches] == [36, 36, 24]
    assert batches[-1].weight[24:].sum() == 0


def test_views_of_an_image_stay_together_when_asked(export: exports.Export) -> None:
    images = [image for image, _ in keys(read(export, together="image_id"))]
    assert changes(images) == 15
    assert images != [image for image, _ in keys(read(export, together="image_id", epoch=2))]
    assert changes([image for image, _ in keys(read(export))]) > 60


def test_small_windows_bound_the_memory_and_lose_no_row(export: exports.Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "WINDOW_BYTES", 1)
    assert [len(window) for window in plan(export).windows()] == [1] * 5
    seen = keys(read(export, together="image_id"))
    assert len(seen) == len(set(seen)) == ROWS


def test_columns_arrive_as_they_were_written_and_nothing_is_printed(export: exports.Export, capfd: pytest.CaptureFixture[str]) -> None:
    rows = feed.read_bucket(export, "held_out")
    assert {name: column.dtype.kind for name, column in rows.items()} == {
        name: {"binary": "O", "string": "U", "float": "f"}[kind] for name, kind in COLUMNS.items()
    }
    assert {len(vector) for vector in rows["vector"]} == {64}
    assert set(rows["value"]) == {np.float32(value) for value in (1.0, 0.6, 0.5, 0.2)}
    assert set(feed.read_bucket(export, "held_out", ("value", "view"))) == {"value", "view"}
    assert capfd.readouterr() == ("", "")


def test_a_file_with_other_rows_than_the_manifest_says_is_refused_by_name(export: exports.Export) -> None:
    file = export.files("train")[0].model_copy(update={"rows": 21})
    with pytest.raises(ValueError, match=r"train-00000\.parquet: petastorm gave"):
        feed.read(export, file)


def test_a_path_that_a_url_cannot_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot name a path with #"):
        exports.open_export(write_export(tmp_path / "a#b"), "labels", COLUMNS, ("train",))
