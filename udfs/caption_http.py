"""One try is one HTTP request: what the captioners behind a server share, over aiohttp.

Redirects are not followed, which would carry the key to another host; nothing is asked again; bodies are read up to LARGEST_BODY.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import certifi

from udfs.caption_call import Reply, Usage

LARGEST_BODY = 8 << 20  # bytes of an answer, unpacked
CONNECT = 30.0  # seconds, at most half of a request's: a connection that is not there costs nothing


class CutBody(Exception):
    """An answer began and did not end. body: what came; late: for want of time."""

    def __init__(self, why: str, body: bytes, late: bool) -> None:
        super().__init__(why)
        self.body, self.late = body, late


class TooLarge(Exception):
    """A body beyond LARGEST_BODY."""


class Unready(Exception):
    """No request can be made: certificates, or a proxy, that the environment names and that are none."""


class OfWorker:
    """What asks a service belongs to its worker, as its key does, and to the event loop that first asks."""

    def __reduce__(self) -> str:
        raise TypeError("what asks a service belongs to its worker, as the key does: it is not pickled")


class Answer(NamedTuple):
    """Whatever the status."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def told(self) -> Any:
        """-> the body's JSON, or its text where it is none."""
        text = self.body.decode("utf-8", "replace").lstrip("\ufeff")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text


class Http(OfWorker):
    """A session, begun with the first request."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], seconds: float) -> Answer:
        """(JSON; seconds: of the whole request) -> the answer; of an error, as much as came. Raises CutBody, TooLarge, Unready, and what aiohttp raises
        before a body.
        """
        if self._session is None:
            self._session = session(url)
        headers = {"Content-Type": "application/json", **headers}
        timeout = aiohttp.ClientTimeout(total=seconds, connect=min(CONNECT, seconds / 2))
        async with self._session.post(url, data=body, headers=headers, timeout=timeout, allow_redirects=False) as answer:
            try:
                told = await bounded(answer)
            except CutBody as cut:
                if answer.status < 300:
                    raise
                told = cut.body
            return Answer(answer.status, answer.headers, told)

    async def close(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()


def session(url: str, **more: Any) -> aiohttp.ClientSession:
    """Within a running loop, for one service (any address of it). Its proxy is the environment's, looked up once: aiohttp's trust_env does it in a thread
    for each request, which costs a busy loop a sixth of its pace. Certificates are the system's (or SSL_CERT_FILE's) and certifi's. more: of
    aiohttp.ClientSession. Raises Unready.
    """
    parts = urlsplit(url)
    proxy = None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
    if proxy is not None and "://" not in proxy:
        proxy = f"http://{proxy}"
    try:
        trusted = ssl.create_default_context()
        trusted.load_verify_locations(certifi.where())
    except OSError as error:
        raise Unready(f"certificates: {type(error).__name__}") from None
    connector = aiohttp.TCPConnector(limit=0, ssl=trusted)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), proxy=proxy, **more)


async def bounded(answer: aiohttp.ClientResponse) -> bytes:
    """-> its body. Raises CutBody, TooLarge; the connection is closed then."""
    body = bytearray()
    try:
        async for piece in answer.content.iter_any():
            body += piece
            if len(body) > LARGEST_BODY:
                raise TooLarge
    except (aiohttp.ClientPayloadError, OSError) as error:  # a timeout is an OSError
        answer.close()
        raise CutBody(type(error).__name__, bytes(body), isinstance(error, TimeoutError)) from None
    except BaseException:
        answer.close()
        raise
    return bytes(body)


def of_exception(error: Exception, most: Usage | None) -> Reply:
    """What a client raised -> the reply. Where the request may have arrived, it may have been answered and billed: usage is the most.
    Of an exception's own words only those about addresses are kept: others hold whole bodies.
    """
    name = type(error).__name__
    if isinstance(error, CutBody):
        return Reply("timeout" if error.late else "cut_body", str(error), usage=most)
    if isinstance(error, TooLarge):
        return Reply("not_an_answer", f"a body of more than {LARGEST_BODY} bytes", usage=most)
    if isinstance(error, (Unready, aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError)):  # of the service or of its proxy
        return Reply("bad_settings", f"{error}" if isinstance(error, Unready) else f"{name}: an address that is none")
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return Reply("key_refused" if error.status == 407 else "dropped", f"{name}: the proxy answers {error.status}")
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return Reply("timeout", name)
    if isinstance(error, TimeoutError):
        return Reply("timeout", name, usage=most)
    if isinstance(error, aiohttp.ClientConnectorError):
        return Reply("dropped", f"{name}: {error}")
    if isinstance(error, aiohttp.ClientResponseError):
        return Reply("not_json", f"{name}: no HTTP", usage=most)
    if isinstance(error, aiohttp.ClientPayloadError):
        return Reply("cut_body", name, usage=most)
    if isinstance(error, (aiohttp.ClientConnectionError, OSError)):
        return Reply("dropped", name, usage=most)
    return Reply("not_an_answer", f"{name} in the client", usage=most)
