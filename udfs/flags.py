"""Evidence of detectors and classifiers -> flags under thresholds: rating, tags, AI-generated, text, watermark. No model, no pixels.

Tags: the union over all taggers, as V7 makes it: from `general` up (`character` for characters, written `character:NAME`), or a tagger's own
threshold for all its kinds. Underscores become spaces, but in emoticons; brackets are not escaped: that belongs to a prompt's syntax. Likeliest
first, characters last.

Rating: every tagger's likeliest rating, mapped; the photo model's number by the threshold of the picture's domain, half of it for
`questionable`. The most severe one stands, and `rating_by` names who said it. A picture of unknown domain is judged as a photograph: a photograph
that passes costs more than a drawing that is looked at again.

Watermark, a heuristic in [0, 1]: the largest of WEIGHTS[kind] * confidence over the regions at the edge, and over strings that stand several
times in one picture. It orders candidates; it is no probability.

Detections and regions come as JSON: of lists of lists, of which a whole batch is empty, pyarrow 14 makes a crash. Their numbers are then
the decimals that a table shows, and a stored .35 reaches a threshold of .35.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd

KERNEL_VERSION = 1
SCHEMA = (
    "image_id BINARY, domain STRING, rating STRING, rating_by STRING, nsfw FLOAT, tags ARRAY<STRING>, ai_generated STRING, "
    "ai_evidence ARRAY<STRING>, has_text BOOLEAN, text STRING, text_share FLOAT, watermark FLOAT"
)
EDGE_SCHEMA = "image_id BINARY, string STRING"
# tags that are drawn with underscores [SmilingWolf's demo, the same in V7]
EMOTICONS = frozenset(["0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@"])
EMOTICONS |= {"^_^", "o_o", "u_u", "x_x", "|_|", "||_||"}
TAG_KINDS = ("general", "copyright", "species", "character")
SEVERITY = ("safe", "questionable", "explicit")
TEXT_LENGTH = 4_000  # characters of a picture's text that are kept
MARKS = 8  # declared marks that are told
REPEATED, ADDRESS, TILED, SIGNATURE, EDGE = "repeated", "address", "tiled", "signature", "edge"
WEIGHTS = {REPEATED: 0.9, ADDRESS: 0.8, TILED: 0.7, SIGNATURE: 0.5, EDGE: 0.3}
LEAST_STRING = 4  # letters and digits of a string that is counted across pictures
TILES = 3  # regions of one picture with the same string
SIGNATURE_LENGTH, SIGNATURE_HEIGHT = 24, 0.06  # characters, share of the picture's height
_ADDRESS = re.compile(r"©|\(c\) ?\w|https?:|www\.|(?<!\w)@\w{3,}|\b[\w-]{3,}\.(?:com|net|org|art|io|co|jp|de|ru|tv|me)\b", re.IGNORECASE)

Row = Mapping[str, Any]


class Told(NamedTuple):
    """settings.flags as a dict, and which kernel each detector of the build is."""

    options: Mapping[str, Any]
    kernels: Mapping[str, str]


def flag(frames: Iterable[pd.DataFrame], options: Mapping[str, Any], kernels: Mapping[str, str]) -> Iterator[pd.DataFrame]:
    """Frames with image_id, style, ai_marks (strings), ai_p, ai_by, detections (JSON) and repeated (strings) -> SCHEMA frames, a row a row."""
    told = Told(options, kernels)
    for frame in frames:
        rows = [_row(row, told) for row in cast(list[Row], frame.to_dict("records"))]
        yield pd.DataFrame(rows, columns=[column.split()[0] for column in SCHEMA.split(", ")])


def edge_strings(frames: Iterable[pd.DataFrame], options: Mapping[str, Any]) -> Iterator[pd.DataFrame]:
    """Frames with image_id and regions (JSON) -> EDGE_SCHEMA frames: each picture's strings at its edges, once, as they are compared."""
    for frame in frames:
        rows = zip(frame["image_id"], frame["regions"], strict=True)
        pairs = [(image_id, string) for image_id, regions in rows for string in _edge_strings(json.loads(regions), options)]
        yield pd.DataFrame(pairs, columns=["image_id", "string"])


