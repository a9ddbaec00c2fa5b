"""A captioner's answer (one JSON text) -> its parts, each checked; and why a part, or the whole, is refused.

The schema: `short`, `medium`, `long`, `style` (texts), `tags` and `ocr` (lists of texts, ocr a text a region), `language` (ISO 639-1). Checked
besides: lengths in tokens, banned words, markup and addresses, control characters and halves of characters, sentences of the prompt given back,
words that contradict known tags. Of an answer that was cut off the parts that are whole are kept;
of one that names another language than asked, by its code, no text is.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

RULES_VERSION = 2
TEXTS = ("short", "medium", "long", "style")
LISTS = ("tags", "ocr")
PARTS = (*TEXTS, *LISTS, "language")
LARGEST = 65_536  # characters of an answer: 768 tokens a text are some 4,000
LONGEST_ITEM = 2_000  # characters of a tag or of a region's text
RUN = 8  # words in a row that a caption may not share with the prompt


def schema(asked: Sequence[str] = PARTS) -> dict[str, Any]:
    """-> the JSON schema of an answer with these parts, in the order of PARTS."""
    text: dict[str, Any] = {"type": "string"}
    names = [name for name in PARTS if name in asked]
    properties = {name: {"type": "array", "items": text} if name in LISTS else text for name in names}
    return {"type": "object", "properties": properties, "required": names, "propertyOrdering": names}


SCHEMA = schema()

_MARKUP = re.compile(r"</?[A-Za-z][^>\n]{0,200}>|```|\*\*|^\s{0,3}#{1,6}\s|\]\(|^\s*[-*]\s", re.MULTILINE)
_ADDRESS = re.compile(r"\b(?:https?|ftp)://|\bwww\.[a-z0-9-]+\.|\b[\w-]+\.(?:com|net|org|io)/", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_LANGUAGE = re.compile(r"[a-z]{2}")
_CHARACTER = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]"
)  # Unicode's Cc but for tab and line ends, and halves of characters


class Rules(NamedTuple):
    """What captions of one prompt version must be. bands: text -> (fewest, most) tokens; contradictions: tag -> words that deny it."""

    bands: Mapping[str, tuple[int, int]]
    banned: Sequence[str]
    most_tags: int
    most_ocr: int
    language: str
    contradictions: Mapping[str, Sequence[str]] = {}


def rules(told: Mapping[str, Any]) -> Rules:
    """conf.captions.PromptFile as a dict -> what captions under it must be."""
    return Rules(**{name: told[name] for name in Rules._fields})


class Fault(NamedTuple):
    """Why a part (`answer`: the whole) is refused. code: one of CODES; detail: what was found, short, and never the whole text."""

    part: str
    code: str
    detail: str


class Checked(NamedTuple):
    """parts: those that passed; faults: of the others; whole: every part passed."""

    parts: dict[str, Any]
    faults: tuple[Fault, ...]

    @property
    def whole(self) -> bool:
        return not self.faults


CODES = (
    "too_large",
    "not_json",
    "not_an_object",
    "cut",
    "missing",
    "wrong_type",
    "empty",
    "too_short",
    "too_long",
    "too_many",
    "control",
    "half_character",
    "markup",
    "address",
    "banned",
    "echo",
    "contradiction",
    "language",
)


def check(
    text: str, rules: Rules, count: Callable[[str], int], prompt: str = "", tags: Sequence[str] = (), asked: Sequence[str] = PARTS
) -> Checked:
    """(answer, rules, tokens of a text, the instructions that were sent, tags that are known, the parts that were asked for) -> its parts and
    faults. Raises nothing.
    """
    parts, faults = _parse(text)
    known = _runs_of_prompt(prompt)
    banned = _banned(rules.banned)
    named = parts.get("language")
    for part in asked:
        if part not in parts:
            if not any(fault.part in (part, "answer") and fault.code != "cut" for fault in faults):
                faults.append(Fault(part, "missing", "the answer ends before it" if faults else "not in the object"))
            continue
        found = _of_part(part, parts[part], rules, count)
        if found is None and part in TEXTS:
            found = _of_words(part, parts[part], banned, known, rules.contradictions, tags)
        if found is not None:
            faults.append(found)
            del parts[part]
    # `English` is no code, and yet English: only another language's code takes the texts with it
    if "language" in asked and isinstance(named, str) and _LANGUAGE.fullmatch(named) and named != rules.language:
        for part in [part for part in TEXTS if part in parts and part in asked]:
            faults.append(Fault(part, "language", f"of an answer in {named}, asked was {rules.language}"))
            del parts[part]
    return Checked({part: _plain(parts[part]) for part in PARTS if part in parts and part in asked}, tuple(faults))


def _plain(value: Any) -> Any:
    """One form for one text: NFC, white space as single blanks."""
    if isinstance(value, list):
        return [_plain(one) for one in value if one.strip()]
    return " ".join(unicodedata.normalize("NFC", value).split())


def _parse(text: str) -> tuple[dict[str, Any], list[Fault]]:
    """Text -> the object's members under PARTS that are whole, and what is wrong with the whole."""
    if len(text) > LARGEST:
        return {}, [Fault("answer", "too_large", f"{len(text)} characters, at most {LARGEST}")]
    begin = _skip(text, 0)
    if text[begin : begin + 1] != "{":
        is_json = text[begin : begin + 1] in ("[", '"')
        return {}, [Fault("answer", "not_an_object" if is_json else "not_json", repr(text[begin : begin + 40]))]
    decoder = json.JSONDecoder()
    members: dict[str, Any] = {}
    at = _skip(text, begin + 1)
    while text[at : at + 1] == '"':
        try:
            name, at = decoder.raw_decode(text, at)
            at = _skip(text, at)
            if text[at : at + 1] != ":":
                break
            value, at = decoder.raw_decode(text, _skip(text, at + 1))
        except (ValueError, RecursionError):
            break
        at = _skip(text, at)
        if text[at : at + 1] not in (",", "}"):  # a number or a word may have been cut
            break
        if name in PARTS:
            members[name] = value
        if text[at] == "}":
            rest = text[at + 1 :].strip()
            return members, [Fault("answer", "not_json", f"after the object stands {rest[:40]!r}")] if rest else []
        at = _skip(text, at + 1)
    return members, [Fault("answer", "cut", f"no whole JSON from character {at} of {len(text)} on")]


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t") and at < len(text):
        at += 1
    return at


