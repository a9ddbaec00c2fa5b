"""Training prompts: V7's string to the letter, and a mix whose draws depend on nothing but what they say."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence

import pytest

from udfs import token_count
from udfs.compose_prompt import PLACES, V7, VARIED, Caption, Composed, Known, Mix, compose, pick

MANY = 10_000
COUNT = token_count.load("utf8-bytes/4").count
SENTENCES = "A red fox sits in the snow. Behind the fox stands a pine. The sky is grey."
STYLE = "Digital painting, soft light. A cold palette. Seen from above. Thick strokes."
WORDS = ["Fox", "red fur", "snow", "tree", "character:Tod", "grey sky", "no humans", "winter"]
CAPTIONS = [
    Caption("a/short", "short", "A red fox in snow."),
    Caption("a/medium", "medium", SENTENCES),
    Caption("b/medium", "medium", "A fox, sitting. Snow lies around."),
    Caption("a/long", "long", f"{SENTENCES} To the left lies a stone, to the right a branch."),
    Caption("a/style", "style", STYLE),
    Caption("a/tags", "tags", ", ".join(WORDS)),
    Caption("a/ocr/0", "ocr", "NO HUNTING"),
]


def known(number: int = 0, captions: Sequence[Caption] = CAPTIONS, score: int | None = 7) -> Known:
    return Known(hashlib.sha256(b"%d" % number).digest(), score, "safe", 12, captions)


def one(number: int, mix: Mix = VARIED, captions: Sequence[Caption] = CAPTIONS, seed: int = 7, epoch: int = 0, most: int = 768) -> Composed:
    return compose(known(number, captions), mix, seed, epoch, COUNT, most)


def assert_share(found: int, expected: float, of: int = MANY) -> None:
    """Within five standard deviations of a binomial count: a right choice fails once in two million."""
    assert abs(found - of * expected) <= 5 * (of * expected * (1 - expected)) ** 0.5, (found, expected, of)


def test_the_mix_v7_is_v7s_string() -> None:
    texts = [("long", "A fox in snow."), ("style", "Digital painting, soft light."), ("tags", "Fox, red fur, character:Tod")]
    captions = [Caption(kind, kind, text) for kind, text in texts]
    fox = Known(b"\x01" * 32, 7, "explicit", 1234, captions)
    golden = "score_7, rating_explicit, style_cluster_1234, A fox in snow. Digital painting, soft light.\nfox, red fur, character:tod"
    composed = compose(fox, V7, 7, 0, COUNT, 768)
    assert composed.text == golden and composed.tokens == COUNT(golden) and composed.length == "long" and not composed.cut
    bare = compose(Known(b"\x01" * 32, 0, "safe", None, [Caption("l", "long", "A fox.")]), V7, 7, 0, COUNT, 768)
    assert bare.text == "score_0, rating_safe, A fox."


def test_a_prompt_is_of_seed_epoch_image_and_captions_alone_whatever_their_order() -> None:
    generator = random.Random(7)
    first = [one(n) for n in range(500)]
    for n in reversed(range(500)):
        assert one(n, captions=generator.sample(CAPTIONS, len(CAPTIONS))) == first[n]
    backwards = VARIED._replace(lengths=dict(reversed(VARIED.lengths.items())), style_at=dict(reversed(VARIED.style_at.items())))
    assert [one(n, backwards) for n in range(500)] == first
    assert sum(one(n, epoch=1).text == first[n].text for n in range(500)) < 50
    assert sum(one(n, seed=8).text == first[n].text for n in range(500)) < 50


def test_lengths_places_marks_and_tags_are_drawn_by_their_weights() -> None:
    mix = Mix(
        {"tags": 1, "short": 2, "medium": 3, "long": 4}, {"before": 1, "between": 2, "after": 3, "out": 4}, 0.1, 0.2, 0.3, 0.4, 0.25, 0.7
    )
    made = [one(n, mix) for n in range(MANY)]
    for name, weight in mix.lengths.items():
        assert_share(sum(each.length == name for each in made), weight / 10)
    for name, weight in mix.style_at.items():
        assert_share(sum(each.style_at == name for each in made), weight / 10)
    for mark, share in (("score_7,", 0.1), ("rating_safe,", 0.2), ("style_cluster_12,", 0.3)):
        assert_share(sum(mark not in each.text for each in made), share)
    with_content = [each for each in made if each.length != "tags"]
    assert_share(sum("a/tags" not in each.captions for each in with_content), 0.4, len(with_content))
    tagged = [each.text for each in made if "a/tags" in each.captions]
    assert_share(sum("no humans" in text for text in tagged), 0.75, len(tagged))
    medium = [each for each in made if each.length == "medium"]
    assert_share(sum("a/medium" in each.captions for each in medium), 0.5, len(medium))
    pairs = Counter((each.length, each.style_at) for each in made)  # one draw tells nothing of another
    assert_share(pairs["medium", "out"], 0.12)
    pair = [text for text in tagged if "winter" in text and "red fur" in text]  # unshuffled in order, else either way
    assert_share(sum(text.index("winter") < text.index("red fur") for text in pair), 0.35, len(pair))


def test_style_words_stand_where_they_are_drawn_and_are_few_beside_a_short_content() -> None:
    captions = [CAPTIONS[0], CAPTIONS[4], Caption("t", "tags", "fox, snow")]
    texts = {
        place: one(3, Mix({"short": 1}, {place: 1}), captions).text.removeprefix("score_7, rating_safe, style_cluster_12, ")
        for place in PLACES
    }
    style = texts["before"].removesuffix(" A red fox in snow.\nfox, snow")
    assert style in {f"{text}." for text in STYLE.removesuffix(".").split(". ")}
    assert texts == {
        "before": f"{style} A red fox in snow.\nfox, snow",
        "between": f"A red fox in snow. {style}\nfox, snow",
        "after": f"A red fox in snow.\nfox, snow\n{style}",
        "out": "A red fox in snow.\nfox, snow",
    }
    assert one(3, Mix({"tags": 1}, {"after": 1}), captions).text.endswith(f"style_cluster_12, fox, snow\n{style}")
    assert STYLE in one(3, Mix({"long": 1}, {"after": 1}), [*captions, CAPTIONS[3]]).text


def test_a_kind_that_an_image_lacks_leaves_its_weight_to_the_others_and_without_any_there_is_no_content() -> None:
    made = Counter(one(n, captions=CAPTIONS[:3]).length for n in range(MANY))
    assert set(made) == {"short", "medium"}
    assert_share(made["short"], VARIED.lengths["short"] / (VARIED.lengths["short"] + VARIED.lengths["medium"]))
    assert one(1, V7, CAPTIONS[4:]).text.startswith(f"score_7, rating_safe, style_cluster_12, {STYLE} fox, red fur")
    assert one(1, V7, CAPTIONS[4:]).length == "none"
    nothing = compose(Known(b"\x02" * 32, None, None, None, []), VARIED, 7, 0, COUNT, 768)
    assert nothing == Composed("", 0, "none", "out", (), ())


def test_a_new_caption_changes_only_the_prompts_that_take_it() -> None:
    more = [*CAPTIONS, Caption("c/medium", "medium", "Another one.")]
    pairs = [(one(n), one(n, captions=more)) for n in range(1_000)]
    assert all(old == new or "c/medium" in new.captions for old, new in pairs)
    assert any("c/medium" in new.captions for _, new in pairs)


@pytest.mark.parametrize("mix", [V7, VARIED])
@pytest.mark.parametrize("most", [3, 9, 20, 40, 77, 768])
def test_no_prompt_is_above_the_bound_and_no_word_is_cut(mix: Mix, most: int) -> None:
    generator = random.Random(most)
    sentences = ["A red fox sits in the snow.", "Behind the fox stands a pine!", "x" * 200 + " y.", "Снег лежит.", "Is a stone there?"]
    for n in range(400):
        texts = {kind: " ".join(generator.choices(sentences, k=generator.randint(1, 40))) for kind in ("short", "medium", "long", "style")}
        tags = ", ".join(f"tag {number}" for number in range(generator.randint(0, 200)))
        captions = [Caption(kind, kind, text) for kind, text in {**texts, "tags": tags}.items() if text]
        composed = one(n, mix, captions, most=most)
        assert composed.tokens == COUNT(composed.text) <= most
        words = set(" ".join([*texts.values(), tags, "score_7, rating_safe, style_cluster_12,"]).split())
        assert {word.rstrip(",") for word in composed.text.split()} <= {word.rstrip(",") for word in words}


def test_what_is_too_long_loses_its_parts_in_the_stated_order() -> None:
    captions = [
        Caption("l", "long", "One two three. Four five six."),
        Caption("s", "style", "Oil. Soft light."),
        Caption("t", "tags", "aa, bb, cc"),
    ]
    whole = one(1, V7, captions)
    assert not whole.cut
    texts = []
    for most in range(whole.tokens, 0, -1):
        texts.append(one(1, V7, captions, most=most).text)
    marks = "score_7, rating_safe, style_cluster_12,"
    order = [
        f"{marks} One two three. Four five six. Oil. Soft light.\naa, bb, cc",
        f"{marks} One two three. Four five six. Oil. Soft light.\naa",
        f"{marks} One two three. Four five six. Oil. Soft light.",
        f"{marks} One two three. Four five six. Oil.",
        f"{marks} One two three. Four five six.",
        f"{marks} One two three.",
        f"{marks} One two",
        f"{marks} One",
        marks.removesuffix(","),
        "score_7, rating_safe",
        "score_7",
        "",
    ]
    assert [text for text in dict.fromkeys(texts) if text in order] == [text for text in order if text in texts]
    assert set(texts) <= {*order, order[0].removesuffix(", cc")}
    assert one(1, V7, captions, most=12).cut == ("tags", "style", "content", "words")


def test_a_name_without_weight_is_never_picked_and_an_empty_choice_is_none() -> None:
    assert {pick({"a": 0, "b": 2, "c": 1}, at / 100) for at in range(100)} == {"b", "c"}
    assert pick({}, 0.5) is None and pick({"a": 0}, 0.5) is None
    assert pick({"a": 0.1, "b": 0.2}, 1 - 2**-53) == "b"
