"""Tags -> words of a sentence: what a tagger's words for people, deeds, places and views are in English; tags and texts of strangers, cleaned."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from udfs import flags

LONGEST_TAG = 80  # characters
CHARACTER = "character:"

_COUNT = re.compile(r"([1-9])(\+?)(girl|boy|other)s?")
_NUMBERS = ("no", "a", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PEOPLE = {"girl": ("girl", "girls"), "boy": ("boy", "boys"), "other": ("character", "characters")}
_SEVERAL = {"multiple girls": "several girls", "multiple boys": "several boys", "multiple others": "several characters"}
_PLACES = {"outdoors", "indoors", "underwater"}
_VIEWS = {"from above", "from below", "from behind", "from side", "from outside"}
_SHOTS = {"close-up": "a close-up", "portrait": "a portrait", "upper body": "an upper-body shot", "full body": "a full-body shot"}
_SHOTS |= {"cowboy shot": "a cowboy shot", "wide shot": "a wide shot"}
# tags of taggers that say nothing to be seen
MUTE = {"solo", "solo focus", "no humans", "highres", "absurdres", "lowres", "commentary", "translated", "tagme", "self upload"}
# names of artists, and what the training writes before a prompt by itself: no stranger's tag may pass for them
_NOT_A_TAG = re.compile(r"(?:artist|meta|lore|rating|score|source):.*|(?:score|rating|style_cluster|source)_\w+|by .*", re.IGNORECASE)
_MAIL = re.compile(r"\S+@\S+\.\w+")
_FILE_NAME = re.compile(
    r"\S+\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic)|(?:img|dsc[nf]?|image|photo|picture|untitled|screenshot)?[\s_-]*\d*", re.I
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"'(\w])")
# nouns that end as participles do
_NOUNS = set(
    """ring wing king string spring ceiling building earring clothing evening morning lighting railing stocking painting drawing
    icing viking sibling wedding frosting swing sling lightning blessing pudding wallcovering darling being thing nothing""".split()  # noqa: SIM905
)
_ENGLISH = set("""a an the of in on with and is are at to by for from its as this that""".split())  # noqa: SIM905
_FOREIGN = set(
    """der die das und ein eine mit auf im von le la les des une un avec dans et el los las con en y il di del che per
    os com em uma do da het een met op van na w z och på med av""".split()  # noqa: SIM905
)
_LATIN = "\u0250"  # the first letter after the Latin ones


def clean(tags: Iterable[str]) -> list[str]:
    """-> lower case, with blanks, each once, in order; without artists, addresses of mail, and what only the training may write."""
    cleaned: dict[str, None] = {}
    for tag in map(plain, tags):
        text = flags.spoken(tag.lower()).strip(" ,;")
        if text and len(text) <= LONGEST_TAG and not _NOT_A_TAG.fullmatch(tag) and "," not in text and not _MAIL.search(text):
            cleaned[" ".join(text.split())] = None
    return list(cleaned)


def sentences(text: str) -> list[str]:
    """A stranger's text -> its English sentences with their ends; the name of a file, an address, or another language is none.

    English by its letters and its small words: no proof, and a short text has none of these.
    """
    text = plain(text)
    if _FILE_NAME.fullmatch(text):
        return []
    text = text.replace("_", " ") if " " not in text else text
    letters = [one for one in text if one.isalpha()]
    words = [word.strip(".,;:!?\"'()") for word in text.lower().split()]
    foreign = sum(word in _FOREIGN for word in words) > sum(word in _ENGLISH for word in words)
    if not letters or foreign or sum(one < _LATIN for one in letters) < 0.9 * len(letters):
        return []
    found = [one.strip(" ,;:-") for one in _SENTENCE.split(text)]
    return [one if one[-1] in ".!?" else f"{one}." for one in found if one and not _MAIL.search(one)]


def plain(text: str) -> str:
    """NFC, without control, direction and zero-width characters and halves of characters, white space as single blanks."""
    kept = "".join(one if unicodedata.category(one) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else " " for one in text)
    return " ".join(unicodedata.normalize("NFC", kept).split())


def describe(picture: str, tags: Sequence[str]) -> str:
    """(`a photograph`, clean tags) -> what the picture is said to be, without a full stop.

    Where a tagger counts people its other words are to be seen, too; else tags are keywords, and are called so.
    """
    people = [text for tag in tags if (text := people_of(tag))]
    if not people:
        return f"{picture} {named(tags)}"
    shots = [_SHOTS[tag] for tag in tags if tag in _SHOTS]
    names = [tag.removeprefix(CHARACTER) for tag in tags if tag.startswith(CHARACTER)]
    told = [f"{picture}, {shots[0]} of {both(people)}" if shots else f"{picture} of {both(people)}"]
    told += [f"the {'characters' if len(names) > 1 else 'character'} {both(names)}"] if names else []
    told += [tag for tag in tags if _is_doing(tag) or tag in _PLACES]
    told += [f"seen {tag}" for tag in tags if tag in _VIEWS]
    seen = [tag for tag in tags if _is_seen(tag)]
    return ", ".join([*told, f"with {both(seen)}"] if seen else told)


def people_of(tag: str) -> str | None:
    """`2girls` -> `two girls`; None for a tag that counts nobody."""
    if tag in _SEVERAL:
        return _SEVERAL[tag]
    found = _COUNT.fullmatch(tag)
    if found is None:
        return None
    number, one_or_many = int(found[1]), _PEOPLE[found[3]]
    if found[2]:
        return f"{'one' if number == 1 else _NUMBERS[number]} or more {one_or_many[1]}"
    return f"{_NUMBERS[number]} {one_or_many[number > 1]}"


def named(tags: Sequence[str]) -> str:
    """-> `with the tags a, b and c`."""
    return f"with the {'tags' if len(tags) > 1 else 'tag'} {both([tag.removeprefix(CHARACTER) for tag in tags])}"


def both(words: Sequence[str]) -> str:
    """-> `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def capital(text: str) -> str:
    """A word with its own capitals (iPhone) keeps them."""
    first = text.split(" ", 1)[0]
    return text[0].upper() + text[1:] if first == first.lower() else text


def _is_doing(tag: str) -> bool:
    """`looking at viewer`; not `wedding dress`, not `string`."""
    first, *rest = tag.split()
    return first.endswith("ing") and len(first) > 4 and not {first, *rest} & _NOUNS


def _is_seen(tag: str) -> bool:
    """Whether it may stand after `with`; an emoticon may not."""
    is_other = people_of(tag) or tag in _SHOTS or tag in MUTE | _PLACES | _VIEWS or ":" in tag or _is_doing(tag)
    return not is_other and any(map(str.isalpha, tag))
