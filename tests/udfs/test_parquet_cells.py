"""Parquet files with an image column: every row an image or a reject with its place, a row group read once, the file checked as it is read."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.object_store import ObjectStore, object_store
from tests.odd_images import LIMITS, encoded, picture
from udfs import addresses, ingest, listing, parquet_file, parquet_reader, parquet_rows
from udfs.ahead import ahead
from udfs.opener import Opener, to_uri
from udfs.reject import Reject

PNG = encoded(picture(40, 30), "PNG")
HF = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # Hugging Face's layout of an image


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as started:
        yield started


def pictures(count: int) -> list[bytes]:
    return [PNG + bytes(number) for number in range(count)]


def write(path: Path, columns: dict[str, Any], rows: int = 4, **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=rows, **options)
    return path


def entry(uri: str, opener: Opener) -> dict[str, Any]:
    stat = opener.stat(uri)
    told = {"source": "s", "kind": "parquet", "entry": uri, "seen": "x", "uri": uri, "offset": 0, "length": stat.size, "size": stat.size}
    told |= {"mtime_us": stat.mtime_us, "key": uri.rpartition("/")[2], "tags": [], "alt_text": None, "licence": "CC0-1.0"}
    return told | {"opt_out": False, "problem": None, "detail": None}


def read(path: Path, columns: dict[str, str] | None = None, **limits: Any) -> list[dict[str, Any]]:
    opener = Opener()
    return ingest.read_entry(entry(to_uri(str(path)), opener), LIMITS | limits, opener, columns or {})


def codes(rows: list[dict[str, Any]]) -> list[str]:
    return [row["reject"]["code"] if row["reject"] else "ok" for row in rows]


def test_every_row_is_an_image_with_its_address_and_what_the_columns_say(tmp_path: Path) -> None:
    whole = pictures(6)
    columns = {"photo": pa.array(whole), "id": [7, 8, 9, 10, 11, None], "words": [["a", "b"], None, [], ["c"], ["d"], ["e"]]}
    columns |= {"alt_text": ["one", None, "", "x", "y", "z"], "licence": [None, "MIT", None, None, None, None]}
    columns |= {"opt_out": [True, False, None, False, False, False]}
    path = write(tmp_path / "a.parquet", columns)
    rows = read(path, {"image": "photo", "key": "id", "tags": "words"})
    assert codes(rows) == ["ok"] * 6
    assert [(row["row_group"], row["row"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    assert [row["image_id"] for row in rows] == [hashlib.sha256(data).digest() for data in whole]
    assert [row["key"] for row in rows] == ["7", "8", "9", "10", "11", "a.parquet#1/1"]
    first, second = rows[0], rows[1]
    assert (first["tags"], first["alt_text"], first["licence"], first["opt_out"]) == (["a", "b"], "one", "CC0-1.0", True)
    assert (second["tags"], second["alt_text"], second["licence"], second["opt_out"]) == ([], None, "MIT", False)
    opener = Opener()
    assert [addresses.read(row, opener) for row in rows] == whole
    assert {(row["offset"], row["column"]) for row in rows} == {(None, "photo")}
    assert [row["length"] for row in rows] == [len(data) for data in whole]
    dotted = read(write(tmp_path / "b.parquet", {"an image.bytes": [PNG]}), {"image": "an image.bytes"})
    assert codes(dotted) == ["ok"] and addresses.read(dotted[0], opener) == PNG
    done: dict[str, Any] = {}
    assert addresses.read_any(done, [rows[5]], opener, rows[5]["image_id"]) == whole[5]
    assert done["at"] == {name: rows[5][name] for name in addresses.PLACE}


@pytest.mark.parametrize("layout", ["struct", "large_binary", "fixed_size_binary", "dictionary_encoded", "compressed", "list_beside"])
def test_an_image_column_of_any_layout_that_holds_bytes_is_read(layout: str, tmp_path: Path) -> None:
    whole = [PNG, PNG + b"\0" if layout != "fixed_size_binary" else PNG]
    options: dict[str, Any] = {"compression": "zstd"} if layout == "compressed" else {}
    if layout == "struct":
        column = pa.array([{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(whole)], HF)
    elif layout == "fixed_size_binary":
        column = pa.array(whole, pa.binary(len(PNG)))
    elif layout == "dictionary_encoded":
        column, options = pa.array(whole), {"use_dictionary": True, "data_page_version": "2.0"}
    else:
        column = pa.array(whole, pa.large_binary() if layout == "large_binary" else pa.binary())
    beside = {"other": [[1], [2, 3]]} if layout == "list_beside" else {}
    rows = read(write(tmp_path / "a.parquet", {"image": column} | beside, **options))
    assert codes(rows) == ["ok", "ok"]
    assert [row["image_id"] for row in rows] == [hashlib.sha256(data).digest() for data in whole]
    assert [row["key"] for row in rows] == (["0.png", "1.png"] if layout == "struct" else ["a.parquet#0/0", "a.parquet#0/1"])
    assert [addresses.read(row, Opener()) for row in rows] == whole


def test_a_row_that_is_no_image_is_a_reject_with_its_place(tmp_path: Path) -> None:
    cells = [PNG, None, {"bytes": None, "path": "far/away.png"}, b"", b"<html>", PNG, PNG + b"1", PNG + bytes(5_000)]
    column = pa.array([cell if cell is None or isinstance(cell, dict) else {"bytes": cell, "path": None} for cell in cells], HF)
    columns = {"image": column, "opt_out": [None, None, None, None, None, "perhaps", "yes", None]}
    rows = read(write(tmp_path / "a.parquet", columns, 3), max_bytes=len(PNG) + 100)
    assert codes(rows) == ["ok", "no_image", "no_image", "empty", "not_an_image", "manifest_row_invalid", "ok", "too_many_bytes"]
    assert [(row["row_group"], row["row"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    assert "far/away.png" in rows[2]["reject"]["detail"] and "row 2 of row group 1" in rows[5]["reject"]["detail"]
    assert rows[6]["opt_out"] is True and rows[5]["image"] is None


@pytest.mark.parametrize(
    ("columns", "names", "code"),
    [
        ({"image": ["a", "b"]}, {}, "column_unfit"),
        ({"image": [1, 2]}, {}, "column_unfit"),
        ({"image": [{"path": "a"}]}, {}, "column_unfit"),
        ({"image": [{"bytes": "a"}]}, {}, "column_unfit"),
        ({"photo": [PNG]}, {}, "column_unfit"),
        ({"image": [PNG]}, {"key": "absent"}, "column_unfit"),
        ({"image": pa.array([], pa.binary())}, {}, "archive_empty"),
    ],
)
def test_a_file_without_such_a_column_is_refused_as_a_whole(
    columns: dict[str, Any], names: dict[str, str], code: str, tmp_path: Path
) -> None:
    (row,) = read(write(tmp_path / "a.parquet", columns), names)
    assert (row["reject"]["code"], row["offset"], row["row_group"]) == (code, 0, None)


def test_a_broken_file_is_refused_and_a_broken_row_group_from_its_break_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": pictures(12)}, compression="gzip", use_dictionary=False)
    whole = path.read_bytes()
    places = pq.ParquetFile(path).metadata
    second = places.row_group(1).column(0)
    for broken in (
        whole[:-1],
        whole[: len(whole) // 2],
        b"PAR1" + bytes(50) + b"PAR1",
        whole[:-8] + b"\xff\xff\xff\x7fPAR1",
        b"PAR1",
        b"x",
    ):
        path.write_bytes(broken)
        assert codes(read(path)) == ["parquet_broken"], broken[:10]
    damaged = bytearray(whole)
    damaged[second.data_page_offset : second.data_page_offset + 60] = b"\xff" * 60  # the page's header and the head of its bytes
    path.write_bytes(damaged)
    rows = read(path)
    assert codes(rows) == ["ok"] * 4 + ["parquet_broken"] + ["ok"] * 4
    assert (rows[4]["row_group"], rows[4]["row"]) == (1, 0)
    assert addresses.read(rows[6], Opener()) == pictures(12)[9]
    with pytest.raises(Reject, match="parquet_broken"):
        addresses.read(rows[3] | {"row_group": 1}, Opener())


def test_a_file_that_crashes_its_reader_is_refused_from_there_on_and_the_next_one_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": [b"x" * 8] * 20, "tags": [["a", "b"]] * 20}, 20, compression="none")
    damaged = bytearray(path.read_bytes())
    damaged[212] = 127  # in a page of `tags`: pyarrow 14.0.2 reads at an address that is not its own
    path.write_bytes(damaged)
    (row,) = read(path)
    # where that address lies decides whether the kernel (11) or the allocator (6) ends the process
    assert row["reject"]["code"] == "parquet_broken" and re.search(r"crashed here \(signal (11|6)\)", row["reject"]["detail"])
    assert codes(read(write(tmp_path / "b.parquet", {"image": [PNG]}))) == ["ok"]


def test_a_reader_that_is_killed_leaves_its_file_to_another_run(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": [os.urandom(100_000) for _ in range(50)]})
    opener, uri = Opener(), to_uri(str(path))
    rows = parquet_reader.rows(opener, uri=uri, expected=opener.stat(uri), image="image", others={})
    next(rows)
    (child,) = [child for child in psutil.Process().children() if "udfs.parquet_rows" in child.cmdline() and child.status() != "zombie"]
    child.kill()
    with pytest.raises(Reject, match="unreadable: the process that read the file was killed"):
        list(rows)
    assert codes(read(path)) == ["not_an_image"] * 50


def test_a_row_group_that_holds_too_much_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", {"image": [PNG, PNG + bytes(200_000), PNG]}, 1, compression="zstd")
    monkeypatch.setattr(parquet_file, "MAX_GROUP_BYTES", 100_000)
    opener, uri = Opener(), to_uri(str(path))
    rows = parquet_rows.rows(opener, uri, opener.stat(uri), "image", {})
    assert [row.refused and row.refused.code for row in rows] == [None, "row_group_too_big", None]


def test_a_file_that_changed_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": pictures(8)})
    rows = read(path)
    opener = Opener()
    assert addresses.read(rows[0], opener) == PNG
    pq.write_table(pa.table({"image": pictures(9)}), path, row_group_size=4)  # in place: one is held open
    for reading in (opener, Opener()):
        with pytest.raises(Reject, match="bytes_changed"):
            addresses.read(rows[7], reading)
    current = read(path)
    for wrong in ({"row": 9}, {"row_group": 9}):
        with pytest.raises(Reject, match="bytes_changed"):
            addresses.read(current[0] | wrong, Opener())


def test_an_entry_whose_file_changed_since_it_was_listed_is_refused_as_a_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": pictures(8)})
    listed = entry(to_uri(str(path)), Opener())
    write(path, {"image": pictures(9)})
    assert codes(ingest.read_entry(listed, LIMITS, Opener(), {})) == ["bytes_changed"]
    path.unlink()
    assert codes(ingest.read_entry(listed, LIMITS, Opener(), {})) == ["missing"]


@pytest.mark.parametrize("rows_of_a_group", [1, 3, 64, 1000])
def test_threads_that_read_in_order_read_every_row_group_once(rows_of_a_group: int, tmp_path: Path) -> None:
    whole = [os.urandom(200) + bytes(number) for number in range(400)]
    path = write(tmp_path / "a.parquet", {"image": pa.array([{"bytes": data, "path": None} for data in whole], HF)}, rows_of_a_group)
    opener, uri = Opener(), to_uri(str(path))
    stat = opener.stat(uri)
    places = [divmod(number, rows_of_a_group) for number in range(400) if number % 7]  # not every row is an image
    read_one = partial(_read_cell, opener, uri, {"size": stat.size, "mtime_us": stat.mtime_us})
    found = list(ahead(read_one, places, 8, 32))
    assert found == [data for number, data in enumerate(whole) if number % 7]
    assert opener.cells_opened == len({group for group, _ in places})
    for group, row in reversed(places[:40]):  # in any order, at a price
        assert read_one((group, row)) == whole[group * rows_of_a_group + row]


def _read_cell(opener: Opener, uri: str, state: dict[str, int], place: tuple[int, int]) -> bytes:
    return addresses.read({"uri": uri, "row_group": place[0], "row": place[1], "column": "image"} | state, opener)


def test_parquet_on_s3_is_listed_ingested_and_read_by_address(store: ObjectStore, tmp_path: Path) -> None:
    whole = pictures(10)
    path = write(tmp_path / "a.parquet", {"image": whole, "opt_out": [False] * 9 + [True]})
    uri = store.put("parquet/deep/a b.parquet", path.read_bytes()).replace(" ", "%20")
    opener = Opener(store.stores)
    rows = ingest.read_entry(entry(uri, opener), LIMITS, opener, {})
    assert codes(rows) == ["ok"] * 10 and rows[9]["opt_out"]
    assert [addresses.read(row, opener) for row in rows] == whole
    store.put("parquet/deep/a b.parquet", path.read_bytes()[:-100])
    with pytest.raises(Reject, match="bytes_changed"):
        addresses.read(rows[0], Opener(store.stores))
    assert codes(ingest.read_entry(entry(uri, opener), LIMITS, opener, {})) == ["parquet_broken"]


def test_other_columns_are_another_state_of_a_file(tmp_path: Path) -> None:
    import pandas as pd

    write(tmp_path / "a.parquet", {"image": [PNG]})
    work = [pd.DataFrame({"uri": [to_uri(str(tmp_path))], "recursive": [True]})]
    told = {"source": "s", "kind": "parquet", "root": str(tmp_path), "licence": None, "stores": {}}
    listed = [next(iter(listing.list_folders(work, columns=columns, **told))).iloc[0] for columns in ({}, {"key": "id"}, {})]
    assert listed[0]["seen"] == listed[2]["seen"] != listed[1]["seen"]
    stat = Opener().stat(to_uri(str(tmp_path / "a.parquet")))
    (alone,) = listing.list_file(listed[0]["uri"], "s", "parquet", None, {}, stat)
    assert list(alone) == list(listed[0])
