"""One measurement of paid captioning against the fake service in a process of its own -> JSON.

    python -m benchmarks.caption_loops OUT.json cost|pace ours|sdk|aiohttp ROWS
    python -m benchmarks.caption_loops OUT.json limit|memory ROWS

`ours` is a task as the stage runs it: requests rendered, answers checked, every call durable in a journal; `sdk` the bare google-genai call with the
same picture, prompt and configuration; `aiohttp` the same body posted without the SDK. Both say one prompt and schema for all rows, rendered once: only
`ours` renders a request for each. No picture is read, decoded or rendered anywhere: it is the same bytes with a number behind them. CPU is this process's
own: the server's is not in it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pandas as pd
import psutil
import yaml
from google import genai
from google.genai import types

from conf.settings import Settings
from jobs import caption_rows
from tests.servers.gemini_server import GeminiServer
from udfs import caption_run, caption_work, gemini_request
from udfs.caption_budget import Price
from udfs.caption_journal import Journal, Place
from udfs.caption_record import Terms
from udfs.caption_run import How
from udfs.opener import Opener, to_uri
from udfs.rate_limit import Rate

PICTURE = os.urandom(60_000)  # bytes: a JPEG of 512 pixels a side has about so many
WARM, FRAME = 64, 256
LATENCY, IN_FLIGHT = 0.2, 64  # seconds of an answer; calls of the task
LIMIT, GUESS = 40.0, 80.0  # calls a second that the service takes, and that the config believes in
FAST = 1e9  # calls a second: no limit of ours
PRICE = Price(750_000_000, 3_750_000_000)


def tier(url: str, in_flight: int) -> caption_work.Tier:
    flash: dict[str, Any] = {"engine": "gemini", "model": "gemini-3.8-flash", "key": {"environment": "STUDBOOK_BENCH_KEY"}, "base_url": url}
    flash |= {"media_resolution": "low", "in_flight": in_flight, "max_output_tokens": 2_048}
    told = {"captioners": {"flash": flash}, "tiers": [{"name": "all", "captioner": "flash"}], "budget_usd": 1e6}
    folder = {"name": "none", "kind": "folder", "uri": "/nonexistent"}
    settings = Settings.model_validate(
        {"lake": {"root": "/nonexistent"}, "ingest": {"sources": [folder]}, "captions": told, **_sections()}, strict=False
    )
    return caption_rows.of_worker(settings, settings.captions.tiers[0])


def _sections() -> dict[str, Any]:
    demo = yaml.safe_load((Path(__file__).parents[1] / "conf/demo.yaml").read_text())
    return {name: value for name, value in demo.items() if name not in ("lake", "ingest", "captions")}


def picture(number: int) -> bytes:
    return PICTURE + number.to_bytes(8, "big")


def frames(rows: int) -> Iterator[pd.DataFrame]:
    for begin in range(0, rows, FRAME):
        told = [
            {"image_id": n.to_bytes(32, "big"), "tags": ["fox", "snow"], "alt_text": "", "known": None}
            for n in range(begin, min(rows, begin + FRAME))
        ]
        yield pd.DataFrame(told)


def ours(url: str, rows: int, in_flight: int, rate: float, seen: Callable[[int], None] = lambda done: None) -> None:
    """A task of `rows` images. seen: called with how many are done."""
    mine = tier(url, in_flight)
    work = caption_work.work(mine)._replace(prepare=lambda row: (picture(int.from_bytes(row["image_id"], "big")), "image/jpeg"))
    with tempfile.TemporaryDirectory() as folder:
        terms = Terms(share=rows * 10**9, worst=10**8, in_flight=in_flight, flush=16, lease=60.0)
        journal = Journal(Opener(), Place(to_uri(f"{folder}/run/wave"), 0, 0), terms)
        how = How(window=2 * in_flight, frame_rows=32)
        done = 0
        for frame in caption_run.run(frames(rows), work, lambda: caption_work.engine(mine.captioner), journal, PRICE, Rate(rate), how):
            assert set(frame.state) == {"whole"}, frame.code.unique()
            seen(done := done + len(frame))


def bare(how: str, url: str, rows: int) -> None:
    """The same requests without what makes them accountable."""
    mine = tier(url, IN_FLIGHT)
    work = caption_work.work(mine)
    first = work.render({"image_id": bytes(32), "tags": ["fox", "snow"], "alt_text": "", "known": None})
    options = {**caption_work.gemini_options(mine.captioner), **first.options}
    told = gemini_request.body(first, b"", "image/jpeg", options)  # system instruction, schema, safety settings and all
    inline = told["contents"][0]["parts"][0]["inlineData"]

    async def sdk(client: genai.Client, config: types.GenerateContentConfig, number: int) -> None:
        contents: Any = [types.Part.from_bytes(data=picture(number), mime_type="image/jpeg"), first.prompt]
        reply = await client.aio.models.generate_content(model=options["model"], contents=contents, config=config)
        assert reply.text

    async def raw(session: aiohttp.ClientSession, number: int) -> None:
        inline["data"] = base64.b64encode(picture(number)).decode()  # until the next await nobody else is at it
        body = json.dumps(told).encode()
        target = f"{url}/v1/models/{options['model']}:generateContent"
        async with session.post(target, data=body, headers={"content-type": "application/json"}) as reply:
            assert json.loads(await reply.text())["candidates"]

    async def run() -> None:
        gate = asyncio.Semaphore(IN_FLIGHT)
        config = types.GenerateContentConfig(**gemini_request.generation(first, options))
        client = genai.Client(api_key="k" * 30, vertexai=False, http_options=types.HttpOptions(base_url=url, api_version="v1"))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session, asyncio.TaskGroup() as tasks:

            async def one(call: Awaitable[None]) -> None:
                try:
                    await call
                finally:
                    gate.release()

            for number in range(rows):
                await gate.acquire()
                tasks.create_task(one(sdk(client, config, number) if how == "sdk" else raw(session, number)))

    asyncio.run(run())


def cost(how: str, rows: int) -> dict[str, float]:
    """CPU-ms of one more request (start-up stands apart: the same work before it)."""
    with GeminiServer({}, process=True) as server:
        ask(how, server.url, WARM)
        before, began = cpu(), time.perf_counter()
        ask(how, server.url, rows)
        return {"cpu_ms": 1e3 * (cpu() - before) / rows, "wall_ms": 1e3 * (time.perf_counter() - began) / rows}


def pace(how: str, rows: int) -> dict[str, float]:
    """Answers of LATENCY seconds, IN_FLIGHT at once -> share of the rate that this allows."""
    with GeminiServer({"latency": LATENCY}, process=True) as server:
        ask(how, server.url, WARM)
        began = time.perf_counter()
        ask(how, server.url, rows)
        return {"share": rows / (time.perf_counter() - began) / (IN_FLIGHT / LATENCY)}


def ask(how: str, url: str, rows: int) -> None:
    if how == "ours":
        ours(url, rows, IN_FLIGHT, FAST)
    else:
        bare(how, url, rows)


def limit(rows: int) -> dict[str, float]:
    """A hidden limit of half of what the config believes, which is halved after half of the rows -> share of it that is used, share of 429s (both
    from the 11th second on, until it is halved), and seconds until 429s are rare again (at most 1 % in 10 s)."""
    looks: list[tuple[float, int, int]] = []  # seconds, answered, refused
    halved = [0.0]
    with GeminiServer({"latency": LATENCY, "limit": LIMIT, "limit_says": "nothing"}, process=True) as server:
        began = time.perf_counter()

        def look(done: int) -> None:
            counts = server.counts()
            looks.append((time.perf_counter() - began, counts["answered"], counts["limited"]))
            if done >= rows // 2 and not halved[0]:
                server.order(limit=LIMIT / 2)
                halved[0] = time.perf_counter() - began

        ours(server.url, rows, IN_FLIGHT, GUESS, look)
    steady = [one for one in looks if 10.0 < one[0] <= halved[0]]
    (t0, a0, l0), (t1, a1, l1) = steady[0], steady[-1]
    after = [one for one in looks if one[0] >= halved[0]]
    found = next(
        (
            first[0] - halved[0]
            for first in after
            if (later := next((one for one in after if one[0] >= first[0] + 10.0), None)) is not None
            and (later[2] - first[2]) <= 0.01 * (later[1] - first[1])
        ),
        float("inf"),
    )
    return {"used": (a1 - a0) / (t1 - t0) / LIMIT, "refused": (l1 - l0) / max(1, a1 - a0 + l1 - l0), "found_s": found}


def memory(rows: int) -> dict[str, float]:
    """RSS in MB after a tenth of the rows, and the most after it."""
    process, seen = psutil.Process(), dict[int, float]()

    def look(done: int) -> None:
        seen[done] = process.memory_info().rss / 1e6

    with GeminiServer({}, process=True) as server:
        ours(server.url, rows, IN_FLIGHT, FAST, look)
    early = max(mb for done, mb in seen.items() if done <= rows / 10)
    return {"early_mb": early, "late_mb": max(mb for done, mb in seen.items() if done > rows / 10)}


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    out, kind, *rest = sys.argv[1:]
    os.environ["STUDBOOK_BENCH_KEY"] = "AIza" + "k" * 35
    rows = int(rest[-1])
    told = {"cost": cost, "pace": pace}[kind](rest[0], rows) if len(rest) == 2 else {"limit": limit, "memory": memory}[kind](rows)
    Path(out).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
