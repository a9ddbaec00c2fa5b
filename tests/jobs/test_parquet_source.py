"""Parquet files with an image column as a source, all the way: every row in exactly one place, nothing read twice, told by its place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import functions as F

from conf.settings import Settings
from jobs import embed, export_images, export_selection, funnel, ingest, report, why
from jobs.lake import Lake
from tests.jobs.conftest import keys, write_image

MakeSettings = Callable[..., Settings]
MakeLake = Callable[[Settings], Lake]
HF = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, cells: list[bytes | None], rows: int, **columns: list[Any]) -> Path:
    """A file in Hugging Face's layout, the path the same in every row."""
    image = pa.array([None if cell is None else {"bytes": cell, "path": "same.png"} for cell in cells], HF)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": image, **columns}), path, row_group_size=rows)
    return path


def made(folder: Path, numbers: range, size: tuple[int, int] = (48, 32)) -> list[bytes]:
    return [write_image(folder / "made.png", number, size).read_bytes() for number in numbers]


def parquet_settings(make_settings: MakeSettings, uri: Path, **limits: int) -> Settings:
    source = {"name": "p", "kind": "parquet", "uri": str(uri), "licence": "CC0-1.0", "columns": {"alt_text": "text"}}
    waves = {"rows": 50, "task_rows": 4}
    return make_settings(ingest={"sources": [source]}, waves=waves, limits=limits, export={"root": f"{uri.parent}/exports"})


def test_rows_of_parquet_files_go_through_every_stage_and_a_second_run_does_nothing(
    tmp_path: Path, make_settings: MakeSettings, make_lake: MakeLake, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = made(tmp_path, range(9)), made(tmp_path, range(20, 25))
    cells = [*one, None, b"<html>", one[0]]
    write(tmp_path / "data/a.parquet", cells, 5, text=[f"words {number}" for number in range(12)], opt_out=[False] * 11 + [True])
    write(tmp_path / "data/deep/b.parquet", [*two[:4], two[4][:-30]], 2, text=[None] * 5)  # the last one is cut: its pixels are broken
    (tmp_path / "data/README.md").write_text("# no picture")
    settings = parquet_settings(make_settings, tmp_path / "data")
    lake = make_lake(settings)
    ingest.run(lake, settings)
    assert len(keys(lake, "images", "image_id")) == 14
    sources = {(row["uri"].rpartition("/")[2], row["row_group"], row["row"]): row for row in lake.read("sources").collect()}
    assert len(sources) == 15 and {row["key"] for row in sources.values()} == {"same.png"}
    twin = sources["a.parquet", 2, 1]
    assert (bytes(twin["image_id"]), twin["opt_out"], twin["alt_text"]) == (hashlib.sha256(one[0]).digest(), True, "words 11")
    assert (twin["offset"], twin["length"], twin["column"], twin["licence"]) == (None, len(one[0]), "image", "CC0-1.0")
    refused = lake.read("rejects").select("code", "offset", "row_group", "row").collect()
    assert {tuple(row) for row in refused} == {("no_image", None, 1, 4), ("not_an_image", None, 2, 0), ("not_an_image", 0, None, None)}
    embed.run(lake, settings)
    embedded = lake.read("embeddings").count()
    broken = lake.read("rejects").where("stage = 'embed'").select("code", "row_group", "row", "column").distinct().collect()
    assert (embedded, [tuple(row) for row in broken]) == (13, [("decode_failed", 2, 0, "image")])
    assert funnel.measure(lake, settings, "none", "no head").inputs == 12 + 5 + 1
    shown = report._rejects(lake, settings, "no head", 8)
    assert {(told["code"], told["count"]) for told in shown} == {("no_image", 1), ("not_an_image", 2), ("decode_failed", 1)}
    capsys.readouterr()
    why.tell(lake, settings, "a.parquet#2/1")
    told = capsys.readouterr().out
    assert hashlib.sha256(one[0]).hexdigest() in told and "row_group 2, row 1, column image" in told and "alt_text words 0" in told
    why.tell(lake, settings, "a.parquet#1/4")
    assert "no_image" in capsys.readouterr().out
    versions = lake.versions(("images", "sources", "rejects", "embeddings"))
    ingest.run(lake, settings)
    embed.run(lake, settings)
    assert capsys.readouterr().out.count("nothing to do") == 2
    assert lake.versions(versions) == versions

    told_by_hand = {"selection": F.lit("s"), "name": F.lit("test"), "score": F.lit(7), "run": F.lit("by hand")}
    lake.append("selections", lake.read("images").select("image_id").withColumns(told_by_hand), "by hand", 0)
    export_images.export(lake, settings, "s", "scores", lake.versions(("images", "sources")))
    (root,) = (tmp_path / "exports").iterdir()
    exported = [row for file in root.glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert {row["bytes"] for row in exported} == {*one, *two[:4], two[4][:-30]}
    assert all(hashlib.sha256(row["bytes"]).digest() == row["image_id"] for row in exported)
    both = next(json.loads(row["captions"]) for row in exported if row["bytes"] == one[0])
    assert {text["text"] for text in both} == {"words 0", "words 11"}
    chosen = export_selection.selected(lake, "s", lake.versions(("images", "sources"))).collect()
    places = {(row["uri"].rpartition("/")[2], row["row_group"], row["row"], row["offset"], row["column"]) for row in chosen}
    assert len(chosen) == len(places) == 14 and {(place[3], place[4]) for place in places} == {(None, "image")}


@pytest.mark.proof
def test_a_file_whose_refused_row_other_limits_take_is_read_once_more_and_a_changed_file_anew(
    tmp_path: Path, make_settings: MakeSettings, make_lake: MakeLake
) -> None:
    small, large = made(tmp_path, range(3)), made(tmp_path, range(3, 5), (96, 64))
    path = write(tmp_path / "one.parquet", [small[0], large[0], small[1], None], 2, text=["a", "b", "c", "d"])
    strict, looser = (parquet_settings(make_settings, path, max_pixels=pixels) for pixels in (48 * 32, 10**6))
    lake = make_lake(strict)
    ingest.run(lake, strict)
    assert keys(lake, "sources", "row_group", "row") == [(0, 0), (1, 0)]
    assert sorted(row["code"] for row in lake.read("rejects").collect()) == ["no_image", "too_many_pixels"]
    ingest.run(lake, looser)
    assert keys(lake, "sources", "row_group", "row") == [(0, 0), (0, 1), (1, 0)]
    for settings in (looser, strict):
        assert ingest.pending(lake, settings, ingest.listed(lake, settings)).isEmpty()
    assert [row["code"] for row in funnel.standing(lake, looser, "no head").collect()] == ["no_image"]
    write(path, [small[0], small[2]], 2, text=["a", "e"])
    ingest.run(lake, looser)
    assert funnel.measure(lake, looser, "none", "no head").inputs == 2  # of the file as it is now
    assert lake.read("sources").count() == 3 + 2 and lake.read("images").count() == 4
