"""The failures of the fake Gemini, by name: what each puts on the wire. Bodies are the API's own as far as they are known in public.

A mode is one of four kinds: an HTTP error of the API (`Fault`), any other HTTP response (`Page`), bytes on the bare connection (`Wire`), and a
clean answer that was changed (`Edit`). `billed`: the service worked and would bill, whatever the client sees of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

RPC = "type.googleapis.com/google.rpc."
ELSEWHERE = "{elsewhere}"  # in a header: the address of the second host
KEY = "{key}"  # in a message: the key that was sent
JSON_TYPE = "application/json; charset=UTF-8"


class Fault(NamedTuple):
    status: int
    word: str
    message: str
    details: tuple[dict[str, Any], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    billed: bool = False

    def body(self, key: str = "") -> dict[str, Any]:
        error: dict[str, Any] = {"code": self.status, "message": self.message.replace(KEY, key), "status": self.word}
        if self.details:
            error["details"] = json.loads(json.dumps(self.details).replace(KEY, key))
        return {"error": error}


class Page(NamedTuple):
    """body: None is the clean answer."""

    status: int
    body: bytes | None
    kind: str | None = JSON_TYPE
    headers: tuple[tuple[str, str], ...] = ()
    billed: bool = False


class Wire(NamedTuple):
    """Steps: bytes are written, numbers are waited for (seconds); `{answer}` and `{length}` are the clean answer. end: close | reset | hang."""

    steps: tuple[bytes | float, ...]
    end: str = "close"
    billed: bool = False
    read: bool = True  # the request's body, before anything else
    repeat: int = 1


class Edit(NamedTuple):
    """change: the whole response's object -> another JSON value, or the bytes of the body."""

    change: Callable[[dict[str, Any]], Any]
    billed: bool = True


Mode = Fault | Page | Wire | Edit


def _retry(delay: str) -> dict[str, Any]:
    return {"@type": RPC + "RetryInfo", "retryDelay": delay}


def _quota(kind: str, value: str = "15") -> dict[str, Any]:
    return {
        "@type": RPC + "QuotaFailure",
        "violations": [
            {
                "quotaMetric": "generativelanguage.googleapis.com/generate_content_free_tier_requests",
                "quotaId": f"GenerateRequests{kind}PerProjectPerModel-FreeTier",
                "quotaDimensions": {"location": "global", "model": "gemini-3.8-flash"},
                "quotaValue": value,
            }
        ],
    }


def _reason(reason: str, **metadata: str) -> dict[str, Any]:
    return {"@type": RPC + "ErrorInfo", "reason": reason, "domain": "googleapis.com", "metadata": metadata}


EXHAUSTED = "You exceeded your current quota, please check your plan and billing details."
HTML = b"<!DOCTYPE html><html><title>Gateway</title><body><h1>The page of a proxy</h1><p>" + b"sorry " * 200 + b"</body></html>"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=UTF-8\r\n"

