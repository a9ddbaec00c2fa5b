"""Archives and manifest lines that are wrong in every way: a row or a reject with a name, never an exception."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.odd_images import LIMITS, encoded, picture
from udfs import ingest, listing
from udfs.opener import Opener, to_uri

PNG = encoded(picture(40, 30), "PNG")


def archive(path: Path, members: list[tuple[str | bytes, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name if isinstance(name, str) else name.decode("utf-8", "surrogateescape"))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(path: Path, **limits: Any) -> list[dict[str, Any]]:
    stat = Opener().stat(to_uri(str(path)))
    entry = {"source": "s", "kind": "tar", "entry": "e", "seen": "x", "uri": to_uri(str(path)), "offset": 0, "length": stat.size}
    entry |= {"size": stat.size, "mtime_us": stat.mtime_us, "key": "", "tags": [], "alt_text": None, "licence": None}
    entry |= {"opt_out": False, "problem": None, "detail": None}
    return ingest.read_entry(entry, LIMITS | limits, Opener(), {})


def codes(rows: list[dict[str, Any]]) -> list[str]:
    return [row["reject"]["code"] if row["reject"] else "ok" for row in rows]


def test_a_members_name_need_not_be_utf8(tmp_path: Path) -> None:
    rows = read(archive(tmp_path / "a.tar", [(b"caf\xe9.png", PNG), (b"caf\xe9.txt", b"caption")]))
    assert codes(rows) == ["ok"]
    assert rows[0]["key"] == r"caf\xe9"
    assert rows[0]["alt_text"] == "caption"


def test_several_pictures_of_one_key_keep_their_own_side_files(tmp_path: Path) -> None:
    opted_out = json.dumps({"opt_out": True, "licence": "A"}).encode()
    members = [("p.1.png", PNG), ("p.1.json", opted_out), ("p.2.png", PNG + b" "), ("p.2.json", b'{"licence": "B"}'), ("p.3.png", PNG)]
    rows = {row["key"]: row for row in read(archive(tmp_path / "a.tar", members))}
    assert (rows["p.1.png"]["opt_out"], rows["p.1.png"]["licence"]) == (True, "A")
    assert (rows["p.2.png"]["opt_out"], rows["p.2.png"]["licence"]) == (False, "B")
    assert (rows["p.3.png"]["opt_out"], rows["p.3.png"]["licence"]) == (False, None)


@pytest.mark.parametrize("where", ["in the padding", "on a boundary", "in a header", "in the data"])
def test_an_archive_cut_anywhere_says_so_and_keeps_the_members_before(where: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", [(f"{number}.png", PNG + bytes(number)) for number in range(4)])
    second_end = read(path)[2]["offset"] - 512
    path.write_bytes(
        path.read_bytes()[: second_end + {"in the padding": -5, "on a boundary": 0, "in a header": 200, "in the data": 600}[where]]
    )
    rows = read(path)
    assert codes(rows) == ["ok", "ok", "archive_broken"]
    assert rows[2]["offset"] == second_end


def test_a_flipped_bit_in_a_header_in_the_middle_ends_the_archive_there(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", [(f"{number}.png", PNG + bytes(number)) for number in range(4)])
    header = read(path)[2]["offset"] - 512
    data = bytearray(path.read_bytes())
    data[header + 3] ^= 1
    path.write_bytes(data)
    rows = read(path)
    assert (codes(rows), rows[2]["offset"]) == (["ok", "ok", "archive_broken"], header)


def test_a_sparse_member_is_refused_by_name_and_the_next_one_taken(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", [("a.png", PNG), ("b.png", PNG)])
    data = bytearray(path.read_bytes())
    data[156:157] = tarfile.GNUTYPE_SPARSE
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    assert codes(read(path)) == ["format_refused", "ok"]


@pytest.mark.parametrize(
    "side", [b"{", b"[]", b'{"tags": 3}', b'{"opt_out": "perhaps"}', b'{"caption": "\\ud800"}', b"[" * 100_000, b"\xff\xfe", b" " * 2000]
)
def test_a_side_file_that_cannot_be_read_refuses_its_picture_so_that_no_opt_out_is_missed(side: bytes, tmp_path: Path) -> None:
    rows = read(
        archive(tmp_path / "a.tar", [("p.png", PNG), ("p.json", side), ("q.png", PNG)]), max_bytes=150_000 if len(side) != 2000 else 1999
    )
    assert codes(rows) == ["manifest_row_invalid", "ok"]
    assert rows[0]["image"] is None


def test_a_member_of_negative_size_breaks_its_archive_there(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", [("a.png", PNG), ("b.png", PNG)])
    data = bytearray(path.read_bytes())
    second = data.index(b"b.png")
    data[second + 124 : second + 136] = b"\xff" * 12  # base-256: -1
    data[second + 148 : second + 156] = b" " * 8
    data[second + 148 : second + 156] = b"%06o\0 " % sum(data[second : second + 512])
    path.write_bytes(bytes(data))
    assert codes(read(path)) == ["ok", "archive_broken"]


def test_an_archive_that_changed_since_it_was_listed_is_not_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", [("a.png", PNG)])
    stat = Opener().stat(to_uri(str(path)))
    archive(path, [("a.png", PNG), ("b.png", PNG), ("c.png", PNG * 9)])
    entry = {"source": "s", "kind": "tar", "uri": to_uri(str(path)), "tags": [], "problem": None}
    entry |= {"size": stat.size, "mtime_us": stat.mtime_us, "offset": 0, "length": stat.size}
    assert codes(ingest.read_entry(entry, LIMITS, Opener(), {})) == ["bytes_changed"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "manifest_row_invalid"),
        ("[" * 100_000, "manifest_row_invalid"),
        ('{"uri": 3}', "manifest_row_invalid"),
        ('{"uri": "\\ud800.png"}', "manifest_row_invalid"),
        ('{"uri": "a.png", "tags": ["\\ud800"]}', "manifest_row_invalid"),
        ('{"uri": "a.png", "length": 99999999999999999999}', "manifest_row_invalid"),
        ('{"uri": "a.png", "offset": -1}', "manifest_row_invalid"),
        ('{"uri": "a\\u0000.png"}', "unreadable"),
        ('{"uri": "https://example.org/a.png"}', "address_refused"),
        ('{"uri": "absent.png"}', "missing"),
        ('{"uri": "../a b.png"}', None),
    ],
)
def test_a_manifest_line_is_an_entry_whatever_it_holds(line: str, problem: str | None, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "a b.png").write_bytes(PNG)
    frames = listing.list_manifest([pd.DataFrame({"line": [line]})], "s", str(tmp_path / "lists/m.jsonl"), {}, None, {})
    (row,) = next(iter(frames)).to_dict("records")
    assert row["problem"] == problem
    if problem is None:
        assert row["uri"] == to_uri(str(tmp_path / "a b.png"))
        assert ingest.read_entry(row, LIMITS, Opener(), {})[0]["image"]["format"] == "PNG"
    for value in row.values():
        if isinstance(value, str):
            value.encode()  # a table's text is UTF-8
