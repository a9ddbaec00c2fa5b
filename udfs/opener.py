"""(uri, offset, length) -> bytes, from local paths, mounted volumes and S3-compatible stores, with its own credentials.

URIs are percent-encoded bytes (`file:///a%0Ab.png`, `s3://bucket/key`), so that any file name has one. Spark's own
credentials do not reach Python workers: an S3 store is described by name in `stores` (conf.build.Store as a
mapping, keyed by bucket; `*` for every other bucket), and its secrets are read from the environment here.
"""

from __future__ import annotations

import io
import os
import shutil
import stat as stat_module
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, unquote, unquote_to_bytes

import pyarrow.fs

from udfs.handles import Reader, Stat, named, read_at, stat_of
from udfs.parquet_cells import CellAddress, Cells
from udfs.reject import Reject

KEPT_OPEN = 8  # archives whose handle stays open between reads


class Entry(NamedTuple):
    """One thing in a folder. `problem` is a reject code when it could not even be looked at."""

    uri: str
    is_folder: bool
    stat: Stat
    problem: str | None = None


def to_uri(path: str | bytes) -> str:
    """Path or URI -> URI. A relative path is taken from the current folder; `s3a://` is `s3://`."""
    if isinstance(path, str) and "://" in path:
        return path.replace("s3a://", "s3://", 1)
    return "file://" + quote(os.path.abspath(os.fsencode(path)), safe="/")


def to_path(uri: str) -> bytes:
    """`file://` URI -> the local path's bytes."""
    assert uri.startswith("file://"), uri
    return unquote_to_bytes(uri.removeprefix("file://"))


