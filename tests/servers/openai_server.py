"""A fake OpenAI-compatible server on loopback, of vLLM's class: chat completions, and failures by name; asyncio, in a thread.

with OpenAiServer() as server:
    ... base_url=server.url ...
    server.mode = "429"
    assert server.asked == 1
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Self

from aiohttp import web

CAPTION = {"short": "A red fox sits in the snow.", "tags": ["fox"], "ocr": [], "language": "en"}
HTML = "<!DOCTYPE html><html><body>The page of a proxy</body></html>"
USAGE = {"prompt_tokens": 1_500, "completion_tokens": 60, "total_tokens": 1_560}
HANG = 20.0  # seconds


class Page(NamedTuple):
    """`{key}` in the body is the key that was sent."""

    status: int
    body: Any
    headers: tuple[tuple[str, str], ...] = ()
    kind: str = "application/json"


def answer(content: Any = None, finish: Any = "stop", usage: Any = USAGE, **message: Any) -> dict[str, Any]:
    said = {"role": "assistant", "content": json.dumps(CAPTION) if content is None else content, **message}
    choice = {"index": 0, "message": said, "finish_reason": finish, "logprobs": None}
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


def new(message: str, kind: str = "BadRequestError", code: Any = 400) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def old(message: str, kind: str = "BadRequestError", code: int = 400) -> dict[str, Any]:
    """vLLM before it took OpenAI's shape."""
    return {"object": "error", "message": message, "type": kind, "param": None, "code": code}


MODES: dict[str, Page] = {
    "": Page(200, answer()),
    "parts": Page(200, answer([{"type": "text", "text": "{}"}])),
    "two_choices": Page(200, answer() | {"choices": answer()["choices"] * 2}),
    "no_usage": Page(200, answer(usage=None)),
    "odd_usage": Page(200, answer(usage={"prompt_tokens": "many", "completion_tokens": -3})),
    "thoughts": Page(200, answer(usage=USAGE | {"completion_tokens_details": {"reasoning_tokens": 20}})),
    "half_character": Page(200, answer('{"short": "\ud83d"}')),
    "megabyte": Page(200, answer("x" * 2**20)),
    "says_the_key": Page(200, answer("the key is {key}")),
    "length": Page(200, answer('{"short": "A red', "length")),
    "429": Page(429, new("Rate limit reached", "rate_limit", "rate_limit_exceeded"), (("Retry-After", "7"),)),
    "429_bare": Page(429, HTML, kind="text/html"),
    "429_quota": Page(429, new("You exceeded your current quota", "insufficient_quota", "insufficient_quota")),
    "408": Page(408, ""),
    "504": Page(504, HTML, kind="text/html"),
    "500": Page(500, old("EngineDeadError: the background loop has errored", "InternalServerError", 500)),
    "502_html": Page(502, HTML, kind="text/html"),
    "503_loading": Page(503, new("Loading model", "unavailable", 503)),
    "200_error": Page(200, new("EngineCore encountered an issue", "InternalServerError", 500)),
    "abort": Page(200, answer("", "abort")),
    "html": Page(200, HTML, kind="text/html"),
    "cut_json": Page(200, json.dumps(answer())[:-40]),
    "empty_body": Page(200, ""),
    "null": Page(200, "null"),
    "other_object": Page(200, {"object": "list", "data": []}),
    "content_number": Page(200, answer(5)),
    "no_choices": Page(200, answer() | {"choices": []}),
    "blank": Page(200, answer(" ")),
    "tool_calls": Page(200, answer("", "tool_calls")),
    "new_finish": Page(200, answer("{}", "a_new_one")),
    "no_finish": Page(200, answer("{}", None)),
    "content_filter": Page(200, answer("", "content_filter")),
    "refusal": Page(200, answer("", refusal="I cannot help with that.")),
    "400_filter": Page(400, new("Rejected by our safety system", "invalid_request_error", "content_policy_violation")),
    "400_image": Page(400, new("Failed to load image: cannot identify image file")),
    "500_image": Page(500, old("cannot identify image file <_io.BytesIO object>", "InternalServerError", 500)),
    "400_long": Page(400, old("This model's maximum context length is 8192 tokens. However, you requested 9000 tokens")),
    "413": Page(413, HTML, kind="text/html"),
    "400_schema": Page(400, new("response_format: json_schema is not supported")),
    "422": Page(422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "x"], "msg": "Extra inputs are not permitted"}]}),
    "401_says_the_key": Page(
        401, new("Incorrect API key provided: {key}. Yours is sk-abcdefghijkl****", "invalid_request_error", "invalid_api_key")
    ),
    "403_html": Page(403, HTML, kind="text/html"),
    "404": Page(404, new("The model `m` does not exist.", "NotFoundError", 404)),
    "402": Page(402, new("Insufficient credits")),
    "302_elsewhere": Page(302, "", (("Location", "{elsewhere}"),)),
    "307_elsewhere": Page(307, "", (("Location", "{elsewhere}"),)),
    "prohibited": Page(200, answer("of it", "PROHIBITED_CONTENT")),
    "400_prohibited": Page(400, new("Blocked: PROHIBITED_CONTENT: this and that")),
}
WIRES = ("drop", "cut_body", "hang", "not_http")  # on the bare connection


class OpenAiServer:
    """mode: one of MODES or WIRES, for every request; asked: requests that came; last: the JSON of the last one; keys: what they authorised by."""

    def __init__(self, elsewhere: str = "http://127.0.0.1:9/") -> None:
        self.mode, self.asked, self.keys = "", 0, list[str]()
        self.last: dict[str, Any] = {}
        self._elsewhere = elsewhere

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        self.keys.append(request.headers.get("Authorization", ""))
        self.last = json.loads(await request.read() or b"{}")
        if request.path != "/v1/chat/completions":
            return web.json_response({"detail": "Not Found"}, status=404)
        if self.mode in WIRES:
            return await self._wire(request)
        page = MODES[self.mode]
        body = (page.body if isinstance(page.body, str) else json.dumps(page.body)).replace("{key}", self.keys[-1].removeprefix("Bearer "))
        headers = {name: value.replace("{elsewhere}", self._elsewhere) for name, value in page.headers}
        return web.Response(status=page.status, text=body, content_type=page.kind, headers=headers)

    async def _wire(self, request: web.Request) -> web.StreamResponse:
        assert isinstance(request.transport, asyncio.Transport)
        if self.mode == "hang":
            for _ in range(int(HANG / 0.02)):
                if request.transport.is_closing():
                    break
                await asyncio.sleep(0.02)
        elif self.mode != "drop":
            cut = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"id": '
            request.transport.write(cut if self.mode == "cut_body" else b"SSH-2.0-OpenSSH_9.6\r\n")
            await asyncio.sleep(0.05)
        request.transport.close()
        return web.Response()

    def __enter__(self) -> Self:
        self._loop, started = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started.set,), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def _run(self, started: Callable[[], None]) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{path:.*}", self._serve)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)

        async def start() -> None:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()

        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(start())
        self.url = "http://{}:{}/v1".format(*runner.addresses[0][:2])
        started()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
