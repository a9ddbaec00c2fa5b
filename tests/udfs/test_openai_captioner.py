"""Every failure of an OpenAI-compatible server by name -> what is to be done with it: real HTTP on loopback, one request a try."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.servers.openai_server import CAPTION, MODES, WIRES, OpenAiServer
from udfs.caption_answer import LARGEST, SCHEMA
from udfs.caption_call import ANSWER, PERMANENT, QUARANTINE, RETRY, STOP, Reply, Usage
from udfs.caption_request import Request
from udfs.openai_captioner import OpenAiCaptioner, most_usage

CANARY = "sk-CANARY/0123456789+abcdef"
OPTIONS = {"model": "OpenGVLab/InternVL3-8B-hf", "max_output_tokens": 900, "timeout": 10.0}
REQUEST = Request("k", b"", "Describe.", "short: one sentence.", SCHEMA, {}, False)

# (outcome, code) -> modes
TABLE: dict[tuple[str, str], str] = {
    (ANSWER, "ok"): "parts two_choices no_usage odd_usage thoughts half_character megabyte says_the_key",
    (ANSWER, "cut"): "length",
    (RETRY, "rate_limited"): "429 429_bare",
    (RETRY, "timeout"): "408 504 hang",
    (RETRY, "dropped"): "drop",
    (RETRY, "cut_body"): "cut_body cut_json",
    (RETRY, "server_error"): "500 502_html 503_loading 200_error abort",
    (RETRY, "not_json"): "html not_http",
    (RETRY, "not_an_answer"): "null other_object content_number",
    (RETRY, "no_text"): "empty_body no_choices blank",
    (RETRY, "malformed"): "tool_calls",
    (RETRY, "unknown_finish"): "new_finish no_finish",
    (PERMANENT, "bad_request"): "400_image 500_image",
    (PERMANENT, "too_large"): "400_long 413",
    (PERMANENT, "blocked"): "400_filter",
    (PERMANENT, "refused"): "content_filter refusal",
    (QUARANTINE, "prohibited"): "prohibited 400_prohibited",
    (STOP, "bad_settings"): "400_schema 422",
    (STOP, "key_refused"): "401_says_the_key 403_html",
    (STOP, "no_such_model"): "404",
    (STOP, "spend_cap"): "402 429_quota",
    (STOP, "redirected"): "302_elsewhere 307_elsewhere",
}
CASES = [(mode, *wanted) for wanted, modes in TABLE.items() for mode in modes.split()]


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[OpenAiServer, OpenAiServer]]:
    """The server, and the second host that its redirects point to."""
    with OpenAiServer() as elsewhere, OpenAiServer(f"{elsewhere.url}/chat/completions") as server:
        yield server, elsewhere


def ask(server: OpenAiServer, mode: str = "", request: Request = REQUEST, key: str = CANARY, **options: Any) -> Reply:
    server.mode, server.asked = mode, 0
    server.keys.clear()

    async def once() -> Reply:
        engine = OpenAiCaptioner({**OPTIONS, "base_url": server.url, **options}, key)
        try:
            return await engine.ask(request, b"an image", "image/jpeg")
        finally:
            await engine.close()

    return asyncio.run(once())


def test_the_table_has_every_mode_once() -> None:
    assert sorted(mode for mode, *_ in CASES) == sorted([*filter(None, MODES), *WIRES])


@pytest.mark.parametrize(("mode", "outcome", "code"), CASES, ids=[mode for mode, *_ in CASES])
def test_a_failure_becomes_its_code_by_one_request_and_the_key_shows_nowhere(
    servers: tuple[OpenAiServer, OpenAiServer], mode: str, outcome: str, code: str
) -> None:
    server, elsewhere = servers
    reply = ask(server, mode, timeout=0.4 if mode == "hang" else 10.0)
    assert (reply.outcome, reply.code) == (outcome, code), reply
    assert server.asked == 1 and elsewhere.asked == 0
    assert server.keys == [f"Bearer {CANARY}"]
    told = repr(reply) + json.dumps(reply)
    assert CANARY not in told and "sk-" not in told and len(reply.detail) <= 200
    assert (reply.text != "") == (outcome == ANSWER)
    assert reply.usage is not None or outcome not in (ANSWER, QUARANTINE) or mode == "400_prohibited"
    if code == "prohibited":
        assert reply == Reply("prohibited", usage=reply.usage)
    assert reply.retry_after == (7.0 if mode == "429" else None)
    json.dumps(reply.text, ensure_ascii=False).encode()
    assert len(reply.text) <= LARGEST + 1


def test_a_clean_answer_comes_with_its_tokens(servers: tuple[OpenAiServer, OpenAiServer]) -> None:
    server, _ = servers
    assert ask(server) == Reply("ok", "", json.dumps(CAPTION), Usage(1_500, 0, 60, 0))
    assert ask(server, "thoughts").usage == Usage(1_500, 0, 40, 20)
    most = most_usage(REQUEST, OPTIONS)
    assert ask(server, "no_usage").usage == ask(server, "odd_usage").usage == most
    assert most.estimated and most.output == 900 and most.image == 3_328


def test_a_request_holds_the_image_the_schema_and_what_the_options_add(servers: tuple[OpenAiServer, OpenAiServer]) -> None:
    server, _ = servers
    extra = {"mm_processor_kwargs": {"max_dynamic_patch": 4}}
    ask(server, request=REQUEST._replace(options={"max_output_tokens": 77}), key="", extra=extra)
    assert server.keys == [""]
    body = server.last
    assert (body["model"], body["max_tokens"], body["temperature"]) == (OPTIONS["model"], 77, 0)
    assert body["mm_processor_kwargs"] == extra["mm_processor_kwargs"]
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["required"] == SCHEMA["required"] and schema["additionalProperties"] is False and "propertyOrdering" not in schema
    system, user = body["messages"]
    assert system == {"role": "system", "content": "Describe."}
    image, text = user["content"]
    assert base64.b64decode(image["image_url"]["url"].removeprefix("data:image/jpeg;base64,")) == b"an image"
    assert text == {"type": "text", "text": "short: one sentence."}


def test_a_server_that_is_not_there_is_dropped_and_nothing_can_have_been_billed() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = OpenAiServer()
        server.url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    reply = ask(server)
    assert (reply.code, reply.usage) == ("dropped", None)


def test_many_requests_are_in_flight_at_once_over_one_engine(servers: tuple[OpenAiServer, OpenAiServer]) -> None:
    server, _ = servers
    server.mode, server.asked = "", 0

    async def many() -> list[Reply]:
        engine = OpenAiCaptioner({**OPTIONS, "base_url": server.url}, CANARY)
        try:
            return await asyncio.gather(*(engine.ask(REQUEST, b"%d" % n, "image/png") for n in range(200)))
        finally:
            await engine.close()

    assert {reply.code for reply in asyncio.run(many())} == {"ok"} and server.asked == 200


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        ({"model": None}, CANARY, "engine options without model"),
        ({"base_url": "http://user:secret@host/v1"}, CANARY, "without a user or password"),
        ({"base_url": "host:8000/v1"}, CANARY, "expected http"),
        ({}, "sk-\u00e9", "characters that no key has"),
    ],
)
def test_options_that_no_request_can_be_made_of_are_a_mistake(options: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        OpenAiCaptioner({**OPTIONS, "base_url": "http://host/v1", **options}, key)
    assert "secret" not in str(caught.value) and key not in str(caught.value)
    assert CANARY not in repr(OpenAiCaptioner({**OPTIONS, "base_url": "http://host/v1"}, CANARY))
