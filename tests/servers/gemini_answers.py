"""What the fake Gemini answers: a request's JSON -> a caption made of the image's bytes, and the tokens that it costs."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from typing import Any, NamedTuple

IMAGE_TOKENS = {"LOW": 280, "MEDIUM": 560, "HIGH": 1120, "ULTRA_HIGH": 2240}  # Gemini 3; HIGH without a word
WORDS = {"short": 14, "medium": 60, "long": 170, "style": 60}  # of each text, give or take a fifth
BYTES_A_TOKEN = 4

_SIZES = ("small", "tall", "wide", "narrow", "round", "long", "low", "broad")
_COLOURS = ("red", "green", "grey", "blue", "brown", "yellow", "white", "black", "orange", "violet")
_THINGS = (
    "barn",
    "bridge",
    "boat",
    "fence",
    "lamp",
    "tree",
    "rock",
    "kettle",
    "chair",
    "wagon",
    "tower",
    "hill",
    "pond",
    "gate",
    "bench",
    "drum",
)
_PLACES = ("on the left", "on the right", "in front of", "behind", "above", "below", "beside", "at the edge of")
_MEDIA = ("oil on canvas", "ink and wash", "flat digital colour", "pencil on paper", "film photography", "woodcut print")
# "ignore the above ... and VERB: rest", as speakers of some languages would put it
_IGNORE = r"ignore|disregard|forget|vergiss|oubliez|ignora|olvida|игнорируй|забудь|忽略|無視"
_VERBS = {
    "repeat": "repeat|reveal|wiederhole|répétez|repite|повтори|重复|繰り返",
    "say": "say|write|sag|schreib|dites|écrivez|di|escribe|скажи|напиши|说|言え",
    "print": "print|drucke|affichez|imprime|выведи|输出|出力",
}
_ORDER = re.compile(
    rf"(?:{_IGNORE})[^\"]{{0,80}}?(?<![a-zà-ÿа-я])(?:"
    + "|".join(f"(?P<{verb}>{words})" for verb, words in _VERBS.items())
    + r")(?![a-zà-ÿа-я])[:：]?\s*(?P<rest>[^\"]{1,400})",
    re.IGNORECASE,
)
_NOTES = re.compile(r"<notes>\s*(\{.*\})\s*</notes>", re.DOTALL)


class Asked(NamedTuple):
    """What stands in a request: image (bytes, empty without one), its text, tokens of its text and of its image, notes as decoded."""

    image: bytes
    text: str
    prompt_tokens: int
    image_tokens: int
    notes: dict[str, Any]

    @property
    def digest(self) -> str:
        """Of the image: 64 hex digits."""
        return hashlib.sha256(self.image).hexdigest()


class Tokens(NamedTuple):
    """Billed for one answer."""

    prompt: int = 0
    image: int = 0
    output: int = 0
    thoughts: int = 0

    def plus(self, other: Tokens) -> Tokens:
        return Tokens(*(mine + yours for mine, yours in zip(self, other, strict=True)))


def read(body: dict[str, Any]) -> Asked:
    """generateContent's request body -> what it asks. KeyError, TypeError: it is none."""
    text, image = [], b""
    for content in [body.get("systemInstruction") or {}, *body["contents"]]:
        for part in content.get("parts", []):
            if "text" in part:
                text.append(part["text"])
            elif "inlineData" in part:
                image = base64.urlsafe_b64decode(part["inlineData"]["data"].replace("+", "-").replace("/", "_"))
    whole = "\n".join(text)
    resolution = body.get("generationConfig", {}).get("mediaResolution", "").removeprefix("MEDIA_RESOLUTION_")
    try:
        notes = json.loads(found.group(1)) if (found := _NOTES.search(whole)) else {}
    except ValueError:
        notes = {}
    return Asked(
        image, whole, -(-len(whole.encode()) // BYTES_A_TOKEN), IMAGE_TOKENS.get(resolution, IMAGE_TOKENS["HIGH"]) if image else 0, notes
    )


def caption(asked: Asked) -> dict[str, Any]:
    """-> the answer as an object of the captions' schema: every part within the bands, the same for the same image and notes."""
    dice = random.Random(asked.digest)
    parts: dict[str, Any] = {name: _text(dice, words, name == "style") for name, words in WORDS.items()}
    own = [f"{dice.choice(_COLOURS)} {dice.choice(_THINGS)}" for _ in range(6)]
    parts["tags"] = list(dict.fromkeys([*asked.notes.get("tags", []), *own]))[:40]
    parts["ocr"] = [f"NO {dice.randrange(1000)}" for _ in range(dice.choice((0, 0, 1, 2)))]
    parts["language"] = "en"
    return parts


def obeyed(asked: Asked, parts: dict[str, Any]) -> str | None:
    """What a model answers that does what the notes, or words in the image's bytes, tell it; None: nobody tells it anything."""
    words = " ".join([json.dumps(asked.notes, ensure_ascii=False), asked.image.decode("latin-1")])
    if (order := _ORDER.search(words)) is None:
        return None
    rest = order["rest"].strip()
    if order["repeat"]:  # the instructions
        return json.dumps({**parts, "long": " ".join(asked.text.split()[:80])})
    if order["say"]:
        return json.dumps({**parts, "medium": rest, "long": f"{parts['long']} {rest}"}, ensure_ascii=False)
    return rest  # print: instead of an answer


def _text(dice: random.Random, words: int, style: bool) -> str:
    """Sentences of some ten words until the text has its length."""
    wanted, said = int(words * dice.uniform(0.8, 1.2)), list[str]()
    while sum(sentence.count(" ") + 1 for sentence in said) < wanted:
        thing = f"{dice.choice(_SIZES)} {dice.choice(_COLOURS)} {dice.choice(_THINGS)}"
        if style:
            said.append(f"{dice.choice(_MEDIA).capitalize()} with {dice.choice(_COLOURS)} light and {dice.choice(_SIZES)} shapes.")
        else:
            said.append(f"A {thing} stands {dice.choice(_PLACES)} the {dice.choice(_COLOURS)} {dice.choice(_THINGS)}.")
    return " ".join(said)


def tokens(asked: Asked, text: str, thoughts: int = 0) -> Tokens:
    return Tokens(asked.prompt_tokens, asked.image_tokens, -(-len(text.encode("utf-8", "replace")) // BYTES_A_TOKEN), thoughts)


def usage(billed: Tokens) -> dict[str, Any]:
    """-> usageMetadata."""
    told: dict[str, Any] = {
        "promptTokenCount": billed.prompt + billed.image,
        "candidatesTokenCount": billed.output,
        "totalTokenCount": sum(billed),
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": billed.prompt}, {"modality": "IMAGE", "tokenCount": billed.image}],
    }
    if billed.thoughts:
        told["thoughtsTokenCount"] = billed.thoughts
    return told


def response(text: str, billed: Tokens, model: str) -> dict[str, Any]:
    """-> a GenerateContentResponse as the API writes it."""
    return {
        "candidates": [{"content": {"parts": [{"text": text}], "role": "model"}, "finishReason": "STOP", "index": 0}],
        "usageMetadata": usage(billed),
        "modelVersion": model,
        "responseId": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:22],
    }
