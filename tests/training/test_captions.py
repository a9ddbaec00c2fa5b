"""The choice of a caption: what decides it, what does not, and how often each is taken."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pytest

from conf.section import Mistake
from training import captions

MANY = 20_000
TEXTS = [("alt_text", "a cat"), ("long", "a grey cat on a red sofa"), ("long", "a cat, asleep"), ("tags", "cat, sofa")]


def pack(texts: list[tuple[str, str]]) -> bytes:
    return json.dumps([{"id": text[:5], "kind": kind, "text": text} for kind, text in texts]).encode()


def image_id(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def count(shares: dict[str, float], no_text: float, epoch: int = 0) -> Counter[str]:
    raw = captions.read(pack(TEXTS), b"")
    return Counter(captions.choose_from(raw, image_id(n), 7, epoch, shares, no_text) for n in range(MANY))


def assert_share(found: int, expected: float) -> None:
    """Within five standard deviations of a binomial count: a right choice fails once in two million."""
    assert abs(found - MANY * expected) < 5 * (MANY * expected * (1 - expected)) ** 0.5


def test_without_shares_all_texts_are_alike_and_no_text_takes_its_share() -> None:
    counts = count({}, 0.1)
    assert_share(counts[""], 0.1)
    for _, text in TEXTS:
        assert_share(counts[text], 0.9 / 4)


def test_text_in_the_picture_and_style_are_no_captions_unless_they_are_asked_for() -> None:
    texts = [("ocr", "EXIT"), ("ocr", "2"), ("style", "oil on canvas"), ("short", "a door")]
    assert {captions.choose(pack(texts), image_id(n), 7, 0, {}, 0.0) for n in range(50)} == {"a door"}
    assert {captions.choose(pack(texts), image_id(n), 7, 0, {"ocr": 1.0}, 0.0) for n in range(50)} == {"EXIT", "2"}
    none = [("ocr", ""), ("short", "a door")]  # it was looked for, and there is none
    assert {captions.choose(pack(none), image_id(n), 7, 0, {"ocr": 9.0, "short": 1.0}, 0.0) for n in range(50)} == {"a door"}


def test_kinds_are_taken_by_their_shares_and_a_kind_that_is_not_named_never() -> None:
    counts = count({"long": 3.0, "tags": 1.0, "ocr": 5.0}, 0.0)
    assert counts["a cat"] == 0 and counts[""] == 0
    assert_share(counts["cat, sofa"], 0.25)
    assert_share(counts["a cat, asleep"], 0.375)


def test_dropping_the_text_does_not_change_which_text_the_others_get() -> None:
    raw = captions.read(pack(TEXTS), b"")
    pairs = [[captions.choose_from(raw, image_id(n), 7, 0, {}, share) for share in (0.0, 0.5)] for n in range(200)]
    assert all(dropped in ("", kept) for kept, dropped in pairs)
    assert 60 < sum(dropped == "" for _, dropped in pairs) < 140


def test_the_choice_is_of_seed_epoch_and_image_alone() -> None:
    def draw(seed: int, epoch: int, order: list[tuple[str, str]] = TEXTS) -> list[str]:
        return [captions.choose(pack(order), image_id(n), seed, epoch, {}, 0.1) for n in range(200)]

    first = draw(7, 0)
    assert first == draw(7, 0) == draw(7, 0, TEXTS[::-1])
    assert [captions.choose(pack(TEXTS), image_id(n), 7, 0, {}, 0.1) for n in reversed(range(200))] == first[::-1]
    assert 30 < sum(a == b for a, b in zip(first, draw(7, 1), strict=True)) < 90  # a quarter by chance
    assert 30 < sum(a == b for a, b in zip(first, draw(8, 0), strict=True)) < 90


def test_an_image_without_a_text_to_take_is_trained_without() -> None:
    assert captions.choose(b"[]", image_id(1), 7, 0, {}, 0.0) == ""
    assert captions.choose(pack(TEXTS[:1]), image_id(1), 7, 0, {"long": 1.0}, 0.0) == ""


@pytest.mark.parametrize("raw", [b"", b"{}", b'["a cat"]', b'[{"kind": "short"}]', b'[{"kind": "short", "text": 3}]', b"\xff"])
def test_a_column_that_is_no_list_of_captions_names_the_image(raw: bytes) -> None:
    with pytest.raises(Mistake, match=rf"image {image_id(5).hex()}: captions: given"):
        captions.choose(raw, image_id(5), 7, 0, {}, 0.0)


def test_kinds_that_no_image_has_are_told_and_a_mistake_when_there_is_no_other() -> None:
    rows = [captions.read(pack(TEXTS), b""), []]
    assert captions.check_kinds(rows, {"long": 1.0}) == captions.check_kinds(rows, {}) == ""
    assert "of 2 held-out images none has ['logn'], they have ['alt_text', 'long', 'tags']" in captions.check_kinds(
        rows, {"logn": 1.0, "long": 1.0}
    )
    with pytest.raises(Mistake, match=r"given \['logn'\]; .* nothing would be trained with a text"):
        captions.check_kinds(rows, {"logn": 1.0})
    assert captions.check_kinds(rows, captions.MIXES["varied"].lengths, "varied").startswith(
        "train_diffusion.mix varied: given ['long', 'medium', 'short', 'tags']; of 2 held-out images none has ['medium', 'short']"
    )
    assert "none has ['long']" in captions.check_kinds([captions.read(pack(TEXTS[:1]), b"")], captions.MIXES["v7"].lengths, "v7")
    assert "none has ['ocr']" in captions.check_kinds([captions.read(pack([("ocr", ""), ("long", "a")]), b"")], {"ocr": 1.0, "long": 1.0})


def test_a_composed_prompt_knows_its_marks_and_leaves_out_those_that_are_none() -> None:
    def compose(marks: tuple[int, str, int], no_text: float = 0.0) -> str:
        return captions.compose(pack(TEXTS), image_id(1), marks, 7, 0, "v7", no_text, lambda text: len(text.split()), 40)

    long = {text for kind, text in TEXTS if kind == "long"}
    assert compose((7, "safe", 12)) in {f"score_7, rating_safe, style_cluster_12, {text}\ncat, sofa" for text in long}
    assert compose((-1, "", -1)) in {f"{text}\ncat, sofa" for text in long}
    assert compose((7, "safe", 12), no_text=1.0) == ""
    varied = {captions.compose(pack(TEXTS), image_id(1), (7, "safe", 12), 7, epoch, "varied", 0.0, len, 40) for epoch in range(20)}
    assert len(varied) > 5 and all(len(text) <= 40 for text in varied)
