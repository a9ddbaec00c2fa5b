"""What is known of an image -> an answer as a captioner gives it, composed without a model: the engine `tags`.

It says nothing that is not in its inputs: its words are those of the alt text, the tags, the style class, the rating and the text that a detector
read, and some to join them (udfs/tag_words.py). It gives short, medium, tags, ocr and language, each where it passes caption_answer.check; of little
knowledge there is no medium that is long enough. It never gives long or style, and no ocr where no text is known: that none was read says nothing of
a picture that no detector has seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from udfs import tag_words
from udfs.caption_answer import Rules, check
from udfs.reject import Reject

KERNEL_VERSION = 2
NAME = "tags"
PARTS = ("short", "medium", "tags", "ocr", "language")  # that it may give
SHORT_TAGS, MEDIUM_TAGS = 8, 24
QUOTED, QUOTE = 4, 80  # regions whose text a caption tells, characters of one
PICTURE = "a picture"
# style class -> what a picture of it is called
PICTURES = {
    **{
        "photo": "a photograph",
        "drawing": "a drawing",
        "painting": "a painting",
        "sketch": "a sketch",
        "cartoon": "a cartoon",
        "icon": "an icon",
    },
    **{"3d_render": "a 3D render", "clipart": "a clipart picture", "anime": "an anime picture", "abstract": "an abstract picture"},
}


class Known(NamedTuple):
    """tags: likeliest first; style: the class by a classifier, None where it is not to be told; regions: texts that a detector read, in reading
    order; () also where none has looked.
    """

    tags: Sequence[str] = ()
    alt_text: str = ""
    style: str | None = None
    rating: str | None = None
    regions: Sequence[str] = ()


def answer(known: Known, rules: Rules, count: Callable[[str], int]) -> str:
    """(what is known, the prompt version's rules, tokens of a text) -> the answer's JSON, with the parts that could be made.

    Raises Reject nothing_known, and ValueError for rules of another language than English.
    """
    if rules.language != "en":
        raise ValueError(f"engine {NAME}: language: given {rules.language!r}, but it composes English (en) only")
    said = _Said(known, rules)
    parts: dict[str, Any] = {"tags": said.tags[: rules.most_tags], "language": "en"}
    if regions := said.regions[: rules.most_ocr]:
        parts["ocr"] = regions
    for part, texts in (("short", _short(said)), ("medium", _medium(said, rules.bands["medium"][1], count))):
        fewest, most = rules.bands[part]
        if (text := next((text for text in texts if fewest <= count(text) <= most), None)) is not None:
            parts[part] = text
    if parts.get("medium") == parts.get("short"):  # nothing more is known
        parts.pop("medium", None)
    passed = check(json.dumps(parts), rules, count, tags=known.tags).parts
    if not {"short", "medium", "tags"} & set(passed):
        raise Reject("nothing_known", said.refused)
    return json.dumps({part: passed[part] for part in PARTS if part in passed}, ensure_ascii=False)


class _Said:
    """What of the known may be said: alt text as sentences, tags, regions, those of them that are quoted; `refused`: what was known and may not."""

    def __init__(self, known: Known, rules: Rules) -> None:
        free = rules._replace(bands={"short": (0, 2**40)})

        def passes(text: str) -> bool:
            return "short" in check(json.dumps({"short": text}), free, len, tags=known.tags).parts

        self.tags = [tag for tag in tag_words.clean(known.tags) if passes(tag)]
        self.alt = [one for one in tag_words.sentences(known.alt_text) if passes(one)]
        self.regions = [text for region in known.regions if (text := tag_words.plain(region))]
        self.quotes = [text.replace('"', "'") for text in self.regions if len(text) <= QUOTE and passes(text)][:QUOTED]
        style = known.style
        self.picture = PICTURE if style is None else PICTURES.get(style, f"a picture of the style {style.replace('_', ' ')}")
        self.rating = known.rating
        given = {"tags": bool(known.tags), "alt text": bool(known.alt_text.strip()), "text": bool(known.regions)}
        self.refused = "; ".join(f"{name} {'refused' if has else 'none'}" for name, has in given.items())

    @property
    def text(self) -> str:
        """`reads "A" and "B"`."""
        return "reads " + tag_words.both([f'"{one}"' for one in self.quotes])


def _short(said: _Said) -> Iterator[str]:
    """One sentence, the best first: the first that has the length is taken."""
    alt = said.alt[0].rstrip(".") if said.alt else ""
    fewer = [said.tags[:many] for many in range(min(SHORT_TAGS, len(said.tags)), 0, -1)]
    made = [f"{alt}, {tag_words.named(tags)}" for tags in fewer] if alt else []
    made += [f"{alt}: {tag_words.describe(said.picture, said.tags[:1])}"] if alt and said.tags else []
    made += [tag_words.describe(said.picture, tags) for tags in fewer]
    made += [f"{f'{alt}: ' if alt else ''}{said.picture} with text that {said.text}"] if said.quotes else []
    made += [f"{said.picture} described as {alt}"] if alt else []
    yield from map(tag_words.capital, [*said.alt[:1], *(f"{one}." for one in made)])


def _medium(said: _Said, most: int, count: Callable[[str], int]) -> Iterator[str]:
    """All that is known, a sentence each; a sentence that would make it too long is left out."""
    pieces = [tag_words.capital(one) for one in said.alt]
    if said.tags:
        pieces.append(tag_words.capital(f"{tag_words.describe(said.picture, said.tags[:MEDIUM_TAGS])}."))
    elif said.picture != PICTURE:
        pieces.append(tag_words.capital(f"{said.picture}."))
    pieces += [f"The text {said.text}."] if said.quotes else []
    pieces += [f"Rated {said.rating}."] if said.rating else []
    text = ""
    for piece in pieces:
        longer = f"{text} {piece}".strip()
        text = longer if count(longer) <= most else text
    yield text
