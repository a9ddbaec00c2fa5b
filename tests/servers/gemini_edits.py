"""The odd answers of the fake Gemini, by name: a clean response, changed. All of them come with status 200."""

from __future__ import annotations

import json
from typing import Any

from tests.servers.gemini_modes import FAULTS, HTML, WIRES, Edit, Fault, Mode, Page

FINISHES = (  # noqa: SIM905
    "FINISH_REASON_UNSPECIFIED MAX_TOKENS SAFETY RECITATION LANGUAGE OTHER BLOCKLIST PROHIBITED_CONTENT SPII MALFORMED_FUNCTION_CALL IMAGE_SAFETY "
    "IMAGE_PROHIBITED_CONTENT IMAGE_OTHER NO_IMAGE IMAGE_RECITATION UNEXPECTED_TOOL_CALL TOO_MANY_TOOL_CALLS MISSING_THOUGHT_SIGNATURE "
    "MALFORMED_RESPONSE ESCALATION PUP_LIMITED_DISABLED CONTINUATION MODEL_ARMOR A_NEW_ONE A_NEW_PROHIBITED_CONTENT"
).split()
BLOCKS = "BLOCKED_REASON_UNSPECIFIED SAFETY OTHER BLOCKLIST PROHIBITED_CONTENT IMAGE_SAFETY MODEL_ARMOR JAILBREAK A_NEW_ONE PUP_LIMITED_DISABLED".split()  # noqa: SIM905
MEGABYTE = 1_000_000

Json = dict[str, Any]


def _first(body: Json, **changed: Any) -> Json:
    """The first candidate with other members; None takes one out."""
    candidate = {**body["candidates"][0], **changed}
    return {**body, "candidates": [{name: value for name, value in candidate.items() if value is not None}]}


def _parts(body: Json, *parts: Any) -> Json:
    return _first(body, content={"parts": list(parts), "role": "model"})


def _text(body: Json) -> str:
    text: str = body["candidates"][0]["content"]["parts"][0]["text"]
    return text


def _said(body: Json, **parts: Any) -> Json:
    """The caption with other parts."""
    return _parts(body, {"text": json.dumps({**json.loads(_text(body)), **parts})})


def _used(body: Json, **changed: Any) -> Json:
    usage = {**body["usageMetadata"], **changed}
    return {**body, "usageMetadata": {name: value for name, value in usage.items() if value is not None}}


def _without(body: Json, *names: str) -> Json:
    return {name: value for name, value in body.items() if name not in names}


def _finished(reason: str) -> Edit:
    """Reasons that withhold come with what was said so far, as they do."""
    if reason in ("MAX_TOKENS", "CONTINUATION"):
        return Edit(lambda body: _first(_parts(body, {"text": _text(body)[:400]}), finishReason=reason, continuationToken="bmV4dA=="))
    return Edit(lambda body: _first(_parts(body, {"text": "a secret beginning"}), finishReason=reason, finishMessage="a secret reason"))


def _blocked(reason: str) -> Edit:
    return Edit(
        lambda body: {
            **_used(_without(body, "candidates"), candidatesTokenCount=None, totalTokenCount=body["usageMetadata"]["promptTokenCount"]),
            "promptFeedback": {"blockReason": reason, "blockReasonMessage": "a secret reason"},
        }
    )


def _raw(change: Any) -> Edit:
    """The body's own text, changed."""
    return Edit(lambda body: change(json.dumps(body)).encode())


