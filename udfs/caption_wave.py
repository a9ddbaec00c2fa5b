"""A wave's journal, read back by its driver: what each attempt has spent, every record, and the parts that hold an image that is to be forgotten."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from udfs.caption_budget import Seen
from udfs.caption_journal import CLOSED
from udfs.caption_record import Part, Record, Strange, listed, name_of, read
from udfs.opener import Opener
from udfs.reject import Reject

ANSWERS = "-answers.jsonl"  # ends the names of parts that hold records
_PARTITION = re.compile(r"\d{6,}")


class Wave(NamedTuple):
    """(partition, attempt) -> what its parts say."""

    attempts: dict[tuple[int, int], Seen]
    strange: tuple[Strange, ...]


def read_wave(opener: Opener, wave: str, threads: int = 8) -> Wave:
    """-> the state of every attempt, from the last part of each; no file of the journal makes it fail, a store that does raises Reject.

    An attempt of which no part is whole is not among them: its open part never was durable, so it began no call.
    """
    strange: list[Strange] = []

    def of_partition(folder: str) -> dict[tuple[int, int], Seen]:
        found: dict[tuple[int, int], Seen] = {}
        broken: set[int] = set()
        for attempt, number, kind in sorted(listed(opener, folder, strange), key=lambda name: (name[0], -name[1])):
            partition = int(folder.rpartition("/")[2])
            if (partition, attempt) in found:
                continue
            part = read(opener, f"{folder}/{name_of(attempt, number, kind)}", strange)
            if part is None:
                broken.add(attempt)
                continue
            terms = part.terms
            seen = Seen(terms.share, terms.worst, terms.unsettled, terms.lease, number, part.calls, part.spent, kind == "end")
            found[partition, attempt] = seen._replace(broken=attempt in broken)
        return found

    with ThreadPoolExecutor(threads) as pool:
        attempts = {name: seen for found in pool.map(of_partition, _partitions(opener, wave, strange)) for name, seen in found.items()}
    return Wave(attempts, tuple(sorted(strange)))


def read_records(opener: Opener, wave: str, strange: list[Strange]) -> Iterator[tuple[Part, Record]]:
    """-> every record of a wave with the part that holds it, part by part; what is no part is added to `strange`."""
    for folder in _partitions(opener, wave, strange):
        for attempt, number, kind in sorted(listed(opener, folder, strange)):
            if (part := read(opener, f"{folder}/{name_of(attempt, number, kind)}", strange)) is not None:
                yield from ((part, one) for one in part.records)


def holds(opener: Opener, uri: str, image_ids: frozenset[str]) -> bool:
    """Whether a part, or the intent of a job (udfs/caption_intent.py), names one of the images (hex)."""
    if not uri.endswith(ANSWERS):
        return any(image_id in image_ids for image_id, *_ in json.loads(opener.read(uri)).values())
    part = read(opener, uri, [])
    return part is not None and any(one.image_id in image_ids for one in part.records)


def blot(opener: Opener, uri: str, image_ids: frozenset[str]) -> None:
    """A part without its records of the images, what it counts and has cost stays; an intent with "" for their ids, so that its job is billed as
    before. The one change that they may suffer, for `forget`.
    """
    if not uri.endswith(ANSWERS):
        told = {key: ["" if image_id in image_ids else image_id, *rest] for key, (image_id, *rest) in json.loads(opener.read(uri)).items()}
        opener.write(uri, json.dumps(told).encode())
        return
    header, *lines = opener.read(uri).rstrip(b"\n").rpartition(b"\n")[0].split(b"\n")
    body = b"\n".join([header, *(line for line in lines if json.loads(line)["image_id"] not in image_ids)]) + b"\n"
    opener.write(uri, body + json.dumps({"whole": hashlib.sha256(body).hexdigest()}).encode() + b"\n")


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
