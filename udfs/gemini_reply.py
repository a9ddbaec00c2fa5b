"""What Gemini said (the JSON of an answer) -> a Reply. Pure: the online path and Batch mode have the same words for the same answers.

Bodies are read with care: every member may be missing or of another type. Of PROHIBITED_CONTENT nothing is kept, wherever it stands, also in a body
that was cut off. The details here are not yet clipped and may hold what the server said of the key: `clean` is the way out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from udfs.caption_answer import LARGEST
from udfs.caption_call import Reply, Usage
from udfs.caption_reply import HALF
from udfs.gemini_errors import of_error, said

MOST_TOKENS = 10**9  # of one answer: more is no number to believe

# a finish reason or a block reason -> the reply's code; what is in neither is new
FINISHES = {
    **dict.fromkeys(("STOP",), "ok"),
    **dict.fromkeys(("MAX_TOKENS", "CONTINUATION"), "cut"),
    **dict.fromkeys(
        ("SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "SPII", "IMAGE_SAFETY", "IMAGE_RECITATION", "ESCALATION", "MODEL_ARMOR"),
        "refused",
    ),
    **dict.fromkeys(
        (
            "MALFORMED_FUNCTION_CALL",
            "UNEXPECTED_TOOL_CALL",
            "TOO_MANY_TOOL_CALLS",
            "MISSING_THOUGHT_SIGNATURE",
            "MALFORMED_RESPONSE",
            "IMAGE_OTHER",
            "NO_IMAGE",
        ),
        "malformed",
    ),
}
BLOCKS = frozenset(("SAFETY", "OTHER", "BLOCKLIST", "IMAGE_SAFETY", "MODEL_ARMOR", "JAILBREAK"))

_OF_ANSWER = {"candidates", "promptFeedback", "usageMetadata", "modelVersion", "responseId"}
_PROHIBITED = re.compile(r'"(?:finishReason|blockReason)"\s*:\s*"[A-Z_]*PROHIBITED')


def prohibited(body: str) -> bool:
    """Whether a body, whole or cut off, says so. (Inside an answer's text these quotes are escaped.)"""
    return _PROHIBITED.search(body) is not None


def of_body(body: str, most: Usage) -> Reply:
    """(body of a 200, the most that it can have cost) -> the reply."""
    text = body.lstrip("\ufeff \r\n\t")
    if not text:
        return Reply("no_text", "a 200 without a body", usage=most)
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError) as error:
        if prohibited(text):
            return Reply("prohibited", usage=most)
        at = error.pos if isinstance(error, json.JSONDecodeError) else 0
        begun = text[0] == "{" and at > 0
        return Reply("cut_body" if begun else "not_json", f"{len(body)} characters, no JSON from {at} on", usage=most)
    return of_answer(answer, most)


def of_answer(answer: Any, most: Usage) -> Reply:
    """(GenerateContentResponse, decoded, the most that it can have cost) -> the reply."""
    if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
        return of_error(200, answer)
    if not isinstance(answer, dict) or not _OF_ANSWER & answer.keys():
        return Reply("not_an_answer", f"JSON of another shape: {type(answer).__name__}", usage=most)
    feedback, candidates = answer.get("promptFeedback"), answer.get("candidates") or []
    block = said(feedback["blockReason"]).upper() if isinstance(feedback, dict) and feedback.get("blockReason") else ""
    dicts = [one for one in candidates if isinstance(one, dict)] if isinstance(candidates, list) else []
    finishes = [said(one.get("finishReason")).upper() for one in dicts]
    text = _text(dicts[0]) if dicts else ""
    usage = _usage(answer.get("usageMetadata"), most, bool(text))
    if any("PROHIBITED" in reason for reason in (block, *finishes)):
        return Reply("prohibited", usage=usage)
    if any("PUP_LIMITED" in reason for reason in (block, *finishes)):
        return Reply("usage_policy", "PUP_LIMITED_DISABLED: limited or disabled for violations of the Prohibited Use Policy", usage=usage)
    if block:
        return Reply("blocked" if block in BLOCKS else "blocked_unknown", block, usage=usage)
    if candidates and (not dicts or dicts[0] is not candidates[0]):
        return Reply("not_an_answer", "candidates of another shape", usage=usage)
    if not candidates:
        return Reply("no_text", "no candidate", usage=usage)
    return _of_candidate(text, finishes[0], usage)


def _of_candidate(text: str | None, finish: str, usage: Usage) -> Reply:
    if text is None:
        return Reply("not_an_answer", "content of another shape", usage=usage)
    code = FINISHES.get(finish, "unknown_finish")
    if code not in ("ok", "cut"):
        return Reply(code, finish or "no finish reason", usage=usage)
    if code == "ok" and not text.strip():
        return Reply("no_text", "a candidate without text", usage=usage)
    # half characters as JSON writes them: the text can be written as UTF-8 anywhere, and says the same
    text = HALF.sub(lambda half: f"\\u{ord(half.group()):04x}", text)
    if len(text) > LARGEST:  # one character too many is enough for the check that refuses it
        return Reply(code, f"{len(text)} characters, {LARGEST + 1} of them kept", text[: LARGEST + 1], usage)
    return Reply(code, "" if code == "ok" else finish, text, usage)


def _text(candidate: Mapping[str, Any]) -> str | None:
    """The text of a candidate's parts, thoughts left out; None: its content has another shape."""
    content = candidate.get("content") or {}
    parts = content.get("parts") or [] if isinstance(content, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return None
    texts = [part["text"] for part in parts if part.get("text") is not None and part.get("thought") is not True]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def _usage(told: Any, most: Usage, spoke: bool) -> Usage:
    """usageMetadata -> what is billed. What is missing or no number is taken for the most that it can be. spoke: there was a text."""
    if not isinstance(told, dict):
        return most
    names = ("promptTokenCount", "candidatesTokenCount", "thoughtsTokenCount", "toolUsePromptTokenCount", "totalTokenCount")
    prompt, output, thoughts, tools, total = (_number(told.get(name)) for name in names)
    odd = any(told.get(name) is not None and _number(told[name]) is None for name in names)
    if odd or prompt is None or (output is None and total is None and spoke):
        return most
    output, thoughts, prompt = output or 0, thoughts or 0, prompt + (tools or 0)
    output = max(output, (total or 0) - prompt - thoughts)
    details = told.get("promptTokensDetails")
    images = [one for one in details if isinstance(one, dict) and one.get("modality") == "IMAGE"] if isinstance(details, list) else []
    image = min(prompt, sum(_number(one.get("tokenCount")) or 0 for one in images))
    return Usage(prompt - image, image, output, thoughts)


def _number(value: Any) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12:  # as protobuf writes 64-bit integers
        value = int(value)
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None
