"""A parquet file with an image column -> its rows. The other side of udfs/parquet_reader.py, which runs this module as a process.

A row that holds no image says why; a row group that cannot be read to its end is a row that says so, and the next one is read.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from udfs.handles import Reader, Stat
from udfs.opener import Opener
from udfs.parquet_file import batches, broken, image_path, only, open_file, parts
from udfs.reject import Reject


class Row(NamedTuple):
    """A row of a file: its place, the image's bytes, its `path` (in Hugging Face's layout) and the values of other columns.

    refused: why there are no bytes; parquet_broken and row_group_too_big are of the row group from this row on.
    """

    row_group: int
    row: int
    data: bytes | None = None
    path: str | None = None
    values: Mapping[str, Any] = {}
    refused: Reject | None = None


def rows(opener: Opener, uri: str, expected: Stat, image: str, others: Mapping[str, str], required: Sequence[str] = ()) -> Iterator[Row]:
    """Every row of a file in order. image: the column; others: our name -> column, taken where the file has it, as it must have `required`.

    Raises Reject as Opener.reader does, parquet_broken for the footer, column_unfit. A row group that cannot be read to its end is
    a Row that says so, and the next one is read.
    """
    reader = opener.reader(uri, expected)
    try:
        with broken(reader):
            file = open_file(reader)
            schema = file.schema_arrow
        path = image_path(schema, image)
        others = {name: column for name, column in others.items() if column in schema.names}
        for column in (*required, *others.values()):
            only(schema, column)
        beside = [f"{image}.path"] if path != image and schema.field(image).type.get_field_index("path") >= 0 else []
        for group in range(file.num_row_groups):
            yield from _rows_of(reader, file, group, [path, *beside], others)
    finally:
        reader.close()


def _rows_of(reader: Reader, file: pq.ParquetFile, group: int, image: list[str], others: Mapping[str, str]) -> Iterator[Row]:
    columns, done = [*image, *dict.fromkeys(others.values())], 0
    try:
        for first, batch in batches(reader, file, group, columns):
            cells, paths = parts(batch, image)
            beside = {name: batch.column(column) for name, column in others.items()}
            for number in range(batch.num_rows):
                yield _row(group, first + number, cells[number].as_py(), number, paths, beside)
            done = first + batch.num_rows
    except Reject as reject:
        if reject.transient or reject.code == "bytes_changed":
            raise  # of the whole file
        yield Row(group, done, refused=reject)


def _row(group: int, row: int, data: bytes | None, number: int, paths: pa.Array | None, beside: Mapping[str, pa.Array]) -> Row:
    """number: the row's in its batch."""
    try:
        path = paths[number].as_py() if paths is not None else None
        values = {name: column[number].as_py() for name, column in beside.items()}
    except (ValueError, OverflowError) as error:  # a text that is not UTF-8, a date beyond Python's
        return Row(group, row, data or None, refused=Reject("manifest_row_invalid", f"row {row} of row group {group}: {error}"))
    refused: Reject | None = None
    if data is None:
        refused = Reject("no_image", f"row {row} of row group {group} is null" + (f", with the path {path!r} alone" if path else ""))
    elif not data:
        refused = Reject("empty", f"row {row} of row group {group}")
    return Row(group, row, data or None, path, values, refused)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Pickled (stores, keywords of `rows`) one after the other -> for each its Rows, and at the end a Reject or None; pickled."""
    while True:
        try:
            stores, keywords = pickle.load(requests)
        except EOFError:
            return
        end: Reject | None = None
        try:
            for row in rows(Opener(stores), **keywords):
                pickle.dump(row, answers, pickle.HIGHEST_PROTOCOL)
        except Reject as reject:
            end = reject
        pickle.dump(end, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "wb", 2**16)
    os.dup2(2, 1)  # what a library prints goes elsewhere
    # by its name: what is pickled here must be found there
    from udfs import parquet_rows

    parquet_rows.serve(sys.stdin.buffer, out)
