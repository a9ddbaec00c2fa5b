"""A part of a paid captioner's journal: the records of calls that it holds, as bytes and back, and by its name in a partition's folder.

JSON lines: a header (whose part it is, the terms of its attempt, and the count and sum of all records up to its end, so that the last part alone says
what an attempt has spent), the records, and the sha256 of the lines before it. What lacks that line, or says another name than its own, is named and
counted as strange, and is no part. Spark reads the records by RECORD_SCHEMA, from lines that have a key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from udfs.caption_call import QUARANTINE, Reply, Usage
from udfs.caption_request import Request
from udfs.opener import Opener

FORMAT = 1
RECORD_SCHEMA = (
    "key STRING, image_id STRING, try INT, repair BOOLEAN, outcome STRING, code STRING, detail STRING, text STRING, "
    "usage STRUCT<prompt: INT, image: INT, output: INT, thoughts: INT, estimated: BOOLEAN>, nano_usd BIGINT, seconds DOUBLE"
)
_NAME = re.compile(r"(\d{3,})-(\d{6,})-(open|answers|end)\.jsonl")
_UNFINISHED = re.compile(r".*\.\d+\.part")  # what Opener.write leaves on a local disk when it is killed


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


def record(request: Request, tried: int, repair: bool, reply: Reply, nano_usd: int, seconds: float) -> Record:
    """A reply -> what is kept of it: of a quarantined image its ids, the code and the bill."""
    kept = reply if reply.outcome != QUARANTINE else reply._replace(detail="", text="")
    told = reply.outcome, kept.code, kept.detail, kept.text, kept.usage
    return Record(request.key, request.image_id.hex(), tried, repair, *told, nano_usd, round(seconds, 3))


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


def to_bytes(header: dict[str, Any], records: Sequence[Record]) -> bytes:
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


def name_of(attempt: int, number: int, kind: str) -> str:
    return f"{attempt:03d}-{number:06d}-{kind}.jsonl"


def listed(opener: Opener, folder: str, strange: list[Strange]) -> list[tuple[int, int, str]]:
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


def read(opener: Opener, uri: str, strange: list[Strange]) -> Part | None:
    """-> the part; None when there is none in the file, which is then added to `strange`."""
    folder, _, name = uri.rpartition("/")
    try:
        part = parse(opener.read(uri))
        if name_of(part.attempt, part.number, part.kind) != name or f"{part.partition:06d}" != folder.rpartition("/")[2]:
            raise ValueError(f"it says that it is part {part.number} of attempt {part.attempt} of partition {part.partition}")
    except (ValueError, KeyError, TypeError) as error:
        strange.append(Strange(uri, str(error), True))
        return None
    return part
