"""The Gemini engine of captions, over google-genai 3.4: asynchronous, one try is one HTTP request, and whatever happens is a Reply.

What the SDK would do by itself is switched off: another request after a dropped connection (attempts=1), after an answer that says CONTINUATION, or for
a function call; redirects, which would carry the key to another host; an endless wait. Bodies are read up to LARGEST_BODY. The engine belongs to the
event loop that first asks; it cannot be pickled: it is made on the worker.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import aiohttp
from google import genai
from google.genai import errors, types

from udfs import caption_reply, gemini_errors, gemini_reply
from udfs.caption_call import Reply, Usage
from udfs.caption_request import Request

API_VERSION = "v1"
LARGEST_BODY = 8 << 20  # bytes of an answer, unpacked
# tokens of an image by media resolution (Gemini 3); HIGH is the service's own default
IMAGE_TOKENS = {"LOW": 280, "MEDIUM": 560, "HIGH": 1_120, "ULTRA_HIGH": 2_240}
MARGIN = 64  # tokens of a prompt that are in no text: roles, separators


class _CutBody(Exception):
    """An answer began and did not end. prohibited: what came says so."""

    def __init__(self, why: str, prohibited: bool) -> None:
        super().__init__(why)
        self.prohibited = prohibited


class _TooLarge(Exception):
    """A body beyond LARGEST_BODY."""


class _Response(aiohttp.ClientResponse):
    """Reads no more than LARGEST_BODY; an error's body that is no JSON or no UTF-8 is text, never an exception."""

    async def read(self) -> bytes:
        if self._body is None:
            body = bytearray()
            try:
                async for piece in self.content.iter_any():
                    body += piece
                    if len(body) > LARGEST_BODY:
                        raise _TooLarge
            except (aiohttp.ClientPayloadError, OSError) as error:  # a timeout is an OSError
                self.close()
                said = gemini_reply.prohibited(body.decode("utf-8", "replace"))
                if isinstance(error, TimeoutError) and not said:
                    raise
                raise _CutBody(type(error).__name__, said) from None
            except BaseException:
                self.close()
                raise
            self._body = bytes(body)
        return await super().read()

    async def text(self, encoding: str | None = None, errors: str = "strict") -> str:
        return await super().text(encoding, errors if self.status == 200 else "replace")

    async def json(self, **how: Any) -> Any:
        try:
            return await super().json(**how)
        except (ValueError, RecursionError):  # for the SDK as for a body of another type: it takes the text
            raise aiohttp.ContentTypeError(self.request_info, self.history, status=self.status, message="no JSON") from None


class _Redirected(Exception):
    """A redirect that the SDK would have followed: of an upload, where it does not pass on that it may not."""


async def _no_redirect(_session: object, _context: object, told: aiohttp.TraceRequestRedirectParams) -> None:
    raise _Redirected(told.url.host or "")


def most_usage(request: Request, options: Mapping[str, Any]) -> Usage:
    """The most that one answer to a request can cost: a token is at least a byte of its text, and thoughts count as output."""
    words = (request.system, request.prompt, json.dumps(request.schema))
    image = IMAGE_TOKENS[_resolution(options) or "HIGH"]
    return Usage(
        sum(len(text.encode("utf-8", "surrogatepass")) for text in words) + MARGIN,
        image,
        int(options["max_output_tokens"]),
        0,
        estimated=True,
    )


def generation(request: Request, options: Mapping[str, Any]) -> dict[str, Any]:
    """-> GenerateContentConfig's members that shape the answer. ValueError, TypeError: the options are wrong."""
    resolution, thinking = _resolution(options), options.get("thinking")
    config: dict[str, Any] = {
        "system_instruction": request.system or None,
        "candidate_count": 1,
        "max_output_tokens": int(options["max_output_tokens"]),
        "response_mime_type": "application/json",
        "response_json_schema": dict(request.schema),
        "media_resolution": f"MEDIA_RESOLUTION_{resolution}" if resolution else None,
        "safety_settings": [
            {"category": _member(types.HarmCategory, name, "HARM_CATEGORY_"), "threshold": _member(types.HarmBlockThreshold, threshold)}
            for name, threshold in (options.get("safety_settings") or {}).items()
        ]
        or None,
    }
    if thinking is not None:  # a level by name, or a budget in tokens
        is_budget = isinstance(thinking, int)
        config["thinking_config"] = (
            {"thinking_budget": thinking} if is_budget else {"thinking_level": _member(types.ThinkingLevel, thinking)}
        )
    return config


def _member(kind: Any, name: Any, prefix: str = "") -> str:
    """The SDK takes an unknown name for a new one, and every request would be refused."""
    found = prefix + str(name).upper().removeprefix(prefix)
    if found not in kind.__members__:
        raise ValueError(f"{name}: no {kind.__name__}; there are {', '.join(kind.__members__).lower()}")
    return found


def _resolution(options: Mapping[str, Any]) -> str:
    name = str(options.get("media_resolution") or "").upper().removeprefix("MEDIA_RESOLUTION_")
    if name and name not in IMAGE_TOKENS:
        raise ValueError(f"media_resolution: {name.lower()}, expected one of {', '.join(map(str.lower, IMAGE_TOKENS))}")
    return name


