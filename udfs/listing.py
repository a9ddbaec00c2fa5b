"""Folders, archives' folders and manifest lines -> entries: what there is to ingest, each with its address and state.

An entry is one thing to read: a file, an archive, a parquet file or a manifest row. `seen` names the state it is in (size, time,
metadata): the same entry in the same state is never read twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from itertools import islice
from typing import Any
from urllib.parse import quote

import pandas as pd

from udfs.ahead import ahead
from udfs.handles import Stat
from udfs.opener import Entry, Opener, to_path, to_uri
from udfs.reject import Reject

SCHEMA = (
    "source STRING, kind STRING, entry STRING, seen STRING, uri STRING, offset BIGINT, length BIGINT, size BIGINT, mtime_us BIGINT, "
    "key STRING, tags ARRAY<STRING>, alt_text STRING, licence STRING, opt_out BOOLEAN, problem STRING, detail STRING"
)
WORK_SCHEMA = "uri STRING, recursive BOOLEAN"
_COLUMNS = [column.split()[0] for column in SCHEMA.split(", ")]
_CHUNK = 10_000  # entries a frame
_ASKING = 16  # threads that wait for a store's answer about a manifest's rows
_STATS_KEPT = 1024
_FOLDERS_ON_DRIVER = 256  # enough to keep a cluster's tasks busy, few enough to list at once


def split_tree(root: str, opener: Opener) -> list[tuple[str, bool]]:
    """Root folder -> (folder, recursive) work items for tasks. Looks only as deep as gives some hundred folders; holds no file names."""
    frontier = [to_uri(root)]
    done: list[tuple[str, bool]] = []
    while frontier and len(frontier) + len(done) < _FOLDERS_ON_DRIVER:
        folder = frontier.pop(0)
        try:
            frontier += sorted(entry.uri for entry in opener.entries(folder) if entry.is_folder)
        except Reject:
            if not done:
                raise  # the root itself
        done.append((folder, False))  # a folder that cannot be listed becomes an entry with a problem, in a task
    return done + [(folder, True) for folder in frontier]


def list_folders(
    frames: Iterable[pd.DataFrame],
    source: str,
    kind: str,
    root: str,
    licence: str | None,
    stores: Mapping[str, Any],
    columns: Mapping[str, str] | None = None,
) -> Iterator[pd.DataFrame]:
    """(uri, recursive) frames -> SCHEMA frames. A folder that cannot be listed is an entry with a problem.

    columns: of parquet files; other columns are another state of an entry.
    """
    opener = Opener(stores)
    prefix = to_uri(root).rstrip("/") + "/"
    rows = []
    for frame in frames:
        for uri, recursive in zip(frame.uri, frame.recursive, strict=True):
            for entry in _walk(uri, bool(recursive), opener):
                rows.append(_row(source, kind, entry, entry.uri.removeprefix(prefix), licence, columns))
                if len(rows) >= _CHUNK:
                    yield pd.DataFrame(rows, columns=_COLUMNS)
                    rows = []
    yield pd.DataFrame(rows, columns=_COLUMNS)


def list_file(uri: str, source: str, kind: str, licence: str | None, columns: Mapping[str, str], stat: Stat) -> list[tuple[Any, ...]]:
    """One file -> its SCHEMA row."""
    row = _row(source, kind, Entry(uri, False, stat), uri.rpartition("/")[2], licence, columns)
    return [tuple(row[column] for column in _COLUMNS)]


def list_manifest(
    frames: Iterable[pd.DataFrame],
    source: str,
    manifest: str,
    columns: Mapping[str, str],
    licence: str | None,
    stores: Mapping[str, Any],
) -> Iterator[pd.DataFrame]:
    """Frames with a `line` of JSON each -> SCHEMA frames. A bad line is an entry with the problem manifest_row_invalid."""
    stat = lru_cache(_STATS_KEPT)(Opener(stores).stat)  # rows that lie in one archive ask once
    read = partial(_manifest_row, source=source, manifest=to_uri(manifest), columns=columns, licence=licence, stat=stat)
    lines = (line for frame in frames for line in frame.line if line.strip())
    rows = ahead(read, lines, _ASKING, 4 * _ASKING)
    while chunk := list(islice(rows, _CHUNK)):
        yield pd.DataFrame(chunk, columns=_COLUMNS)


def _walk(uri: str, recursive: bool, opener: Opener) -> Iterator[Entry]:
    try:
        for entry in opener.entries(uri):
            if not entry.is_folder:
                yield entry
            elif recursive:
                yield from _walk(entry.uri, True, opener)
    except Reject as reject:
        yield Entry(uri, True, Stat(-1, 0), reject.code)


def _row(source: str, kind: str, entry: Entry, key: str, licence: str | None, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    return {
        "source": source,
        "kind": kind,
        "entry": entry.uri,
        "seen": _state(entry.stat, licence if columns is None else [licence, dict(columns)]),
        "uri": entry.uri,
        "offset": 0,
        "length": entry.stat.size,
        "size": entry.stat.size,
        "mtime_us": entry.stat.mtime_us,
        "key": key,
        "tags": [],
        "alt_text": None,
        "licence": licence,
        "opt_out": False,
        "problem": entry.problem,
        "detail": entry.uri if entry.problem else None,
    }


def _manifest_row(
    line: str, source: str, manifest: str, columns: Mapping[str, str], licence: str | None, stat: Callable[[str], Stat]
) -> dict[str, Any]:
    fallback = Entry(f"{manifest}#{hashlib.sha256(line.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}", False, Stat(-1, 0))
    try:
        facts = _facts(line, columns)
    except ValueError as error:
        row = _row(source, "file", fallback, "", licence)
        detail = f"{error}: {line[:120]}".encode("utf-8", "backslashreplace").decode()
        return row | {"problem": "manifest_row_invalid", "detail": detail}
    given = facts.pop("uri")
    uri = _beside(manifest, given)
    offset, length = facts.pop("offset"), facts.pop("length")
    try:
        entry = Entry(uri, False, stat(uri))
    except Reject as reject:
        entry = Entry(uri, False, Stat(-1, 0), reject.code)
    key = facts["key"] if facts["key"] is not None else given
    facts["licence"] = facts["licence"] if facts["licence"] is not None else licence
    row = _row(source, "file", entry, key, licence) | facts | {"key": key}
    row["entry"] = f"{uri}#{offset or 0}+{'' if length is None else length}@{key}"
    row["seen"] = _state(entry.stat, facts)
    row["offset"] = offset or 0
    row["length"] = entry.stat.size - row["offset"] if length is None else length
    return row


def _beside(manifest: str, given: str) -> str:
    """An address as the manifest gives it -> URI: a URI, a path, or a path from the manifest's own folder."""
    if "://" in given or given.startswith("/"):
        return to_uri(given)
    if manifest.startswith("file://"):
        return to_uri(os.path.join(os.path.dirname(to_path(manifest)), os.fsencode(given)))
    scheme, _, path = manifest.partition("://")
    return f"{scheme}://" + posixpath.normpath(posixpath.join(posixpath.dirname(path), quote(given, safe="/")))


