"""Gemini's Batch mode: half the price, results within a day. Requests -> JSONL files of bounded size -> jobs -> a Reply per key, by the words of
the online path.

A job is bought once: its display name is made of its keys; the caller notes the intent durably before the job is created, its name at the service
after, and where a restart has the intent alone `find` tells whether there is a job. What a job that ended did not answer is missing: it goes into a
next round, alone. The service keeps results for some days: a job that is asked for later is GONE.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Awaitable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from google.genai import types

from udfs import caption_reply, gemini_errors, gemini_reply, gemini_sdk
from udfs.caption_call import Reply, Usage
from udfs.caption_request import Request
from udfs.gemini_request import body, checked, most_usage

LARGEST_FILE = 256 << 20  # bytes; the service takes 2 GB
MOST_ROWS = 10_000
PAGE = 100  # jobs of one listing
GONE = "GONE"
ENDED = ("SUCCEEDED", "PARTIALLY_SUCCEEDED", "EXPIRED", "FAILED", "CANCELLED", GONE)
T = TypeVar("T")


class BatchFault(Exception):
    """A call about files or jobs failed; `reply` says how, in the words of a try (RETRY: the same call may succeed later)."""

    def __init__(self, what: str, reply: Reply) -> None:
        super().__init__(f"{what}: {reply.code}: {reply.detail}")
        self.reply = reply


class Part(NamedTuple):
    """A file of requests. name: of its job, the same for the same keys and purpose; most: key -> what its answer can cost, in the order of the lines."""

    path: Path
    name: str
    most: Mapping[str, Usage]


class Job(NamedTuple):
    """name: at the service ("batches/..."); state: QUEUED, PENDING, RUNNING, ... or one of ENDED."""

    name: str
    state: str


class Collected(NamedTuple):
    """replies: key -> Reply; missing: keys without one, in order: to be asked again in a next round; state: one of ENDED."""

    replies: dict[str, Reply]
    missing: tuple[str, ...]
    state: str


def write_parts(
    asked: Iterable[tuple[Request, bytes, str]],
    options: Mapping[str, Any],
    folder: Path,
    rows: int = MOST_ROWS,
    size: int = LARGEST_FILE,
    purpose: str = "",
) -> Iterator[Part]:
    """((request, image, media type)s, engine options, an empty folder, most lines and bytes of a file) -> files, each yielded when it is whole.
    One line that is longer than `size` is a file of its own. purpose: another one makes other jobs of the same keys, as for those that are asked again.
    """
    rest, number = iter(asked), 0
    ahead = next(rest, None)
    while ahead is not None:
        path, most = folder / f"{number:05d}.jsonl", dict[str, Usage]()
        with path.open("wb") as file:
            while ahead is not None and len(most) < rows:
                request, image, mime = ahead
                settings = {**options, **request.options}
                line = json.dumps({"key": request.key, "request": body(request, image, mime, settings)}).encode() + b"\n"
                if most and file.tell() + len(line) > size:
                    break
                file.write(line)
                most[request.key] = most_usage(request, settings)
                ahead = next(rest, None)
        yield Part(path, _name(most, purpose), most)
        number += 1


def _name(keys: Iterable[str], purpose: str) -> str:
    return f"studbook-{hashlib.sha256(chr(10).join([purpose, *sorted(keys)]).encode()).hexdigest()[:40]}"


class GeminiBatch:
    """options, key: as of udfs.gemini_request.checked; `timeout` bounds a whole upload or download too. Raises BatchFault where a call fails."""

    def __init__(self, options: Mapping[str, Any], key: str) -> None:
        self._options, self._key = checked(options, key)
        self._sdk = gemini_sdk.Sdk(self._options, self._key)

    async def upload(self, part: Part) -> str:
        """-> the file's name at the service ("files/...")."""
        client = self._sdk.client
        sent = await self._call("upload", client.files.upload(file=part.path, config={"mime_type": "jsonl", "display_name": part.name}))
        return str(sent.name)

    async def create(self, name: str, file: str) -> str:
        """(Part.name, which must be noted durably by now; the file) -> the job's name at the service ("batches/..."). A create that was lost on its way
        back made a job all the same: `find` tells.
        """
        client = self._sdk.client
        job = await self._call("create", client.batches.create(model=self._options["model"], src=file, config={"display_name": name}))
        return str(job.name)

    async def state(self, job: str) -> str:
        """-> QUEUED, PENDING, RUNNING, ... or one of ENDED; GONE where the service does not know it any more."""
        try:
            return _state(await self._call("get", self._sdk.client.batches.get(name=job)))
        except BatchFault as fault:
            if fault.reply.code != "no_such_model":  # what the online path takes a 404 for
                raise
            return GONE

    async def find(self, names: Iterable[str]) -> dict[str, list[Job]]:
        """Display names -> the jobs of each, the first that was made and has not failed before the others: those are cancelled, as they would be
        paid twice. Jobs are listed to the key that made them alone.
        """
        client = self._sdk.client
        found: dict[str, list[types.BatchJob]] = {name: [] for name in names}
        for job in await self._call("list", self._jobs()):
            if job.display_name in found:
                found[job.display_name].append(job)
        for jobs in found.values():
            jobs.sort(key=lambda job: (_state(job) in ("FAILED", "CANCELLED"), str(job.create_time), str(job.name)))
            for other in jobs[1:]:
                if _state(other) not in ENDED:
                    await self._call("cancel", client.batches.cancel(name=str(other.name)))
        return {name: [Job(str(job.name), _state(job)) for job in jobs] for name, jobs in found.items()}

    async def _jobs(self) -> list[types.BatchJob]:
        return [job async for job in await self._sdk.client.batches.list(config={"page_size": PAGE})]

    async def collect(self, job: str, most: Mapping[str, Usage]) -> Collected | None:
        """(a job that ended, Part.most) -> its replies and what is missing, which is all of one that is GONE; None: it has not ended."""
        client = self._sdk.client
        replies: dict[str, Reply] = {}
        try:
            known = await self._call("get", client.batches.get(name=job))
            if (state := _state(known)) not in ENDED:
                return None
            if known.dest is not None and known.dest.file_name:
                with tempfile.TemporaryFile() as results:
                    await self._call("download", client.files.download(file=known.dest.file_name, destination=results))
                    results.seek(0)
                    for line in results:
                        self._read(line, most, replies)
        except BatchFault as fault:
            if fault.reply.code != "no_such_model":
                raise
            replies, state = {}, GONE
        return Collected(replies, tuple(key for key in most if key not in replies), state)

    def _read(self, line: bytes, most: Mapping[str, Usage], replies: dict[str, Reply]) -> None:
        """One line of results into `replies`. A line of no known key, or that is cut off, is as good as missing; of two the first counts."""
        try:
            told = json.loads(line)
        except (ValueError, RecursionError):
            return
        key = told.get("key") if isinstance(told, dict) else None
        if not isinstance(key, str) or key not in most or key in replies:
            return
        if told.get("response") is not None:
            reply = gemini_reply.of_answer(told["response"], most[key])
        elif isinstance(told.get("error"), dict):
            reply = gemini_errors.of_error(0, told)
        else:
            return
        replies[key] = caption_reply.clean(reply, self._key)

    async def _call(self, what: str, work: Awaitable[T]) -> T:
        try:
            return await work
        except Exception as error:  # noqa: BLE001  (the edge: the SDK's exceptions hold the key and whole bodies)
            reply = caption_reply.clean(gemini_sdk.of_exception(error), self._key)
        raise BatchFault(what, reply)

    async def close(self) -> None:
        await self._sdk.close()


def _state(job: Any) -> str:
    """JOB_STATE_SUCCEEDED, and BATCH_STATE_PARTIALLY_SUCCEEDED, which the SDK passes on as it is -> the last word."""
    return str(getattr(job.state, "value", job.state)).rpartition("STATE_")[2]
