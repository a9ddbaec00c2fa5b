"""Flags from detections as the tables hold them: tags, rating, origin, text, watermark."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest

from conf.enrichment import Flags
from udfs import flags
from udfs.flags import Told

OPTIONS = Flags().model_dump()
KERNELS = {"wd": "tagger", "e621": "tagger", "open-nsfw": "nsfw", "rapidocr": "text"}
TOLD = Told(OPTIONS, KERNELS)


def label(name: str, kind: str, p: float) -> dict[str, Any]:
    return {"name": name, "kind": kind, "p": p}


def seen(detector: str, *labels: dict[str, Any], regions: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"detector": detector, "labels": list(labels), "regions": list(regions)}


def region(text: str, x: float, y: float, width: float = 0.2, height: float = 0.04, p: float = 0.95) -> dict[str, Any]:
    """A box with its top left corner at (x, y)."""
    return {"text": text, "p": p, "box": [x, y, x + width, y, x + width, y + height, x, y + height]}


def rated(detector: str, **ratings: float) -> dict[str, Any]:
    known = {"general": 0.01, "sensitive": 0.01, "questionable": 0.01, "explicit": 0.01} | ratings
    return seen(detector, *(label(name, "rating", p) for name, p in known.items()))


def test_tags_are_the_union_over_taggers_by_each_ones_threshold() -> None:
    wd = seen(
        "wd",
        label("long_hair", "general", 0.35),
        label("^_^", "general", 0.9),
        label("short_hair", "general", 0.349),
        label("hero_(series)", "character", 0.85),
        label("villain", "character", 0.84),
        label("general", "rating", 0.99),
    )
    e621 = seen("e621", label("long_hair", "general", 0.6), label("felid", "species", 0.5), label("tail", "general", 0.49))
    e621["labels"].append(label("villain", "character", 0.5))
    options = OPTIONS | {"thresholds": {"e621": 0.5}}
    assert flags.tags_of([wd, e621], options) == ["^_^", "long hair", "felid", "character:hero (series)", "character:villain"]
    assert flags.tags_of([wd], options) == ["^_^", "long hair", "character:hero (series)"]
    assert flags.tags_of([], options) == []


def test_the_likeliest_rating_is_mapped_and_the_most_severe_evidence_stands() -> None:
    assert flags.rate([rated("wd", sensitive=0.6)], None, TOLD) == ("safe", "wd", None)
    assert flags.rate([rated("wd", general=0.6), rated("e621", explicit=0.5)], None, TOLD) == ("explicit", "e621", None)
    other = Told(OPTIONS | {"ratings": OPTIONS["ratings"] | {"sensitive": "questionable"}}, KERNELS)
    assert flags.rate([rated("wd", sensitive=0.6)], None, other)[:2] == ("questionable", "wd")
    nsfw = seen("open-nsfw", label("nsfw", "nsfw", 0.95))
    assert flags.rate([rated("wd", general=0.9), nsfw], "photo", TOLD)[:2] == ("explicit", "open-nsfw")
    assert flags.rate([rated("wd", explicit=0.9), nsfw], "photo", TOLD)[:2] == ("explicit", "open-nsfw + wd")
    assert flags.rate([seen("rapidocr")], "photo", TOLD) == (None, None, None)


@pytest.mark.parametrize(
    ("domain", "p", "rating"),
    [
        ("photo", 0.39, "safe"),
        ("photo", 0.4, "questionable"),
        ("photo", 0.8, "explicit"),
        ("drawing", 0.8, "questionable"),
        ("drawing", 0.44, "safe"),
        ("drawing", 0.9, "explicit"),
        (None, 0.8, "explicit"),  # of unknown domain: as a photograph
    ],
)
def test_the_photo_models_number_counts_by_domain(domain: str | None, p: float, rating: str) -> None:
    found = flags.rate([seen("open-nsfw", label("nsfw", "nsfw", p))], domain, TOLD)
    assert found[:2] == (rating, "open-nsfw") and found[2] == pytest.approx(p)


def test_a_picture_whose_style_is_not_known_has_no_domain() -> None:
    assert [flags.domain_of(style, OPTIONS) for style in ("photo", "anime", "other", None)] == ["photo", "drawing", None, None]


def test_an_origin_is_declared_detected_or_unknown_with_its_evidence() -> None:
    assert flags.judge_origin([], None, None, OPTIONS) == ("unknown", ["no detector"])
    assert flags.judge_origin([], 0.95, "ai-head:3", OPTIONS) == ("detected", ["detected, 0.950 by ai-head:3"])
    assert flags.judge_origin([], 0.2, "ai-head:3", OPTIONS) == ("unknown", ["not detected, 0.200 by ai-head:3"])
    generated, evidence = flags.judge_origin([], float("nan"), "ai-head:3", OPTIONS)  # a classifier that is not to be trusted
    assert (generated, evidence[0].startswith("no trustworthy detector: ai-head:3")) == ("unknown", True)
    told = flags.judge_origin(["png:parameters: a cat"], 0.2, "ai-head:3", OPTIONS)
    assert told == ("declared", ["declared by png:parameters: a cat", "not detected, 0.200 by ai-head:3"])


def test_text_is_joined_measured_and_not_read_into_patterns() -> None:
    regions = (region("SALE", 0.1, 0.4), region("SSS", 0.5, 0.5), region("now 50%", 0.1, 0.6), region("maybe", 0.1, 0.7, p=0.4))
    found = flags.read_text([seen("rapidocr", regions=regions)], None, TOLD)
    assert found == {"has_text": True, "text": "SALE\nnow 50%", "text_share": pytest.approx(0.016), "watermark": 0.0}
    nothing = flags.read_text([seen("rapidocr")], None, TOLD)
    assert nothing == {"has_text": False, "text": None, "text_share": 0.0, "watermark": 0.0}
    assert set(flags.read_text([rated("wd")], None, TOLD).values()) == {None}
    whole = tuple(region("page", 0, 0, 1, 1) for _ in range(3))
    assert flags.read_text([seen("rapidocr", regions=whole)], None, TOLD)["text_share"] == 1.0


@pytest.mark.parametrize(
    ("regions", "repeated", "expected"),
    [
        ([region("My Title", 0.4, 0.45, 0.3, 0.2)], [], 0.0),  # in the middle, once
        ([region("STUDIO x", 0.7, 0.94)], ["studiox"], 0.9),  # many pictures have it there
        ([region("ＳＴＵＤＩＯ－Ｘ", 0.7, 0.94)], ["studiox"], 0.9),
        ([region("www.shop.com", 0.4, 0.95)], [], 0.8),
        ([region("© A. Painter", 0.02, 0.02)], [], 0.8),
        ([region("demo copy", 0.1 + 0.2 * n, 0.3 + 0.1 * n) for n in range(3)], [], 0.7),  # the same string all over
        ([region("A. Painter", 0.75, 0.93)], [], 0.5),  # small, below
        ([region("CHAPTER ONE", 0.3, 0.01, 0.4, 0.1)], [], 0.3),
    ],
)
def test_what_makes_a_watermark_likely(regions: list[dict[str, Any]], repeated: list[str], expected: float) -> None:
    sure = [one | {"p": 1.0} for one in regions]
    assert flags.watermark(sure, repeated, OPTIONS) == pytest.approx(expected)
    unsure = [one | {"p": 0.6} for one in regions]
    assert flags.watermark(unsure, repeated, OPTIONS) == pytest.approx(0.6 * expected)


def test_only_strings_at_an_edge_are_counted_across_pictures() -> None:
    regions = [region("Studio X", 0.7, 0.94), region("STUDIO x", 0.7, 0.01), region("Title", 0.4, 0.5), region("a1", 0.0, 0.0)]
    frame = pd.DataFrame({"image_id": [b"1", b"2"], "regions": [json.dumps(regions), "[]"]})
    (found,) = flags.edge_strings([frame], OPTIONS)
    assert found.values.tolist() == [[b"1", "studiox"]]


def test_a_box_that_stands_askew_has_its_own_area() -> None:
    assert flags.area([0.5, 0.4, 0.6, 0.5, 0.5, 0.6, 0.4, 0.5]) == pytest.approx(0.02)


def test_a_row_comes_out_for_every_row_with_the_columns_of_the_table() -> None:
    rows = [
        {"image_id": b"a", "style": None, "ai_marks": [], "ai_p": None, "ai_by": None, "detections": None, "repeated": None},
        {
            "image_id": b"b",
            "style": "photo",
            "ai_marks": ["x"],
            "ai_p": 0.9,
            "ai_by": "m:1",
            "detections": json.dumps([rated("wd", general=0.9)]),
            "repeated": ["s"],
        },
    ]
    (found,) = flags.flag([pd.DataFrame(rows)], OPTIONS, KERNELS)
    assert list(found.columns) == [column.split()[0] for column in flags.SCHEMA.split(", ")]
    assert found.ai_generated.tolist() == ["unknown", "declared"] and found.rating.tolist() == [None, "safe"]
    assert found.ai_evidence[0] == ["no detector"]
