"""Files -> whether they hold a trace of forgotten images, and the same files without it.

A trace is an image's id (the 32 bytes in a parquet column `image_id` or `derived_from`, at any depth; its 64 hex digits in a text), the
`input_key` under which ingest refused one of its files, or a name of it in a text. Parquet rows with a trace go; in a text a trace is
replaced by as many zeros, so that what counts bytes of the text (a journal's delivery) still counts right.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from udfs.opener import Opener
from udfs.reject import Reject

ID_FIELDS, KEY_FIELD = ("image_id", "derived_from"), "input_key"
TEXTS = (".json", ".jsonl", ".txt", ".csv", ".html", ".md", ".log", ".yaml", ".sent")
BLANK = b"0"
SCHEMA = "uri STRING, rows BIGINT"


class Traces(NamedTuple):
    """What is looked for: ids in hex, input keys, names (as they stand in texts)."""

    ids: frozenset[str]
    keys: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()

    @property
    def words(self) -> list[bytes]:
        """What a text is searched for, names also as JSON writes them: the longest first, so that a name within a longer one does not cut it."""
        as_json = {json.dumps(name)[1:-1] for name in self.names}
        return sorted((word.encode() for word in self.ids | self.names | as_json), key=lambda word: (-len(word), word))

    def to_json(self) -> str:
        return json.dumps({name: sorted(words) for name, words in self._asdict().items()})

    @classmethod
    def from_json(cls, text: str | bytes) -> Traces:
        return cls(**{name: frozenset(words) for name, words in json.loads(text).items()})


def holding(batches: Iterable[pa.RecordBatch], told: str, stores: Mapping[str, Any]) -> Iterator[pa.RecordBatch]:
    """Rows with `uri` of parquet files -> (uri, rows with a trace) of those that have one. A file that is gone meanwhile has none."""
    traces, opener = Traces.from_json(told), Opener(stores)
    for batch in batches:
        for uri in batch.column("uri").to_pylist():
            rows = _count(uri, traces, opener)
            if rows:
                yield pa.RecordBatch.from_pylist([{"uri": uri, "rows": rows}])


def _count(uri: str, traces: Traces, opener: Opener) -> int:
    try:
        with opener.stream(uri) as stream:
            file = pq.ParquetFile(stream)
            leaves = [file.schema.column(number).path for number in range(len(file.schema.names))]
            wanted = [leaf for leaf in leaves if _field(leaf) in (*ID_FIELDS, KEY_FIELD)]
            if not wanted:
                return 0
            groups = (file.read_row_group(number, columns=wanted) for number in range(file.num_row_groups))
            return sum(int(pc.sum(_marked(group, traces)).as_py() or 0) for group in groups)
    except Reject as reject:
        if reject.code != "missing":
            raise
        return 0


def without(data: bytes, traces: Traces) -> bytes | None:
    """Parquet bytes -> the same without the rows that have a trace (one row group, as they were compressed); None when none has."""
    table = pq.read_table(io.BytesIO(data))
    marked = _marked(table, traces)
    if not pc.any(marked).as_py():
        return None
    out = io.BytesIO()
    codec = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(0).compression
    pq.write_table(table.filter(pc.invert(marked)), out, compression=codec.lower() if codec != "UNCOMPRESSED" else "none")
    return out.getvalue()


def blanked(data: bytes, traces: Traces) -> bytes | None:
    """A text's bytes -> the same with every trace overwritten; None when it has none."""
    found = data
    for word in traces.words:
        found = found.replace(word, BLANK * len(word))
    return None if found == data else found


def _field(leaf: str) -> str:
    """Path of a leaf -> the name of the innermost field that is no part of a list."""
    return next(part for part in reversed(leaf.split(".")) if part not in ("element", "item", "list", "array", "bag"))


def _marked(table: pa.Table, traces: Traces) -> pa.Array:
    """-> bool[rows]: whether a row has a trace, at any depth."""
    ids = pa.array([bytes.fromhex(one) for one in sorted(traces.ids)], pa.binary())
    keys = pa.array(sorted(traces.keys), pa.string())
    marked = pa.array([False] * table.num_rows, pa.bool_())
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.num_chunks:
            marked = pc.or_(marked, _within(pa.concat_arrays(column.chunks), name, ids, keys))
    return marked


def _within(array: pa.Array, name: str, ids: pa.Array, keys: pa.Array) -> pa.Array:
    kind = array.type
    if pa.types.is_struct(kind):
        found = pa.array([False] * len(array), pa.bool_())
        for number in range(kind.num_fields):
            found = pc.or_(found, _within(array.field(number), kind.field(number).name, ids, keys))
        return found
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = _within(array.flatten(), name, ids, keys)
        parents = set(pc.list_parent_indices(array).filter(inner).to_pylist())
        return pa.array([number in parents for number in range(len(array))], pa.bool_())
    if name in ID_FIELDS and (pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind)):
        return pc.is_in(array.cast(pa.binary()), value_set=ids)
    if name == KEY_FIELD and pa.types.is_string(kind):
        return pc.is_in(array, value_set=keys)
    return pa.array([False] * len(array), pa.bool_())
