"""google-genai 3.4's client for files and jobs of Batch mode, with what it would do by itself switched off: another request after a dropped connection
(attempts=1), redirects, which would carry the key to another host, an endless wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp
from google import genai
from google.genai import errors, types

from udfs import caption_http, gemini_errors
from udfs.caption_call import Reply


class _Response(aiohttp.ClientResponse):
    """Reads no more than the largest body; an error's body that is no JSON or no UTF-8 is text, never an exception."""

    async def read(self) -> bytes:
        if self._body is None:
            self._body = await caption_http.bounded(self)
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


class Sdk(caption_http.OfWorker):
    """options, key: from udfs.gemini_request.checked. An upload to another host takes the service's proxy too."""

    def __init__(self, options: Mapping[str, Any], key: str) -> None:
        self._options, self._key = options, key
        self._made: tuple[genai.Client, aiohttp.ClientSession] | None = None

    @property
    def client(self) -> genai.client.AsyncClient:
        """Made within the running loop."""
        if self._made is None:
            traces = aiohttp.TraceConfig()
            traces.on_request_redirect.append(_no_redirect)
            session = caption_http.session(self._options["base_url"], trace_configs=[traces], response_class=_Response)
            http = types.HttpOptions(
                base_url=self._options["base_url"],
                api_version=self._options["api_version"],
                timeout=max(1, int(float(self._options["timeout"]) * 1_000)),
                retry_options=types.HttpRetryOptions(attempts=1),
                client_args={"follow_redirects": False},
                async_client_args={"allow_redirects": False},
                aiohttp_client=session,
            )
            self._made = genai.Client(api_key=self._key, vertexai=False, http_options=http), session
        return self._made[0].aio

    async def close(self) -> None:
        if self._made is not None:
            (client, session), self._made = self._made, None
            await client.aio.aclose()
            client.close()
            await session.close()


def of_exception(error: Exception) -> Reply:
    """What the SDK or its client raised -> the reply. A call about files or jobs costs nothing."""
    if isinstance(error, errors.APIError):
        return gemini_errors.of_error(error.code or 0, error.details, getattr(error.response, "headers", None))
    if isinstance(error, _Redirected):
        return Reply("redirected", f"from the host {error}")
    return caption_http.of_exception(error, None)
