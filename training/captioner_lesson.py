"""An image's captions in an export -> what a captioner is taught of it: the request as inference renders it, and the teacher's answer.

The answer is put together from the rows of one teacher (an engine, model and prompt version: the fingerprint in the captions' ids) that was asked by
the prompt version that is taught. An empty row of OCR says that the picture has no text; an answer that is not whole is taught as the answer to a
request for the parts it has. The language is the one that the prompt's rules ask for: no other was landed.

Whether the request tells tags and alt text is a draw from (seed, epoch, image): the student is asked both ways.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from conf.captions import PromptFile
from conf.loops import TrainCaptioner
from training import captions
from training.captions import Caption
from udfs import caption_answer, caption_request
from udfs.caption_request import Prompt, Request

KERNEL_VERSION = 2  # raised when the same captions would give another lesson
LANGUAGE, OCR = "language", "ocr"


class Course(NamedTuple):
    """What is taught. parts: of an answer; teachers: how fingerprints begin, the first preferred; notes: share of the requests that tell some."""

    prompt: Prompt
    language: str
    parts: tuple[str, ...]
    teachers: tuple[str, ...]
    notes: float


class Lesson(NamedTuple):
    """tags: that the request tells; parts: the answer's, in the order of caption_answer.PARTS."""

    request: Request
    tags: Sequence[str]
    parts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """sha256 of the request's key and the answer: losses on two lessons of one image do not compare."""
        return hashlib.sha256(json.dumps([self.request.key, dict(self.parts)]).encode()).hexdigest()


def course(told: PromptFile, wanted: TrainCaptioner) -> Course:
    words = Prompt(**{name: getattr(told, name) for name in Prompt._fields})
    parts = tuple(part for part in caption_answer.PARTS if part in (*wanted.parts, LANGUAGE))
    return Course(words, told.language, parts, wanted.teachers, wanted.notes)


def lesson(course: Course, raw_json: bytes, image_id: bytes, seed: int, epoch: int) -> Lesson | None:
    """A row's captions column -> its lesson, None when no teacher has captioned it. Raises Mistake as `captions.read`."""
    known = captions.read(raw_json, image_id)
    parts = answer(course, known)
    if not parts:
        return None
    tags: list[str] = []
    alt_text = ""
    if _draw(seed, epoch, image_id) < course.notes:
        tags = [tag for one in known if one.kind == "source_tags" for tag in one.text.split(", ")]
        alt_text = next((one.text for one in known if one.kind == "alt_text"), "")
    schema = caption_answer.schema(tuple(parts))
    return Lesson(caption_request.render(image_id, course.prompt, schema, {}, tags, alt_text), tags, parts)


def answer(course: Course, known: Sequence[Caption]) -> dict[str, Any]:
    """-> the parts of the preferred teacher's answer; {} when there is none."""
    told = [(one.id.rsplit("/", 2), one) for one in known]
    rows = [(place[0], one.kind, int(place[2]), one.text) for place, one in told if len(place) == 3 and place[2].isdigit()]
    for teacher in course.teachers:
        for fingerprint in sorted({row[0] for row in rows if row[0].startswith(teacher) and _asked_by(row[0]) == course.prompt.name}):
            if parts := _parts(course, sorted(row[1:] for row in rows if row[0] == fingerprint)):
                return parts
    return {}


def _asked_by(fingerprint: str) -> str:
    """engine:model:prompt:digest -> the prompt version."""
    return fingerprint.rsplit(":", 2)[-2] if fingerprint.count(":") > 2 else ""


def _parts(course: Course, rows: Sequence[tuple[str, int, str]]) -> dict[str, Any]:
    """(kind, part, text) of one teacher in order -> its answer."""
    texts: dict[str, list[str]] = {}
    for kind, _, text in rows:
        texts.setdefault(kind, []).append(text)
    parts: dict[str, Any] = {}
    for part in course.parts:
        if part == OCR and part in texts:
            parts[part] = [text for text in texts[part] if text]
        elif part in texts:
            parts[part] = texts[part][0].split(", ") if part == "tags" else texts[part][0]
    return parts | {LANGUAGE: course.language} if any(parts.values()) else {}


def _draw(seed: int, epoch: int, image_id: bytes) -> float:
    """A number in [0, 1), of these alone."""
    hashed = hashlib.sha256(json.dumps(["lesson", seed, epoch, image_id.hex()]).encode()).digest()
    return int.from_bytes(hashed[:6], "little") / 2**48