EDITS: dict[str, Mode] = {
    **{f"finish_{reason}": _finished(reason) for reason in FINISHES},
    **{f"block_{reason}": _blocked(reason) for reason in BLOCKS},
    # the body is no answer
    "empty_body": Page(200, b""),
    "blank_body": Page(200, b" \n "),
    "html": Page(200, HTML, "text/html"),
    "html_called_json": Page(200, HTML),
    "cut_json": _raw(lambda text: text[: len(text) // 2]),
    "cut_json_prohibited": Page(
        200, b'{"candidates": [{"finishReason" : "PROHIBITED_CONTENT", "content": {"parts": [{"text": "a secr', billed=True
    ),
    "event_stream": _raw(lambda text: f"data: {text}\n\n"),
    "null": Page(200, b"null"),
    "number": Page(200, b"1" * 10_000),
    "list": Page(200, b"[]"),
    "other_object": Page(200, b'{"choices": [{"message": {"content": "an answer of another service"}}]}'),
    "deep": Page(200, b'{"candidates": ' + b"[" * 100_000),
    "bad_utf8": Page(200, b'{"candidates": [{"content": {"parts": [{"text": "\xff\xfe"}]}}]}'),
    "utf16": Edit(lambda body: json.dumps(body).encode("utf-16")),
    "error_in_200": Page(200, json.dumps(Fault(503, "UNAVAILABLE", "overloaded").body()).encode()),
    "error_in_200_key": Page(200, json.dumps(Fault(403, "PERMISSION_DENIED", "not allowed").body()).encode()),
    # an answer in another dress
    "wrong_content_type": Page(200, None, "text/plain", billed=True),
    "octet_stream": Page(200, None, "application/octet-stream", billed=True),
    "odd_charset": Page(200, None, "application/json; charset=klingon", billed=True),
    "byte_order_mark": _raw(lambda text: "\ufeff" + text),
    # candidates
    "no_candidates": Edit(lambda body: _without(body, "candidates")),
    "candidates_empty": Edit(lambda body: {**body, "candidates": []}),
    "candidates_null": Edit(lambda body: {**body, "candidates": None}),
    "candidates_text": Edit(lambda body: {**body, "candidates": "none"}),
    "candidate_number": Edit(lambda body: {**body, "candidates": [7]}),
    "two_candidates": Edit(
        lambda body: {**body, "candidates": [body["candidates"][0], _parts(body, {"text": "another"})["candidates"][0]]}
    ),
    "second_candidate_prohibited": Edit(
        lambda body: {**body, "candidates": [body["candidates"][0], {"finishReason": "PROHIBITED_CONTENT"}]}
    ),
    "no_content": Edit(lambda body: _first(body, content=None)),
    "content_text": Edit(lambda body: _first(body, content="words")),
    "no_parts": Edit(lambda body: _first(body, content={"role": "model"})),
    "parts_empty": Edit(lambda body: _parts(body)),
    "parts_object": Edit(lambda body: _first(body, content={"parts": {"text": "words"}})),
    "text_empty": Edit(lambda body: _parts(body, {"text": ""})),
    "text_blank": Edit(lambda body: _parts(body, {"text": " \n"})),
    "text_number": Edit(lambda body: _parts(body, {"text": 7})),
    "thoughts_only": Edit(
        lambda body: _used(
            _parts(body, {"text": "thinking", "thought": True}),
            candidatesTokenCount=None,
            thoughtsTokenCount=body["usageMetadata"]["candidatesTokenCount"],
        )
    ),
    "thoughts_took_all": Edit(
        lambda body: _used(_first(body, content={}, finishReason="MAX_TOKENS"), candidatesTokenCount=None, thoughtsTokenCount=900)
    ),
    "thought_and_answer": Edit(lambda body: _parts(body, {"text": "thinking", "thought": True}, {"text": _text(body)})),
    "two_parts": Edit(lambda body: _parts(body, {"text": _text(body)[:50]}, {"text": _text(body)[50:]})),
    "function_call": Edit(lambda body: _parts(body, {"functionCall": {"name": "f", "args": {}}})),
    "no_finish": Edit(lambda body: _first(body, finishReason=None)),
    "finish_number": Edit(lambda body: _first(body, finishReason=3)),
    # usage
    "no_usage": Edit(lambda body: _without(body, "usageMetadata")),
    "usage_text": Edit(lambda body: {**body, "usageMetadata": "much"}),
    "usage_negative": Edit(lambda body: _used(body, promptTokenCount=-5)),
    "usage_infinite": _raw(lambda text: text.replace('"candidatesTokenCount": ', '"candidatesTokenCount": Infinity, "x": ')),
    "usage_strings": Edit(
        lambda body: _used(body, **{name: str(value) for name, value in body["usageMetadata"].items() if isinstance(value, int)})
    ),
    "usage_no_details": Edit(lambda body: _used(body, promptTokensDetails=None)),
    "usage_no_prompt": Edit(lambda body: _used(body, promptTokenCount=None)),
    # the caption itself
    "caption_wrong_schema": Edit(lambda body: _parts(body, {"text": '{"caption": "words", "score": 3}'})),
    "caption_prose": Edit(lambda body: _parts(body, {"text": "Here is a caption."})),
    "caption_fenced": Edit(lambda body: _parts(body, {"text": f"```json\n{_text(body)}\n```"})),
    "caption_cut": Edit(lambda body: _parts(body, {"text": _text(body)[:-40]})),
    "caption_nul": Edit(lambda body: _said(body, short="a small\0barn stands at the edge of the pond")),
    "caption_raw_nul": Edit(lambda body: _parts(body, {"text": _text(body).replace("barn", "b\0rn") + "\0"})),
    "caption_half_character": Edit(lambda body: _said(body, short="a small barn \ud83d stands at the edge of the pond")),
    "caption_raw_half_character": Edit(lambda body: _parts(body, {"text": '{"short": "a barn \ud83d at the edge"}'})),
    "caption_megabyte": Edit(lambda body: _said(body, long="a barn " * (MEGABYTE // 7))),
    "caption_megabyte_of_escapes": Edit(lambda body: _said(body, long="\u0001" * (MEGABYTE // 6))),
    "caption_says_the_key": Edit(lambda body: _said(body, short="a barn with the sign {key} at the edge of the pond")),
}

MODES: dict[str, Mode] = {**FAULTS, **WIRES, **EDITS}
assert len(MODES) == len(FAULTS) + len(WIRES) + len(EDITS)