def _of_part(part: str, value: Any, rules: Rules, count: Callable[[str], int]) -> Fault | None:
    """Type, characters, lengths."""
    if part in LISTS:
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            return Fault(part, "wrong_type", f"{type(value).__name__}, expected a list of strings")
        most = rules.most_tags if part == "tags" else rules.most_ocr
        return _of_characters(part, value) or _of_list(part, value, most)
    if not isinstance(value, str):
        return Fault(part, "wrong_type", f"{type(value).__name__}, expected a string")
    return _of_characters(part, [value]) or (_of_language if part == "language" else _of_text)(part, value, rules, count)


def _of_language(part: str, value: str, rules: Rules, count: Callable[[str], int]) -> Fault | None:
    if not _LANGUAGE.fullmatch(value):
        return Fault(part, "language", f"{value[:20]!r} is no ISO 639-1 code")
    return None if value == rules.language else Fault(part, "language", f"{value}, asked was {rules.language}")


def _of_text(part: str, value: str, rules: Rules, count: Callable[[str], int]) -> Fault | None:
    if not value.strip():
        return Fault(part, "empty", "no word")
    fewest, most = rules.bands[part]
    tokens = count(value)
    if not fewest <= tokens <= most:
        return Fault(part, "too_short" if tokens < fewest else "too_long", f"{tokens} tokens, expected {fewest} to {most}")
    return None


def _of_characters(part: str, texts: Sequence[str]) -> Fault | None:
    found = next(filter(None, map(_CHARACTER.search, texts)), None)
    if found is None:
        return None
    return Fault(part, "half_character" if found.group() >= "\ud800" else "control", f"U+{ord(found.group()):04X}")


def _of_list(part: str, value: Sequence[str], most: int) -> Fault | None:
    if len(value) > most:
        return Fault(part, "too_many", f"{len(value)}, at most {most}")
    if longest := max((len(one) for one in value if len(one) > LONGEST_ITEM), default=0):
        return Fault(part, "too_long", f"an item of {longest} characters, at most {LONGEST_ITEM}")
    if part == "tags" and (found := next(filter(None, map(_ADDRESS.search, value)), None)):
        return Fault(part, "address", repr(found.string[found.start() : found.start() + 40]))
    return Fault(part, "empty", "no tag") if part == "tags" and not any(one.strip() for one in value) else None


def _of_words(
    part: str,
    text: str,
    banned: re.Pattern[str] | None,
    known: set[tuple[str, ...]],
    denied: Mapping[str, Sequence[str]],
    tags: Sequence[str],
) -> Fault | None:
    if found := _MARKUP.search(text):
        return Fault(part, "markup", repr(found.group()[:40]))
    if found := _ADDRESS.search(text):
        return Fault(part, "address", repr(text[found.start() : found.start() + 40]))
    if banned is not None and (found := banned.search(text)):
        return Fault(part, "banned", repr(found.group()[:40]))
    if known and (shared := _runs(text) & known):
        return Fault(part, "echo", repr(" ".join(min(shared))[:80]))
    for tag in tags:
        for word in denied.get(tag.lower(), ()):
            if re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE):
                return Fault(part, "contradiction", f"{word!r} beside the tag {tag[:40]!r}")
    return None


def _banned(words: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile(r"\b(?:" + "|".join(map(re.escape, words)) + r")\b", re.IGNORECASE) if words else None


@lru_cache(maxsize=8)
def _runs_of_prompt(prompt: str) -> set[tuple[str, ...]]:
    """One prompt is behind all answers of a tier."""
    return _runs(prompt)


def _runs(text: str) -> set[tuple[str, ...]]:
    """Text -> its runs of RUN words, lower case."""
    words = [word.lower() for word in _WORD.findall(text)]
    return {tuple(words[at : at + RUN]) for at in range(len(words) - RUN + 1)}
