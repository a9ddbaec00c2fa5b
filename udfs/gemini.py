"""The Gemini engine of captions: generateContent over HTTP, asynchronous, one try is one request, and whatever happens is a Reply.

google-genai checks the options and carries Batch mode (udfs.gemini_sdk); its own generate_content costs four times the CPU of this request, and a task
of 64 calls in flight is bound by it (benchmarks/results, part caption). The body is what the SDK would send: a test compares them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from udfs import caption_http, caption_reply, gemini_errors, gemini_reply
from udfs.caption_call import Reply, Usage
from udfs.caption_request import Request
from udfs.gemini_request import address, body, checked, most_usage


class GeminiEngine:
    """options, key: as of udfs.gemini_request.checked; a request's own options come before them. ValueError: no request can be made of them."""

    def __init__(self, options: Mapping[str, Any], key: str) -> None:
        self._options, self._key = checked(options, key)
        self._http = caption_http.Http()

    def __repr__(self) -> str:
        return f"GeminiEngine({self._options['model']})"

    async def ask(self, request: Request, image: bytes, mime: str) -> Reply:
        """One try, one HTTP request. Raises nothing but asyncio.CancelledError."""
        options = {**self._options, **request.options}
        try:
            most, told = most_usage(request, options), json.dumps(body(request, image, mime, options)).encode()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            return caption_reply.clean(Reply("bad_settings", f"{type(error).__name__}: {error}"), self._key)
        seconds = float(options["timeout"])
        headers = {"x-goog-api-key": self._key, "X-Server-Timeout": str(math.ceil(seconds))}
        try:
            reply = of_answer(await self._http.post(address(options), told, headers, seconds), most)
        except Exception as error:  # noqa: BLE001  (the edge: a try ends with a reply)
            reply = caption_http.of_exception(error, most)
            if isinstance(error, caption_http.CutBody) and gemini_reply.prohibited(error.body.decode("utf-8", "replace")):
                reply = Reply("prohibited", usage=most)
        return caption_reply.clean(reply, self._key)

    async def close(self) -> None:
        await self._http.close()


def of_answer(answer: caption_http.Answer, most: Usage) -> Reply:
    """(an answer of the service, the most that it can have cost) -> the reply. Nothing but a status of 200 to 299 can have been billed."""
    if answer.status != 200:
        reply = gemini_errors.of_error(answer.status, answer.told(), answer.headers)
        return reply._replace(usage=most) if 200 <= answer.status < 300 else reply
    try:
        return gemini_reply.of_body(answer.body.decode(), most)
    except UnicodeDecodeError:
        prohibited = gemini_reply.prohibited(answer.body.decode("utf-8", "replace"))
        return Reply("prohibited" if prohibited else "not_json", "no UTF-8", usage=most)
