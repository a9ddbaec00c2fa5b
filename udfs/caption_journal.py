"""What was asked of a paid captioner, durable before it counts: immutable parts of an attempt (wave, partition, attempt), and reading them back.

    WAVE/closed.json                                    the wave's driver settles it: an attempt that opens later asks nothing
    WAVE/../closed.json                                 the same for all waves of its run
    WAVE/000012/003-000000-open.jsonl                   partition 12, attempt 3: before its first call
    WAVE/000012/003-000001-answers.jsonl, ...           at most `flush` records each, or none: a sign of life
    WAVE/000012/003-000007-end.jsonl                    none of its calls is in flight and none follows

A part is written once, as a whole (object stores have no append), after the part before it is durable. JSON lines: a header (whose part it is, the
terms of its attempt, and the count and sum of all records up to its end, so that the last part alone says what an attempt has spent), the records,
and the sha256 of the lines before it. What lacks that line, or says another name than its own, is named and counted as strange, and is no part.
Spark reads the records by RECORD_SCHEMA, from lines that have a key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from udfs.caption_budget import Seen
from udfs.caption_call import QUARANTINE, Reply, Usage
from udfs.caption_request import Request
from udfs.opener import Opener
from udfs.reject import Reject

FORMAT = 1
CLOSED = "closed.json"
RECORD_SCHEMA = (
    "key STRING, image_id STRING, try INT, repair BOOLEAN, outcome STRING, code STRING, detail STRING, text STRING, "
    "usage STRUCT<prompt: INT, image: INT, output: INT, thoughts: INT, estimated: BOOLEAN>, nano_usd BIGINT, seconds DOUBLE"
)
_NAME = re.compile(r"(\d{3,})-(\d{6,})-(open|answers|end)\.jsonl")
_PARTITION = re.compile(r"\d{6,}")
_UNFINISHED = re.compile(r".*\.\d+\.part")  # what Opener.write leaves on a local disk when it is killed


class Place(NamedTuple):
    """wave: URI of its folder in the journal; attempt: from 0, counted over the stage's attempts too."""

    wave: str
    partition: int
    attempt: int


class Terms(NamedTuple):
    """What an attempt may do: nano-dollars in all and of a call, calls at once, records of a part, seconds of its lease."""

    share: int
    worst: int
    in_flight: int
    flush: int
    lease: float

    @property
    def unsettled(self) -> int:
        """Calls begun and not durable, at most: those in flight, those that a part under way holds, and those of the next part."""
        return self.in_flight + 2 * self.flush


class Record(NamedTuple):
    """One call that has come back. tried: the number of the try of this key in its attempt, from 1; repair: it asked for a better answer."""

    key: str
    image_id: str
    tried: int
    repair: bool
    outcome: str
    code: str
    detail: str
    text: str
    usage: Usage | None
    nano_usd: int
    seconds: float


class Part(NamedTuple):
    partition: int
    attempt: int
    number: int
    kind: str
    terms: Terms
    calls: int
    spent: int
    records: tuple[Record, ...]
    reason: str


class Strange(NamedTuple):
    """A file in the journal that is no part. harm: it has a part's name, so that something may be missing."""

    uri: str
    why: str
    harm: bool


class Wave(NamedTuple):
    """(partition, attempt) -> what its parts say."""

    attempts: dict[tuple[int, int], Seen]
    strange: tuple[Strange, ...]


def record(request: Request, tried: int, repair: bool, reply: Reply, nano_usd: int, seconds: float) -> Record:
    """A reply -> what is kept of it: of a quarantined image its ids, the code and the bill."""
    kept = reply if reply.outcome != QUARANTINE else reply._replace(detail="", text="")
    told = reply.outcome, kept.code, kept.detail, kept.text, kept.usage
    return Record(request.key, request.image_id.hex(), tried, repair, *told, nano_usd, round(seconds, 3))


def next_attempt(opener: Opener, wave: str, partition: int) -> int:
    """-> the number of an attempt that begins now: Spark's own begins anew when a stage is tried again."""
    try:
        return 1 + max((attempt for attempt, _, _ in _listed(opener, f"{wave}/{partition:06d}", [])), default=-1)
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
        names = [name for name in _listed(self.opener, self._folder, self.strange) if int(name[0]) < self.place.attempt]
        for attempt, number, kind in names:
            uri = self._uri(attempt, number, kind)
            if uri not in self._read and (part := _part(self.opener, uri, self.strange)) is not None:
                found += part.records
            self._read.add(uri)
        ended = {attempt for attempt, _, kind in names if kind == "end"}
        return found, all(attempt in ended for attempt, _, _ in names)

    def _uri(self, attempt: int, number: int, kind: str) -> str:
        return f"{self._folder}/{attempt:03d}-{number:06d}-{kind}.jsonl"

    def _write(self, kind: str, records: Sequence[Record], reason: str = "") -> None:
        number = self._number + 1
        calls, spent = self._calls + len(records), self._spent + sum(one.nano_usd for one in records)
        header = {"format": FORMAT, "partition": self.place.partition, "attempt": self.place.attempt, "number": number, "kind": kind}
        header |= {"terms": self.terms._asdict(), "calls": calls, "spent": spent, "reason": reason}
        self.opener.write(self._uri(self.place.attempt, number, kind), _lines(header, records))
        self._number, self._calls, self._spent = number, calls, spent


