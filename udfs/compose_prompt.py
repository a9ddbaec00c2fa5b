"""All texts of an image -> the prompt that it is trained with in this epoch, and its tokens.

V7 learned from one very long caption an image in one order, and follows prompts badly for it: short ones, tags, and a style that the content does
not suggest. The mix draws the length of the content, leaves out score, rating, style cluster, tags and style words now and then, shuffles tags, and
puts the style words before, between or after. V7 itself is the mix `V7`. Its order and separators: the released pipeline (github.com/fuhrriel/pony-captioner,
a port of the team's notebook, which writes a blank before the line break that is not part of the recipe).

    score_7, rating_safe, style_cluster_12, Soft light. A red fox in snow.
    snow, fox

Every draw is a hash of (seed, epoch, image id, what is drawn) and, among texts or tags, of their ids and words: the same on any rank, in any order of
the inputs, after any restart. A text that comes later changes only the prompts that take it.

A prompt is never longer than `most` tokens. What is too long loses, in this order, until it fits: tags from the last on, sentences of the style
from the last on, sentences of the content from the last but not the first, words of that one from the last on, then style_cluster, rating, score.
Where tags are the content the style goes before them. No word is cut.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

KERNEL_VERSION = 1
TAGS, STYLE, NONE = "tags", "style", "none"  # kinds of captions; a prompt without content
BEFORE, BETWEEN, AFTER, OUT = PLACES = ("before", "between", "after", "out")  # of the style words: content, tags, and none at all
STYLE_SENTENCES = {TAGS: 1, "short": 1, "medium": 2}  # beside contents of these kinds; beside others all
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"'(\w])")


class Caption(NamedTuple):
    """A row of `captions`. id: its key in one string, the same for ever; kind `tags`: one text, tags apart by commas."""

    id: str
    kind: str
    text: str


class Known(NamedTuple):
    """What the tables say of an image; None: nothing."""

    image_id: bytes
    score: int | None
    rating: str | None
    cluster: int | None
    captions: Sequence[Caption]


class Mix(NamedTuple):
    """lengths: kind of the content -> how often it is taken beside the others that the image has; style_at: one of PLACES -> the same.

    Shares from 0 to 1: drop_*: without that mark; drop_tags: without any tag beside a content; drop_tag: of the tags; shuffle_tags: of the prompts.
    """

    lengths: Mapping[str, float]
    style_at: Mapping[str, float]
    drop_score: float = 0.0
    drop_rating: float = 0.0
    drop_cluster: float = 0.0
    drop_tags: float = 0.0
    drop_tag: float = 0.0
    shuffle_tags: float = 0.0


V7 = Mix({"long": 1.0}, {BETWEEN: 1.0})
# a proposal: nobody has trained with it yet
VARIED = Mix({TAGS: 1.0, "short": 3.0, "medium": 3.0, "long": 2.0}, dict.fromkeys(PLACES, 1.0), 0.3, 0.3, 0.3, 0.3, 0.25, 0.8)


class Composed(NamedTuple):
    """length: the content's kind, or NONE; style_at: one of PLACES; captions: ids of the texts in it; cut: what lost something to the bound."""

    text: str
    tokens: int
    length: str
    style_at: str
    captions: tuple[str, ...]
    cut: tuple[str, ...]


def compose(known: Known, mix: Mix, seed: int, epoch: int, count: Callable[[str], int], most: int) -> Composed:
    """(image, mix, seed, epoch, tokens of a text, tokens at most) -> its prompt; "" for an image of which nothing is known."""
    draw = _Draw(seed, epoch, known.image_id)
    kinds = {caption.kind for caption in known.captions}
    length = pick({kind: weight for kind, weight in mix.lengths.items() if kind in kinds}, draw("length")) or NONE
    content = None if length in (TAGS, NONE) else draw.one(known.captions, length)
    tags = draw.one(known.captions, TAGS)
    if length != TAGS and draw("drop_tags") < mix.drop_tags:
        tags = None
    style = draw.one(known.captions, STYLE)
    place = pick(mix.style_at, draw("style_at")) or OUT
    if style is None or place == OUT:
        style, place = None, OUT
    score = known.score if draw("drop_score") >= mix.drop_score else None
    rating = known.rating if draw("drop_rating") >= mix.drop_rating else None
    cluster = known.cluster if draw("drop_cluster") >= mix.drop_cluster else None
    style_words = draw.some(_sentences(style), STYLE_SENTENCES.get(length))
    draft = _Draft(marks(score, rating, cluster), _sentences(content), style_words, draw.tags(tags.text, mix) if tags else [], place)
    draft, tokens, cut = _bounded(draft, length == TAGS, count, most)
    taken = tuple(caption.id for caption in (content, style, tags) if caption is not None)
    return Composed(draft.text, tokens, length, place, taken, cut)


