"""What jobs of Batch mode are to ask: noted before they are created, so that a restart knows of each that there may be.

    RUN/000003/...                the wave's journal (udfs/caption_journal.py), where what a job answered has a folder of its own
    RUN/000003.jobs/NAME.json     the intent of a job: key -> image, whether it is a second request, the most that it can be billed for
    RUN/000003.jobs/NAME.made     the job's name at the service, once it is created

A worker creates a job only when it sees, after its intent is durable, that neither its wave nor its run is closed: a driver that closes the wave, and
looks for jobs once a call's timeout has passed, knows all that there will ever be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from udfs import caption_journal
from udfs.caption_call import Usage
from udfs.opener import Opener
from udfs.reject import Reject


class Asked(NamedTuple):
    """image_id: hex, "" of one that is forgotten; repair: it is a second request; most: tokens that it can be billed for."""

    image_id: str
    repair: bool
    most: Usage


class Wave(NamedTuple):
    """folder: URI of its journal; purpose: what makes its jobs its own."""

    folder: str
    purpose: str

    def intent(self, name: str) -> str:
        return f"{self.folder}.jobs/{name}.json"

    def made(self, name: str) -> str:
        return f"{self.folder}.jobs/{name}.made"


def note(opener: Opener, wave: Wave, name: str, asked: Mapping[str, Asked]) -> None:
    """Makes an intent durable. Raises RuntimeError when the wave or its run is closed: this attempt is a late one."""
    told = {key: [one.image_id, one.repair, one.most._asdict()] for key, one in asked.items()}
    opener.write(wave.intent(name), json.dumps(told).encode())
    for folder in (wave.folder, wave.folder.rpartition("/")[0]):
        if opener.exists(f"{folder}/{caption_journal.CLOSED}"):
            raise RuntimeError(f"{folder} is closed: this attempt is a late one")


def read(opener: Opener, wave: Wave, name: str) -> dict[str, Asked]:
    """-> key -> what was asked. Raises Reject."""
    told = json.loads(opener.read(wave.intent(name)))
    return {key: Asked(image_id, repair, Usage(**most)) for key, (image_id, repair, most) in told.items()}


def names(opener: Opener, wave: Wave) -> dict[str, str | None]:
    """-> every intent's name -> its job's name at the service; None where that is not noted."""
    try:
        files = [entry.uri.rpartition("/")[2] for entry in opener.entries(f"{wave.folder}.jobs")]
    except Reject as reject:
        if reject.code != "missing":
            raise
        return {}
    noted = sorted(name.removesuffix(".json") for name in files if name.endswith(".json"))
    return {name: opener.read(wave.made(name)).decode() if f"{name}.made" in files else None for name in noted}


def partition_of(name: str) -> int:
    """A job's name -> the number of its folder in the journal: 48 bits of it."""
    return int(name.rpartition("-")[2][:12], 16)
