"""(file, row group, row, column) -> the bytes of that cell of a parquet file; cheap when they are asked for in their order.

The row groups that the threads of a process are at stay open, and each is read forwards, once. Memory: see udfs/parquet_file.py.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from udfs.parquet_file import batches, broken, image_path, open_file, parts, size_of
from udfs.reject import Reject

if TYPE_CHECKING:
    from udfs.handles import Reader, Stat
    from udfs.opener import Opener

# Threads do not ask in exactly the order in which they were told to: rows before the last batch that are kept, more where they are small
_KEPT_ROWS, _KEPT_SMALL_ROWS, _SMALL_ROWS_BYTES = 16, 64, 16 * 2**20
_KEPT_GROUPS, _KEPT_BYTES = 16, 32 * 2**20  # row groups, beside the last two, between which threads may go back and forth
_KEPT_FOOTERS = 8


class CellAddress(NamedTuple):
    """A column of a row group of a file in the state that ingest saw (None: as it is)."""

    uri: str
    row_group: int
    column: str
    expected: Stat | None


class Cells:
    """Cells of parquet files, by address. Shared by threads; the row groups that they are at stay open, and each is read forwards."""

    def __init__(self) -> None:
        self._groups: OrderedDict[CellAddress, _Group] = OrderedDict()
        self._footers: OrderedDict[tuple[str, Stat | None], pq.FileMetaData] = OrderedDict()
        self._lock = threading.Lock()
        self.opened = 0  # row groups that were begun

    def read(self, opener: Opener, address: CellAddress, row: int) -> bytes:
        """Raises Reject as Opener.reader does, parquet_broken, column_unfit, row_group_too_big; bytes_changed where there is no such cell."""
        with self._lock:
            if address not in self._groups:
                self._groups[address] = _Group()
            group = self._groups[address]
            self._groups.move_to_end(address)
        with group.lock:
            try:
                data = group.cell(row, lambda: self._begin(opener, address, group))
            except BaseException:
                group.forget()
                raise
        if not data:
            raise Reject("bytes_changed", f"{address.uri}: no image in row {row} of row group {address.row_group}")
        return data

    def _begin(self, opener: Opener, address: CellAddress, group: _Group) -> Iterator[tuple[int, pa.Array]]:
        """-> the cells of a row group, in batches. Groups that are no longer needed go."""
        reader = opener.reader(address.uri, address.expected)
        key = (address.uri, address.expected)
        with broken(reader):
            file = open_file(reader, self._footers.get(key))
        if address.row_group >= file.num_row_groups:
            raise Reject("bytes_changed", f"{address.uri}: {file.num_row_groups} row groups, none has the number {address.row_group}")
        path = image_path(file.schema_arrow, address.column)
        group.size = size_of(reader, file, address.row_group, [path])
        group.rows = file.metadata.row_group(address.row_group).num_rows
        with self._lock:
            self.opened += 1
            self._footers[key] = file.metadata
            while len(self._footers) > _KEPT_FOOTERS:
                self._footers.popitem(last=False)
            held = sum(one.size for one in self._groups.values())
            while len(self._groups) > 2 and (len(self._groups) > _KEPT_GROUPS or held > _KEPT_BYTES):
                held -= self._groups.popitem(last=False)[1].size  # freed when the last thread that reads it is through
        return _cells_of(reader, file, address.row_group, path)


def _cells_of(reader: Reader, file: pq.ParquetFile, group: int, path: str) -> Iterator[tuple[int, pa.Array]]:
    try:
        for first, batch in batches(reader, file, group, [path]):
            yield first, parts(batch, [path])[0]
    finally:
        reader.close()


class _Group:
    """The cells of one row group: those before the next batch, of which the last ones are kept."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.size = self.rows = 0
        self._coming: Iterator[tuple[int, pa.Array]] | None = None
        self._kept: deque[tuple[int, pa.Array]] = deque()
        self._end = 0  # of what was read so far

    def cell(self, row: int, begin: Callable[[], Iterator[tuple[int, pa.Array]]]) -> bytes | None:
        """None: there is no such row, or it is null."""
        if self._coming is None or row < (self._kept[0][0] if self._kept else self._end):
            self.forget()
            self._coming = begin()
        while row >= self._end:
            batch = next(self._coming, None)
            if batch is None:
                return None
            self._kept.append(batch)
            self._end = batch[0] + len(batch[1])
            if self._end >= self.rows:
                self._coming = iter(())  # the file's pages go at once, not with the next row group
            while len(self._kept) > 1 and batch[0] - self._kept[1][0] >= self._wanted():
                self._kept.popleft()
        first, cells = next(kept for kept in reversed(self._kept) if kept[0] <= row)
        return cells[row - first].as_py()

    def _wanted(self) -> int:
        """Rows to keep before the last batch."""
        return _KEPT_SMALL_ROWS if sum(cells.nbytes for _, cells in self._kept) < _SMALL_ROWS_BYTES else _KEPT_ROWS

    def forget(self) -> None:
        self._coming, self._end, self.size = None, 0, 0
        self._kept.clear()
