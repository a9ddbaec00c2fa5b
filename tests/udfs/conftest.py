"""What the tests of the Gemini engine and of the service it is tested against share."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import pytest

from tests.servers.gemini_server import GeminiServer
from udfs import caption_answer
from udfs.caption_call import Reply
from udfs.caption_request import Request
from udfs.gemini import GeminiEngine

CANARY = "AIzaSyCANARY-0123456789_abcdefghijklmno"
OPTIONS = {"model": "gemini-3.8-flash", "max_output_tokens": 2_000, "timeout": 20.0}
REQUEST = Request("k", b"", "Describe.", "short: one sentence.", caption_answer.SCHEMA, {"media_resolution": "low"}, False)
SLOW = ("hang", "hang_in_body", "slow_drip")  # these end by a timeout
T = TypeVar("T")


class Bench:
    """Two hosts, the first redirects to the second; engines of a long and of a short timeout; one event loop."""

    def __init__(self, server: GeminiServer, elsewhere: GeminiServer, runner: asyncio.Runner) -> None:
        self.server, self.elsewhere, self._runner = server, elsewhere, runner
        self.patient, self.hasty = (self.engine(timeout=seconds) for seconds in (20.0, 0.3))

    def engine(self, **options: Any) -> GeminiEngine:
        return GeminiEngine({**OPTIONS, "base_url": self.server.url, **options}, CANARY)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def ask(self, mode: str) -> Reply:
        self.server.order(always=mode)
        self.server.forget()
        return self.run((self.hasty if mode in SLOW else self.patient).ask(REQUEST, b"an image", "image/jpeg"))


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with (
        GeminiServer() as elsewhere,
        GeminiServer({"elsewhere": elsewhere.url + "/v1/models/m:generateContent"}) as server,
        asyncio.Runner() as runner,
    ):
        bench = Bench(server, elsewhere, runner)
        yield bench
        for engine in (bench.patient, bench.hasty):
            bench.run(engine.close())


@pytest.fixture
def server(bench: Bench) -> GeminiServer:
    """Without a mode, and with new counts."""
    bench.server.order(always="", queue=[], by_image={}, share=0.0, modes=[], latency=0.0, limit=0.0, thoughts=0, obedient=False)
    bench.server.forget()
    return bench.server
