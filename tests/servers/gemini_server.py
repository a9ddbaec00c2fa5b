"""A fake Gemini on loopback: generateContent, files and batches over HTTP as google-genai 3.4 calls them; asyncio, in a thread or a process.

    with GeminiServer({"latency": 0.2, "limit": 100}) as server:
        ... base_url=server.url ...
        server.order(queue=["429_bare", "drop"])
        assert server.counts()["requests"] == 3

As a process of its own (it then costs the tests no CPU of theirs): GeminiServer(..., process=True), or `python -m tests.servers.gemini_server JSON`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from tests.servers import gemini_answers as answers
from tests.servers.gemini_answers import Asked
from tests.servers.gemini_batches import Batches
from tests.servers.gemini_edits import MODES
from tests.servers.gemini_modes import ELSEWHERE, Fault, Mode, Page, Wire
from tests.servers.gemini_service import SCRIPT, Service

MOST_BODY = 256 << 20  # bytes of a request
LONGEST_HANG = 30.0  # seconds
_GENERATE = re.compile(r"/[^/]+/models/([^/:]+):generateContent")


def application(script: Mapping[str, Any] | None = None) -> web.Application:
    service = Service(script)
    batches = Batches(service)

    async def generate(request: web.Request, model: str) -> web.StreamResponse:
        service.requests += 1
        service.in_flight += 1
        service.most_in_flight = max(service.most_in_flight, service.in_flight)
        try:
            if unread := service.unread():
                return await _wire(request, unread, b"")
            raw = await request.read()
            try:
                service.last = json.loads(raw)
                asked = answers.read(service.last)
            except (KeyError, TypeError, ValueError):
                return _fault(Fault(400, "INVALID_ARGUMENT", "Invalid JSON payload received."), "")
            if over := service.over_limit():
                return _fault(over, "")
            name = service.mode(asked, raw)
            if service.script["latency"]:
                await asyncio.sleep(service.script["latency"])
            return await _answer(request, service, MODES.get(name), asked, model)
        finally:
            service.in_flight -= 1

    async def dispatch(request: web.Request) -> web.StreamResponse:
        if request.path == "/control":
            if request.method == "POST":
                service.order(await request.json())
            elif request.method == "DELETE":
                service.forget()
            return web.json_response(service.last if "last" in request.query else service.counts())
        service.saw(request.headers)
        found = _GENERATE.fullmatch(request.path)
        if found and request.method == "POST":
            return await generate(request, found.group(1))
        service.others += 1
        return await batches.answer(request) or _fault(Fault(404, "NOT_FOUND", "Requested entity was not found."), "")

    app = web.Application(client_max_size=MOST_BODY)
    app.router.add_route("*", "/{path:.*}", dispatch)
    return app


async def _answer(request: web.Request, service: Service, mode: Mode | None, asked: Asked, model: str) -> web.StreamResponse:
    key = request.headers.get("x-goog-api-key", "")
    if isinstance(mode, Fault):
        service.worked(mode, asked, model)
        return _fault(mode, key)
    if isinstance(mode, Wire):
        service.worked(mode, asked, model)
        return await _wire(request, mode, json.dumps(service.clean(asked, model)[0]).encode())
    if isinstance(mode, Page):
        if mode.body is not None:
            service.worked(mode, asked, model)
        body = service.body(None, asked, model, key) if mode.body is None else mode.body
        response = web.Response(status=mode.status, body=body or None)
        if mode.kind is not None:
            response.headers["Content-Type"] = mode.kind
        response.headers.update({name: value.replace(ELSEWHERE, service.script["elsewhere"]) for name, value in mode.headers})
        return response
    return web.Response(body=service.body(mode, asked, model, key), headers={"Content-Type": "application/json; charset=UTF-8"})


def _fault(fault: Fault, key: str) -> web.Response:
    return web.json_response(fault.body(key), status=fault.status, headers=dict(fault.headers))


async def _wire(request: web.Request, mode: Wire, answer: bytes) -> web.StreamResponse:
    """Writes on the connection beside aiohttp, and ends it."""
    transport = request.transport
    if transport is None:  # the client was killed meanwhile
        return web.Response()
    assert isinstance(transport, asyncio.Transport)
    for step in (*mode.steps[:1], *mode.steps[1:] * mode.repeat):
        if transport.is_closing():
            break
        if isinstance(step, float):
            await asyncio.sleep(step)
            continue
        written = step.replace(b"{length}", b"%d" % len(answer)).replace(b"{answer}", answer).replace(b"{half}", answer[: len(answer) // 2])
        transport.write(written)
        while transport.get_write_buffer_size() > 1 << 22 and not transport.is_closing():
            await asyncio.sleep(0.005)
    if mode.end == "hang":
        for _ in range(int(LONGEST_HANG / 0.02)):
            if transport.is_closing():
                break
            await asyncio.sleep(0.02)
    if mode.end == "reset" and not transport.is_closing():
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()
    return web.Response()


class GeminiServer:
    """`url` is the service's address. The script's members are in gemini_service.SCRIPT, the modes in gemini_edits.MODES."""

    def __init__(self, script: Mapping[str, Any] | None = None, process: bool = False) -> None:
        self._script, self._process = dict(script or {}), process
        self.url = ""

    def __enter__(self) -> Self:
        if self._process:
            line = [sys.executable, "-m", "tests.servers.gemini_server", json.dumps(self._script)]
            self._running = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
            assert self._running.stdout is not None
            self.url = self._running.stdout.readline().strip()
            assert self.url, "the server did not start"
        else:
            self._loop, started = asyncio.new_event_loop(), threading.Event()
            self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
            self._thread.start()
            assert started.wait(10)
        return self

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        runner, self.url = self._loop.run_until_complete(_start(self._script))
        started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._running.terminate()
            self._running.wait(10)
            assert self._running.stdout is not None
            self._running.stdout.close()
        else:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    def order(self, **script: Any) -> None:
        """Changes the script's members that are given."""
        self._control("POST", json.dumps(script).encode())

    def forget(self) -> None:
        """Every count begins anew; the script stays."""
        self._control("DELETE")

    def counts(self) -> dict[str, Any]:
        return self._control("GET")

    def last_request(self) -> dict[str, Any]:
        """The JSON of the last generateContent."""
        return self._control("GET", query="?last")

    def _control(self, method: str, body: bytes | None = None, query: str = "") -> dict[str, Any]:
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/control{query}", data=body, method=method), timeout=10) as answer:
            told: dict[str, Any] = json.load(answer)
            return told


async def _start(script: Mapping[str, Any], port: int = 0) -> tuple[web.AppRunner, str]:
    runner = web.AppRunner(application(script), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    return runner, "http://{}:{}".format(*runner.addresses[0][:2])


async def _forever(script: Mapping[str, Any], port: int) -> None:
    print((await _start(script, port))[1], flush=True)
    await asyncio.Event().wait()


def main() -> None:
    about = "A fake Gemini on loopback: prints its address, answers until it is ended. It invents captions, whatever the picture."
    modes = f"modes of failure, for `always`, `queue` and `modes`: {' '.join(MODES)}"
    parser = argparse.ArgumentParser(prog="python -m tests.servers.gemini_server", description=about, epilog=modes)
    members = f"JSON with members of {', '.join(SCRIPT)} (tests/servers/gemini_service.py)"
    parser.add_argument(
        "script", nargs="?", type=json.loads, default={}, help=f'{members}, as \'{{"latency": 1, "share": 0.1, "modes": ["503"]}}\''
    )
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    told = parser.parse_args()
    asyncio.run(_forever(told.script, told.port))


if __name__ == "__main__":
    main()