def _row(row: Row, told: Told) -> dict[str, Any]:
    detections = json.loads(row["detections"] or "[]")
    domain = domain_of(row["style"], told.options)
    rating, by, nsfw = rate(detections, domain, told)
    generated, evidence = judge_origin(row["ai_marks"], row["ai_p"], row["ai_by"], told.options)
    done = {"image_id": row["image_id"], "domain": domain, "rating": rating, "rating_by": by, "nsfw": nsfw}
    done |= {"tags": tags_of(detections, told.options), "ai_generated": generated, "ai_evidence": evidence}
    return done | read_text(detections, row["repeated"], told)


def domain_of(style: str | None, options: Mapping[str, Any]) -> str | None:
    """The class by `style`'s classifier -> photo, drawing, or None where there is none or it did not decide."""
    if style is None or style == "other":
        return None
    return "photo" if style in options["photo_classes"] else "drawing"


def tags_of(detections: Sequence[Row], options: Mapping[str, Any]) -> list[str]:
    """Detections of all taggers -> the union of their tags."""
    best: dict[tuple[bool, str], float] = {}
    for detection in detections:
        own = options["thresholds"].get(detection["detector"])
        for label in detection["labels"]:
            if label["kind"] in TAG_KINDS:
                is_character = label["kind"] == "character"
                threshold = own if own is not None else options["character" if is_character else "general"]
                if label["p"] >= threshold:
                    key = (is_character, spoken(label["name"]))
                    best[key] = max(best.get(key, 0.0), label["p"])
    ordered = sorted(best, key=lambda key: (key[0], -best[key], key[1]))
    return [f"character:{name}" if is_character else name for is_character, name in ordered]


def spoken(name: str) -> str:
    """`long_hair` -> `long hair`; an emoticon stays."""
    return name if name in EMOTICONS else name.replace("_", " ")


def rate(detections: Sequence[Row], domain: str | None, told: Told) -> tuple[str | None, str | None, float | None]:
    """-> (rating, which detectors said so, the photo model's probability); None where no model that could say so ran."""
    said: list[tuple[str, str]] = []
    nsfw: float | None = None
    for detection in detections:
        ratings = {label["name"]: label["p"] for label in detection["labels"] if label["kind"] == "rating"}
        if ratings:
            likeliest = max(sorted(ratings), key=lambda name: ratings[name])
            said.append((told.options["ratings"][likeliest], detection["detector"]))
        for label in detection["labels"]:
            if label["kind"] == "nsfw":
                nsfw = max(nsfw or 0.0, label["p"])
                said.append((_severity(label["p"], domain, told.options), detection["detector"]))
    if not said:
        return None, None, nsfw
    rating = max((one for one, _ in said), key=SEVERITY.index)
    return rating, " + ".join(sorted(name for one, name in said if one == rating)), nsfw


def _severity(p: float, domain: str | None, options: Mapping[str, Any]) -> str:
    explicit = options["drawing_nsfw" if domain == "drawing" else "photo_nsfw"]
    if p >= explicit:
        return "explicit"
    return "questionable" if p >= explicit / 2 else "safe"


def judge_origin(marks: Sequence[str], p: float | None, by: str | None, options: Mapping[str, Any]) -> tuple[str, list[str]]:
    """(marks in the bytes, probability of `ai`, which classifier says so) -> (declared, detected or unknown; the evidence in words). A
    classifier that is not to be trusted gives no probability.
    """
    evidence = [f"declared by {mark}" for mark in list(marks)[:MARKS]]
    detected = False
    if by is None:
        evidence.append("no detector")
    elif p is None or math.isnan(p):  # NULL is NaN in a frame
        evidence.append(f"no trustworthy detector: {by} does not beat its baselines, or is confounded with where its images are from")
    else:
        detected = p >= options["ai_detected"]
        evidence.append(f"{'' if detected else 'not '}detected, {p:.3f} by {by}")
    return ("declared" if len(marks) else "detected" if detected else "unknown"), evidence


