"""The feed: every row exactly once, in an order that only the manifest, seed and epoch decide."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.settings import Settings, load
from tests.object_store import BUCKET, object_store
from tests.training.conftest import COLUMNS, ROOT, write_export
from training import exports, feed, print_plan
from training.spool import Spool
from udfs.snapshot import id_sum

ROWS = 16 * 6


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> exports.Export:
    folder = write_export(tmp_path_factory.mktemp("feed") / "with space and 100%", rows_per_file=20)
    return open_labels(folder)


def open_labels(place: Path | str, settings: Settings | None = None) -> exports.Export:
    return exports.open_export(place, "labels", COLUMNS, ("train", "held_out"), settings)


def plan(export: exports.Export, **given: Any) -> feed.Plan:
    return feed.Plan(export, **({"bucket": "train", "seed": 7, "epoch": 1, "rows_per_step": 60, "micro_batch": 5} | given))


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


def steps_of(ranks: list[list[feed.Batch]]) -> list[tuple[bytes, str]]:
    """The global order, put together from what each rank was fed: step by step, rank by rank."""
    steps = range(ranks[0][-1].step + 1)
    return [key for step in steps for batches in ranks for key in keys([batch for batch in batches if batch.step == step])]


def changes(images: list[bytes]) -> int:
    return sum(one != other for one, other in itertools.pairwise(images))


def test_an_epoch_has_every_row_once(export: exports.Export) -> None:
    seen = keys(read(export))
    assert len(seen) == len(set(seen)) == ROWS
    assert id_sum(image for image, _ in seen) == export.ids("train")


def test_an_epoch_is_the_same_again_and_every_other_epoch_and_seed_differs(export: exports.Export) -> None:
    first = keys(read(export))
    assert keys(read(export)) == first
    others = [keys(read(export, epoch=2)), keys(read(export, seed=8))]
    assert all(other != first and sorted(other) == sorted(first) for other in others)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_cut_one_global_order_into_equal_steps(export: exports.Export, world: int) -> None:
    ranks = [read(export, rank=rank, world=world) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {2 * 60 // 5 // world}
    assert {len(batch.weight) for batches in ranks for batch in batches} == {5}
    assert [batch.last for batch in ranks[0]] == [number % (12 // world) == 12 // world - 1 for number in range(24 // world)]
    assert steps_of(ranks) == keys(read(export))
    assert [sum(batch.weight.sum() for rank in ranks for batch in rank if batch.step == step) for step in (0, 1)] == [60, 36]
    assert {batch.step: batch.step_rows for batch in ranks[0]} == {0: 60, 1: 36}


def test_only_rows_that_fill_up_the_last_step_have_weight_0_and_they_are_copies_of_real_ones(export: exports.Export) -> None:
    batches = read(export, micro_batch=30)
    assert [batch.weight.sum() for batch in batches] == [30, 30, 30, 6]
    assert batches[-1].weight[6:].sum() == 0
    assert set(batches[-1].rows["image_id"][6:]) == {batches[2].rows["image_id"][0]}


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


@pytest.mark.parametrize("window_bytes", [1, 10_000, feed.WINDOW_BYTES])
@pytest.mark.parametrize("together", [None, "image_id"])
def test_an_epoch_stopped_and_gone_on_with_by_other_numbers_of_ranks_has_every_row_once(
    export: exports.Export, together: str | None, window_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "WINDOW_BYTES", window_bytes)
    given: dict[str, Any] = {"rows_per_step": 8, "micro_batch": 2, "together": together}
    seen: list[tuple[bytes, str]] = []
    for world, start, steps in ((2, 0, 3), (1, 24, 4), (4, 56, 5)):
        ranks = [read(export, rank=rank, world=world, start=start, **given) for rank in range(world)]
        seen += steps_of([[batch for batch in batches if batch.step < steps] for batches in ranks])
    assert seen == keys(read(export, **given))
    assert len(set(seen)) == ROWS


@pytest.mark.parametrize("together", [None, "image_id"])
def test_the_plan_as_data_is_the_order_that_is_fed(export: exports.Export, together: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "WINDOW_BYTES", 10_000)
    files = [feed.read(export, file) for file in export.files("train")]
    planned = [
        (files[file]["image_id"][row], str(files[file]["view"][row]))
        for step in feed.places(plan(export, together=together, start=60))
        for file, row in zip(step.file, step.row, strict=True)
    ]
    assert planned == keys(read(export, together=together, start=60))
    assert len(planned) == 36


def test_the_printed_plan_says_which_rows_each_rank_takes(
    export: exports.Export, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = export.root.removeprefix("file://").replace("%20", " ").replace("%25", "%")
    sets = [f"--set=train_scorer.{one}" for one in ("rows_per_step=60", "micro_batch=5", "ranks=2")]
    line = [
        "print_plan",
        place,
        "--config",
        str(ROOT / "conf/demo.yaml"),
        "--trainer",
        "train_scorer",
        "--rank",
        "1",
        "--epoch",
        "1",
        *sets,
    ]
    monkeypatch.setattr(sys, "argv", line)
    print_plan.main()
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    files = {file.file: feed.read(export, file) for file in export.files("train")}
    printed = [(files[name]["image_id"][int(row)], str(files[name]["view"][int(row)])) for *_, name, row, weight in lines if weight == "1"]
    assert printed == keys(read(export, rank=1, world=2, together="image_id"))
    assert [(step, micro) for step, _, micro, *_ in lines[::5]] == [(str(step), str(micro)) for step in range(2) for micro in range(6)]


def test_rows_are_prepared_in_threads_and_arrive_in_order(export: exports.Export) -> None:
    def prepare(rows: feed.Rows, epoch: int) -> feed.Arrays:
        return {"value": rows["value"] + epoch, "first": np.array([image[0] for image in rows["image_id"]])}

    prepared = list(feed.batches(plan(export), prepare, threads=3))
    assert [batch.rows["first"].tolist() for batch in prepared] == [[image[0] for image in batch.image_id] for batch in prepared]
    assert np.concatenate([batch.rows["value"] for batch in prepared]).tolist() == pytest.approx(
        np.concatenate([batch.rows["value"] + 1 for batch in read(export)]).tolist()
    )


def test_an_image_of_the_other_bucket_stops_the_feed(tmp_path: Path) -> None:
    export = open_labels(write_export(tmp_path / "export", train=4, held_out=range(3, 6)))
    with pytest.raises(ValueError, match=r"1 images are in both train and held_out, e\.g\. "):
        read(export, apart="held_out")


def test_columns_arrive_as_they_were_written_and_nothing_is_printed(export: exports.Export, capfd: pytest.CaptureFixture[str]) -> None:
    rows = feed.read_bucket(export, "held_out")
    assert {name: column.dtype.kind for name, column in rows.items()} == {
        name: {"binary": "O", "string": "U", "float": "f"}[kind] for name, kind in COLUMNS.items()
    }
    assert {len(vector) for vector in rows["vector"]} == {64}
    assert set(rows["value"]) == {np.float32(value) for value in (1.0, 0.6, 0.5, 0.2)}
    assert set(feed.read_bucket(export, "held_out", ("value", "view"))) == {"value", "view"}
    assert feed.count(feed.read_bucket(export, "held_out", limit=25)) == 25
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("spoilt", "said"), [({"rows": 21}, "petastorm gave"), ({"ids": "0" * 16}, "the checksum of its ids is not")])
def test_a_file_that_gives_other_rows_than_the_manifest_says_is_refused_by_name(
    export: exports.Export, spoilt: dict[str, Any], said: str
) -> None:
    feed.read(export, export.files("train")[0])  # its bytes were found right, its rows are looked at each time
    with pytest.raises(ValueError, match=rf"train-00000\.parquet: {said}"):
        feed.read(export, export.files("train")[0].model_copy(update=spoilt))


def test_a_file_that_changes_between_two_epochs_is_refused_by_name(tmp_path: Path) -> None:
    export = open_labels(write_export(tmp_path / "export"))
    assert len(keys(read(export))) == ROWS
    path = tmp_path / "export/train-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ValueError, match=r"train-00001\.parquet was changed: its sha256 is"):
        read(export, epoch=2)


def test_a_path_that_a_url_cannot_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot name a path with #"):
        open_labels(write_export(tmp_path / "a#b"))


def test_an_export_in_an_object_store_is_fed_as_a_folder_is_and_a_changed_object_is_named(tmp_path: Path, export: exports.Export) -> None:
    with object_store() as store:
        for path in sorted(Path(export.root.removeprefix("file://").replace("%20", " ").replace("%25", "%")).iterdir()):
            store.put(f"exports/one/{path.name}", path.read_bytes())
        settings = load(ROOT / "conf/demo.yaml", [f"training.spool={tmp_path}/spool"]).model_copy(update={"stores": _stores(store.stores)})
        remote = open_labels(f"s3://{BUCKET}/exports/one", settings)
        assert remote.sha256 == export.sha256
        assert keys(read(remote)) == keys(read(export))
        held = sorted(path.stem for path in (tmp_path / "spool").glob("*.parquet"))
        assert held == sorted(file.sha256 for file in export.files("train"))
        file = remote.files("held_out")[0]
        data = bytearray(store.client.get_object(Bucket=BUCKET, Key=f"exports/one/{file.file}")["Body"].read())
        data[100] ^= 1
        store.put(f"exports/one/{file.file}", bytes(data))
        with pytest.raises(ValueError, match=rf"{file.file} was changed: its sha256 is"):
            feed.read(remote, file)
        store.client.delete_object(Bucket=BUCKET, Key=f"exports/one/{file.file}")
        with pytest.raises(ValueError, match=rf"{file.file}: missing"):
            feed.read(remote, file)
        with pytest.raises(ValueError, match=rf"{file.file} is missing; export again"):
            open_labels(f"s3://{BUCKET}/exports/one", settings)


def _stores(described: dict[str, dict[str, str]]) -> Any:
    from conf.build import Store

    return {bucket: Store(**about) for bucket, about in described.items()}


def test_a_spool_keeps_to_its_limit_and_never_takes_what_is_read(tmp_path: Path) -> None:
    from hashlib import sha256

    from udfs.opener import Opener, to_uri

    contents = [bytes([number]) * 1000 for number in range(4)]
    names = [sha256(content).hexdigest() for content in contents]
    for name, content in zip(names, contents, strict=True):
        (tmp_path / name).write_bytes(content)
    spool, opener = Spool(tmp_path / "spool", 2500), Opener()
    uris = [to_uri(str(tmp_path / name)) for name in names]
    with spool.held(opener, uris[0], names[0], 1000) as first:
        for number in (1, 2, 3):
            with spool.held(opener, uris[number], names[number], 1000) as path:
                assert path.read_bytes() == contents[number]
        assert first.read_bytes() == contents[0]
    assert sorted(path.stem for path in (tmp_path / "spool").glob("*.parquet")) == sorted([names[0], names[3]])
