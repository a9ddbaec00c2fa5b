"""Batch mode against the fake service: the same replies as online, no job bought twice, only what is missing asked again."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from google import genai
from google.genai import types

from tests.servers.gemini_edits import EDITS, MODES
from tests.servers.gemini_modes import Edit, Fault
from tests.servers.gemini_server import GeminiServer
from udfs import caption_answer
from udfs.caption_call import Reply
from udfs.caption_request import Request
from udfs.gemini import GeminiEngine
from udfs.gemini_batch import GONE, PAGE, BatchFault, GeminiBatch, Job, Part, write_parts
from udfs.gemini_request import body, generation, most_usage

KEY = "AIzaSyCANARY-0123456789_abcdefghijklmno"
OPTIONS = {
    "model": "gemini-3.8-flash",
    "max_output_tokens": 2_000,
    "timeout": 20.0,
    "safety_settings": {"harassment": "off"},
    "thinking": "low",
}
NO_CODE_IN_A_BATCH = ("402",)  # google.rpc.Code has none for it
T = TypeVar("T")

Asked = tuple[Request, bytes, str]


def asked(count: int) -> list[Asked]:
    images = [b"image %d" % number for number in range(count)]
    return [
        (
            Request(f"key-{number}", b"", "Describe.", "short: one sentence.", caption_answer.SCHEMA, {"media_resolution": "low"}, False),
            image,
            "image/png",
        )
        for number, image in enumerate(images)
    ]


class Bench:
    def __init__(self, server: GeminiServer, runner: asyncio.Runner) -> None:
        self.server, self._runner = server, runner
        self.batch = GeminiBatch({**OPTIONS, "base_url": server.url}, KEY)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def submit(self, part: Part) -> str:
        return self.run(self.batch.create(part.name, self.run(self.batch.upload(part))))


@pytest.fixture
def bench() -> Iterator[Bench]:
    with GeminiServer() as server, asyncio.Runner() as runner:
        bench = Bench(server, runner)
        yield bench
        bench.run(bench.batch.close())


def test_a_batch_has_the_replies_of_the_online_path_for_the_same_answers(bench: Bench, tmp_path: Path) -> None:
    named = ["", *(name for name, mode in MODES.items() if isinstance(mode, Edit | Fault))]
    rows = asked(len(named))
    plan = {hashlib.sha256(image).hexdigest(): [name] * 2 for (_, image, _), name in zip(rows, named, strict=True)}
    bench.server.order(by_image=plan)

    async def online() -> list[Reply]:
        engine = GeminiEngine({**OPTIONS, "base_url": bench.server.url}, KEY)
        replies = [await engine.ask(*row) for row in rows]
        await engine.close()
        return replies

    before = bench.run(online())
    (part,) = write_parts(rows, OPTIONS, tmp_path)
    collected = bench.run(bench.batch.collect(bench.submit(part), part.most))
    assert collected is not None and (collected.state, collected.missing) == ("SUCCEEDED", ())
    differ = []
    for name, reply, (request, _, _) in zip(named, before, rows, strict=True):
        batched = collected.replies[request.key]
        if name in EDITS and reply.code in ("not_json", "cut_body"):  # no line of a batch can hold them
            assert batched.code == "server_error"
        elif isinstance(MODES.get(name), Fault):
            if (batched.code, batched.usage) != (reply.code, None) and name not in NO_CODE_IN_A_BATCH:
                differ.append((name, reply, batched))
        elif batched != reply:
            differ.append((name, reply, batched))
    assert differ == []
    assert KEY not in repr(collected)


def test_a_line_and_the_online_path_ask_what_the_sdk_would_ask(bench: Bench) -> None:
    ((request, image, mime),) = asked(1)
    options = {**OPTIONS, **request.options}

    async def online() -> None:
        engine = GeminiEngine({**OPTIONS, "base_url": bench.server.url}, KEY)
        await engine.ask(request, image, mime)
        await engine.close()

    async def by_the_sdk() -> None:
        http = types.HttpOptions(base_url=bench.server.url, api_version="v1", timeout=20_000)
        client = genai.Client(api_key=KEY, vertexai=False, http_options=http)
        contents: Any = [types.Part.from_bytes(data=image, mime_type=mime), request.prompt]
        config = types.GenerateContentConfig(**generation(request, options))
        await client.aio.models.generate_content(model=OPTIONS["model"], contents=contents, config=config)
        await client.aio.aclose()

    bench.run(online())
    ours = bench.server.last_request()
    bench.run(by_the_sdk())
    headers = bench.server.counts()["headers"]
    assert [headers[name] for name in ("x-goog-api-key", "x-server-timeout", "content-type")] == [[KEY], ["20"], ["application/json"]]
    sent = json.dumps(bench.server.last_request())
    for mixed in ("mime_type", "thinking_level"):  # the SDK's own mixture; protobuf's JSON takes both
        assert sent.count(mixed) == 1
        first, second = mixed.split("_")
        sent = sent.replace(mixed, first + second.capitalize())
    assert body(request, image, mime, options) == ours == json.loads(sent)


def test_files_are_bounded_in_rows_and_bytes_and_named_by_their_keys(tmp_path: Path) -> None:
    rows = asked(10)
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    by_rows = list(write_parts(rows, OPTIONS, folders[0], rows=4))
    assert [len(part.most) for part in by_rows] == [4, 4, 2]
    assert [json.loads(line)["key"] for part in by_rows for line in part.path.read_text().splitlines()] == [
        request.key for request, _, _ in rows
    ]
    line = by_rows[0].path.stat().st_size // 4
    by_bytes = list(write_parts(rows, OPTIONS, folders[1], size=3 * line + 20))
    assert [len(part.most) for part in by_bytes] == [3, 3, 3, 1] and all(part.path.stat().st_size <= 3 * line + 20 for part in by_bytes)
    single = list(write_parts(rows, OPTIONS, folders[2], size=1))
    assert [len(part.most) for part in single] == [1] * 10
    again = next(write_parts(reversed(rows[:4]), OPTIONS, folders[2], rows=4))
    assert again.name == by_rows[0].name != by_rows[1].name
    assert next(write_parts(rows[:4], OPTIONS, folders[2], purpose="again")).name != again.name
    assert list(write_parts([], OPTIONS, folders[2])) == []


def test_a_job_is_found_by_its_name_and_what_nobody_made_is_not(bench: Bench, tmp_path: Path) -> None:
    bench.server.order(batch_polls=9)
    parts = list(write_parts(asked(6), OPTIONS, tmp_path, rows=2))
    jobs = [bench.submit(part) for part in parts[:2]]
    found = bench.run(bench.batch.find([part.name for part in parts]))
    assert [[job.name for job in found[part.name]] for part in parts] == [[jobs[0]], [jobs[1]], []]
    assert [bench.run(bench.batch.state(job)) for job in jobs] == ["RUNNING", "RUNNING"]


def test_a_job_that_the_service_has_dropped_is_gone_and_all_of_it_is_missing(bench: Bench, tmp_path: Path) -> None:
    (part,) = write_parts(asked(2), OPTIONS, tmp_path)
    assert bench.run(bench.batch.state("batches/long-ago")) == GONE
    gone = bench.run(bench.batch.collect("batches/long-ago", part.most))
    assert gone is not None and (gone.replies, gone.missing, gone.state) == ({}, ("key-0", "key-1"), GONE)


def test_a_job_is_found_behind_many_pages_and_of_two_the_first_counts(bench: Bench, tmp_path: Path) -> None:
    bench.server.order(batch_polls=20)
    first = bench.submit(part := next(write_parts(asked(1), OPTIONS, tmp_path)))

    async def others() -> str:
        client = bench.batch._sdk.client
        for number in range(PAGE + 5):
            await client.batches.create(model="m", src="files/up0", config={"display_name": f"other {number}"})
        return str((await client.batches.create(model="m", src="files/up0", config={"display_name": part.name})).name)

    second = bench.run(others())
    assert [job.name for job in bench.run(bench.batch.find([part.name]))[part.name]] == [first, second]
    assert bench.run(bench.batch.find([part.name]))[part.name] == [Job(first, "RUNNING"), Job(second, "CANCELLED")]


@pytest.mark.parametrize(
    ("end", "done", "answered"), [("EXPIRED", 0.6, 6), ("PARTIALLY_SUCCEEDED", 0.8, 8), ("EXPIRED", 0.0, 0), ("FAILED", 1.0, 0)]
)
def test_what_a_job_left_out_is_asked_again_alone(bench: Bench, tmp_path: Path, end: str, done: float, answered: int) -> None:
    rows = {row[0].key: row for row in asked(10)}
    bench.server.order(batch_end=end, batch_done=done)
    (part,) = write_parts(rows.values(), OPTIONS, tmp_path)
    collected = bench.run(bench.batch.collect(bench.submit(part), part.most))
    assert collected is not None and collected.state == end
    assert list(collected.replies) == [f"key-{number}" for number in range(answered)]
    assert collected.missing == tuple(f"key-{number}" for number in range(answered, 10))
    bench.server.order(batch_end="SUCCEEDED")
    (again,) = write_parts((rows[key] for key in collected.missing), OPTIONS, tmp_path, purpose="again")
    rest = bench.run(bench.batch.collect(bench.submit(again), again.most))
    assert rest is not None and rest.missing == ()
    assert {**collected.replies, **rest.replies}.keys() == rows.keys()
    assert set(bench.server.counts()["by_image"].values()) == {1}  # nothing was answered twice
    exact = sum(sum(reply.usage[:4]) for reply in [*collected.replies.values(), *rest.replies.values()] if reply.usage)
    assert exact == sum(bench.server.counts()["batch_billed"].values()) and sum(bench.server.counts()["billed"].values()) == 0


def test_a_job_that_has_not_ended_gives_nothing_yet(bench: Bench, tmp_path: Path) -> None:
    bench.server.order(batch_polls=4)
    (part,) = write_parts(asked(1), OPTIONS, tmp_path)
    job = bench.submit(part)
    assert bench.run(bench.batch.collect(job, part.most)) is None
    assert bench.run(bench.batch.find([part.name])) == {part.name: [Job(job, "RUNNING")]}
    assert bench.run(bench.batch.collect(job, part.most)) is None
    assert bench.run(bench.batch.collect(job, part.most)) is not None


def test_odd_lines_of_results_are_missing_and_of_two_the_first_counts() -> None:
    (row,) = asked(1)
    request = row[0]
    batch, replies = GeminiBatch(OPTIONS, KEY), dict[str, Reply]()
    answer = {"candidates": [{"content": {"parts": [{"text": "{}"}]}, "finishReason": "STOP"}]}
    most = {request.key: most_usage(request, OPTIONS)}
    for line in (b"", b"{", b"[]", b'{"key": 3}', b'{"key": "other", "response": {}}', b'{"key": "key-0"}', b"[" * 50_000, b"\xff"):
        batch._read(line, most, replies)
    assert replies == {}
    batch._read(json.dumps({"key": "key-0", "response": answer}).encode(), most, replies)
    batch._read(json.dumps({"key": "key-0", "error": {"code": 13}}).encode(), most, replies)
    assert replies["key-0"].code == "ok" and replies["key-0"].usage == most["key-0"]


def test_a_call_that_fails_says_how_without_the_key(bench: Bench, tmp_path: Path) -> None:
    (part,) = write_parts(asked(1), OPTIONS, tmp_path)
    with pytest.raises(BatchFault) as unknown:
        bench.run(bench.batch.create(part.name, "files/nothing"))
    assert (unknown.value.reply.code, unknown.value.reply.usage) == ("no_such_model", None)
    with GeminiServer() as elsewhere:
        bench.server.order(upload_elsewhere=True, elsewhere=elsewhere.url + "/upload/v1/files")
        with pytest.raises(BatchFault) as redirected:
            bench.submit(part)
        assert redirected.value.reply.code == "redirected"
        assert elsewhere.counts()["requests"] == elsewhere.counts()["others"] == 0
    for caught in (unknown, redirected):
        assert KEY not in f"{caught.value!r}{caught.value.__cause__!r}{caught.value.__context__!r}"
