"""The way of a captioner's request to its service and back: the environment's proxy, what never leaves the machine, answers that are cut off."""

from __future__ import annotations

import asyncio
import pickle
import socket
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import aiohttp
import pytest
from aiohttp import web

from tests.servers.gemini_server import GeminiServer
from udfs.caption_call import Reply
from udfs.caption_request import Request
from udfs.gemini import GeminiEngine
from udfs.gemini_batch import GeminiBatch

KEY = "AIzaSyCANARY-0123456789_abcdefghijklmno"
OPTIONS = {"model": "gemini-3.8-flash", "max_output_tokens": 2_000, "timeout": 20.0}
REQUEST = Request("k", b"", "Describe.", "short: one sentence.", {}, {}, False)


class Proxy:
    """A forward proxy for HTTP on loopback. passed: (method and address, Proxy-Authorization) of what went through."""

    def __init__(self) -> None:
        self.passed: list[tuple[str, str]] = []

    async def start(self) -> tuple[web.AppRunner, str]:
        application = web.Application()
        application.router.add_route("*", "/{rest:.*}", self._pass)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, "{}:{}".format(*runner.addresses[0][:2])

    async def _pass(self, request: web.Request) -> web.Response:
        self.passed.append((f"{request.method} {request.url}", request.headers.get("Proxy-Authorization", "")))
        headers = {name: request.headers[name] for name in ("Content-Type", "x-goog-api-key")}
        async with aiohttp.request(request.method, request.url, data=await request.read(), headers=headers) as answer:
            return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)


@pytest.mark.parametrize("around", [False, True])
def test_a_proxy_of_the_environment_is_used_unless_it_is_to_be_gone_around(monkeypatch: pytest.MonkeyPatch, around: bool) -> None:
    proxy = Proxy()

    async def work(url: str) -> list[str]:
        runner, address = await proxy.start()
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://someone:secret@{address}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "127.0.0.1" if around else "")
        engine = GeminiEngine({**OPTIONS, "base_url": url}, KEY)
        try:
            return [(await engine.ask(REQUEST, b"an image", "image/jpeg")).code for _ in range(2)]
        finally:
            await engine.close()
            await runner.cleanup()

    with GeminiServer() as server:
        assert asyncio.run(work(server.url)) == ["ok", "ok"]
        asked = f"POST {server.url}/v1/models/gemini-3.8-flash:generateContent"
    told = (asked, f"Basic {b64encode(b'someone:secret').decode()}")
    assert proxy.passed == ([] if around else [told, told])


@pytest.mark.parametrize(
    ("surroundings", "options", "code"),
    [
        ({"http_proxy": "http://127.0.0.1:no-port"}, {}, "bad_settings"),
        ({"http_proxy": "127.0.0.1:9"}, {}, "dropped"),  # without a scheme; nobody listens
        ({}, {"base_url": "127.0.0.1:8765"}, "bad_settings"),
        ({}, {"base_url": "http://FULL", "timeout": 0.4}, "timeout"),  # nobody takes the connection
    ],
)
def test_what_never_left_the_machine_is_not_billed(
    monkeypatch: pytest.MonkeyPatch, surroundings: dict[str, str], options: dict[str, object], code: str
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, surroundings.get(name, ""))

    async def work() -> Reply:
        with full() as address:
            told = {name: value.replace("FULL", address) if isinstance(value, str) else value for name, value in options.items()}
            engine = GeminiEngine({**OPTIONS, "base_url": "http://127.0.0.1:9", **told}, KEY)
            try:
                return await engine.ask(REQUEST, b"an image", "image/jpeg")
            finally:
                await engine.close()

    reply = asyncio.run(work())
    assert (reply.code, reply.usage) == (code, None), reply


@contextmanager
def full() -> Iterator[str]:
    """-> host:port where nobody accepts, and the queue of connections is full: another is never made."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        yield "{}:{}".format(*listening.getsockname())


def test_an_error_whose_body_is_cut_is_still_the_error_and_costs_nothing() -> None:
    """A redirect to another host is not asked again, and a server that is busy says for how long."""

    async def answer(head: str, body: str = "only this") -> Reply:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(f"HTTP/1.1 {head}\r\nContent-Length: 1000\r\n\r\n{body}".encode())
            await writer.drain()
            writer.close()

        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        host, port = listening.sockets[0].getsockname()[:2]
        engine = GeminiEngine({**OPTIONS, "base_url": f"http://{host}:{port}"}, KEY)
        try:
            return await engine.ask(REQUEST, b"an image", "image/jpeg")
        finally:
            await engine.close()
            listening.close()

    moved = asyncio.run(answer("302 Found\r\nLocation: http://elsewhere.example/"))
    assert (moved.code, moved.usage) == ("redirected", None)
    forbidden = asyncio.run(answer("422 Unprocessable", '{"error": {"message": "PROHIBITED_CONTENT'))
    assert forbidden == Reply("prohibited")
    busy = asyncio.run(answer("503 Service Unavailable\r\nRetry-After: 7"))
    assert (busy.code, busy.retry_after, busy.usage) == ("server_error", 7.0, None)


@pytest.mark.parametrize("client", [GeminiEngine, GeminiBatch])
def test_what_holds_a_key_is_not_pickled(client: type[GeminiEngine] | type[GeminiBatch]) -> None:
    with pytest.raises(TypeError, match="belongs to its worker"):
        pickle.dumps(client(OPTIONS, KEY))
