"""What several captioners said of the same images -> measures: lengths, tags named, text read, refusals, sameness, money, and where they disagree.

Shares and means come as (mean, lower, upper): 95 % percentiles over a bootstrap of images. Lengths, sameness and counts have none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from udfs import caption_words, explained
from udfs.caption_answer import LISTS, TEXTS
from udfs.caption_words import CONTENT

MEASURES_VERSION = 2
KINDS = (*TEXTS, *LISTS)
NOT_SHOWN = "not_shown"  # the refusal of an image that another captioner called prohibited before this one was asked
START = 3  # words of a text's beginning
SCHEMA = "image_id BINARY, disagreement DOUBLE"
Interval = tuple[float, float, float]


class Given(NamedTuple):
    """What is known of an image without a captioner. tags: as sources and taggers give them; read: the text that a detector read, "" for none."""

    image_id: bytes
    tags: Sequence[str]
    read: str


class Said(NamedTuple):
    """What a captioner made of an image. texts, tokens: kind -> of each part (`ocr` [""]: it saw no text); refusal: the reject's code, "" where there
    are texts, NOT_SHOWN: it has no part in this captioner's figures; calls, tokens and nano-dollars of all tries.
    """

    texts: Mapping[str, Sequence[str]]
    tokens: Mapping[str, Sequence[int]]
    refusal: str = ""
    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    nano_usd: int = 0


def compare(
    given: Sequence[Given], said: Mapping[str, Sequence[Said]], bands: Mapping[str, tuple[int, int]], seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(images; captioner -> what it said of each of them, in their order; part -> least and most tokens) -> (measures, a row an image and pair).

    Raises ValueError for a captioner that was not asked about every image.
    """
    if wrong := [name for name, rows in said.items() if len(rows) != len(given)]:
        raise ValueError(f"captioners: given {wrong} with another number of images than the {len(given)}; ask all about the same ones")
    tags = [caption_words.tags_of(one.tags) for one in given]
    recalls = {
        name: [_recall(tags[at], one.texts) if one.refusal != NOT_SHOWN else None for at, one in enumerate(rows)]
        for name, rows in said.items()
    }
    captioners = {name: _captioner(given, rows, tags, recalls[name], bands, seed) for name, rows in said.items()}
    pairs, images = [], []
    for first, second in combinations(said, 2):
        each = [caption_words.agreement(one.texts, other.texts) for one, other in zip(said[first], said[second], strict=True)]
        # what two say of different images agrees by chance
        others = [caption_words.agreement(said[first][at].texts, said[second][at - 1].texts) for at in range(len(given)) if len(given) > 1]
        more = [a - b for a, b in zip(recalls[first], recalls[second], strict=True) if a is not None and b is not None]
        told = {"first": first, "second": second, "images": sum(one is not None for one in each)}
        told |= {"agreement": _mean(each, seed), "chance": _average(others), "recall_difference": _mean(more, seed)}
        pairs.append(told)
        images += [
            {"image_id": one.image_id, "first": first, "second": second, "agreement": told}
            for one, told in zip(given, each, strict=True)
            if told is not None
        ]
    return {"images": len(given), "captioners": captioners, "pairs": pairs}, images