FAULTS: dict[str, Mode] = {
    "429_retry_info": Fault(429, "RESOURCE_EXHAUSTED", EXHAUSTED, (_quota("PerMinute"), _retry("3s"))),
    "429_retry_info_fraction": Fault(429, "RESOURCE_EXHAUSTED", EXHAUSTED, (_retry("34.074824224s"),)),
    "429_retry_info_nonsense": Fault(429, "RESOURCE_EXHAUSTED", EXHAUSTED, (_retry("soon"), {"@type": 3}, _retry("-5s"))),
    "429_retry_after": Fault(429, "RESOURCE_EXHAUSTED", "Resource has been exhausted (e.g. check quota).", (), (("Retry-After", "7"),)),
    "429_retry_after_date": Fault(
        429,
        "RESOURCE_EXHAUSTED",
        EXHAUSTED,
        (),
        (("Date", "Thu, 01 Oct 2026 00:00:00 GMT"), ("Retry-After", "Thu, 01 Oct 2026 00:00:09 GMT")),
    ),
    "429_bare": Fault(429, "RESOURCE_EXHAUSTED", "Resource has been exhausted (e.g. check quota)."),
    "429_html": Page(429, HTML, "text/html"),
    "429_per_day": Fault(429, "RESOURCE_EXHAUSTED", EXHAUSTED, (_quota("PerDay", "1500"), _retry("41s"))),
    "429_limit_zero": Fault(
        429, "RESOURCE_EXHAUSTED", EXHAUSTED + " Quota exceeded, limit: 0, model: gemini-3-pro", (_quota("PerMinute", "0"),)
    ),
    "429_spend_cap": Fault(
        429,
        "RESOURCE_EXHAUSTED",
        "Your project has exceeded its monthly spending cap. Please go to AI Studio at https://ai.studio/spend to manage your project spend cap.",
        (_retry("2s"),),
    ),
    "429_prepaid": Fault(
        429, "RESOURCE_EXHAUSTED", "Your prepayment credits are depleted. Please go to AI Studio at https://ai.studio/projects."
    ),
    "400_image": Fault(
        400, "INVALID_ARGUMENT", "Unable to process input image. Please retry or report in https://developers.generativeai.google/guide"
    ),
    "400_settings": Fault(
        400,
        "INVALID_ARGUMENT",
        "Invalid JSON payload received. Unknown name \"responseJsonSchema\" at 'generation_config': Cannot find field.",
        ({"@type": RPC + "BadRequest", "fieldViolations": [{"field": "generation_config", "description": "Cannot find field."}]},),
    ),
    "400_key": Fault(
        400,
        "INVALID_ARGUMENT",
        "API key not valid. Please pass a valid API key.",
        (_reason("API_KEY_INVALID", service="generativelanguage.googleapis.com"),),
    ),
    "400_location": Fault(400, "FAILED_PRECONDITION", "User location is not supported for the API use."),
    "400_payload": Fault(400, "INVALID_ARGUMENT", "Request payload size exceeds the limit: 20971520 bytes."),
    "400_tokens": Fault(400, "INVALID_ARGUMENT", "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576)."),
    "400_html": Page(400, HTML, "text/html"),
    "401": Fault(401, "UNAUTHENTICATED", "Request had invalid authentication credentials."),
    "402": Fault(402, "RESOURCE_EXHAUSTED", "Billing is required."),
    "403": Fault(
        403,
        "PERMISSION_DENIED",
        "Generative Language API has not been used in project 1 before or it is disabled.",
        (_reason("SERVICE_DISABLED"),),
    ),
    "403_leaked": Fault(403, "PERMISSION_DENIED", "Your API key was reported as leaked. Please use another API key."),
    "403_suspended_says_the_key": Fault(
        403,
        "PERMISSION_DENIED",
        f"Permission denied: Consumer 'api_key:{KEY}' has been suspended." + " x" * 90 + f" {KEY}",
        (_reason("CONSUMER_SUSPENDED", containerInfo=f"api_key:{KEY}"),),
    ),
    "403_usage_policy": Fault(
        403, "PERMISSION_DENIED", "PUP_LIMITED_DISABLED: the account is limited.", (_reason("PUP_LIMITED_DISABLED"),)
    ),
    "404_model": Fault(404, "NOT_FOUND", "models/gemini-9 is not found for API version v1, or is not supported for generateContent."),
    "404_html": Page(404, HTML, "text/html"),
    "407_proxy": Page(407, HTML, "text/html"),
    "408": Fault(408, "DEADLINE_EXCEEDED", "Request timeout."),
    "409": Fault(409, "ABORTED", "The operation was aborted."),
    "413_html": Page(413, HTML, "text/html"),
    "422_prohibited": Fault(422, "INVALID_ARGUMENT", "The prompt could not be submitted: PROHIBITED_CONTENT, a secret word."),
    "499": Fault(499, "CANCELLED", "The operation was cancelled."),
    "500": Fault(500, "INTERNAL", "An internal error has occurred. Please retry or report in https://developers.generativeai.google/guide"),
    "500_empty": Page(500, b""),
    "500_list": Page(500, json.dumps([{"error": {"code": 500, "message": "Internal", "status": "INTERNAL"}}]).encode()),
    "500_odd_json": Page(500, b'{"error": "oops", "details": 3}'),
    "500_deep": Page(500, b"[" * 100_000),
    "500_bad_utf8": Page(500, b'{"error": {"code": 500, "message": "\xff\xfe"}}'),
    "501": Fault(501, "UNIMPLEMENTED", "The operation is not implemented."),
    "502_html": Page(502, HTML, "text/html"),
    "503": Fault(503, "UNAVAILABLE", "This model is currently experiencing high demand. Please try again later."),
    "503_cut_json": Page(503, b'{"error": {"code": 503, "mess'),
    "503_html_called_json": Page(503, HTML),
    "504": Fault(504, "DEADLINE_EXCEEDED", "Deadline expired before operation could complete."),
    "301_elsewhere": Page(301, b"", "text/html", (("Location", ELSEWHERE),)),
    "302_elsewhere": Page(302, HTML, "text/html", (("Location", ELSEWHERE),)),
    "302_nowhere": Page(302, b"", "text/html", (("Location", "http://[:::"),)),
    "303_elsewhere": Page(303, b"{}", JSON_TYPE, (("Location", ELSEWHERE),)),
    "307_elsewhere": Page(307, b"", "text/html", (("Location", ELSEWHERE),)),
    "308_elsewhere": Page(308, b"", "text/html", (("Location", ELSEWHERE),)),
    "204": Page(204, b"", None),
    "206_answer": Page(206, None, billed=True),
}

