"""What an OpenAI-compatible server said (the JSON of a chat completion, or of an error) -> a Reply. Pure.

Servers of this class (vLLM, SGLang, gateways in front of others) agree on what is in an answer and on little else: errors come as
{"error": {...}}, as {"object": "error", ...}, as FastAPI's {"detail": ...}, or as a proxy's page. Bodies are read with care: every member may be
missing or of another type. Details may still hold what the server said of the key: `clean` is the way out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from udfs.caption_answer import LARGEST
from udfs.caption_call import Reply, Usage
from udfs.caption_reply import HALF, retry_after

MOST_TOKENS = 10**9  # of one answer: more is no number to believe
PROHIBITED = "PROHIBITED_CONTENT"  # a gateway in front of Gemini passes its word on

FINISHES = {
    **{"stop": "ok", "length": "cut", "content_filter": "refused", "tool_calls": "malformed", "function_call": "malformed"},
    **{"abort": "server_error", "error": "server_error"},  # vLLM: it was taken off the queue, or broke
}
_LARGE = re.compile(
    r"maximum context length|context length exceeded|longer than the maximum|too (?:large|long)|exceeds? the (?:max|limit)", re.I
)
_SETTINGS = re.compile(
    r"response_format|json_schema|guided|structured|grammar|extra[ _](?:forbidden|inputs)|unrecognized|unsupported|max_(?:completion_)?tokens|"
    r"temperature|chat template|not a multimodal|at most 0 image|does not support image",
    re.IGNORECASE,
)
_IMAGE = re.compile(r"identify image|(?:load|decode|open|process|fetch).{0,20} image|image (?:data|file|is)|truncated|base64", re.I)
_FILTER = re.compile(r"content[_ ](?:policy|filter)|content management policy|safety system", re.I)
_MONEY = re.compile(
    r"insufficient[ _](?:quota|credit|fund|balance)|credits? (?:are |is )?(?:depleted|exhausted)|spend(?:ing)? (?:cap|limit)", re.I
)


def of_body(body: str, most: Usage) -> Reply:
    """(body of a 200, the most that it can have cost) -> the reply."""
    if not body.strip():
        return Reply("no_text", "a 200 without a body", usage=most)
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        at = error.pos if isinstance(error, json.JSONDecodeError) else 0
        if f'"{PROHIBITED}"' in body or f'"{PROHIBITED.lower()}"' in body:
            return Reply("prohibited", usage=most)
        begun = body.lstrip().startswith("{") and at > 0
        return Reply("cut_body" if begun else "not_json", f"{len(body)} characters, no JSON from {at} on", usage=most)
    if isinstance(answer, dict) and "choices" not in answer and ("error" in answer or answer.get("object") == "error"):
        return of_error(200, answer)._replace(usage=most)
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list):
        return Reply("not_an_answer", f"JSON of another shape: {type(answer).__name__}", usage=most)
    usage = _usage(answer.get("usage"), most)
    if not choices:
        return Reply("no_text", "no choice", usage=usage)
    finishes = [str(one.get("finish_reason")) for one in choices if isinstance(one, dict)]
    if any(PROHIBITED in finish.upper() for finish in finishes):
        return Reply("prohibited", usage=usage)
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    if not isinstance(message, dict):
        return Reply("not_an_answer", "a choice of another shape", usage=usage)
    return _of_message(message, finishes[0], usage)


def _of_message(message: Mapping[str, Any], finish: str, usage: Usage) -> Reply:
    if message.get("refusal"):
        return Reply("refused", "the model's own refusal", usage=usage)
    text = _text(message.get("content"))
    if text is None:
        return Reply("not_an_answer", "content of another shape", usage=usage)
    code = FINISHES.get(finish, "unknown_finish")
    if code not in ("ok", "cut"):
        return Reply(code, finish, usage=usage)
    if code == "ok" and not text.strip():
        return Reply("no_text", "a message without text", usage=usage)
    # half characters as JSON writes them: the text can be written as UTF-8 anywhere, and says the same
    text = HALF.sub(lambda half: f"\\u{ord(half.group()):04x}", text)
    if len(text) > LARGEST:  # one character too many is enough for the check that refuses it
        return Reply(code, f"{len(text)} characters, {LARGEST + 1} of them kept", text[: LARGEST + 1], usage)
    return Reply(code, "" if code == "ok" else finish, text, usage)


def _text(content: Any) -> str | None:
    """A message's content, a text or a list of parts -> its text; None for another shape."""
    if isinstance(content, list):
        texts = [part.get("text", "") for part in content if isinstance(part, dict)]
        return "".join(map(str, texts)) if len(texts) == len(content) and all(isinstance(text, str) for text in texts) else None
    return "" if content is None else content if isinstance(content, str) else None


def _usage(told: Any, most: Usage) -> Usage:
    """-> what was computed. What is missing or no number is taken for the most that it can be."""
    if not isinstance(told, dict):
        return most
    prompt, output = _number(told.get("prompt_tokens")), _number(told.get("completion_tokens"))
    if prompt is None or output is None:
        return most
    asked, made = told.get("prompt_tokens_details"), told.get("completion_tokens_details")
    image = min(prompt, _number(asked.get("image_tokens")) or 0) if isinstance(asked, dict) else 0
    thoughts = min(output, _number(made.get("reasoning_tokens")) or 0) if isinstance(made, dict) else 0
    return Usage(prompt - image, image, output - thoughts, thoughts)


def _number(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None


def of_error(status: int, body: Any, headers: Mapping[str, str] | None = None) -> Reply:
    """(HTTP status, or 200 when the error says it, decoded body or its text, headers) -> the reply. Nothing is billed."""
    error: dict[str, Any] = {}
    if isinstance(body, dict):
        inner = body.get("error", body.get("detail", body))
        error = inner if isinstance(inner, dict) else {"message": inner}
    told = body if isinstance(body, str) else json.dumps(error)
    if PROHIBITED in told.upper():
        return Reply("prohibited")
    if status == 200:
        status = _number(error.get("code")) or 500
    headers = headers or {}
    message = f"HTTP {status}: {error.get('message') or error.get('type') or 'a body that is no error of this API'}"
    if 300 <= status < 400:
        message = f"HTTP {status} to the host {urlsplit(str(headers.get('Location', ''))).hostname}"
    return Reply(_code(status, json.dumps(error) if error else ""), message, retry_after=retry_after(headers))


def _code(status: int, said: str) -> str:
    """said: the error's JSON, empty for what is none."""
    known = {
        401: "key_refused",
        402: "spend_cap",
        403: "key_refused",
        404: "no_such_model",
        407: "key_refused",
        408: "timeout",
        413: "too_large",
    }
    if 300 <= status < 400:
        return "redirected"
    if status == 429:
        return "spend_cap" if _MONEY.search(said) else "rate_limited"
    if status in (500, 400, 422):  # vLLM has answered what it could not take with each of them
        for pattern, code in ((_FILTER, "blocked"), (_LARGE, "too_large"), (_IMAGE, "bad_request"), (_SETTINGS, "bad_settings")):
            if pattern.search(said):
                return code
        return "server_error" if status == 500 else "bad_request" if said else "server_error"
    return known.get(status) or (
        "timeout" if status == 504 else "server_error" if status >= 500 or status in (409, 425, 499) else "bad_request"
    )
