"""Entries -> images with identity, header and address: one pass over the bytes, which stay where they lie.

A row that is an image has `image_id` and `image`; a row that is not has `reject`. An archive gives a row a member, all
of them or (when its store fails half-way) none, so that an entry is either taken or tried again as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import pandas as pd

from udfs import header
from udfs.ahead import ahead
from udfs.listing import tags_of, text_of, truth_of
from udfs.opener import Opener, Stat
from udfs.reject import Reject

KERNEL_VERSION = 1
SCHEMA = (
    "source STRING, key STRING, image_id BINARY, entry STRING, seen STRING, uri STRING, offset BIGINT, length BIGINT, size BIGINT, "
    "mtime_us BIGINT, tags ARRAY<STRING>, alt_text STRING, licence STRING, opt_out BOOLEAN, "
    "image STRUCT<format: STRING, width: INT, height: INT, bytes: BIGINT, frames: INT, ai_marks: ARRAY<STRUCT<where: STRING, text: STRING>>>, "
    "reject STRUCT<code: STRING, detail: STRING, transient: BOOLEAN>"
)
_COLUMNS = ["source", "key", "image_id", "entry", "seen", "uri", "offset", "length", "size", "mtime_us"]
_COLUMNS += ["tags", "alt_text", "licence", "opt_out", "image", "reject"]
_SIDE_FILES = ("json", "txt", "cls")  # of a webdataset sample: its metadata, no image
_CHUNK = 256  # rows a frame
_READERS = 4  # threads that wait for the store

Row = dict[str, Any]


def fingerprint(limits: Mapping[str, Any]) -> str:
    """What a reject of this stage depends on."""
    told = hashlib.sha256(json.dumps(limits, sort_keys=True, default=list).encode()).hexdigest()[:12]
    return f"ingest:{KERNEL_VERSION}.{header.KERNEL_VERSION}:{told}"


def ingest(frames: Iterable[pd.DataFrame], limits: Mapping[str, Any], stores: Mapping[str, Any]) -> Iterator[pd.DataFrame]:
    """listing.SCHEMA frames -> SCHEMA frames. Reads ahead in threads; memory is bounded by limits.max_bytes x threads."""
    opener = Opener(stores)
    entries = (row for frame in frames for row in cast(list[Row], frame.to_dict("records")))
    rows: list[Row] = []
    for found in ahead(lambda entry: read_entry(entry, limits, opener), entries, _READERS, 2 * _READERS):
        rows += found
        while len(rows) >= _CHUNK:
            yield pd.DataFrame(rows[:_CHUNK], columns=_COLUMNS)
            rows = rows[_CHUNK:]
    yield pd.DataFrame(rows, columns=_COLUMNS)


def read_entry(entry: Row, limits: Mapping[str, Any], opener: Opener) -> list[Row]:
    """One listing row -> its rows: one for a file, one a member for an archive. Never raises for what the bytes are."""
    base = {name: entry[name] for name in _COLUMNS if name in entry}
    base |= {"image_id": None, "image": None, "reject": None, "tags": list(entry["tags"])}
    try:
        if entry["problem"] is not None:
            raise Reject(entry["problem"], entry["detail"])
        if entry["kind"] == "tar":
            return _read_archive(base, limits, opener)
        if entry["length"] > limits["max_bytes"]:
            raise Reject("too_many_bytes", f"{entry['length']} bytes, limit {limits['max_bytes']}")
        data = opener.read(entry["uri"], entry["offset"], entry["length"], Stat(entry["size"], entry["mtime_us"]))
        return [base | _identify(data, limits)]
    except Reject as reject:
        return [base | _refused(reject)]


def _identify(data: bytes, limits: Mapping[str, Any]) -> Row:
    try:
        found = header.probe(data, limits)
    except Reject as reject:
        return _refused(reject)
    image = {"format": found.format, "width": found.width, "height": found.height, "bytes": len(data)}
    image |= {"frames": found.frames, "ai_marks": found.ai_marks}
    return {"image_id": hashlib.sha256(data).digest(), "image": image}


def _refused(reject: Reject | None) -> Row:
    assert reject is not None
    return {"reject": {"code": reject.code, "detail": reject.detail, "transient": reject.transient}}


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
            return row | {"image_id": None, "image": None} | _refused(Reject("manifest_row_invalid", f"{member.name}: {error}"))
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
