"""Events of a training -> journal.jsonl, one JSON line each, and how far they were delivered -> journal.sent.

The journal is written before anything is sent, so that it outlives the server, the network and this process. A line is in
the file when `append` returns (a kill -9 leaves it there); `sync` also waits for the disk. A line that a kill tore is cut
off when the journal is opened again. One process at a time has it, by a lock that ends with the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.section import Mistake

CHUNK = 1 << 20  # bytes that are read at once

Event = dict[str, Any]


class Journal:
    """An open journal: `facts` is what its delivery found out (run, version, ...), `pending` how many events were not delivered."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self._sent_path = folder / "journal.jsonl", folder / "journal.sent"
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise Mistake(f"{self.path}: another process writes this journal; wait for it, or end it first") from None
        self._lock = threading.Lock()
        self._unwritten = b""  # what a full disk refused; tried again with the next event
        self.written, self._end = 0, 0
        for _, end in self._scan():
            self.written, self._end = self.written + 1, end
        os.ftruncate(self._file, self._end)
        told: Event = json.loads(self._sent_path.read_bytes()) if self._sent_path.is_file() else {"end": 0, "count": 0, "facts": {}}
        self._sent: int = min(told["end"], self._end)
        self.sent: int = min(told["count"], self.written)
        self.facts: dict[str, str] = told["facts"]

    @staticmethod
    def forget(folder: Path) -> None:
        """Nothing was delivered: all events of a folder's journal are pending again when it is next opened."""
        (folder / "journal.sent").unlink(missing_ok=True)

    @staticmethod
    def look(folder: Path) -> tuple[dict[str, str], bool]:
        """A folder whose journal may be another process's -> what its delivery found out, and whether all is delivered, up to a `close`."""
        path, sent = folder / "journal.jsonl", folder / "journal.sent"
        if not path.is_file() or not sent.is_file():
            return {}, False
        told: Event = json.loads(sent.read_bytes())
        with path.open("rb") as lines:
            size = lines.seek(0, os.SEEK_END)
            lines.seek(max(0, size - CHUNK))
            last = lines.read().splitlines()[-1:]
        return told["facts"], told["end"] == size and any(b'"kind":"close"' in line for line in last)

    @property
    def pending(self) -> int:
        return self.written - self.sent

    @property
    def unwritten(self) -> int:
        """Events that a full disk refused: they are nowhere yet."""
        return self._unwritten.count(b"\n")

    def __iter__(self) -> Iterator[Event]:
        """All events, the oldest first."""
        return (event for event, _ in self._scan())

    def append(self, event: Event, sync: bool) -> str:
        """Event -> "" when it is in the file, else why not: it is then kept in memory and written with the next one."""
        with self._lock:
            self._unwritten += json.dumps(event, separators=(",", ":")).encode() + b"\n"
            try:
                _write(self._file, self._unwritten)
                if sync:
                    os.fsync(self._file)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._end)  # half a line must not stand before the next try
                return str(error)
            self._end += len(self._unwritten)
            self.written += self._unwritten.count(b"\n")
            self._unwritten = b""
            return ""

    def read(self) -> list[tuple[Event, int]]:
        """-> the next undelivered events, each with the place where it ends: about CHUNK bytes of them."""
        size = CHUNK
        while True:
            data = os.pread(self._file, min(size, self._end - self._sent), self._sent)
            whole = data[: data.rfind(b"\n") + 1]
            if whole or not data:
                break
            size *= 2  # one event larger than that
        found, end = [], self._sent
        for line in whole.splitlines(keepends=True):
            end += len(line)
            found.append((json.loads(line), end))
        return found

    def mark(self, end: int, count: int) -> None:
        """`count` more events, to the place `end`, are delivered; `facts` are kept with that."""
        self._sent, self.sent = end, self.sent + count
        text = json.dumps({"end": self._sent, "count": self.sent, "facts": self.facts})
        fresh = self._sent_path.with_suffix(".new")
        with contextlib.suppress(OSError):  # a full disk: what is not noted is delivered again, which changes nothing
            fresh.write_text(text)
            fresh.replace(self._sent_path)

    def rewind(self) -> None:
        """Nothing is delivered: for a store that is another than the one before."""
        self._sent, self.sent, self.facts = 0, 0, {}

    def close(self) -> None:
        os.close(self._file)

    def _scan(self) -> Iterator[tuple[Event, int]]:
        """Whole events with the place where each ends, up to the end or to the first line that is none."""
        end = 0
        with self.path.open("rb") as lines:
            for line in lines:
                try:
                    event = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    event = None
                if not isinstance(event, dict):
                    return
                end += len(line)
                yield event, end


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
