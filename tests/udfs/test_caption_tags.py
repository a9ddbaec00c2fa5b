"""Captions without a model: they say what is known and nothing else, and pass the check that every captioner's answer passes."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from udfs import tag_words, token_count
from udfs.caption_answer import Rules, check
from udfs.caption_tags import PARTS, Known, answer
from udfs.reject import Reject

COUNT = token_count.load("utf8-bytes/4").count
PROMPT = yaml.safe_load(Path("conf/prompts/studbook-1.yaml").read_text())
BANDS = {name: (low, high) for name, (low, high) in PROMPT["bands"].items()}
RULES = Rules(BANDS, PROMPT["banned"], PROMPT["most_tags"], PROMPT["most_ocr"], "en", {"no humans": ["man"]})
# the only words that are its own
OWN = """a an one two three four five six several or more picture with the tag tags and of seen girl girls boy boys character characters text that
reads rated described as style photograph drawing painting cartoon icon 3d render clipart anime abstract close-up portrait upper-body full-body"""


def compose(*args: Any, **named: Any) -> dict[str, Any]:
    parts: dict[str, Any] = json.loads(answer(Known(*args, **named), RULES, COUNT))
    return parts


@pytest.mark.parametrize(
    ("known", "short"),
    [
        (Known(["animal"], "A red fox sits in the snow. It looks at us."), "A red fox sits in the snow."),
        (Known(["food", "drink", "kitchen"], "coffee cup"), "Coffee cup, with the tags food, drink and kitchen."),
        (Known(["animals"], "cat", "cartoon"), "Cat, with the tag animals."),
        (Known(["red_fox"], ""), "A picture with the tag red fox."),
        (Known(["bird", "sea"], "", "3d_render"), "A 3D render with the tags bird and sea."),
        (Known([], "cat"), "A picture described as cat."),
        (Known([], "open_box_of_apples"), "A picture described as open box of apples."),
        (Known([], "", regions=["NO SMOKING", "here"]), 'A picture with text that reads "NO SMOKING" and "here".'),
        (
            Known(["1girl", "solo", "long_hair", "smile", "sitting", "wedding dress", "outdoors"], "", "anime"),
            "An anime picture of a girl, sitting, outdoors, with long hair, smile and wedding dress.",
        ),
        (
            Known(["2girls", "6+boys", "upper body", "from above", "character:hatsune miku"], "", "photo"),
            "A photograph, an upper-body shot of two girls and six or more boys, the character hatsune miku, seen from above.",
        ),
    ],
)
def test_a_short_caption_is_one_sentence_of_what_is_known(known: Known, short: str) -> None:
    shorts = json.loads(answer(known, RULES._replace(bands=BANDS | {"short": (6, 48)}), COUNT))
    assert shorts["short"] == short


def test_a_medium_caption_adds_tags_text_and_rating_and_a_short_one_alone_is_not_said_twice() -> None:
    parts = compose(["fox", "snow", "tree"], "A red fox sits in the snow. Behind it stands a dark tree.", "photo", "safe", ["STOP"])
    assert parts["medium"] == (
        "A red fox sits in the snow. Behind it stands a dark tree. A photograph with the tags fox, snow and tree. "
        'The text reads "STOP". Rated safe.'
    )
    assert "medium" not in compose(
        [], "A red fox sits in the snow beside a dark tree, and looks at the one who holds the camera and a light."
    )
    assert "medium" not in compose(["fox"], "A red fox.")  # too little to say


def test_tags_are_cleaned_and_keep_their_order() -> None:
    given = [
        "Long_Hair",
        "^_^",
        "long hair",
        "artist:bob",
        "by bob",
        "score_9",
        "rating:safe",
        "style_cluster_7",
        "a, b",
        "x@y.com",
        " ",
        "red\u200bfox",
    ]
    assert tag_words.clean(given) == ["long hair", "^_^", "red fox"]
    assert compose([*given, "see http://x.com/a", "<b>bold</b>"])["tags"] == ["long hair", "^_^", "red fox"]
    assert len(compose([f"tag {n}" for n in range(100)])["tags"]) == RULES.most_tags


def test_text_is_given_verbatim_in_reading_order_and_without_any_it_is_not_said_that_there_is_none() -> None:
    found = ["Eis 2 €", '"Hi"']
    parts = compose([], "A red fox sits in the snow, and behind it stands a tree.", regions=found)
    assert parts["ocr"] == found
    assert """The text reads "Eis 2 €" and "'Hi'".""" in parts["medium"]
    assert "ocr" not in compose(["fox"]) and "ocr" not in compose(["fox"], regions=["\u200b"])


def test_sentences_that_no_caption_may_hold_are_left_out_of_an_alt_text() -> None:
    alt = "The image depicts a fox. A red fox sits in the snow beside a dark tree with long branches. See https://x.com/a."
    alt += " Mail bob@x.com now. A man is near."
    assert compose(["no humans", "fox"], alt)["medium"].startswith(
        "A red fox sits in the snow beside a dark tree with long branches. A picture with the tags"
    )


@pytest.mark.parametrize(
    ("known", "why"),
    [
        (Known(), "tags none; alt text none; text none"),
        (Known(["artist:bob", "score_9"], "IMG_1234.jpg"), "tags refused; alt text refused; text none"),
        (Known([], "Это красная лиса"), "alt text refused"),
        (Known([], "ein roter Fuchs im Schnee mit einer Katze"), "alt text refused"),
        (Known([" "], "\ud800\x00", "photo", "safe", ["\u200b"]), "tags refused; alt text refused; text refused"),
    ],
)
def test_an_image_of_which_nothing_is_known_has_no_caption_and_a_named_reason(known: Known, why: str) -> None:
    with pytest.raises(Reject, match=why) as caught:
        answer(known, RULES, COUNT)
    assert caught.value.code == "nothing_known" and not caught.value.transient


def test_another_language_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="given 'de', but it composes English"):
        answer(Known(["fox"]), RULES._replace(language="de"), COUNT)


def test_every_answer_passes_the_check_is_the_same_again_and_has_no_word_that_nobody_said() -> None:
    rows = [json.loads(line) for line in Path("tests/data/sample/metadata.jsonl").read_text().splitlines()]
    generator = random.Random(7)
    taggers = ["1girl", "3boys", "multiple girls", "looking_back", "from behind", "close-up", "a\x00b"]
    tags = [*sorted({tag for row in rows for tag in row["tags"]}), *taggers]
    alts = [*(row["caption"] for row in rows), "", "x" * 5_000, "word " * 3_000, "**bold** claim", '"quoted" text. More! "And more?"']
    made = 0
    for _ in range(1_500):
        style, rating = generator.choice([None, "photo", "anime", "oil_paint"]), generator.choice([None, "safe", "explicit"])
        texts = generator.sample(["STOP", "a" * 200, "www.x.com/a", "half \ud800", "two\nlines"], generator.randint(0, 3))
        known = Known(generator.sample(tags, generator.randint(0, 30)), generator.choice(alts), style, rating, texts)
        try:
            text = answer(known, RULES, COUNT)
        except Reject:
            continue
        made += 1
        assert text == answer(known, RULES, COUNT)
        parts = json.loads(text)
        checked = check(text, RULES, COUNT, tags=known.tags)
        assert checked.parts == parts and set(parts) <= set(PARTS)
        assert {fault.code for fault in checked.faults} <= {"missing"}
        words = {*OWN.split(), *_words(" ".join([*known.tags, known.alt_text, *texts, style or "", rating or ""]))}
        said = _words(f"{parts.get('short', '')} {parts.get('medium', '')}")
        assert said <= words, (said - words, known)
    assert made > 1_300


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+(?:-[^\W_]+)*", re.sub(r"[\x00\ud800]", " ", text.lower())))