def _facts(line: str, columns: Mapping[str, str]) -> dict[str, Any]:
    """JSON line -> the fields by our names. Raises ValueError that says which field is wrong."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({type(error).__name__})") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    facts = {
        name: record.get(columns.get(name, name)) for name in ("uri", "offset", "length", "key", "tags", "alt_text", "licence", "opt_out")
    }
    if not isinstance(facts["uri"], str) or not facts["uri"]:
        raise ValueError(f"field {columns.get('uri', 'uri')!r}: expected an address, given {facts['uri']!r}")
    facts["uri"].encode()  # UnicodeEncodeError is a ValueError: half a surrogate pair is no text
    for name in ("key", "alt_text", "licence"):
        facts[name] = text_of(facts[name], columns.get(name, name))
    for name in ("offset", "length"):
        facts[name] = _whole_number(facts[name], columns.get(name, name))
    facts["tags"] = tags_of(facts["tags"])
    facts["opt_out"] = truth_of(facts["opt_out"])
    return facts


def tags_of(value: Any) -> list[str]:
    """A list of strings, or one string with commas -> tags. Raises ValueError."""
    if value is None:
        return []
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
        raise ValueError(f"tags: expected a list of strings or one string with commas, given {value!r}")
    return [text_of(tag.strip(), "tags") for tag in value if tag.strip()]


def text_of(value: Any, name: str) -> Any:
    """Text that a table can hold, or None. Raises ValueError."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"field {name!r}: expected text, given {value!r}")
    if value is not None:
        value.encode()
    return value


def truth_of(value: Any) -> bool:
    """true/false, yes/no, 1/0, nothing -> bool. Raises ValueError, so that an opt-out is never misread."""
    if value is None or value == "":
        return False
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if str(value).strip().lower() not in known:
        raise ValueError(f"opt_out: expected true or false, given {value!r}")
    return known[str(value).strip().lower()]


def _whole_number(value: Any, name: str) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) >= 2**62:
        raise ValueError(f"field {name!r}: expected a number of bytes, given {value!r}")
    return int(value)


def _state(stat: Stat, metadata: object) -> str:
    told = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:8]
    return f"{stat.size}-{stat.mtime_us}-{told}"
