"""The captioner behind an OpenAI-compatible server, such as vLLM that serves InternVL on a GPU cluster: chat completions, one HTTP
request a try, and whatever happens is a Reply.

No SDK: there is none in the project that does less. The image goes inside the request.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from udfs import caption_http, caption_reply, openai_reply
from udfs.caption_call import Reply, Usage
from udfs.caption_request import Request

IMAGE_TOKENS = 3_328  # of InternVL's 13 tiles: the most of an image at its default, where the options say nothing
MARGIN = 64  # tokens of a prompt that are in no text: roles, separators
NEEDED = ("base_url", "model", "max_output_tokens", "timeout")


class OpenAiCaptioner:
    """options: base_url (ends in /v1), model, max_output_tokens, timeout (seconds); or None: image_tokens (the most of an image), extra (members
    of every request, such as vLLM's {"mm_processor_kwargs": {"max_dynamic_patch": 4}}). A request's own options come before them.
    key: as text, "" for a server that asks none. ValueError: options that no request can be made of. The engine belongs to the event loop that first
    asks; it is made on the worker.
    """

    def __init__(self, options: Mapping[str, Any], key: str) -> None:
        if missing := [name for name in NEEDED if not options.get(name)]:
            raise ValueError(f"engine options without {', '.join(missing)}")
        if urlsplit(options["base_url"]).scheme not in ("http", "https") or "@" in urlsplit(options["base_url"]).netloc:
            raise ValueError(
                "base_url: expected http(s)://host[:port]/v1, without a user or password; the key has its own place in the config"
            )
        if not key.isascii() or not key.strip().isprintable():
            raise ValueError("the API key holds characters that no key has")
        self._options, self._key = dict(options), key.strip()
        self._http = caption_http.Http()

    def __repr__(self) -> str:
        return f"OpenAiCaptioner({self._options['model']})"

    async def ask(self, request: Request, image: bytes, mime: str) -> Reply:
        """One try, one HTTP request. Raises nothing but asyncio.CancelledError."""
        options = {**self._options, **request.options}
        try:
            most, body = most_usage(request, options), json.dumps(body_of(request, image, mime, options)).encode()
        except (ValueError, TypeError) as error:
            return caption_reply.clean(Reply("bad_settings", f"{type(error).__name__}: {error}"), self._key)
        url = f"{str(options['base_url']).rstrip('/')}/chat/completions"
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            answer = await self._http.post(url, body, headers, float(options["timeout"]))
            if answer.status == 200:
                reply = openai_reply.of_body(answer.body.decode("utf-8", "replace").lstrip("\ufeff"), most)
            else:
                reply = openai_reply.of_error(answer.status, answer.told(), answer.headers)
        except Exception as error:  # noqa: BLE001  (the edge: a try ends with a reply)
            reply = caption_http.of_exception(error, most)
        return caption_reply.clean(reply, self._key)

    async def close(self) -> None:
        await self._http.close()


def body_of(request: Request, image: bytes, mime: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """-> the request's JSON: greedy, one choice, held to the schema."""
    schema = {name: value for name, value in request.schema.items() if name != "propertyOrdering"}  # Gemini's own word
    address = f"data:{mime};base64,{base64.b64encode(image).decode()}"
    asked = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": request.prompt}]
    told = [{"role": "system", "content": request.system}] if request.system else []
    return {
        "model": options["model"],
        "messages": [*told, {"role": "user", "content": asked}],
        "max_tokens": int(options["max_output_tokens"]),
        "temperature": 0,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "captions", "strict": True, "schema": schema | {"additionalProperties": False}},
        },
        **(options.get("extra") or {}),
    }


def most_usage(request: Request, options: Mapping[str, Any]) -> Usage:
    """The most that one answer to a request can cost: a token is at least a byte of its text."""
    words = sum(len(text.encode()) for text in (request.system, request.prompt))
    return Usage(words + MARGIN, int(options.get("image_tokens") or IMAGE_TOKENS), int(options["max_output_tokens"]), 0, estimated=True)
