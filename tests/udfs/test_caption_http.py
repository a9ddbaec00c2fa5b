"""The way of a captioner's request to its service: through the environment's proxy where there is one, and around it where it is told to."""

from __future__ import annotations

import asyncio
from base64 import b64encode

import aiohttp
import pytest
from aiohttp import web

from tests.servers.gemini_server import GeminiServer
from udfs.caption_request import Request
from udfs.gemini import GeminiEngine

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
