"""An error of Gemini (HTTP status, or the code of a batch's line, and a body) -> a Reply. Pure; the detail is clipped and cleaned by caption_reply.clean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from udfs.caption_call import Reply
from udfs.caption_reply import LONGEST_WAIT, retry_after

# google.rpc.Code, as the lines of a batch have it -> the status that HTTP has for it
HTTP = dict(enumerate((499, 500, 400, 504, 404, 409, 403, 429, 400, 409, 400, 501, 500, 503, 500, 401), 1))

_MONEY = re.compile(r"spend(?:ing)? (?:cap|limit)|prepay|billing account .{0,40}(?:closed|disabled)", re.IGNORECASE)
_LARGE = re.compile(r"payload size exceeds|token count .{0,40}exceeds|request is too large|exceeds the maximum", re.IGNORECASE)
_SETTINGS = re.compile(r"^(?:generation_?config|safety_?settings|system_?instruction|model)\b", re.IGNORECASE)
_DELAY = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)s")


def of_error(status: int, body: Any, headers: Mapping[str, str] | None = None) -> Reply:
    """(HTTP status, or 200 or 0 when the error says it, decoded body or what stands for it, headers) -> the reply. Nothing is billed."""
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    if isinstance(body, str) and "PROHIBITED_CONTENT" in body:  # a body that was cut off
        return Reply("prohibited")
    error = body.get("error") if isinstance(body, dict) else None
    ours = isinstance(error, dict)
    error = error if isinstance(error, dict) else {}
    code = error.get("code")
    if status in (0, 200):
        status = HTTP.get(code, code) if type(code) is int else 500
        status = status if 300 <= status < 600 else 500
    details = [one for one in error.get("details") or [] if isinstance(one, dict)] if isinstance(error.get("details"), list) else []
    word = said(error.get("status", "FAILED_PRECONDITION" if code == 9 else ""))
    message = said(error.get("message"))
    reasons = " ".join([word, *(said(one.get("reason")) for one in details), message])
    if "PROHIBITED_CONTENT" in reasons:
        return Reply("prohibited")
    headers = headers or {}
    told = f"HTTP {status} {word}: {message}" if ours else f"HTTP {status}, a body that is not the API's"
    if 300 <= status < 400:
        told = f"HTTP {status} to the host {_host(headers.get('Location', ''))}"
    return Reply(_code(status, ours, reasons, details), told, retry_after=_wait(details, headers))


def said(value: Any) -> str:
    """A member that should be text: of anything else only the type (a deep one cannot even be printed)."""
    return value if isinstance(value, str) else "" if value is None else f"({type(value).__name__})"


def _host(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return "of an address that is none"


def _code(status: int, ours: bool, reasons: str, details: list[dict[str, Any]]) -> str:
    if "PUP_LIMITED" in reasons:
        return "usage_policy"
    if 300 <= status < 400:
        return "redirected"
    if status == 402 or (400 <= status < 500 and _MONEY.search(reasons)):
        return "spend_cap"
    if status in (401, 403, 407) or "API_KEY_" in reasons or "FAILED_PRECONDITION" in reasons:
        return "key_refused"  # also: a place, a project or a billing that may not use the service
    if status == 429:
        return "quota_used_up" if _used_up(reasons, details) else "rate_limited"
    if status == 404:
        return "no_such_model"
    if status == 413 or (status == 400 and _LARGE.search(reasons)):
        return "too_large"
    if status in (408, 504):
        return "timeout"
    if status >= 500 or status in (409, 425, 499):
        return "server_error"
    if not ours:
        return "not_json"
    return (
        "bad_settings"
        if status == 400 and any(_SETTINGS.match(field) for field in _fields(details, "fieldViolations", "field"))
        else "bad_request"
    )


def _fields(details: list[dict[str, Any]], group: str, name: str) -> list[str]:
    groups = [one[group] for one in details if isinstance(one.get(group), list)]
    return [said(one.get(name)) for found in groups for one in found if isinstance(one, dict)]


def _used_up(reasons: str, details: list[dict[str, Any]]) -> bool:
    """Whether a 429 is of the day, or of a model that the key has no quota of at all."""
    kinds = _fields(details, "violations", "quotaId")
    none = "0" in _fields(details, "violations", "quotaValue") or re.search(r"\blimit: 0\b", reasons) is not None
    return none or any("PerDay" in kind for kind in kinds)


def _wait(details: list[dict[str, Any]], headers: Mapping[str, str]) -> float | None:
    """Seconds of RetryInfo, else of Retry-After (a number, or a date beside the server's own), at most LONGEST_WAIT."""
    for one in details:
        if said(one.get("@type")).endswith("google.rpc.RetryInfo") and (found := _DELAY.fullmatch(said(one.get("retryDelay")))):
            return min(float(found.group(1)), LONGEST_WAIT)
    return retry_after(headers)