class GeminiEngine:
    """options: model, max_output_tokens, timeout (seconds); or None: base_url, api_version, media_resolution (low | medium | high), safety_settings
    (category -> threshold), thinking (a level, or tokens). A request's own options come before them. key: the API key, as text.
    ValueError: options or a key that no request can be made of.
    """

    def __init__(self, options: Mapping[str, Any], key: str) -> None:
        if not key.strip() or not key.isascii() or not key.strip().isprintable():
            raise ValueError("the API key is empty, or holds characters that no key has")
        if missing := [name for name in ("model", "max_output_tokens", "timeout") if not options.get(name)]:
            raise ValueError(f"engine options without {', '.join(missing)}")
        self._options, self._key = dict(options), key.strip()
        self._client: genai.Client | None = None
        self._session: aiohttp.ClientSession | None = None
        self._config: tuple[Any, types.GenerateContentConfig] | None = None
        _checked(generation(Request("", b"", "", "", {}, {}, False), self._options))

    def __repr__(self) -> str:
        return f"GeminiEngine({self._options['model']})"

    async def ask(self, request: Request, image: bytes, mime: str) -> Reply:
        """One try, one HTTP request. Raises nothing but asyncio.CancelledError."""
        try:
            options = {**self._options, **request.options}
            most, config = most_usage(request, options), self._configured(request, options)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            return caption_reply.clean(Reply("bad_settings", f"{type(error).__name__}: {error}"), self._key)
        try:
            parts = [types.Part(inline_data=types.Blob(data=image, mime_type=mime)), types.Part(text=request.prompt)]
            contents = types.Content(role="user", parts=parts)
            answer = await self.client().aio.models.generate_content(model=options["model"], contents=contents, config=config)
            raw = answer.sdk_http_response
            reply = gemini_reply.of_body((raw.body or "") if raw else "", most)
        except Exception as error:  # noqa: BLE001  (the edge: a try ends with a reply)
            reply = of_exception(error, most)
        return caption_reply.clean(reply, self._key)

    def _configured(self, request: Request, options: Mapping[str, Any]) -> types.GenerateContentConfig:
        """The config of the last request, when it is the same: checking it anew costs more than the rest of a call."""
        wanted = (request.system, request.schema, options)
        if self._config is None or self._config[0] != wanted:
            self._config = (wanted, _checked(generation(request, options)))
        return self._config[1]

    def client(self) -> genai.Client:
        """The SDK's client, made within the running loop."""
        if self._client is None:
            traces = aiohttp.TraceConfig()
            traces.on_request_redirect.append(_no_redirect)
            self._session = aiohttp.ClientSession(
                trace_configs=[traces],
                connector=aiohttp.TCPConnector(limit=0),
                response_class=_Response,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=True,
            )
            http = types.HttpOptions(
                base_url=self._options.get("base_url"),
                api_version=self._options.get("api_version") or API_VERSION,
                timeout=max(1, int(float(self._options["timeout"]) * 1_000)),
                retry_options=types.HttpRetryOptions(attempts=1),
                client_args={"follow_redirects": False},
                async_client_args={"allow_redirects": False},
                aiohttp_client=self._session,
            )
            self._client = genai.Client(api_key=self._key, vertexai=False, http_options=http)
        return self._client

    async def close(self) -> None:
        if self._client is not None and self._session is not None:
            client, session, self._client, self._session = self._client, self._session, None, None
            await client.aio.aclose()
            client.close()
            await session.close()


def _checked(config: dict[str, Any]) -> types.GenerateContentConfig:
    return types.GenerateContentConfig(
        **config,
        automatic_continuation=False,
        automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
        should_return_http_response=True,
    )


def of_exception(error: Exception, most: Usage) -> Reply:
    """What the SDK or its client raised -> the reply. Where the request may have arrived, it may have been answered and billed: usage is the most.
    Of an exception's own words only those about addresses are kept: others hold whole bodies.
    """
    name = type(error).__name__
    if isinstance(error, errors.APIError):
        reply = gemini_errors.of_error(error.code or 0, error.details, getattr(error.response, "headers", None))
        return reply._replace(usage=most) if 200 <= (error.code or 0) < 300 else reply
    if isinstance(error, _CutBody):
        return Reply("prohibited" if error.prohibited else "cut_body", f"{error}", usage=most)
    if isinstance(error, _Redirected):
        return Reply("redirected", f"from the host {error}")
    if isinstance(error, _TooLarge):
        return Reply("not_an_answer", f"a body of more than {LARGEST_BODY} bytes", usage=most)
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return Reply("timeout", name)
    if isinstance(error, TimeoutError):
        return Reply("timeout", name, usage=most)
    if isinstance(error, aiohttp.ClientConnectorError):
        return Reply("dropped", f"{name}: {error}")
    if isinstance(error, (aiohttp.ClientResponseError, UnicodeError)):
        return Reply("not_json", f"{name}: no HTTP, or no text", usage=most)
    if isinstance(error, aiohttp.ClientPayloadError):
        return Reply("cut_body", name, usage=most)
    if isinstance(error, (aiohttp.ClientConnectionError, OSError)):
        return Reply("dropped", name, usage=most)
    return Reply("not_an_answer", f"{name} in the client", usage=most)