def read_wave(opener: Opener, wave: str, threads: int = 8) -> Wave:
    """-> the state of every attempt, from the last part of each; no file of the journal makes it fail, a store that does raises Reject.

    An attempt of which no part is whole is not among them: its open part never was durable, so it began no call.
    """
    strange: list[Strange] = []

    def read(folder: str) -> dict[tuple[int, int], Seen]:
        found: dict[tuple[int, int], Seen] = {}
        broken: set[int] = set()
        for attempt, number, kind in sorted(_listed(opener, folder, strange), key=lambda name: (name[0], -name[1])):
            partition = int(folder.rpartition("/")[2])
            if (partition, attempt) in found:
                continue
            part = _part(opener, f"{folder}/{attempt:03d}-{number:06d}-{kind}.jsonl", strange)
            if part is None:
                broken.add(attempt)
                continue
            terms = part.terms
            seen = Seen(terms.share, terms.worst, terms.unsettled, terms.lease, number, part.calls, part.spent, kind == "end")
            found[partition, attempt] = seen._replace(broken=attempt in broken)
        return found

    with ThreadPoolExecutor(threads) as pool:
        attempts = {name: seen for found in pool.map(read, _partitions(opener, wave, strange)) for name, seen in found.items()}
    return Wave(attempts, tuple(sorted(strange)))


def read_records(opener: Opener, wave: str, strange: list[Strange]) -> Iterator[tuple[Part, Record]]:
    """-> every record of a wave with the part that holds it, part by part; what is no part is added to `strange`."""
    for folder in _partitions(opener, wave, strange):
        for attempt, number, kind in sorted(_listed(opener, folder, strange)):
            if (part := _part(opener, f"{folder}/{attempt:03d}-{number:06d}-{kind}.jsonl", strange)) is not None:
                yield from ((part, one) for one in part.records)


def holds(opener: Opener, uri: str, image_ids: frozenset[str]) -> bool:
    """Whether a part has a record of one of the images (hex)."""
    part = _part(opener, uri, [])
    return part is not None and any(one.image_id in image_ids for one in part.records)


def blot(opener: Opener, uri: str, image_ids: frozenset[str]) -> None:
    """A part without its records of the images; what it counts and has cost stays. The one change that a part may suffer, for `forget`."""
    header, *lines = opener.read(uri).rstrip(b"\n").rpartition(b"\n")[0].split(b"\n")
    body = b"\n".join([header, *(line for line in lines if json.loads(line)["image_id"] not in image_ids)]) + b"\n"
    opener.write(uri, body + json.dumps({"whole": hashlib.sha256(body).hexdigest()}).encode() + b"\n")


def parse(data: bytes) -> Part:
    """-> the part. Raises ValueError that says why it is none."""
    body, _, last = data.rstrip(b"\n").rpartition(b"\n")
    try:
        whole = json.loads(last).get("whole")
    except (ValueError, AttributeError, RecursionError):
        whole = None
    if whole != hashlib.sha256(body + b"\n").hexdigest():
        raise ValueError("it is not whole")
    header, *lines = (json.loads(line) for line in body.split(b"\n"))
    if header["format"] != FORMAT:
        raise ValueError(f"its format is {header['format']}, this code reads {FORMAT}")
    records = tuple(_record(line) for line in lines)
    whose = header["partition"], header["attempt"], header["number"], header["kind"]
    return Part(*whose, Terms(**header["terms"]), header["calls"], header["spent"], records, header["reason"])


def _lines(header: dict[str, Any], records: Sequence[Record]) -> bytes:
    told = [header, *(_told(one) for one in records)]
    body = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in told).encode()  # ASCII: halves of characters are escaped
    return body + json.dumps({"whole": hashlib.sha256(body).hexdigest()}).encode() + b"\n"


def _told(one: Record) -> dict[str, Any]:
    told = one._asdict()
    told["try"] = told.pop("tried")
    return told | {"usage": None if one.usage is None else one.usage._asdict()}


def _record(line: dict[str, Any]) -> Record:
    usage = None if line["usage"] is None else Usage(**line["usage"])
    return Record(**{name: line["try" if name == "tried" else name] for name in Record._fields if name != "usage"}, usage=usage)


def _partitions(opener: Opener, wave: str, strange: list[Strange]) -> list[str]:
    """-> URIs of the wave's folders of partitions; none before anything was begun."""
    found = []
    try:
        for entry in opener.entries(wave):
            uri = entry.uri.rstrip("/")
            name = uri.rpartition("/")[2]
            if entry.is_folder and _PARTITION.fullmatch(name):
                found.append(uri)
            elif name != CLOSED:
                strange.append(Strange(uri, "not of the journal", False))
    except Reject as reject:
        if reject.code != "missing":
            raise
    return sorted(found)


def _listed(opener: Opener, folder: str, strange: list[Strange]) -> list[tuple[int, int, str]]:
    """-> (attempt, number, kind) of the files with a part's name."""
    found = []
    for entry in opener.entries(folder):
        name = entry.uri.rpartition("/")[2]
        if matched := _NAME.fullmatch(name):
            found.append((int(matched[1]), int(matched[2]), matched[3]))
        else:
            strange.append(
                Strange(entry.uri, "a write that was not finished" if _UNFINISHED.fullmatch(name) else "not of the journal", False)
            )
    return found


def _part(opener: Opener, uri: str, strange: list[Strange]) -> Part | None:
    folder, _, name = uri.rpartition("/")
    try:
        part = parse(opener.read(uri))
        if f"{part.attempt:03d}-{part.number:06d}-{part.kind}.jsonl" != name or f"{part.partition:06d}" != folder.rpartition("/")[2]:
            raise ValueError(f"it says that it is part {part.number} of attempt {part.attempt} of partition {part.partition}")
    except (ValueError, KeyError, TypeError) as error:
        strange.append(Strange(uri, str(error), True))
        return None
    return part
