"""What is known of an image, a prompt version and an engine's options -> the request, fully rendered, and its key.

What strangers wrote (tags, alt text) goes in as delimited JSON, never as words of ours: a mark that would end the data is taken out of it. The key
is the sha256 of everything that is sent, with the image's own sha256 for its pixels: what is journaled under a key was asked for exactly so.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

REQUEST_VERSION = 1
NOTE = 1_000  # characters of alt text that are sent
TAGS, TAG = 60, 80  # tags that are sent, characters of one
WHY = 300  # characters of what was wrong with an answer
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]+")
_MARK = re.compile(r"<\s*/?\s*notes\s*>", re.IGNORECASE)


class Prompt(NamedTuple):
    """One version of the words (conf/prompts/NAME.yaml)."""

    name: str
    system: str
    content: str
    style: str
    rest: str
    notes: str
    repair: str


class Request(NamedTuple):
    """system, prompt: what is sent as text; schema: of the answer; options: of the engine (model, media_resolution, max_output_tokens, ...);
    key: 64 hex digits; image_id: the sha256 of the original file; noted: whether tags or alt text stand in it.
    """

    key: str
    image_id: bytes
    system: str
    prompt: str
    schema: Mapping[str, Any]
    options: Mapping[str, Any]
    noted: bool


def render(
    image_id: bytes, prompt: Prompt, schema: Mapping[str, Any], options: Mapping[str, Any], tags: Sequence[str] = (), alt_text: str = ""
) -> Request:
    """-> the request. tags and alt text are cut to TAGS and NOTE; without any there are no notes in it."""
    notes = _notes(tags, alt_text)
    words = [prompt.content, prompt.style, prompt.rest]
    if notes:
        words.append(prompt.notes.replace("{notes}", json.dumps(notes, ensure_ascii=False)))
    text = "\n".join(word.strip() for word in words)
    whole = {
        "version": REQUEST_VERSION,
        "image": image_id.hex(),
        "system": prompt.system,
        "prompt": text,
        "schema": schema,
        "options": options,
    }
    key = hashlib.sha256(json.dumps(whole, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
    return Request(key, image_id, prompt.system.strip(), text, schema, options, bool(notes))


def repaired(request: Request, prompt: Prompt, why: str) -> Request:
    """A request whose answer was refused -> the one more that says why. Its key is another."""
    text = f"{request.prompt}\n\n{prompt.repair.replace('{why}', _CONTROL.sub(' ', why)[:WHY]).strip()}"
    key = hashlib.sha256(f"{request.key}|repair|{text}".encode()).hexdigest()
    return request._replace(key=key, prompt=text)


def _notes(tags: Sequence[str], alt_text: str) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if cleaned := [word for tag in tags[:TAGS] if (word := _clean(tag)[:TAG])]:
        told["tags"] = cleaned
    if text := _clean(alt_text)[:NOTE]:
        told["alt_text"] = text
    return told


def _clean(text: str) -> str:
    """Without control, direction and zero-width characters, halves of characters, and the marks of the notes."""
    text = _CONTROL.sub(" ", text)
    while _MARK.search(text):  # <no<notes>tes> leaves a mark when one is taken out
        text = _MARK.sub(" ", text)
    return " ".join(text.split())
