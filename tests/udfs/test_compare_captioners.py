"""The measures that captioners are compared by, against figures worked out by hand."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
import pytest

from udfs import caption_words, captioner_table, compare_captioners
from udfs.compare_captioners import Given, Said

FOX = {"short": ["A red fox stands in deep snow."], "tags": ["fox, snow, tree"]}
IMAGES = [hashlib.sha256(str(number).encode()).digest() for number in range(3)]


def test_words_are_lower_case_in_the_singular_without_small_words() -> None:
    assert caption_words.words("The Foxes' cubs: two BOXES of cherries, a boy's glass on the bus.") == [
        *("fox", "cub", "two", "box"),
        *("cherry", "boy", "glass", "bus"),
    ]


def test_a_tag_is_named_where_its_words_stand_in_one_sentence_in_any_order() -> None:
    texts = {"medium": ["Her long brown hair falls on a table. The wall is blue."]}
    assert caption_words.named(["long hair", "hair brown", "blue hair", "table", "tables"], texts) == [
        *("long hair", "hair brown"),
        *("table", "tables"),
    ]


def test_a_tag_is_named_by_one_of_a_texts_tags_and_by_people_as_english_counts_them() -> None:
    assert caption_words.named(["long hair"], {"tags": ["long skirt, brown hair"]}) == []
    assert caption_words.named(["long hair"], {"tags": ["skirt, long hair"]}) == ["long hair"]
    texts = {"short": ["Two girls and a boy."]}
    assert caption_words.named(["2girls", "1boy", "3girls", "2boys", "character:boy"], texts) == ["2girls", "1boy", "character:boy"]
    assert caption_words.named(["sign"], {"ocr": ["SIGN"]}) == []  # text that is transcribed names nothing


def test_tags_that_no_caption_can_name_are_not_asked_for() -> None:
    assert caption_words.tags_of(["Long_Hair", "solo", "highres", "artist:someone", "score_9", "no_humans"]) == ["long hair"]


def test_agreement_is_dice_over_kinds_that_both_wrote() -> None:
    # short: {red, fox, stand, deep, snow} and {fox, snow, run}: 2 * 2 / 8; tags: {fox, snow, tree} and {fox}: 2 / 4
    other = {"short": ["The fox runs: snow."], "tags": ["fox"], "long": ["Nobody else has a long text."]}
    assert caption_words.agreement(FOX, other) == pytest.approx((4 / 8 + 2 / 4) / 2) == caption_words.agreement(other, FOX)
    assert caption_words.agreement(FOX, FOX) == 1.0
    assert caption_words.agreement({"short": ["A fox."]}, {"style": ["A fox."], "long": ["A fox."]}) is None


@pytest.mark.parametrize(
    ("read", "told", "edits", "longest"),
    [
        ("kitten", "sitting", 3, 7),
        ("OPEN 24h", "open  24H", 0, 8),
        ("abc", "", 3, 3),
        ("", "ab", 2, 2),
        ("ab", "ba", 2, 2),
        ("flaw", "lawn", 2, 4),
    ],
)
def test_similarity_counts_edits_of_the_longer_text(read: str, told: str, edits: int, longest: int) -> None:
    assert caption_words.similarity(read, told) == pytest.approx(1 - edits / longest)


def test_words_that_were_read_are_found_in_any_order_as_often_as_they_stand_there() -> None:
    assert caption_words.found("EXIT exit left", "left, please exit") == pytest.approx(2 / 3)
    assert caption_words.found("...", "anything") is None


def test_sameness_counts_words_duplicates_and_beginnings() -> None:
    told = compare_captioners.sameness(["A drawing of a fox.", "Drawing of foxes", "A drawing of the fox in snow.", "Snow."])
    # words: drawing fox, drawing fox, drawing fox snow, snow: 3 of 8 are distinct; two texts are the same
    assert told == {"distinct_words": 3 / 8, "duplicates": 2 / 4, "same_start": 2 / 4}


def test_captioners_are_measured_on_the_same_images_and_a_refusal_counts_against_them() -> None:
    given = [Given(IMAGES[0], ["fox", "snow"], "STOP"), Given(IMAGES[1], ["cat", "indoors"], ""), Given(IMAGES[2], [], "")]
    text = {"short": ["A red fox in the snow."], "ocr": ["STEP"]}
    wide = [
        Said(text, {"short": [6], "ocr": [1]}, calls=2, input_tokens=100, output_tokens=10, nano_usd=3_000),
        Said({}, {}, "prohibited", calls=1, input_tokens=100, nano_usd=3_000),
        Said({"short": ["A dog.", ""], "ocr": ["ghost"]}, {"short": [2, 0], "ocr": [1]}, calls=1, input_tokens=100, output_tokens=2),
    ]
    free = [Said({"short": ["A fox."]}, {"short": [2]}), Said({"short": ["A cat."]}, {"short": [20]}), Said({}, {}, "nothing_known")]
    told, images = compare_captioners.compare(given, {"wide": wide, "free": free}, {"short": (3, 10)}, seed=1)
    one, other = told["captioners"]["wide"], told["captioners"]["free"]
    assert told["images"] == 3 and (one["captioned"], one["refusals"]) == (2, {"prohibited": 1})
    assert one["refused"][0] == pytest.approx(1 / 3) and 0 <= one["refused"][1] <= 1 / 3 <= one["refused"][2] <= 1
    assert one["tag_recall"][0] == pytest.approx((2 / 2 + 0 / 2) / 2) and other["tag_recall"][0] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert one["tags_given"] == 2  # of an image without tags nothing can be named
    short = one["kinds"]["short"]
    assert (short["images"], short["median"], short["p10"]) == (2, 4.0, pytest.approx(2.4)) and set(one["kinds"]) == {"short", "ocr"}
    assert short["in_band"][0] == pytest.approx(1 / 3)  # too short, and none at all
    assert one["ocr_images"] == 1 and one["ocr_similarity"][0] == pytest.approx(3 / 4) and one["ocr_words"][0] == 0
    assert one["ocr_where_none_was_read"][0] == 1.0  # of the images with an answer
    assert other["ocr_similarity"] is None and other["usd"] is None
    assert one["calls"] == 4 and one["usd"][0] == pytest.approx(2e-6) and one["input_tokens"][0] == 100 and one["output_tokens"][0] == 4
    (pair,) = told["pairs"]
    # {red, fox, snow} and {fox}: 2 / 4; on the other images one of them has no text
    assert (pair["first"], pair["second"], pair["images"]) == ("wide", "free", 1) and pair["agreement"][0] == pytest.approx(0.5)
    assert pair["chance"] == pytest.approx(0.0)  # {dog} and {cat}
    assert pair["recall_difference"][0] == pytest.approx(((1 - 0.5) + (0 - 0.5)) / 2)
    assert images == [{"image_id": IMAGES[0], "first": "wide", "second": "free", "agreement": pytest.approx(0.5)}]


def test_a_captioner_that_was_not_shown_an_image_is_measured_without_it() -> None:
    given = [Given(IMAGES[0], ["fox"], ""), Given(IMAGES[1], ["cat"], "")]
    text = Said({"short": ["A fox."]}, {"short": [2]}, calls=1, output_tokens=4)
    said = {"first": [text, Said({}, {}, "prohibited", calls=1)], "later": [text, Said({}, {}, compare_captioners.NOT_SHOWN)]}
    told, images = compare_captioners.compare(given, said, {"short": (1, 10)}, seed=1)
    first, later = told["captioners"]["first"], told["captioners"]["later"]
    assert (first["refusals"], first["refused"][0], first["tag_recall"][0], first["not_shown"]) == ({"prohibited": 1}, 0.5, 0.5, 0)
    assert (later["refusals"], later["refused"][0], later["tag_recall"][0], later["not_shown"]) == ({}, 0.0, 1.0, 1)
    assert later["output_tokens"][0] == 4 and later["kinds"]["short"]["in_band"][0] == 1.0 and later["tags_given"] == 1
    (pair,) = told["pairs"]
    assert pair["recall_difference"][0] == 0.0 and len(images) == pair["images"] == 1
    shown = captioner_table.lines(told)
    assert any("later: " in line and "not shown 1 that another's service prohibits" in line for line in shown)


def test_a_captioner_that_looked_and_saw_no_text_is_measured_as_one_that_reads() -> None:
    given = [Given(IMAGES[0], [], ""), Given(IMAGES[1], [], "STOP")]
    nothing = Said({"short": ["A fox."], "ocr": [""]}, {"short": [2], "ocr": [0]})
    mute = Said({"short": ["A fox."]}, {"short": [2]})
    told, _ = compare_captioners.compare(given, {"looks": [nothing] * 2, "mute": [mute] * 2}, {}, seed=1)
    looks, other = told["captioners"]["looks"], told["captioners"]["mute"]
    assert set(looks["kinds"]) == {"short"}  # no text of the kind ocr: nothing to count
    assert looks["ocr_similarity"][0] == 0.0 and looks["ocr_where_none_was_read"][0] == 0.0 and other["ocr_similarity"] is None
    read = [nothing, Said({"short": ["A sign."], "ocr": ["STOP"]}, {"short": [2], "ocr": [1]})]
    told, _ = compare_captioners.compare(given, {"reads": read, "mute": [mute] * 2}, {}, seed=1)
    ocr = told["captioners"]["reads"]["kinds"]["ocr"]
    assert (ocr["images"], ocr["texts"], ocr["median"], ocr["duplicates"]) == (1, 1, 1.0, 0.0)


def test_captioners_of_different_images_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"given \['b'\] with another number of images than the 1"):
        compare_captioners.compare([Given(IMAGES[0], [], "")], {"a": [Said({}, {})], "b": []}, {}, seed=1)


def test_disagreement_is_over_all_pairs_and_unknown_without_a_kind_in_common() -> None:
    def one(fingerprint: str, kind: str, text: str) -> dict[str, str]:
        return {"fingerprint": fingerprint, "kind": kind, "text": text}

    three = [one("a", "short", "fox snow"), one("b", "short", "fox snow"), one("c", "short", "fox tree")]
    apart = [one("a", "short", "fox"), one("b", "style", "oil")]
    said = pd.Series([np.array(three, dtype=object), np.array(apart, dtype=object)])
    (frame,) = compare_captioners.disagreements([pd.DataFrame({"image_id": IMAGES[:2], "said": said})])
    assert frame.to_dict("records") == [{"image_id": IMAGES[0], "disagreement": pytest.approx(1 - (1 + 0.5 + 0.5) / 3)}]
