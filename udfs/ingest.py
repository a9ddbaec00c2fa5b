"""Entries -> images with identity, header and address: one pass over the bytes, which stay where they lie.

A row that is an image has `image_id` and `image`; a row that is not has `reject`. An archive gives a row a member, a parquet file one
a row of its own, all of them or (when its store fails half-way) none, so that an entry is either taken or tried again as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import pandas as pd

from udfs import header, parquet_reader, parquet_rows
from udfs.ahead import ahead
from udfs.handles import Stat
from udfs.listing import tags_of, text_of, truth_of
from udfs.opener import Opener
from udfs.reject import Reject

KERNEL_VERSION = 1
SCHEMA = (
    "source STRING, key STRING, image_id BINARY, entry STRING, seen STRING, uri STRING, offset BIGINT, length BIGINT, size BIGINT, "
    "mtime_us BIGINT, row_group INT, row INT, column STRING, "
    "tags ARRAY<STRING>, alt_text STRING, licence STRING, opt_out BOOLEAN, "
    "image STRUCT<format: STRING, width: INT, height: INT, bytes: BIGINT, frames: INT, ai_marks: ARRAY<STRUCT<where: STRING, text: STRING>>>, "
    "reject STRUCT<code: STRING, detail: STRING, transient: BOOLEAN>"
)
_COLUMNS = ["source", "key", "image_id", "entry", "seen", "uri", "offset", "length", "size", "mtime_us", "row_group", "row", "column"]
_COLUMNS += ["tags", "alt_text", "licence", "opt_out", "image", "reject"]
_SIDE_FILES = ("json", "txt", "cls")  # of a webdataset sample: its metadata, no image
_CHUNK = 256  # rows a frame
_READERS = 4  # threads that wait for the store

Row = dict[str, Any]
Columns = Mapping[str, str]  # of a parquet file: our name -> the column's; a name that is not given is the column's own


def fingerprint(limits: Mapping[str, Any]) -> str:
    """What a reject of this stage depends on."""
    told = hashlib.sha256(json.dumps(limits, sort_keys=True, default=list).encode()).hexdigest()[:12]
    return f"ingest:{KERNEL_VERSION}.{header.KERNEL_VERSION}:{told}"


def ingest(
    frames: Iterable[pd.DataFrame], limits: Mapping[str, Any], stores: Mapping[str, Any], columns: Mapping[str, Columns]
) -> Iterator[pd.DataFrame]:
    """listing.SCHEMA frames -> SCHEMA frames. columns: source -> our names for the columns of its parquet files.

    Reads ahead in threads; memory is bounded by limits.max_bytes x threads, and for parquet as udfs/parquet_file.py says.
    """
    opener = Opener(stores)
    entries = (row for frame in frames for row in cast(list[Row], frame.to_dict("records")))
    rows: list[Row] = []

    def read(entry: Row) -> list[Row]:
        return read_entry(entry, limits, opener, columns.get(entry["source"], {}))

    for found in ahead(read, entries, _READERS, 2 * _READERS):
        rows += found
        while len(rows) >= _CHUNK:
            yield _frame(rows[:_CHUNK])
            rows = rows[_CHUNK:]
    yield _frame(rows)


def _frame(rows: list[Row]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=_COLUMNS, dtype=object)  # object: a column of whole numbers with gaps would become floats


def read_entry(entry: Row, limits: Mapping[str, Any], opener: Opener, columns: Columns) -> list[Row]:
    """One listing row -> its rows: one for a file, one a member for an archive or parquet file. Never raises for what the bytes are."""
    base = {name: entry[name] for name in _COLUMNS if name in entry}
    base |= {"image_id": None, "image": None, "reject": None, "tags": list(entry["tags"])}
    base |= {"row_group": None, "row": None, "column": None}
    try:
        if entry["problem"] is not None:
            raise Reject(entry["problem"], entry["detail"])
        if entry["kind"] == "tar":
            return _read_archive(base, limits, opener)
        if entry["kind"] == "parquet":
            return _read_parquet(base, limits, opener, columns)
        if entry["length"] > limits["max_bytes"]:
            raise Reject("too_many_bytes", f"{entry['length']} bytes, limit {limits['max_bytes']}")
        data = opener.read(entry["uri"], entry["offset"], entry["length"], Stat(entry["size"], entry["mtime_us"]))
        return [base | _identify(data, limits)]
    except Reject as reject:
        return [base | _refused(reject)]


def _identify(data: bytes, limits: Mapping[str, Any]) -> Row:
    image_id = hashlib.sha256(data).digest()
    try:
        found = header.probe(data, limits)
    except Reject as reject:
        return {"image_id": image_id} | _refused(reject)  # the id too: a denied file is known by it, whatever is wrong with it
    image = {"format": found.format, "width": found.width, "height": found.height, "bytes": len(data)}
    image |= {"frames": found.frames, "ai_marks": found.ai_marks}
    return {"image_id": image_id, "image": image}


def _refused(reject: Reject | None) -> Row:
    assert reject is not None
    return {"reject": {"code": reject.code, "detail": reject.detail, "transient": reject.transient}}


def _read_parquet(base: Row, limits: Mapping[str, Any], opener: Opener, columns: Columns) -> list[Row]:
    image = columns.get("image", "image")
    others = {name: columns.get(name, name) for name in ("key", "tags", "alt_text", "licence", "opt_out")}
    required = [column for name, column in columns.items() if name != "image"]
    found = []
    told = {"uri": base["uri"], "expected": Stat(base["size"], base["mtime_us"]), "image": image, "others": others, "required": required}
    for cell in parquet_reader.rows(opener, **told):
        place = {"offset": None, "length": len(cell.data or b""), "row_group": cell.row_group, "row": cell.row, "column": image}
        found.append(base | place | _of_cell(cell, base, limits))
    if not found:
        raise Reject("archive_empty", f"{base['uri']} has no rows")
    return found


def _of_cell(cell: parquet_rows.Row, base: Row, limits: Mapping[str, Any]) -> Row:
    """What a parquet row says and what its bytes are. A field of the wrong type refuses it, so that no opt-out is missed.

    A refused one has its id too, as in _identify.
    """
    told: Row = {"key": f"{base['key']}#{cell.row_group}/{cell.row}"}
    if cell.data is not None:
        told["image_id"] = hashlib.sha256(cell.data).digest()
    try:
        told |= {name: value for name, value in _cell_facts(cell).items() if value is not None}
    except ValueError as error:
        return told | _refused(Reject("manifest_row_invalid", f"row {cell.row} of row group {cell.row_group}: {error}"))
    if cell.refused is not None or cell.data is None:
        return told | _refused(cell.refused)
    if len(cell.data) > limits["max_bytes"]:
        return told | _refused(Reject("too_many_bytes", f"{len(cell.data)} bytes, limit {limits['max_bytes']}"))
    return told | _identify(cell.data, limits)


def _cell_facts(cell: parquet_rows.Row) -> Row:
    """-> key (Hugging Face's `path` where no column is the key), tags, alt_text, licence, opt_out. Raises ValueError."""
    told = dict(cell.values)
    if isinstance(told.get("key"), int) and not isinstance(told["key"], bool):
        told["key"] = str(told["key"])
    facts = {name: text_of(told.get(name), name) for name in ("key", "alt_text", "licence")}
    facts["key"] = facts["key"] or text_of(cell.path, "path") or None
    facts["tags"] = tags_of(told["tags"]) if "tags" in told else None
    facts["opt_out"] = truth_of(told["opt_out"]) if "opt_out" in told else None
    return facts


class _Member(NamedTuple):
    name: str
    offset: int
    data: bytes | None  # None: not read, for the reason in `refused`
    size: int
    refused: Reject | None = None

    @property
    def key(self) -> str:
        """webdataset: the name up to the first dot of its last part."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def stem(self) -> str:
        """The name without its last suffix: what pairs a picture with its own side files among several of one key."""
        return self.name.rpartition(".")[0]

    @property
    def suffix(self) -> str:
        return self.name.rpartition(".")[2].lower()


def _read_archive(base: Row, limits: Mapping[str, Any], opener: Opener) -> list[Row]:
    if base["uri"].lower().endswith("gz"):
        raise Reject("format_refused", "a compressed archive gives its members no address; unpack it to a plain .tar")
    if (found := opener.stat(base["uri"])) != (listed := Stat(base["size"], base["mtime_us"])):
        raise Reject("bytes_changed", f"{base['uri']}: {found} now, {listed} when it was listed")
    rows: list[Row] = []
    sample = _Sample()
    end: list[Row] = []
    try:
        for member in _members(base["uri"], limits["max_bytes"], opener):
            if sample.key not in (None, member.key):
                rows += sample.rows()
                sample = _Sample()
            sample.add(member, base, limits)
    except _Broken as broken:
        end = [base | {"offset": broken.offset, "length": 0} | _refused(Reject("archive_broken", str(broken)))]
    rows += sample.rows() + end
    if not rows:
        raise Reject("archive_empty", base["uri"])
    return rows


class _Sample:
    """The members of one webdataset key: pictures are identified as they come, only side files are held."""

    def __init__(self) -> None:
        self.key: str | None = None
        self._pictures: list[tuple[_Member, Row]] = []
        self._side: dict[str, dict[str, bytes | None]] = {}

    def add(self, member: _Member, base: Row, limits: Mapping[str, Any]) -> None:
        self.key = member.key
        if member.suffix in _SIDE_FILES:
            self._side.setdefault(member.stem, {})[member.suffix] = member.data
            return
        row = base | {"offset": member.offset, "length": member.size}
        row |= _refused(member.refused) if member.data is None else _identify(member.data, limits)
        self._pictures.append((member._replace(data=None), row))

    def rows(self) -> list[Row]:
        """A row a picture, with the facts of its own side files, or else of the key's."""
        return [self._told(member, row) for member, row in self._pictures]

    def _told(self, member: _Member, row: Row) -> Row:
        row["key"] = member.key if len(self._pictures) == 1 else member.name
        try:
            facts = _side_facts(self._side.get(member.stem) or self._side.get(member.key) or {})
        except (ValueError, RecursionError) as error:
            return row | {"image": None} | _refused(Reject("manifest_row_invalid", f"{member.name}: {error}"))
        return row | {name: value for name, value in facts.items() if value is not None}


class _Broken(Exception):
    """The archive cannot be read on from `offset`."""

    def __init__(self, why: str, offset: int) -> None:
        super().__init__(f"at byte {offset}: {why}")
        self.offset = offset


def _members(uri: str, max_bytes: int, opener: Opener) -> Iterator[_Member]:
    """Regular members in order. Raises _Broken where the archive is, Reject when the store fails."""
    position = 0
    with opener.stream(uri) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                while (info := archive.next()) is not None:
                    position = info.offset
                    if info.isreg():  # folders and links have no bytes of their own
                        yield _member(info, stream, max_bytes)
                    archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                    position = archive.offset  # the next header's
                stream.seek(position)
                if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile ends in silence at a header that is none
                    raise tarfile.ReadError("neither a member's header nor the archive's end (a block of zeros)")
        except (tarfile.TarError, EOFError, ValueError) as error:  # ValueError: a pax header that is none
            raise _Broken(str(error) or type(error).__name__, position) from None
        except OSError as error:
            raise Reject("unreadable", f"{uri}: {error}") from error


def _member(info: tarfile.TarInfo, stream: Any, max_bytes: int) -> _Member:
    name = os.fsencode(info.name).decode("utf-8", "backslashreplace")
    if info.issparse():
        return _Member(
            name, info.offset_data, None, info.size, Reject("format_refused", f"{name}: a sparse member has no bytes in one piece")
        )
    if info.size < 0:
        raise tarfile.ReadError(f"member {name!r} has {info.size} bytes")
    if info.size > max_bytes:
        return _Member(name, info.offset_data, None, info.size, Reject("too_many_bytes", f"{name}: {info.size} bytes, limit {max_bytes}"))
    stream.seek(info.offset_data)
    data = stream.read(info.size)
    if len(data) < info.size:
        raise tarfile.ReadError(f"member {name!r} has {len(data)} of {info.size} bytes")
    return _Member(name, info.offset_data, data, info.size)


def _side_facts(files: Mapping[str, bytes | None]) -> Row:
    """{"json": ..., "txt": ...} -> tags, alt_text, licence, opt_out. Raises ValueError (UnicodeDecodeError and JSONDecodeError are)."""
    facts: Row = {}
    if None in files.values():
        raise ValueError("a side file is larger than limits.max_bytes")
    if (text := files.get("txt")) is not None:
        facts["alt_text"] = text.decode().strip()
    if (raw := files.get("json")) is not None:
        record = json.loads(raw)
        if not isinstance(record, dict):
            raise ValueError("the .json file is not an object")
        facts["tags"] = tags_of(record.get("tags"))
        facts["opt_out"] = truth_of(record.get("opt_out"))
        for name, others in (("alt_text", ("alt_text", "caption", "alt")), ("licence", ("licence", "license"))):
            value = next((record[other] for other in others if record.get(other)), None)
            facts[name] = text_of(value, name) if value is not None else facts.get(name)
    return facts
