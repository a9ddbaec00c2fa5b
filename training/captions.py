"""All texts of an image -> the one, or the prompt composed of some, that it is trained with in this epoch.

The choice is a hash of (seed, epoch, image id): the same on any rank, in any batch, after any restart and at any world size,
and another one in the next epoch. So variety costs no copies of the data and no state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from conf.section import Mistake
from udfs import compose_prompt

NO_CAPTIONS = ("ocr", "style")  # a text in the picture, and words on how it is made: neither says what it shows
MIXES = {"v7": compose_prompt.V7, "varied": compose_prompt.VARIED}


class Caption(NamedTuple):
    """id: of its row in `captions`; of a source's text, made from the text."""

    kind: str
    text: str
    id: str


_LIST = TypeAdapter(list[dict[str, str]])


def choose(raw_json: bytes, image_id: bytes, seed: int, epoch: int, shares: Mapping[str, float], no_text: float) -> str:
    """[{"id": "...", "kind": "short", "text": "..."}, ...] as UTF-8 JSON -> one of the texts, "" in `no_text` of the cases or when there is none to take.

    With `shares` a kind is drawn by its share among the kinds that the image has, then one of its texts; kinds that are not in
    `shares` are not taken. Without, all texts are alike, but for NO_CAPTIONS. An empty text (of OCR: none was seen) is never taken. The order of the list
    does not matter.
    """
    return choose_from(read(raw_json, image_id), image_id, seed, epoch, shares, no_text)


def compose(
    raw_json: bytes,
    image_id: bytes,
    marks: tuple[int, str, int],
    seed: int,
    epoch: int,
    mix: str,
    no_text: float,
    count: Callable[[str], int],
    most: int,
) -> str:
    """As `choose`, but a prompt of the mix: of its texts, score, rating and style cluster (marks; -1 and "" for none), at most `most` tokens."""
    if _draw(seed, epoch, image_id)[0] < no_text:
        return ""
    texts = [compose_prompt.Caption(one.id, one.kind, one.text) for one in read(raw_json, image_id)]
    score, rating, cluster = marks
    known = compose_prompt.Known(image_id, score if score >= 0 else None, rating or None, cluster if cluster >= 0 else None, texts)
    return compose_prompt.compose(known, MIXES[mix], seed, epoch, count, most).text


def choose_from(captions: list[Caption], image_id: bytes, seed: int, epoch: int, shares: Mapping[str, float], no_text: float) -> str:
    """As `choose`, of captions that are read already."""
    drop, kind_at, text_at = _draw(seed, epoch, image_id)
    captions = [c for c in captions if c.text]
    if drop < no_text:
        return ""
    if shares:
        kind = _pick_kind(sorted({c.kind for c in captions} & set(shares)), shares, kind_at)
        captions = [c for c in captions if c.kind == kind]
    else:
        captions = [c for c in captions if c.kind not in NO_CAPTIONS]
    texts = sorted(captions)
    return texts[int(text_at * len(texts))].text if texts else ""


def read(raw_json: bytes, image_id: bytes) -> list[Caption]:
    """A row's captions column -> its captions. Raises Mistake naming the image when it is not such a list."""
    try:
        return [Caption(one["kind"], one["text"], one["id"]) for one in _LIST.validate_json(raw_json, strict=True)]
    except (ValidationError, KeyError):
        raise Mistake(
            f'image {image_id.hex()}: captions: given {raw_json[:80]!r}, expected a JSON list of {{"id": ..., "kind": ..., "text": ...}}; export again'
        ) from None


def check_kinds(rows: list[list[Caption]], shares: Mapping[str, float], mix: str | None = None) -> str:
    """-> a line on the kinds of `shares` that none of these images has, "" when there are none. Raises Mistake when they have no kind of it.

    mix: whose kinds of content they are; of one nothing is raised, as its prompts have tags and marks besides.
    """
    found = {caption.kind for captions in rows for caption in captions if caption.text}
    missing = sorted(set(shares) - found)
    if not missing:
        return ""
    asked_by = "captions" if mix is None else f"mix {mix}"
    told = (
        f"train_diffusion.{asked_by}: given {sorted(shares)}; of {len(rows)} held-out images none has {missing}, they have {sorted(found)}"
    )
    if len(missing) == len(shares) and mix is None:
        raise Mistake(f"{told}: nothing would be trained with a text")
    return told


def _pick_kind(kinds: list[str], shares: Mapping[str, float], at: float) -> str | None:
    """A point in [0, 1) -> the kind in whose part of the line it lies; None when there is no kind."""
    point = at * sum(shares[kind] for kind in kinds)
    for kind in kinds:
        point -= shares[kind]
        if point < 0:
            return kind
    return kinds[-1] if kinds else None  # the last sum was rounded


def _draw(seed: int, epoch: int, image_id: bytes) -> tuple[float, float, float]:
    """Three numbers in [0, 1), independent of one another and of every other (seed, epoch, image)."""
    hashed = hashlib.sha256(json.dumps(["captions", seed, epoch, image_id.hex()]).encode()).digest()
    first, second, third = (int.from_bytes(hashed[at : at + 6], "little") / 2**48 for at in (0, 8, 16))
    return first, second, third