def read_text(detections: Sequence[Row], repeated: Sequence[str] | None, told: Told) -> dict[str, Any]:
    """-> has_text, text, text_share (the sum of the regions' areas, at most 1), watermark; NULL where no text detector ran."""
    mine = [detection for detection in detections if told.kernels.get(detection["detector"]) == "text"]
    if not mine:
        return dict.fromkeys(("has_text", "text", "text_share", "watermark"))
    regions = [region for detection in mine for region in detection["regions"] if counts(region, told.options)]
    text = "\n".join(region["text"] for region in regions)[:TEXT_LENGTH]
    share = min(1.0, sum(area(region["box"]) for region in regions))
    found = watermark(regions, () if repeated is None else repeated, told.options)
    return {"has_text": bool(regions), "text": text or None, "text_share": share, "watermark": found}


def counts(region: Row, options: Mapping[str, Any]) -> bool:
    """Whether a region is text: sure enough, and of two different letters or digits (hatching is read as `SSS`, a wheel as `0`)."""
    return region["p"] >= options["text_confidence"] and len(set(normalise(region["text"]))) > 1


def watermark(regions: Sequence[Row], repeated: Sequence[str], options: Mapping[str, Any]) -> float:
    """Regions that are text, strings that many pictures show at an edge -> the heuristic's value in [0, 1]."""
    known, times = set(repeated), Counter(normalise(region["text"]) for region in regions)
    found = [WEIGHTS[kind] * region["p"] for region in regions if (kind := _kind(region, known, times, options)) is not None]
    return float(min(1.0, max(found, default=0.0)))


def _kind(region: Row, repeated: set[str], times: Mapping[str, int], options: Mapping[str, Any]) -> str | None:
    """What of a watermark a region has: the heaviest of WEIGHTS, None for text inside the picture that stands there once."""
    string, side = normalise(region["text"]), side_of(region["box"], options["edge"])
    if side is None:
        return TILED if times[string] >= TILES and len(string) >= LEAST_STRING else None
    if string in repeated:
        return REPEATED
    if _ADDRESS.search(region["text"]):
        return ADDRESS
    if times[string] >= TILES and len(string) >= LEAST_STRING:
        return TILED
    heights = region["box"][1::2]
    is_small = max(heights) - min(heights) <= SIGNATURE_HEIGHT and len(region["text"]) <= SIGNATURE_LENGTH
    return SIGNATURE if side == "bottom" and is_small else EDGE


def side_of(box: Sequence[float], edge: float) -> str | None:
    """Corners -> the side that the region's middle is within `edge` of, the nearest one; None: it stands inside."""
    x, y = float(np.mean(box[::2])), float(np.mean(box[1::2]))
    distances = {"left": x, "right": 1 - x, "top": y, "bottom": 1 - y}
    nearest = min(distances, key=lambda side: distances[side])
    return nearest if distances[nearest] <= edge else None


def area(box: Sequence[float]) -> float:
    """Corners in turn -> the polygon's share of the picture (Gauss's formula)."""
    x, y = np.asarray(box[::2], np.float64), np.asarray(box[1::2], np.float64)
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def normalise(text: str) -> str:
    """What two readings of one string share: letters and digits, without width, case and accents' form."""
    return "".join(letter for letter in unicodedata.normalize("NFKC", text).casefold() if letter.isalnum())


def _edge_strings(regions: Sequence[Row], options: Mapping[str, Any]) -> list[str]:
    at_edge = [region for region in regions if counts(region, options) and side_of(region["box"], options["edge"]) is not None]
    strings = {normalise(region["text"]) for region in at_edge}
    return sorted(string for string in strings if len(string) >= LEAST_STRING)
