"""Folders, tar shards and manifests -> images, sources, rejects; every input in exactly one place, nothing read twice."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings
from jobs import funnel, ingest
from jobs.lake import Lake
from tests.jobs.conftest import keys, write_image
from tests.odd_images import write_folder

MakeSettings = Callable[..., Settings]
MakeLake = Callable[[Settings], Lake]


def source(kind: str, uri: Path, **more: Any) -> dict[str, Any]:
    return {"sources": [{"name": "s", "kind": kind, "uri": str(uri), **more}]}


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def test_a_folder_becomes_images_and_sources_and_a_second_run_does_nothing(
    images: Path, make_settings: MakeSettings, make_lake: MakeLake, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings(waves={"rows": 5, "task_rows": 2})
    lake = make_lake(settings)
    ingest.run(lake, settings, plan_only=True)
    assert "12 inputs pending" in capsys.readouterr().out
    assert lake.version("sources") == 0
    ingest.run(lake, settings)
    files = sorted(images.rglob("*.png"))
    assert keys(lake, "images", "image_id") == sorted((hashlib.sha256(file.read_bytes()).hexdigest(),) for file in files)
    assert keys(lake, "sources", "key") == sorted((str(file.relative_to(images)),) for file in files)
    first = lake.read("images").select("width", "height", "format", "frames").distinct().collect()
    assert [tuple(row) for row in first] == [(48, 32, "PNG", 1)]
    version = lake.version("sources")
    assert version == 3  # three waves of five
    capsys.readouterr()
    ingest.run(lake, settings)
    assert "ingest: nothing to do" in capsys.readouterr().out
    assert lake.version("sources") == version


def test_a_grown_folder_costs_what_is_new_and_a_changed_file_is_a_new_image(
    images: Path, make_settings: MakeSettings, make_lake: MakeLake, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings(waves={"rows": 50, "task_rows": 20})
    lake = make_lake(settings)
    ingest.run(lake, settings)
    write_image(images / "part-9/new.png", 100)
    write_image(images / "part-0/00.png", 101)  # the bytes change, the name stays
    shutil.copy(images / "part-1/01.png", images / "part-9/copy.png")
    capsys.readouterr()
    ingest.run(lake, settings, plan_only=True)
    assert "3 inputs pending" in capsys.readouterr().out
    ingest.run(lake, settings)
    assert lake.read("images").count() == 14  # 12 + new + changed; the copy is an image that was known
    assert lake.read("sources").count() == 15
    twice = lake.read("sources").where(F.col("key") == "part-0/00.png")
    assert twice.select("image_id").distinct().count() == 2
    two_keys = lake.read("sources").groupBy("image_id").agg(F.sort_array(F.collect_list("key")).alias("keys")).where("size(keys) = 2")
    assert [row["keys"] for row in two_keys.collect()] == [["part-1/01.png", "part-9/copy.png"]]


def test_every_odd_file_ends_in_exactly_one_place_with_its_code(tmp_path: Path, make_settings: MakeSettings, make_lake: MakeLake) -> None:
    expected = write_folder(tmp_path / "odd")
    os.symlink(tmp_path / "nowhere", tmp_path / "odd/dangling.png")
    os.mkfifo(tmp_path / "odd/pipe.png")
    settings = make_settings(ingest=source("folder", tmp_path / "odd"), waves={"rows": 1000, "task_rows": 100})
    lake = make_lake(settings)
    ingest.run(lake, settings)
    entries = len(list((tmp_path / "odd").iterdir()))
    taken = {bytes.fromhex(key) for (key,) in keys(lake, "sources", "image_id")}
    refused = lake.read("rejects").select("uri", "code", "permanent").collect()
    assert lake.read("sources").count() + len(refused) == entries
    codes = {row["uri"].rpartition("/")[2]: row["code"] for row in refused}
    assert codes.pop("dangling.png") == "missing"
    assert codes.pop("pipe.png") == "unreadable"
    at_header = {name: code for name, code in expected.items() if code not in ("ok", "decode_failed")}
    from urllib.parse import quote

    assert codes == {quote(os.fsencode(name), safe="/"): code for name, code in at_header.items()}
    assert len(taken) <= entries - len(refused)


def test_a_transient_reject_is_tried_again_and_permanent_after_its_attempts(
    images: Path, make_settings: MakeSettings, make_lake: MakeLake
) -> None:
    os.symlink(images / "not-yet", images / "late.png")
    settings = make_settings(waves={"rows": 50, "task_rows": 20, "attempts": 2})
    lake = make_lake(settings)
    for _ in range(3):
        ingest.run(lake, settings)
    told = [tuple(row) for row in lake.read("rejects").orderBy("attempts").select("code", "attempts", "permanent").collect()]
    assert told == [("missing", 1, False), ("missing", 2, True)]
    write_image(images / "not-yet.png", 55)
    os.unlink(images / "late.png")
    os.symlink(images / "not-yet.png", images / "late.png")
    ingest.run(lake, settings)  # the link now leads to a file: another state, taken
    assert lake.read("sources").where(F.col("key") == "late.png").count() == 1


def test_tar_shards_give_addresses_metadata_and_the_members_before_a_cut(
    tmp_path: Path, images: Path, make_settings: MakeSettings, make_lake: MakeLake
) -> None:
    one, two = (images / "part-0/00.png").read_bytes(), (images / "part-1/01.png").read_bytes()
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "a.tar", "w") as archive:
        add(archive, "x/1.png", one)
        add(archive, "x/1.json", json.dumps({"tags": "cat, dog", "license": "CC0-1.0", "opt_out": True}).encode())
        add(archive, "x/1.txt", b"a caption\n")
        add(archive, "x/2.png", two)
        add(archive, "x/3.jpg", b"<html>")
    with tarfile.open(shards / "b.tar", "w") as archive:
        add(archive, "1.png", one)
        add(archive, "2.png", two)
    whole = (shards / "b.tar").read_bytes()
    (shards / "b.tar").write_bytes(whole[: 512 + 1024 + 512 + len(two) // 2])
    with tarfile.open(shards / "c.tar.gz", "w:gz") as archive:
        add(archive, "1.png", one)
    (shards / "d.tar").write_bytes(b"\0" * 10240)
    settings = make_settings(ingest=source("tar", shards, licence="unknown"))
    lake = make_lake(settings)
    ingest.run(lake, settings)
    rows = {row["key"]: row for row in lake.read("sources").where(F.col("uri").endswith("a.tar")).collect()}
    assert set(rows) == {"x/1", "x/2"}
    assert (rows["x/1"]["tags"], rows["x/1"]["alt_text"], rows["x/1"]["licence"], rows["x/1"]["opt_out"]) == (
        ["cat", "dog"], "a caption", "CC0-1.0", True,
    )  # fmt: skip
    assert rows["x/2"]["licence"] == "unknown"
    data = (shards / "a.tar").read_bytes()
    for row, member in ((rows["x/1"], one), (rows["x/2"], two)):
        assert data[row["offset"] : row["offset"] + row["length"]] == member
    codes = sorted((row["uri"].rpartition("/")[2], row["code"]) for row in lake.read("rejects").collect())
    assert codes == [("a.tar", "not_an_image"), ("b.tar", "archive_broken"), ("c.tar.gz", "format_refused"), ("d.tar", "archive_empty")]
    assert lake.read("sources").where(F.col("uri").endswith("b.tar")).count() == 1  # the member before the cut
    version = lake.version("sources")
    ingest.run(lake, settings)
    assert lake.version("sources") == version
    # other limits: what they refuse too is read once more, and not for ever
    looser = settings.model_copy(update={"limits": settings.limits.model_copy(update={"max_frames": 7})})
    entries = ingest.listed(lake, looser)
    assert {row["uri"].rpartition("/")[2] for row in ingest.pending(lake, looser, entries).collect()} == {
        "a.tar", "b.tar", "c.tar.gz", "d.tar",
    }  # fmt: skip
    ingest.run(lake, looser)
    assert ingest.pending(lake, looser, entries).isEmpty()
    assert lake.version("sources") == version


@pytest.mark.proof
def test_an_archive_whose_refused_member_other_limits_take_is_read_once_more_and_then_settled(
    tmp_path: Path, images: Path, make_settings: MakeSettings, make_lake: MakeLake
) -> None:
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/a.tar", "w") as archive:
        add(archive, "1.png", (images / "part-0/00.png").read_bytes())
        add(archive, "2.png", write_image(tmp_path / "wide.png", 1, (96, 64)).read_bytes())
    strict = make_settings(ingest=source("tar", tmp_path / "shards"), limits={"max_pixels": 48 * 32})
    looser = make_settings(ingest=source("tar", tmp_path / "shards"))
    lake = make_lake(strict)
    ingest.run(lake, strict)
    assert keys(lake, "sources", "key") == [("1",)]
    assert keys(lake, "rejects", "code") == [("too_many_pixels",)]
    ingest.run(lake, looser)
    assert keys(lake, "sources", "key") == [("1",), ("2",)]
    third = make_settings(ingest=source("tar", tmp_path / "shards"), limits={"max_frames": 7})
    for settings in (looser, strict, third):
        assert ingest.pending(lake, settings, ingest.listed(lake, settings)).isEmpty()
    assert funnel.standing(lake, looser, "no head").isEmpty()
    # the latest state of an entry counts: the archive is cut now, and then whole again
    whole = (tmp_path / "shards/a.tar").read_bytes()
    for data, refused in ((whole[: len(whole) - 10240 + 200], ["archive_broken"]), (whole, [])):
        (tmp_path / "shards/a.tar").write_bytes(data)
        ingest.run(lake, looser)
        assert [row["code"] for row in funnel.standing(lake, looser, "no head").collect()] == refused
        assert funnel.measure(lake, looser, "none", "no head").inputs == 2


def test_a_manifest_of_any_format_gives_its_metadata(
    tmp_path: Path, images: Path, make_settings: MakeSettings, make_lake: MakeLake
) -> None:
    import pandas as pd

    rows = [
        {"file": "images/part-0/00.png", "words": "a, b", "says": 'a "quoted", line\nbreak', "stop": "false"},
        {"file": "images/part-1/01.png", "words": None, "says": None, "stop": "yes"},
        {"file": "images/absent.png", "words": "c", "says": None, "stop": None},
        {"file": None, "words": "d", "says": None, "stop": None},
        {"file": "images/part-0/02.png", "words": "e", "says": None, "stop": "perhaps"},
    ]
    frame = pd.DataFrame(rows)
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\nnot json\n")
    frame.to_csv(tmp_path / "list.csv", index=False)
    frame.to_parquet(tmp_path / "list.parquet")
    columns = {"uri": "file", "tags": "words", "alt_text": "says", "opt_out": "stop"}
    sources = [
        {"name": kind, "kind": "manifest", "uri": str(tmp_path / f"list.{kind}"), "columns": columns}
        for kind in ("jsonl", "csv", "parquet")
    ]
    settings = make_settings(ingest={"sources": sources}, waves={"rows": 50, "task_rows": 20})
    lake = make_lake(settings)
    ingest.run(lake, settings)
    told = {(row["source"], row["key"]): row for row in lake.read("sources").collect()}
    for kind in ("jsonl", "csv", "parquet"):
        assert {key for source, key in told if source == kind} == {"images/part-0/00.png", "images/part-1/01.png"}
        one = told[kind, "images/part-0/00.png"]
        assert (one["tags"], one["opt_out"], one["alt_text"]) == (["a", "b"], False, 'a "quoted", line\nbreak')
        assert told[kind, "images/part-1/01.png"]["opt_out"] is True
    assert lake.read("images").count() == 2
    refused = sorted((row["input_key"].partition("|")[0], row["code"]) for row in lake.read("rejects").collect())
    bad = {"csv": 2, "jsonl": 3, "parquet": 2}
    assert refused == [(kind, code) for kind in bad for code in ["manifest_row_invalid"] * bad[kind] + ["missing"]]


def test_a_later_opt_out_is_a_new_row_of_the_same_image(
    tmp_path: Path, images: Path, make_settings: MakeSettings, make_lake: MakeLake
) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text(json.dumps({"uri": "images/part-0/00.png"}))
    settings = make_settings(ingest=source("manifest", path))
    lake = make_lake(settings)
    ingest.run(lake, settings)
    path.write_text(json.dumps({"uri": "images/part-0/00.png", "opt_out": True}))
    ingest.run(lake, settings)
    assert sorted(row["opt_out"] for row in lake.read("sources").collect()) == [False, True]
    assert lake.read("images").count() == 1


def test_a_source_that_is_not_there_is_named(tmp_path: Path, make_settings: MakeSettings, make_lake: MakeLake) -> None:
    for kind, name in (("folder", "absent"), ("manifest", "absent.jsonl"), ("manifest", "absent.xml")):
        (tmp_path / "absent.xml").touch()
        settings = make_settings(ingest=source(kind, tmp_path / name))
        with pytest.raises(Mistake, match=r"ingest\.sources\.s"):
            ingest.run(make_lake(settings), settings)
