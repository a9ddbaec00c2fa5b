"""Who is compared on which images, by what the rows say; no Spark."""

from __future__ import annotations

import re

import pytest

from conf.captions import CompareCaptioners, Tier
from conf.section import Mistake
from conf.settings import Settings, load
from jobs import caption_rows, compared_rows
from jobs.compared_rows import Rows
from tests.jobs.conftest import REPOSITORY

MINE = "tags:none:studbook-1:"
OTHER, OLD = "gemini:a/b:c:studbook-1:0123456789ab", "openai:vl:studbook-0:ba9876543210"


@pytest.fixture
def settings() -> Settings:
    return load(REPOSITORY / "conf/demo.yaml").model_copy(
        update={"compare_captioners": CompareCaptioners(captioners=("tags",), covers=0.75)}
    )


def text(fingerprint: str, image: str, kind: str = "short", part: int = 0) -> dict[str, object]:
    return {
        "image_id": image,
        "fingerprint": fingerprint,
        "kind": kind,
        "part": part,
        "text": f"{kind} {part}",
        "tokens": 2,
        "tokenizer": "t",
    }


def rows(settings: Settings, images: str = "abcd") -> Rows:
    mine = caption_rows.fingerprint(settings, settings.captions.tiers[0])
    assert mine.startswith(MINE)
    texts = [*(text(mine, image) for image in "abcd"), *(text(OTHER, image) for image in "ac"), text(OLD, "a")]
    refused = [{"image_id": "b", "fingerprint": OTHER, "code": "blocked"}, {"image_id": "a", "fingerprint": OTHER, "code": "timeout"}]
    given = [{"image_id": f"{image * 64}", "tags": [], "read": ""} for image in images]
    whole = [one | {"image_id": str(one["image_id"]) * 64} for one in texts]
    calls = [{"image_id": "b" * 64, "fingerprint": OTHER, "calls": 2, "input_tokens": 5, "output_tokens": 0, "nano_usd": 7}]
    return Rows(given, whole, [one | {"image_id": one["image_id"] * 64} for one in refused], calls)


def test_compared_is_who_was_asked_about_enough_on_the_images_that_all_were_asked_about(settings: Settings) -> None:
    asked = compared_rows.who(settings, rows(settings))
    assert list(asked.names.values()) == ["a/b:c/studbook-1/012345", "tags"] and asked.left_out == {"vl/studbook-0/ba9876": 1}
    assert asked.images == ["a" * 64, "b" * 64, "c" * 64] and asked.sample == 4
    given, said = compared_rows.for_kernel(rows(settings), asked)
    assert [one.image_id.hex() for one in given] == asked.images
    other = said["a/b:c/studbook-1/012345"]
    assert [one.refusal for one in other] == ["", "blocked", ""]  # a text came after the first reject
    assert (other[1].calls, other[1].input_tokens, other[1].nano_usd, other[1].texts) == (2, 5, 7, {})
    assert other[0].texts == {"short": ["short 0"]} and other[0].tokens == {"short": [2]}


def test_an_image_that_one_of_them_calls_prohibited_stays_and_who_was_never_shown_it_says_so(settings: Settings) -> None:
    strict = settings.model_copy(update={"compare_captioners": CompareCaptioners(captioners=("tags",), covers=0.9)})
    told, mine = rows(settings), caption_rows.fingerprint(settings, settings.captions.tiers[0])
    texts = [one for one in told.texts if (one["fingerprint"], one["image_id"]) != (mine, "b" * 64)]
    texts.append(text(OTHER, "d") | {"image_id": "d" * 64})
    banned = [one | {"code": "prohibited"} if one["code"] == "blocked" else one for one in told.refusals]
    known = told._replace(texts=texts, refusals=banned)
    asked = compared_rows.who(strict, known)  # `tags` was asked about 3, of 3 that it could be asked about
    assert asked.images == [one * 64 for one in "abcd"] and asked.left_out == {"vl/studbook-0/ba9876": 1}
    _, said = compared_rows.for_kernel(known, asked)
    assert [one.refusal for one in said["tags"]] == ["", "not_shown", "", ""]
    assert [one.refusal for one in said["a/b:c/studbook-1/012345"]] == ["", "prohibited", "", ""]
    by_another = [one | {"fingerprint": OLD} if one["code"] == "prohibited" else one for one in banned]
    asked = compared_rows.who(strict, known._replace(refusals=by_another))  # nobody who is compared has seen it: no finding about them
    assert asked.images == [one * 64 for one in "acd"]


def test_one_captioner_or_none_is_no_comparison_and_who_was_asked_is_told(settings: Settings) -> None:
    stricter = settings.model_copy(update={"compare_captioners": CompareCaptioners(captioners=("tags",), covers=0.9)})
    told = "of the sample's 4 images were asked: a/b:c/studbook-1/012345 (3), vl/studbook-0/ba9876 (1), tags (4); two captioners must have been asked about 90%"
    with pytest.raises(Mistake, match=re.escape(told)):
        compared_rows.who(stricter, rows(settings))
    with pytest.raises(Mistake, match="of the sample's 1 images were asked: nobody"):
        compared_rows.who(settings, Rows(rows(settings, "a").given, [], [], []))


def test_captioners_have_the_configs_names_and_with_the_tier_where_it_asks_for_other_parts(settings: Settings) -> None:
    tiers = (*settings.captions.tiers, Tier(name="few", captioner="tags", parts=("tags",)))
    both = settings.model_copy(update={"captions": settings.captions.model_copy(update={"tiers": tiers})})
    names = [caption_rows.fingerprint(both, tier) for tier in tiers]
    assert compared_rows.short_names(both, [*names, OLD]) == {names[0]: "tags", names[1]: "tags/few", OLD: "vl/studbook-0/ba9876"}


def test_the_content_of_rows_is_that_of_every_value(settings: Settings) -> None:
    told = rows(settings)
    changed = told._replace(texts=[told.texts[0] | {"text": "another"}, *told.texts[1:]])
    assert told.content == rows(settings).content != changed.content
