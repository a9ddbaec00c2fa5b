"""A captioner's answer: what is kept of it, and the named fault of every other part."""

from __future__ import annotations

import json
from typing import Any

import pytest

from udfs import caption_answer
from udfs.caption_answer import PARTS, Checked, Rules

BANDS = {"short": (4, 20), "medium": (8, 40), "long": (12, 60), "style": (4, 40)}
RULES = Rules(BANDS, ("appears", "this image"), most_tags=5, most_ocr=3, language="en", contradictions={"monochrome": ("colourful",)})
PROMPT = "One paragraph. The summary first; then every object, placed in space (left, right, in front, behind)."
GOOD: dict[str, Any] = {
    "short": "A red fox stands in the snow.",
    "medium": "A red fox stands in deep snow at the edge of a wood.",
    "long": "A red fox stands in deep snow. Behind the fox to the left grows a row of dark firs, and to the right lies a frozen lake.",
    "style": "Medium shot, eye level, soft light, digital painting.",
    "tags": ["fox", "snow"],
    "ocr": [],
    "language": "en",
}


def words(text: str) -> int:
    return len(text.split())


def check(answer: str | dict[str, Any], tags: tuple[str, ...] = ()) -> Checked:
    return caption_answer.check(answer if isinstance(answer, str) else json.dumps(answer), RULES, words, PROMPT, tags)


def test_a_whole_answer_is_kept_in_one_form() -> None:
    told = check(GOOD | {"short": "  A red fox\n stands in the snow. ", "tags": ["fox", " ", "cafe\u0301"]})
    assert told.whole and told.parts == GOOD | {"tags": ["fox", "café"]}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"short": 7}, "wrong_type"),
        ({"tags": ["fox", 3]}, "wrong_type"),
        ({"tags": "fox"}, "wrong_type"),
        ({"short": "  "}, "empty"),
        ({"tags": [" "]}, "empty"),
        ({"tags": ["fox", "see www.fox.example"]}, "address"),
        ({"short": "A fox."}, "too_short"),
        ({"short": "fox " * 21}, "too_long"),
        ({"tags": list("abcdef")}, "too_many"),
        ({"ocr": ["x" * 2_001]}, "too_long"),
        ({"short": "A red fox\x00 stands in snow."}, "control"),
        ({"short": "A red fox \ud83d stands in snow."}, "half_character"),
        ({"short": "A <b>red</b> fox stands in snow."}, "markup"),
        ({"short": "A **red** fox stands in snow."}, "markup"),
        ({"short": "# A red fox stands in snow."}, "markup"),
        ({"short": "A red fox, see https://example.org now."}, "address"),
        ({"short": "A red fox appears in the snow."}, "banned"),
        ({"medium": "The summary first; then every object, placed in space, left and right of a fox."}, "echo"),
        ({"short": "A colourful fox stands in snow."}, "contradiction"),
        ({"language": "English"}, "language"),
    ],
)
def test_a_part_that_is_not_as_asked_is_refused_by_name_and_the_others_stay(change: dict[str, Any], code: str) -> None:
    told = check(GOOD | change, ("Monochrome",))
    (part,) = change
    assert [(fault.part, fault.code) for fault in told.faults] == [(part, code)]
    assert told.parts.keys() == set(PARTS) - {part}
    assert code in caption_answer.CODES and len(told.faults[0].detail) < 120


def test_an_answer_that_names_another_language_keeps_no_text_and_one_that_names_none_keeps_them() -> None:
    told = check(GOOD | {"language": "de"})
    assert told.parts == {"tags": GOOD["tags"], "ocr": []}
    assert {(fault.part, fault.code) for fault in told.faults} == {(part, "language") for part in (*caption_answer.TEXTS, "language")}
    assert all(fault.part == "language" or fault.detail == "of an answer in de, asked was en" for fault in told.faults)
    both = check(GOOD | {"language": "de", "short": "A fox."})  # a text that was refused for itself is refused once
    assert [fault.code for fault in both.faults if fault.part == "short"] == ["too_short"]
    assert set(check(GOOD | {"language": "english"}).parts) == set(PARTS) - {"language"}
    unasked = caption_answer.check(json.dumps(GOOD | {"language": "de"}), RULES, words, asked=("short", "tags"))
    assert unasked.whole and set(unasked.parts) == {"short", "tags"}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "not_json"),
        ("I cannot help with that.", "not_json"),
        ('```json\n{"short": "x"}\n```', "not_json"),
        ("[]", "not_an_object"),
        ('"{}"', "not_an_object"),
        (json.dumps(GOOD) + " and more", "not_json"),
        ("[" * 100_000, "too_large"),
        ('{"short": ' + "[" * 60_000, "cut"),
        ('{"short" "x"}', "cut"),
        ("{short: 1}", "cut"),
    ],
)
def test_what_is_no_object_of_json_is_one_fault_of_the_whole(text: str, code: str) -> None:
    told = check(text)
    assert (told.faults[0].part, told.faults[0].code) == ("answer", code)


def test_the_whole_parts_of_an_answer_that_was_cut_anywhere_are_kept_and_never_half_of_one() -> None:
    text = json.dumps(GOOD)
    seen = set()
    for end in range(len(text)):
        told = check(text[:end])
        assert all(told.parts[part] == GOOD[part] for part in told.parts)
        seen.add(tuple(told.parts))
        assert told.faults[0].code in ("cut", "not_json")
    assert {tuple(PARTS[:n]) for n in range(len(PARTS))} == seen


def test_of_a_name_that_comes_twice_and_of_unknown_names_the_rest_is_read() -> None:
    text = json.dumps(GOOD)[:-1] + ', "more": {"a": [1, {"b": null}]}, "language": "de", "language": "en"}'
    assert check(text).whole


def test_a_missing_part_is_named() -> None:
    told = check({name: value for name, value in GOOD.items() if name != "style"})
    assert [(fault.part, fault.code) for fault in told.faults] == [("style", "missing")]


def test_only_what_was_asked_is_expected_and_kept() -> None:
    told = caption_answer.check(json.dumps(GOOD), RULES, words, asked=("short", "tags", "language"))
    assert told.whole and told.parts.keys() == {"short", "tags", "language"}
    assert caption_answer.schema(("tags", "short"))["required"] == ["short", "tags"]