def marks(score: int | None, rating: str | None, cluster: int | None) -> list[str]:
    """-> `score_7,` `rating_safe,` `style_cluster_12,`: those that are known, in V7's order. One score, never V6's chain score_9, score_8_up, ..."""
    assert score is None or 0 <= score <= 9, score
    named = (("score", score), ("rating", rating), ("style_cluster", cluster))
    return [f"{name}_{value}," for name, value in named if value is not None]


def pick(weights: Mapping[str, float], at: float) -> str | None:
    """(name -> weight, a point in [0, 1)) -> the name in whose part of the line it lies, whatever their order; None when there is no name."""
    names = sorted(name for name, weight in weights.items() if weight > 0)
    point = at * sum(weights[name] for name in names)
    for name in names:
        point -= weights[name]
        if point < 0:
            return name
    return names[-1] if names else None  # the last sum was rounded


class _Draw:
    """(seed, epoch, image) -> numbers in [0, 1), independent of one another by their names."""

    def __init__(self, seed: int, epoch: int, image_id: bytes) -> None:
        self._whose = ["compose", seed, epoch, image_id.hex()]

    def __call__(self, *what: str) -> float:
        hashed = hashlib.sha256(json.dumps([*self._whose, *what]).encode()).digest()
        return int.from_bytes(hashed[:6], "little") / 2**48

    def one(self, captions: Sequence[Caption], kind: str) -> Caption | None:
        """One of a kind; each is as likely, and another one's coming does not change the order of the rest."""
        mine = [caption for caption in captions if caption.kind == kind and caption.text.strip()]
        return min(mine, key=lambda caption: (self("caption", caption.id), caption)) if mine else None

    def some(self, sentences: list[str], most: int | None) -> list[str]:
        """At most so many of them, in their order."""
        if most is None or len(sentences) <= most:
            return sentences
        taken = sorted(range(len(sentences)), key=lambda at: self("sentence", sentences[at]))[:most]
        return [sentences[at] for at in sorted(taken)]

    def tags(self, text: str, mix: Mix) -> list[str]:
        """`fox, snow` -> those that are kept, at least one, perhaps in another order."""
        tags = list(dict.fromkeys(tag for one in text.lower().split(",") if (tag := " ".join(one.split()))))
        kept = [tag for tag in tags if self("drop_tag", tag) >= mix.drop_tag] or tags[:1]
        return sorted(kept, key=lambda tag: self("order", tag)) if self("shuffle_tags") < mix.shuffle_tags else kept


@dataclass(frozen=True)
class _Draft:
    """The parts of a prompt, in pieces that may be dropped."""

    marks: list[str]
    content: list[str]
    style: list[str]
    tags: list[str]
    place: str

    @property
    def text(self) -> str:
        content, style = " ".join(self.content), " ".join(self.style)
        first = [style, content] if self.place == BEFORE else [content] if self.place == AFTER else [content, style]
        if content:
            line = " ".join(filter(None, [*self.marks, *first]))
            lines = [line, ", ".join(self.tags)]
        else:  # tags are the content
            said = [style, ", ".join(self.tags)] if self.place in (BEFORE, BETWEEN) else [", ".join(self.tags)]
            lines = [" ".join(filter(None, [*self.marks, *said]))]
        return "\n".join(filter(None, [*lines, style if self.place == AFTER else ""])).removesuffix(",")  # marks alone


def _bounded(draft: _Draft, tags_last: bool, count: Callable[[str], int], most: int) -> tuple[_Draft, int, tuple[str, ...]]:
    """-> (what of it fits, its tokens, the parts that lost something)."""
    tokens, cut = count(draft.text), []
    for part in ("style", "tags", "content", "marks") if tags_last else ("tags", "style", "content", "words", "marks"):
        if tokens <= most:
            break
        name = "content" if part == "words" else part
        pieces: list[str] = getattr(draft, name)
        if part == "words":
            pieces = " ".join(pieces).split()
        least = 1 if part == "content" and pieces else 0
        draft = _fewer(draft, name, pieces, least, count, most)
        tokens = count(draft.text)
        if len(getattr(draft, name)) < len(pieces):
            cut.append(part)
    assert tokens <= most, (tokens, most)
    return draft, tokens, tuple(cut)


def _fewer(draft: _Draft, part: str, pieces: list[str], least: int, count: Callable[[str], int], most: int) -> _Draft:
    """The most of the first pieces, `least` or more, with which it fits; `least` when none fits."""

    def first(many: int) -> _Draft:
        changed: dict[str, Any] = {part: pieces[:many]}
        return replace(draft, **changed)

    low, high = least, len(pieces)
    while low < high - 1:  # `high` does not fit
        middle = (low + high) // 2
        if count(first(middle).text) <= most:
            low = middle
        else:
            high = middle
    return first(low)


def _sentences(caption: Caption | None) -> list[str]:
    return _SENTENCE.split(" ".join(caption.text.split())) if caption is not None else []