class Opener:
    """Reads, lists and writes by URI. Safe to share between threads; make one per process (it holds connections)."""

    def __init__(self, stores: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.stores = dict(stores or {})
        self._remote: dict[str, pyarrow.fs.FileSystem] = {}
        self._open: OrderedDict[str, tuple[Any, Stat]] = OrderedDict()
        self._lock = threading.Lock()
        self._cells = Cells()

    def stat(self, uri: str) -> Stat:
        """Raises Reject missing or unreadable."""
        with named(uri):
            if uri.startswith("file://"):
                found = os.stat(to_path(uri))
                if not stat_module.S_ISREG(found.st_mode):
                    raise Reject("unreadable", f"{uri} is not a regular file")
                return Stat(found.st_size, found.st_mtime_ns // 1000)
            info = self._filesystem(uri).get_file_info(_remote_path(uri))
            if info.type != pyarrow.fs.FileType.File:
                raise Reject("missing", uri)
            return _remote_stat(info)

    def read(self, uri: str, offset: int = 0, length: int | None = None, expected: Stat | None = None) -> bytes:
        """Bytes of a range (None: to the end). Raises Reject missing, unreadable, or bytes_changed when the object is not `expected`."""
        with named(uri):
            whole = expected is None or (offset == 0 and length == expected.size)
            handle, found = self._handle(uri, keep=not whole)
            if uri.startswith("file://"):
                found = stat_of(handle)  # an open archive may have changed since its last read
            try:
                if expected is not None and found != expected:
                    raise Reject("bytes_changed", f"{uri}: {found} now, {expected} at ingest")
                wanted = found.size - offset if length is None else length
                data = read_at(handle, wanted, offset)
            finally:
                if whole:
                    handle.close()
        if len(data) != wanted:
            raise Reject("bytes_changed", f"{uri}: {len(data)} of {wanted} bytes at offset {offset}")
        return data

    def reader(self, uri: str, expected: Stat | None = None) -> Reader:
        """A file for reads here and there. Raises Reject missing, unreadable, or bytes_changed when the object is not `expected`."""
        with named(uri):
            handle, found = self._fresh(uri)
        if expected is not None and found != expected:
            handle.close()
            raise Reject("bytes_changed", f"{uri}: {found} now, {expected} at ingest")
        return Reader(uri, handle, found)

    def cell(self, uri: str, row_group: int, row: int, column: str, expected: Stat | None) -> bytes:
        """Bytes of a cell of a parquet file; cheap for cells that are asked for in their order. Raises Reject as `read` does, parquet_broken
        or column_unfit."""
        return self._cells.read(self, CellAddress(uri, row_group, column, expected), row)

    @property
    def cells_opened(self) -> int:
        """Row groups that were begun for `cell`."""
        return self._cells.opened

    def stream(self, uri: str) -> BinaryIO:
        """A seekable binary file for reading from front to back. Raises Reject missing or unreadable."""
        with named(uri):
            if uri.startswith("file://"):
                return open(to_path(uri), "rb", buffering=2**20)
            # tarfile asks for 512 bytes at a time
            return io.BufferedReader(self._filesystem(uri).open_input_file(_remote_path(uri)), 2**20)

    def entries(self, uri: str) -> Iterator[Entry]:
        """What a folder holds, one level deep, in no order; links to folders are not followed. Raises Reject missing or unreadable."""
        with named(uri):
            if uri.startswith("file://"):
                yield from _local_entries(to_path(uri))
                return
            selector = pyarrow.fs.FileSelector(_remote_path(uri).rstrip("/"), recursive=False)
            for info in self._filesystem(uri).get_file_info(selector):
                child = f"s3://{quote(info.path, safe='/')}"
                folder = info.type == pyarrow.fs.FileType.Directory
                yield Entry(child, folder, Stat(-1, 0) if folder else _remote_stat(info))

    def exists(self, uri: str) -> bool:
        try:
            self.stat(uri)
        except Reject as reject:
            if reject.code == "missing":
                return False
            raise
        return True

    def write(self, uri: str, data: bytes | memoryview) -> None:
        """All of it or nothing: a reader never sees half a file."""
        with named(uri):
            if not uri.startswith("file://"):
                with self._filesystem(uri).open_output_stream(_remote_path(uri)) as out:
                    out.write(data)
                return
            path = to_path(uri)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            part = path + b".%d.part" % threading.get_native_id()
            with open(part, "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            os.replace(part, path)

    def delete(self, uri: str) -> None:
        """A file, or a folder with all it holds; nothing there is fine."""
        with named(uri):
            if uri.startswith("file://"):
                path = to_path(uri)
                if os.path.isdir(path):
                    shutil.rmtree(path)
                elif os.path.lexists(path):
                    os.unlink(path)
                return
            filesystem, path_ = self._filesystem(uri), _remote_path(uri)
            if filesystem.get_file_info(path_).type == pyarrow.fs.FileType.File:
                filesystem.delete_file(path_)
            elif filesystem.get_file_info(path_).type == pyarrow.fs.FileType.Directory:
                filesystem.delete_dir(path_)

    def _handle(self, uri: str, keep: bool) -> tuple[Any, Stat]:
        if not keep:
            return self._fresh(uri)
        with self._lock:
            held = self._open.get(uri)
        held = held or self._fresh(uri)  # outside the lock: a store takes its time, and other threads read meanwhile
        with self._lock:
            held = self._open.setdefault(uri, held)
            self._open.move_to_end(uri)
            while len(self._open) > KEPT_OPEN:
                self._open.popitem(last=False)  # closed when its last reader lets go of it
            return held

    def _fresh(self, uri: str) -> tuple[Any, Stat]:
        if uri.startswith("file://"):
            handle = open(to_path(uri), "rb", buffering=0)  # noqa: SIM115  (closed by `read`, or kept)
            return handle, stat_of(handle)
        stat = self.stat(uri)
        return self._filesystem(uri).open_input_file(_remote_path(uri)), stat

    def _filesystem(self, uri: str) -> pyarrow.fs.FileSystem:
        scheme, _, rest = uri.partition("://")
        if scheme != "s3":
            raise Reject("address_refused", f"{uri}: expected a local path, file:// or s3://")
        bucket = rest.partition("/")[0]
        with self._lock:
            if bucket not in self._remote:
                self._remote[bucket] = _s3(self.stores.get(bucket) or self.stores.get("*") or {})
            return self._remote[bucket]


def _s3(store: Mapping[str, Any]) -> pyarrow.fs.FileSystem:
    options: dict[str, Any] = {"region": store.get("region", "us-east-1")}
    if store.get("endpoint"):
        scheme, _, host = store["endpoint"].rpartition("://")
        options |= {"endpoint_override": host, "scheme": scheme or "https"}
    for option, variable in (("access_key", store.get("access_key_env")), ("secret_key", store.get("secret_key_env"))):
        if variable:
            if variable not in os.environ:
                raise ValueError(f"stores: the environment variable {variable} that holds the {option} is not set on this machine")
            options[option] = os.environ[variable]
    return pyarrow.fs.S3FileSystem(**options)


def _remote_stat(info: pyarrow.fs.FileInfo) -> Stat:
    """Time in whole seconds: some stores list milliseconds, but an object's own header has only seconds."""
    return Stat(info.size, (info.mtime_ns or 0) // 1_000_000_000 * 1_000_000)


def _remote_path(uri: str) -> str:
    return unquote(uri.partition("://")[2])


def _local_entries(path: bytes) -> Iterator[Entry]:
    with os.scandir(path) as found:
        for item in found:
            uri = to_uri(item.path)
            try:
                info = item.stat()
            except FileNotFoundError:  # a link to nothing, or gone since
                yield Entry(uri, False, Stat(-1, 0), "missing")
            except OSError:
                yield Entry(uri, False, Stat(-1, 0), "unreadable")
            else:
                if stat_module.S_ISDIR(info.st_mode):
                    if not item.is_symlink():
                        yield Entry(uri, True, Stat(-1, 0))
                elif stat_module.S_ISREG(info.st_mode):
                    yield Entry(uri, False, Stat(info.st_size, info.st_mtime_ns // 1000))
                else:
                    yield Entry(uri, False, Stat(-1, 0), "unreadable")
