"""What was asked of a paid captioner, durable before it counts: immutable parts of an attempt (wave, partition, attempt).

    WAVE/closed.json                                    the wave's driver settles it: an attempt that opens later asks nothing
    WAVE/../closed.json                                 the same for all waves of its run
    WAVE/000012/003-000000-open.jsonl                   partition 12, attempt 3: before its first call
    WAVE/000012/003-000001-answers.jsonl, ...           at most `flush` records each, or none: a sign of life
    WAVE/000012/003-000007-end.jsonl                    none of its calls is in flight and none follows

A part is written once, as a whole (object stores have no append), after the part before it is durable. What stands in it: udfs/caption_record.py; how
a wave's driver reads them: udfs/caption_wave.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from udfs.caption_record import FORMAT, Record, Strange, Terms, listed, name_of, read, to_bytes
from udfs.opener import Opener
from udfs.reject import Reject

CLOSED = "closed.json"


class Place(NamedTuple):
    """wave: URI of its folder in the journal; attempt: from 0, counted over the stage's attempts too."""

    wave: str
    partition: int
    attempt: int


def next_attempt(opener: Opener, wave: str, partition: int) -> int:
    """-> the number of an attempt that begins now: Spark's own begins anew when a stage is tried again."""
    try:
        return 1 + max((attempt for attempt, _, _ in listed(opener, f"{wave}/{partition:06d}", [])), default=-1)
    except Reject as reject:
        if reject.code != "missing":
            raise
        return 0


def close(opener: Opener, folder: str) -> None:
    """Marks a wave's folder, or a run's, as closed. Before its journal is listed to be settled."""
    opener.write(f"{folder}/{CLOSED}", b"{}\n")


class Journal:
    """The parts of one attempt. Not for several threads at once."""

    def __init__(self, opener: Opener, place: Place, terms: Terms) -> None:
        self.opener, self.place, self.terms = opener, place, terms
        self._folder = f"{place.wave}/{place.partition:06d}"
        self._number, self._calls, self._spent = -1, 0, 0
        self._read: set[str] = set()
        self.strange: list[Strange] = []  # met by `earlier`

    def open(self) -> None:
        """The open part. Raises RuntimeError when there is one: two tasks under one name would spend one share twice."""
        if self.opener.exists(self._uri(self.place.attempt, 0, "open")):
            raise RuntimeError(f"{self._folder}: attempt {self.place.attempt} has been begun by another task")
        self._write("open", ())

    def answers(self, records: Sequence[Record]) -> None:
        """The next part. Raises Reject when the store fails; then only the same records may be tried again."""
        assert self._number >= 0 and len(records) <= self.terms.flush
        self._write("answers", records)

    def end(self, reason: str) -> None:
        """The last part. Raises as `answers`."""
        assert self._number >= 0
        self._write("end", (), reason)

    def whole(self, records: Sequence[Record]) -> None:
        """An attempt that one result file tells at once, whoever reads it: written again it is the same parts."""
        self._number = -1
        for kind, some in (("open", ()), ("answers", records), ("end", ())):
            self._write(kind, some)

    def fenced(self) -> str | None:
        """-> why this attempt must ask nothing (more): its wave or run is closed, or a later attempt has begun; None: it may."""
        wave, run = self.place.wave, self.place.wave.rpartition("/")[0]
        marks = {
            "its wave is closed": f"{wave}/{CLOSED}",
            "its run is closed": f"{run}/{CLOSED}",
            "a later attempt has begun": self._uri(self.place.attempt + 1, 0, "open"),
        }
        return next((why for why, uri in marks.items() if self.opener.exists(uri)), None)

    def earlier(self) -> tuple[list[Record], bool]:
        """-> (records of earlier attempts of this partition that were not given before, whether all of those attempts have ended)."""
        found: list[Record] = []
        fresh: set[str] = set()
        names = [name for name in listed(self.opener, self._folder, self.strange) if int(name[0]) < self.place.attempt]
        for attempt, number, kind in names:
            uri = self._uri(attempt, number, kind)
            if uri not in self._read and (part := read(self.opener, uri, self.strange)) is not None:
                found += part.records
            fresh.add(uri)
        self._read |= fresh  # when all are read: a store that fails halfway is asked again for the same
        ended = {attempt for attempt, _, kind in names if kind == "end"}
        return found, all(attempt in ended for attempt, _, _ in names)

    def _uri(self, attempt: int, number: int, kind: str) -> str:
        return f"{self._folder}/{name_of(attempt, number, kind)}"

    def _write(self, kind: str, records: Sequence[Record], reason: str = "") -> None:
        number = self._number + 1
        calls, spent = self._calls + len(records), self._spent + sum(one.nano_usd for one in records)
        header = {"format": FORMAT, "partition": self.place.partition, "attempt": self.place.attempt, "number": number, "kind": kind}
        header |= {"terms": self.terms._asdict(), "calls": calls, "spent": spent, "reason": reason}
        self.opener.write(self._uri(self.place.attempt, number, kind), to_bytes(header, records))
        self._number, self._calls, self._spent = number, calls, spent
