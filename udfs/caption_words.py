"""Captions -> words: which of an image's tags they name, how far two captioners say the same, how near two readings of one text are.

A word is letters and digits, lower case, in the singular by its ending (`foxes` is `fox`; no dictionary), small words (`the`, `with`) left out. A tag
is named where all its words stand in one sentence of a text, in any order (`long hair` in `her long brown hair`), or in one of the tags of a text of
the kind `tags`; a tag that counts people also where the words of its English stand side by side (`2girls`, `two girls`). Synonyms are not known,
which makes a recall too low; that one and many are one word, and any order will do, makes it now and then too high (`two girls` names `1girl` too): it is
no strict bound.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from udfs import tag_words

WORDS_VERSION = 1
CONTENT = ("short", "medium", "long", "tags")  # kinds that say what a picture shows
Texts = Mapping[str, Sequence[str]]  # kind -> its texts, in the order of their parts

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_SENTENCE = re.compile(r"[.!?;\n]+(?:\s|$)|\n")
_SMALL = frozenset(
    """a an the this that these those of in on at to by for from with without into onto over under and or but as is are was were be been being has
    have had it its it's there their his her he she they them which who whose while than then also very some""".split()  # noqa: SIM905
)
_LONGEST = 4_000  # characters of a text whose edits are counted: the product of two lengths is the cost


def words(text: str) -> list[str]:
    """-> its words as they are compared, in order."""
    found = (one.replace("’", "'") for one in _WORD.findall(unicodedata.normalize("NFC", text).lower()))
    return [_singular(one.removesuffix("'s")) for one in found if one not in _SMALL]


def tags_of(given: Iterable[str]) -> list[str]:
    """The tags of an image -> those that a caption could name: cleaned, without what is not to be seen (`solo`, `highres`, artists)."""
    return [tag for tag in tag_words.clean(given) if tag not in tag_words.MUTE and words(tag.removeprefix(tag_words.CHARACTER))]


def named(tags: Sequence[str], texts: Texts) -> list[str]:
    """(tags_of an image, what a captioner said of it) -> the tags that it names, in their order."""
    said = [words(piece) for kind, those in texts.items() if kind != "ocr" for text in those for piece in _pieces(kind, text)]
    return [tag for tag in tags if any(_names(piece, tag) for piece in said)]


def agreement(first: Texts, second: Texts) -> float | None:
    """How far two captioners say the same of one image, 0 to 1: Dice's coefficient of the sets of words of their texts of one kind, 2 * common /
    (one's + the other's), as the mean over the kinds of CONTENT that both wrote; None where there is none.
    """
    both = [kind for kind in CONTENT if first.get(kind) and second.get(kind)]
    each = [_dice(_set(first[kind]), _set(second[kind])) for kind in both]
    return float(np.mean(each)) if each else None


def similarity(read: str, told: str) -> float:
    """1 - edits (characters put in, taken out or changed) / the longer one's characters; case and white space aside. Two empty texts: 1."""
    first, second = (" ".join(text.casefold().split())[:_LONGEST] for text in (read, told))
    return 1.0 - _edits(first, second) / max(len(first), len(second), 1)


def found(read: str, told: str) -> float | None:
    """The share of the words that were read (each as often as it stands there) that are told too, in any order; None where no word was read."""
    wanted = Counter(_WORD.findall(read.casefold()))
    have = Counter(_WORD.findall(told.casefold()))
    total = sum(wanted.values())
    return sum((wanted & have).values()) / total if total else None


def _pieces(kind: str, text: str) -> list[str]:
    return text.split(",") if kind == "tags" else _SENTENCE.split(text)


def _names(piece: Sequence[str], tag: str) -> bool:
    if set(words(tag.removeprefix(tag_words.CHARACTER))) <= set(piece):
        return True
    people = tag_words.people_of(tag)  # side by side: `two girls and a boy` are no two boys
    return people is not None and f" {' '.join(words(people))} " in f" {' '.join(piece)} "


def _set(texts: Sequence[str]) -> set[str]:
    return {word for text in texts for word in words(text)}


def _dice(first: set[str], second: set[str]) -> float:
    return 2 * len(first & second) / (len(first) + len(second)) if first or second else 1.0


def _singular(word: str) -> str:
    if len(word) < 4 or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zes")):
        return word[:-2]
    return word.removesuffix("s")


def _edits(first: str, second: str) -> int:
    """Levenshtein's distance, a row at a time: what is put in is a running minimum of `cost so far - place`."""
    places = np.arange(len(second) + 1)
    codes, row = np.array([ord(one) for one in second], dtype=np.int64), places
    for number, one in enumerate(first, 1):
        changed = np.minimum(row[1:] + 1, row[:-1] + (codes != ord(one)))
        row = np.minimum.accumulate(np.concatenate(([number], changed)) - places) + places
    return int(row[-1])
