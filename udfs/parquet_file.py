"""A parquet file with an image column -> its columns, sizes and batches; a row group is read once, in order.

Memory: a row group comes in batches of about BATCH_BYTES and in pages as they were written. Of a column of many pages some 25 MB are
held at a time; of a row group that is one page (pyarrow writes up to 1,024 rows so) twice its bytes. So one that holds more than
MAX_GROUP_BYTES is refused: write such a file anew with smaller row groups (Hugging Face's have 100 images).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from udfs.reject import Reject

if TYPE_CHECKING:
    from udfs.handles import Reader

MAX_GROUP_BYTES = 512 * 2**20  # uncompressed, of the columns that are read of one row group
BATCH_BYTES = 4 * 2**20  # of mean rows
MAX_BATCH = 256  # rows
_BUFFER = 2**20  # bytes of a read; without a buffer pyarrow reads a row group's column at once


def image_path(schema: pa.Schema, column: str) -> str:
    """Schema and the image column -> the path of its bytes: itself, or `bytes` in it. Raises Reject column_unfit."""
    kind = only(schema, column).type
    path = column
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        path, kind = f"{column}.bytes", kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)):
        raise Reject("column_unfit", f"column {path!r} is {kind}; expected binary, or a struct with `bytes`")
    return path


def only(schema: pa.Schema, column: str) -> pa.Field:
    """The one column of that name. Raises Reject column_unfit."""
    found = schema.get_all_field_indices(column)
    if len(found) != 1:
        raise Reject("column_unfit", f"{len(found)} columns are named {column!r}, expected one of {', '.join(schema.names[:20])}")
    return schema.field(found[0])


def open_file(reader: Reader, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """footer: where it was read before."""
    return pq.ParquetFile(reader, metadata=footer, buffer_size=_BUFFER)


def size_of(reader: Reader, file: pq.ParquetFile, group: int, columns: Sequence[str]) -> int:
    """Bytes that the columns of a row group hold. Raises Reject row_group_too_big."""
    with broken(reader):
        told = file.metadata.row_group(group)
        chunks = [told.column(number) for number in range(told.num_columns)]
        mine = [chunk for chunk in chunks if any(f"{chunk.path_in_schema}.".startswith(f"{column}.") for column in columns)]
        size = sum(chunk.total_uncompressed_size for chunk in mine)
    if size > MAX_GROUP_BYTES:
        raise Reject("row_group_too_big", f"row group {group}: {', '.join(columns)} hold {size} bytes, at most {MAX_GROUP_BYTES} are read")
    return size


def batches(reader: Reader, file: pq.ParquetFile, group: int, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """-> (number of its first row, batch), of as many rows as fill BATCH_BYTES on the average."""
    many, first = max(1, file.metadata.row_group(group).num_rows), 0
    batch_rows = max(1, min(MAX_BATCH, BATCH_BYTES * many // max(1, size_of(reader, file, group, columns))))
    with broken(reader):
        for batch in file.iter_batches(batch_rows, row_groups=[group], columns=list(columns), use_threads=False):
            yield first, batch
            first += batch.num_rows


def parts(batch: pa.RecordBatch, image: Sequence[str]) -> tuple[pa.Array, pa.Array | None]:
    """A batch -> (the cells, their paths where there are such)."""
    whole = batch.column(image[0] if image[0] in batch.schema.names else image[0].removesuffix(".bytes"))
    if not pa.types.is_struct(whole.type):
        return whole, None
    return whole.field("bytes"), whole.field("path") if len(image) > 1 else None


@contextmanager
def broken(reader: Reader) -> Iterator[None]:
    """What pyarrow raises for bytes that are no parquet, as a reject; what the store said, as it said it."""
    try:
        yield
    except Reject:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise reader.failed or Reject("parquet_broken", f"{type(error).__name__}: {error}") from None
