"""Rows of one export file -> a parquet file with one row group, and its line of the manifest; and whether files still are what they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from udfs.opener import Opener
from udfs.reject import Reject

FORMAT = 2  # of files and manifest; raised when an export of the same rows would read otherwise
SCHEMA = "bucket STRING, file STRING, rows BIGINT, bytes BIGINT, sha256 STRING, ids STRING"


def write_file(table: pa.Table, root: str, stores: Mapping[str, Any]) -> pa.Table:
    """Rows with `bucket`, `file` (a number) and `at` (their order) -> one SCHEMA row. The same rows give the same bytes."""
    table = table.sort_by("at")
    bucket, number = table.column("bucket")[0].as_py(), table.column("file")[0].as_py()
    rows = table.drop(["bucket", "file", "at"]).replace_schema_metadata(None)
    line = write(rows, bucket, f"{bucket}-{number:05d}.parquet", root, Opener(stores), compression="zstd")
    return pa.table({column: [value] for column, value in line.items()})


def write(rows: pa.Table, bucket: str, name: str, root: str, opener: Opener, **options: Any) -> dict[str, Any]:
    """Rows -> the file, and its SCHEMA row. `options`: of the parquet writer."""
    # room for pages as they are, dictionaries (1 MB a column) and page headers; memory that is not written is not taken, while a
    # sink that grows would hold the file up to three times
    room = pa.allocate_buffer(rows.nbytes * 33 // 32 + 2**21 * (1 + rows.num_columns) + 2**10 * rows.num_rows)
    sink = pa.FixedSizeBufferWriter(room)
    pyarrow.parquet.write_table(rows, sink, row_group_size=max(1, rows.num_rows), store_schema=False, **options)
    data = memoryview(room)[: sink.tell()]
    opener.write(f"{root}/{name}", data)
    ids = f"{id_sum(rows.column('image_id').to_pylist()):016x}"
    return {
        "bucket": bucket,
        "file": name,
        "rows": rows.num_rows,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "ids": ids,
    }


def changed_files(batches: Iterable[pa.RecordBatch], stores: Mapping[str, Any]) -> Iterator[pa.RecordBatch]:
    """(uri, sha256) -> (uri, problem) of those that are not what they were."""
    opener = Opener(stores)
    for batch in batches:
        for file in batch.to_pylist():
            try:
                found = _hash(opener, file["uri"])
                problem = "" if found == file["sha256"] else f"its sha256 is {found}, recorded was {file['sha256']}"
            except Reject as reject:
                problem = reject.code
            if problem:
                yield pa.RecordBatch.from_pylist([{"uri": file["uri"], "problem": problem}])


def _hash(opener: Opener, uri: str) -> str:
    found = hashlib.sha256()
    with opener.stream(uri) as stream:
        while part := stream.read(2**20):
            found.update(part)
    return found.hexdigest()


def id_sum(ids: Iterable[bytes]) -> int:
    """image_ids (32 bytes each), in any order and as often as they occur -> a checksum that adds up: of two row sets together it is the
    sum modulo 2**64.

    The ids are sha256 digests, so their first 8 bytes are as good as random: another row set has the same sum once in 2**64.
    """
    words = np.frombuffer(b"".join(ids), "<u8").reshape(-1, 4)
    return int(words[:, 0].sum(dtype=np.uint64))