def disagreements(frames: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """Frames with image_id and said, a list of (fingerprint, kind, text) -> SCHEMA: 1 - the mean agreement over all pairs of the captioners; images
    of which no pair has a kind in common are left out.
    """
    for frame in frames:
        rows = []
        for image_id, said in zip(frame["image_id"], frame["said"], strict=True):
            by: dict[str, dict[str, list[str]]] = {}
            for one in said:
                by.setdefault(one["fingerprint"], {}).setdefault(one["kind"], []).append(one["text"])
            each = [caption_words.agreement(by[first], by[second]) for first, second in combinations(sorted(by), 2)]
            if (mean := _average(each)) is not None:
                rows.append((image_id, 1.0 - mean))
        yield pd.DataFrame(rows, columns=["image_id", "disagreement"])


def _captioner(
    given: Sequence[Given],
    rows: Sequence[Said],
    tags: Sequence[Sequence[str]],
    recalls: Sequence[float | None],
    bands: Mapping[str, tuple[int, int]],
    seed: int,
) -> dict[str, Any]:
    shown = [at for at, one in enumerate(rows) if one.refusal != NOT_SHOWN]
    withheld = len(rows) - len(shown)
    given, rows = [given[at] for at in shown], [rows[at] for at in shown]
    tags, recalls = [tags[at] for at in shown], [recalls[at] for at in shown]
    kinds = [kind for kind in KINDS if any(any(one.texts.get(kind, ())) for one in rows)]
    told: dict[str, Any] = {
        "not_shown": withheld,
        "captioned": sum(bool(one.texts) for one in rows),
        "refusals": dict(sorted(Counter(one.refusal for one in rows if one.refusal).items())),
        "refused": _mean([float(bool(one.refusal)) for one in rows], seed),
        "tag_recall": _mean(recalls, seed),
        "tags_given": sum(map(bool, tags)),
        "kinds": {kind: _kind(kind, rows, tags, bands.get(kind), seed) for kind in kinds},
    }
    return told | _text_read(given, rows, any("ocr" in one.texts for one in rows), seed) | _paid(rows, seed)


def _kind(kind: str, rows: Sequence[Said], tags: Sequence[Sequence[str]], band: tuple[int, int] | None, seed: int) -> dict[str, Any]:
    each = [(text, tokens) for one in rows for text, tokens in zip(one.texts.get(kind, ()), one.tokens.get(kind, ()), strict=True) if text]
    texts, counts = [text for text, _ in each], [tokens for _, tokens in each]
    low, middle, high = np.quantile(counts, (0.1, 0.5, 0.9))
    told: dict[str, Any] = {"images": sum(any(one.texts.get(kind, ())) for one in rows), "texts": len(texts)}
    told |= {"p10": float(low), "median": float(middle), "p90": float(high), "in_band": None, "tag_recall": None}
    if band is not None:  # an image without the text has none of the right length
        inside = [float(any(band[0] <= tokens <= band[1] for tokens in one.tokens.get(kind, ()))) for one in rows]
        told["in_band"] = _mean(inside, seed)
    if kind in CONTENT:
        told["tag_recall"] = _mean([_recall(tags[at], {kind: one.texts.get(kind, ())}) for at, one in enumerate(rows)], seed)
    return told | sameness(texts)


def sameness(texts: Sequence[str]) -> dict[str, float]:
    """Texts of one kind, one captioner -> shares: distinct_words of all its words (falls with length and number: compare within a kind),
    duplicates: texts that stand there more than once, same_start: texts that begin with the most frequent START words.
    """
    split = [caption_words.words(text) for text in texts]
    every = [word for one in split for word in one]
    same, starts = Counter(map(tuple, split)), Counter(tuple(one[:START]) for one in split)
    return {
        "distinct_words": len(set(every)) / max(len(every), 1),
        "duplicates": sum(count for count in same.values() if count > 1) / len(texts),
        "same_start": max(starts.values()) / len(texts),
    }


def _text_read(given: Sequence[Given], rows: Sequence[Said], gives_text: bool, seed: int) -> dict[str, Any]:
    """Text against the detector's: of a captioner that gives none at all nothing is said."""
    similar, share, extra = [], [], []
    for image, one in zip(given, rows, strict=True):
        told = "\n".join(one.texts.get("ocr", ()))
        if image.read.strip():
            similar.append(caption_words.similarity(image.read, told))
            share.append(caption_words.found(image.read, told))
        elif one.texts:
            extra.append(float(bool(told)))
    if not gives_text:
        similar, share, extra = [], [], []
    found = {"ocr_similarity": _mean(similar, seed), "ocr_words": _mean(share, seed), "ocr_where_none_was_read": _mean(extra, seed)}
    return found | {"ocr_images": sum(bool(image.read.strip()) for image in given)}


def _paid(rows: Sequence[Said], seed: int) -> dict[str, Any]:
    calls = sum(one.calls for one in rows)
    if not calls:
        return {"calls": 0, "input_tokens": None, "output_tokens": None, "usd": None}
    each = {"input_tokens": [one.input_tokens for one in rows], "output_tokens": [one.output_tokens for one in rows]}
    told = {name: _mean(values, seed) for name, values in each.items()}
    return told | {"calls": calls, "usd": _mean([one.nano_usd / 1e9 for one in rows], seed)}


def _recall(tags: Sequence[str], texts: Mapping[str, Sequence[str]]) -> float | None:
    """None of an image without tags; a refused image names none."""
    return len(caption_words.named(tags, texts)) / len(tags) if tags else None


def _mean(values: Sequence[float | None], seed: int) -> Interval | None:
    known = [value for value in values if value is not None]
    return explained.interval(np.array(known, np.float64), seed) if known else None


def _average(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
