"""Rows of one export file -> a parquet file with one row group, and its line of the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from udfs.opener import Opener

SCHEMA = "bucket STRING, file STRING, rows BIGINT, bytes BIGINT, sha256 STRING"


def write_file(table: pa.Table, root: str, stores: Mapping[str, Any]) -> pa.Table:
    """Rows with `bucket`, `file` (a number) and `at` (their order) -> one SCHEMA row. The same rows give the same bytes."""
    table = table.sort_by("at")
    bucket, number = table.column("bucket")[0].as_py(), table.column("file")[0].as_py()
    rows = table.drop(["bucket", "file", "at"]).replace_schema_metadata(None)
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(rows, sink, row_group_size=max(1, rows.num_rows), compression="zstd", store_schema=False)
    data = sink.getvalue().to_pybytes()
    name = f"{bucket}-{number:05d}.parquet"
    Opener(stores).write(f"{root}/{name}", data)
    told = {"bucket": [bucket], "file": [name], "rows": [rows.num_rows], "bytes": [len(data)], "sha256": [hashlib.sha256(data).hexdigest()]}
    return pa.table(told)
