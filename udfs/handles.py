"""An open file of a store -> its bytes here and there, its state, and the store's errors as rejects with a name."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from udfs.reject import Reject


class Stat(NamedTuple):
    """Size in bytes and modification time in microseconds since 1970: how a change of bytes is noticed."""

    size: int
    mtime_us: int


class Reader:
    """What pyarrow needs of a Python file, with a Reject for every failure; a local file that changes while it is read is one."""

    def __init__(self, uri: str, handle: Any, stat: Stat) -> None:
        self.uri, self.stat, self.closed = uri, stat, False
        self.failed: Reject | None = None  # in case the library that reads here tells of it in its own words
        self._handle, self._position = handle, 0

    def read(self, size: int = -1) -> bytes:
        try:
            return self._read(size)
        except Reject as reject:
            self.failed = reject
            raise

    def _read(self, size: int) -> bytes:
        wanted = max(0, self.stat.size - self._position)
        wanted = wanted if size < 0 else min(size, wanted)
        with named(self.uri):
            data = read_at(self._handle, wanted, self._position)
            if self.uri.startswith("file://") and (found := stat_of(self._handle)) != self.stat:
                raise Reject("bytes_changed", f"{self.uri}: {found} now, {self.stat} when it was opened")
        if len(data) != wanted:
            raise Reject("bytes_changed", f"{self.uri}: {len(data)} of {wanted} bytes at offset {self._position}")
        self._position += wanted
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self.stat.size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
        self._handle.close()


def stat_of(handle: Any) -> Stat:
    found = os.fstat(handle.fileno())
    return Stat(found.st_size, found.st_mtime_ns // 1000)


def read_at(handle: Any, length: int, offset: int) -> bytes:
    if hasattr(handle, "read_at"):
        return handle.read_at(length, offset)
    parts = []
    while length > 0 and (part := os.pread(handle.fileno(), min(length, 2**30), offset)):
        parts.append(part)
        length -= len(part)
        offset += len(part)
    return b"".join(parts)


class named:
    """The store's errors, as rejects with a name."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, FileNotFoundError):
            raise Reject("missing", self._uri) from error
        if isinstance(error, OSError) or (type(error) is ValueError and "embedded null" in str(error)):
            raise Reject("unreadable", f"{self._uri}: {error}") from error
