"""Lists of pictures that must never enter: their files -> hashes, and a picture -> whether a list names it.

A list is a text file, one hash a line in hex: 64 digits, the sha256 of a file (kind `sha256`) or the perceptual hash of a picture (kind
`phash`, udfs/perceptual_hash.py). Lines that begin with # are comments; the first line may be, and of a list of kind phash must be,

    # studbook deny-list kind=phash kernel=1 date=2026-11-25 count=46 name=of-whom

in which `kernel` is perceptual_hash.KERNEL_VERSION, `date` (needed where the config says how old a list may be) the day it was made, and
`count` the number of its hashes, by which one that was cut off is noticed. A list that holds no hash, or one that says nothing of a
picture (a flat one's: it would deny every flat picture), is refused: a list is right as a whole or it stops the job. `make_deny_list` writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from udfs import perceptual_hash, picture_frames
from udfs.opener import Opener, to_uri
from udfs.reject import Reject

if TYPE_CHECKING:
    from PIL import Image

SHA256, PHASH = "sha256", "phash"
BYTES = 32  # of either hash
MARK = "# studbook deny-list"
FLAT = 96  # bits set of 256 below which a hash is of a flat picture: others have 128, half of them above their median
CHUNK = 8_192  # hashes compared at once: they stay in the processor's cache, 2.2 times faster than a million at once [measured]

Listed = Mapping[str, Any]  # conf.enrichment.Deny.List as a mapping; on a worker with the `sha256` that the driver found


class DenyList(NamedTuple):
    """A list as its file says it; `sha256` of the file, hex; `made`: its date; `hashes` uint8[n, 32]."""

    name: str
    kind: str
    sha256: str
    made: date | None
    hashes: np.ndarray


def read(listed: Listed, opener: Opener) -> DenyList:
    """A list of the config -> its hashes. Raises ValueError when the file is not there, not the pinned one, or not a whole list of its kind."""
    where = f"deny.lists {listed['name']}: {listed['path']}"
    try:
        data = opener.read(to_uri(listed["path"]))
    except Reject as reject:
        raise ValueError(f"{where}: {reject.code}; nothing is done without the list: put it there, or take it out of the config") from None
    found = hashlib.sha256(data).hexdigest()
    if listed["sha256"] not in (None, found):
        raise ValueError(f"{where}: its sha256 is {found}, pinned is {listed['sha256']}; put the pinned file there, or pin the new one")
    try:
        made, hashes = parse(data, listed["kind"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return DenyList(listed["name"], listed["kind"], found, made, hashes)


def parse(data: bytes, kind: str) -> tuple[date | None, np.ndarray]:
    """File -> (its date, uint8[n, 32]). Raises ValueError that names what is wrong, and the line."""
    lines = data.decode("utf-8", "replace").splitlines()
    told = _header(lines[0], kind) if lines and lines[0].startswith(MARK) else {}
    if kind == PHASH and "kernel" not in told:
        raise ValueError(
            f"the first line of a list of perceptual hashes must be: {MARK} kind=phash kernel={perceptual_hash.KERNEL_VERSION} ..."
        )
    wanted = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    try:
        whole = bytes.fromhex("".join(text for _, text in wanted))
    except ValueError:
        whole = b""
    if len(whole) != BYTES * len(wanted) or any(len(text) != 2 * BYTES for _, text in wanted):
        number, text = next((number, text) for number, text in wanted if not _is_hash(text))
        raise ValueError(f"line {number}: given {text[:80]!r}, expected {2 * BYTES} hex digits")
    if not wanted or int(told.get("count", len(wanted))) != len(wanted):
        raise ValueError(
            f"it holds {len(wanted)} hashes, its first line says {told.get('count', 'nothing')}; a list must be whole and not empty"
        )
    hashes = np.frombuffer(whole, np.uint8).reshape(-1, BYTES)
    if kind == PHASH and len(flat := np.flatnonzero(~np.asarray(tells(hashes)))):
        raise ValueError(f"line {wanted[flat[0]][0]}: the hash of a flat picture, which every flat picture has; take it out")
    try:
        return date.fromisoformat(told["date"]) if "date" in told else None, hashes
    except ValueError:
        raise ValueError(f"date: given {told['date']!r}, expected YYYY-MM-DD") from None


def tells(hashes: np.ndarray) -> np.ndarray:
    """Perceptual hashes uint8[n, 32] -> bool[n]: whether it says something of a picture."""
    return np.unpackbits(hashes, axis=1).sum(axis=1, dtype=np.int64) >= FLAT


def text_of(kind: str, hashes: np.ndarray, made: date, name: str) -> str:
    """What `read` reads."""
    kernel = f" kernel={perceptual_hash.KERNEL_VERSION}" if kind == PHASH else ""
    lines = [f"{MARK} kind={kind}{kernel} date={made} count={len(hashes)} name={name}", *(one.tobytes().hex() for one in hashes)]
    return "\n".join(lines) + "\n"


def _header(line: str, kind: str) -> dict[str, str]:
    told = dict(word.partition("=")[::2] for word in line.removeprefix(MARK).split())
    if told.get("kind", kind) != kind:
        raise ValueError(f"it is a list of kind {told['kind']}, the config says {kind}")
    if (kernel := told.get("kernel", str(perceptual_hash.KERNEL_VERSION))) != str(perceptual_hash.KERNEL_VERSION):
        raise ValueError(f"its hashes are of kernel {kernel}, this code makes kernel {perceptual_hash.KERNEL_VERSION}: make the list anew")
    if not told.get("count", "0").isdigit():
        raise ValueError(f"count: given {told['count']!r}, expected a number")
    return told


def _is_hash(text: str) -> bool:
    return len(text) == 2 * BYTES and set(text.lower()) <= set("0123456789abcdef")


class Screen:
    """What holds the perceptual hashes of some lists, to ask pictures by. Safe to share between threads."""

    def __init__(self, lists: Sequence[DenyList], distance: int, guess: bool) -> None:
        import faiss

        whole = np.concatenate([np.empty((0, BYTES), np.uint8), *(one.hashes for one in lists)])
        self._distance, self._guess = distance, guess
        self._names = [one.name for one in lists]
        self._starts = np.cumsum([0, *(len(one.hashes) for one in lists)])
        self._chunks = []
        for start in range(0, len(whole), CHUNK):
            self._chunks.append(faiss.IndexBinaryFlat(8 * BYTES))
            self._chunks[-1].add(whole[start : start + CHUNK])

    def check(self, luma: Image.Image) -> None:
        """Luma of a picture (pixel_statistics.luma_of). Raises Reject denied when a list names it or what it may be a copy of."""
        if self._chunks:
            hashes = picture_frames.guesses(luma) if self._guess else picture_frames.mirrored(luma)
            (near,) = self.names(hashes[None])
            if near is not None:
                raise Reject("denied", near)

    def names(self, hashes: np.ndarray) -> list[str | None]:
        """Hashes uint8[pictures, n, 32] -> for each picture a list that has one within the distance of one of its n; None: none has."""
        import faiss

        faiss.omp_set_num_threads(1)  # of this thread: the decode threads are the parallel ones
        pictures, each, _ = hashes.shape
        named: list[str | None] = [None] * pictures
        for number, chunk in enumerate(self._chunks):
            ends, _, found = chunk.range_search(hashes.reshape(-1, BYTES), self._distance + 1)  # those below
            for query in np.flatnonzero(np.diff(ends)):
                place = number * CHUNK + int(found[ends[query]])
                named[query // each] = self._names[int(np.searchsorted(self._starts, place, "right")) - 1]
        return named


@lru_cache(maxsize=4)
def screen(told: str) -> Screen:
    """JSON of {lists, distance, guess, stores} -> the Screen of this worker, made once. Raises ValueError when a list is not what the driver has read."""
    asked = json.loads(told)
    opener = Opener(asked["stores"])
    lists = [read(listed, opener) for listed in asked["lists"] if listed["kind"] == PHASH]
    return Screen(lists, asked["distance"], asked["guess"])