WIRES: dict[str, Mode] = {
    "drop_unread": Wire((), "reset", read=False),
    "drop": Wire(()),
    "drop_reset": Wire((), "reset"),
    "drop_after_work": Wire((0.02,), "reset", billed=True),
    "drop_in_headers": Wire((b"HTTP/1.1 200 OK\r\nContent-Ty",)),
    "cut_body": Wire((OK + b"Content-Length: {length}\r\n\r\n", b"{half}"), billed=True),
    "cut_body_reset": Wire((OK + b"Content-Length: {length}\r\n\r\n", b"{half}", 0.02), "reset", billed=True),
    "cut_chunks": Wire((OK + b"Transfer-Encoding: chunked\r\n\r\n", b'5\r\n{"can\r\n'), billed=True),
    "cut_body_prohibited": Wire(
        (
            OK + b"Content-Length: 999\r\n\r\n",
            b'{"candidates": [{"finishReason": "PROHIBITED_CONTENT", "content": {"parts": [{"text": "a secret',
        ),
        billed=True,
    ),
    "bad_chunks": Wire((OK + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n",)),
    "not_http": Wire((b"SSH-2.0-OpenSSH_9.2\r\n\r\n",)),
    "huge_header": Wire((OK + b"X-Long: " + b"x" * 100_000 + b"\r\nContent-Length: 0\r\n\r\n",)),
    "bad_gzip": Wire((OK + b"Content-Encoding: gzip\r\nContent-Length: 9\r\n\r\nnot gzip!",), billed=True),
    "hang": Wire((), "hang"),
    "hang_in_body": Wire((OK + b"Content-Length: {length}\r\n\r\n", b"{half}"), "hang", billed=True),
    "slow_drip": Wire((OK + b"Content-Length: 1000\r\n\r\n", b" ", 0.05), "hang", billed=True, repeat=60),
    "endless_body": Wire(
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"100000\r\n" + b" " * 0x100000 + b"\r\n"), "hang", billed=True, repeat=64
    ),
}
