"""(object's uri, sha256) -> a file of this machine with its bytes: downloaded once for all ranks that run here.

A file is named by its sha256 and appears whole: hashed while it is written beside, then renamed. Readers hold a shared lock on it,
so that what makes room (the least recently used goes first) never takes a file that is being read. Bounded by `limit` bytes, plus what is held.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from conf.section import Mistake
from udfs.opener import Opener
from udfs.reject import Reject

PIECE = 8 * 2**20


class Spool:
    """One folder of a machine's own file system, shared by its processes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.fresh: set[str] = set()  # sha256 of what this process downloaded, and so has hashed

    @contextmanager
    def held(self, opener: Opener, uri: str, sha256: str, size: int) -> Iterator[Path]:
        """The file, safe from removal for the length of the block. Raises Mistake when the object has other bytes, Reject when it cannot be read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(sha256)
        while True:
            with self._locked(sha256, fcntl.LOCK_EX):  # of several ranks one downloads, the others wait for it
                if not path.is_file():
                    self._make_room(size)
                    self._download(opener, uri, sha256, path)
            with self._locked(sha256, fcntl.LOCK_SH):
                if path.is_file():  # not taken between the two locks
                    os.utime(path)
                    yield path
                    return

    def path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.parquet"

    @contextmanager
    def _locked(self, sha256: str, how: int) -> Iterator[None]:
        with open(self.folder / f"{sha256}.lock", "w") as lock:
            fcntl.flock(lock, how)
            yield

    def _download(self, opener: Opener, uri: str, sha256: str, path: Path) -> None:
        part, digest = path.with_suffix(".part"), hashlib.sha256()  # one writer, by the lock; what a kill left is written over
        with opener.stream(uri) as source:
            try:
                with part.open("wb") as sink:
                    for piece in _pieces(source, uri):
                        digest.update(piece)
                        sink.write(piece)
                if digest.hexdigest() != sha256:
                    raise Mistake(f"{uri} was changed: its sha256 is {digest.hexdigest()}, the manifest says {sha256}; export again")
                part.rename(path)
                self.fresh.add(sha256)
            except OSError as error:
                free = shutil.disk_usage(self.folder).free
                raise Mistake(f"spool {self.folder}: {error} ({free} bytes free); give training.spool a place with room") from error
            finally:
                part.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Removes the least recently used files that nobody holds until `size` more bytes fit."""
        there = [(found.stat(), found) for found in self.folder.glob("*.parquet")]
        used = sum(state.st_size for state, _ in there)
        for state, found in sorted(there, key=lambda one: one[0].st_mtime):
            if used + size <= self.limit:
                return
            with open(self.folder / f"{found.stem}.lock", "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                found.unlink(missing_ok=True)
                used -= state.st_size


def _pieces(source: BinaryIO, uri: str) -> Iterator[bytes]:
    """Raises Reject when the store stops giving: its errors are OSErrors as a full disk's are."""
    while True:
        try:
            piece = source.read(PIECE)
        except OSError as error:
            raise Reject("unreadable", f"{uri}: {error}") from error
        if not piece:
            return
        yield piece
