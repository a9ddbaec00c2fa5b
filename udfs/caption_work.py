"""A tier's prompt, rules and captioner -> what udfs.caption_run asks of a row: request, image, check, repair; and the engine itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from udfs import caption_answer, caption_image, caption_request, token_count
from udfs.caption_answer import Checked, Rules
from udfs.caption_budget import Bounds
from udfs.caption_call import Engine, Usage
from udfs.caption_record import Record
from udfs.caption_request import Prompt, Request
from udfs.caption_row import Row, Work
from udfs.opener import Opener

if TYPE_CHECKING:
    from udfs.gemini_batch import GeminiBatch

LANGUAGE = "language"  # a part that is always asked for
REPAIR = 4 * caption_request.WHY  # bytes of a repair's words at most, beside the prompt's own
ESCAPED = 2  # JSON writes a character of the notes in at most so many of its bytes, but for controls, which are taken out


class Tier(NamedTuple):
    """captioner: conf.captions.Captioner as a dict; asked: parts; tokenizer: name and sha256; limits, stores: as every stage's workers get them."""

    captioner: Mapping[str, Any]
    prompt: Prompt
    rules: Rules
    asked: tuple[str, ...]
    tokenizer: tuple[str, str | None]
    limits: Mapping[str, Any]
    stores: Mapping[str, Any]

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part in caption_answer.PARTS if part in self.asked or part == LANGUAGE)

    @property
    def options(self) -> dict[str, Any]:
        """Of a request: what of the captioner's settings makes another answer."""
        if (local := self.captioner["local"]) is not None:
            of_model = {name: local[name] for name in ("sha256", "precision", "min_tiles", "max_tiles")}
            return of_model | {"max_output_tokens": self.captioner["max_output_tokens"]}
        told = {name: self.captioner[name] for name in ("model", "max_output_tokens", "media_resolution")}
        if self.captioner["thinking"] is not None:
            told["thinking"] = self.captioner["thinking"]
        told |= elsewhere(self.captioner)
        return told | {"safety": self.captioner["safety"], "image": f"{caption_image.RENDER_VERSION}:{self.captioner['max_side']}"}


def elsewhere(captioner: Mapping[str, Any]) -> dict[str, str]:
    """-> base_url of a Gemini that is not the service's own, else nothing: a stand-in's captions are not the model's, and its answers buy nothing."""
    is_gemini = captioner["engine"] in ("gemini", "gemini-batch")
    return {"base_url": captioner["base_url"]} if is_gemini and captioner["base_url"] is not None else {}


def work(tier: Tier) -> Work:
    """For one task. Rows: image_id, addresses, tags, alt_text, known (JSON of earlier calls, or None)."""
    opener, schema = Opener(tier.stores), caption_answer.schema(tier.parts)
    count = token_count.load(*tier.tokenizer).count
    said = "\n".join((tier.prompt.system, tier.prompt.content, tier.prompt.style, tier.prompt.rest))

    def render(row: Row) -> Request:
        return caption_request.render(bytes(row["image_id"]), tier.prompt, schema, tier.options, list(row["tags"]), row["alt_text"])

    def plain(row: Row) -> Request:
        return caption_request.render(bytes(row["image_id"]), tier.prompt, schema, tier.options)

    def prepare(row: Row) -> tuple[bytes, str]:
        return caption_image.render(row["addresses"], bytes(row["image_id"]), opener, tier.limits, tier.captioner["max_side"])

    def check(row: Row, request: Request, text: str) -> Checked:
        return caption_answer.check(text, tier.rules, count, said, list(row["tags"]), tier.parts)

    def repair(row: Row, request: Request, why: str) -> Request:
        return caption_request.repaired(request, tier.prompt, why)

    def known(row: Row) -> Sequence[Record]:
        return [_record(one) for one in json.loads(row["known"])] if row["known"] else ()

    return Work(render, prepare, check, repair, plain, known)


def _record(one: dict[str, Any]) -> Record:
    usage = one.pop("usage", None)
    told = {"detail": "", "text": ""} | one | {"tried": one.pop("try"), "usage": None if usage is None else Usage(**usage)}
    told.pop("try", None)
    return Record(**told)


def bounds(tier: Tier, notes: int, image_tokens: int) -> Bounds:
    """(bytes of the longest notes, tokens of an image) -> the most that one call can be billed for: a token is at least a byte of text."""
    own = words(tier) + len(tier.prompt.repair.encode()) + REPAIR + 1024  # 1024: keys and quotes of 60 tags, roles, separators
    return Bounds(own + ESCAPED * notes, image_tokens, tier.captioner["max_output_tokens"])


def words(tier: Tier) -> int:
    """-> bytes of a request's text without what is told of an image, its schema among them."""
    said = (tier.prompt.system, tier.prompt.content, tier.prompt.style, tier.prompt.rest, tier.prompt.notes)
    return sum(len(text.encode()) for text in (*said, json.dumps(caption_answer.schema(tier.parts))))


def engine(captioner: Mapping[str, Any]) -> Engine:
    """The captioner's client; its key is read here, on the worker, and goes nowhere else. Raises ValueError that names what is lacking."""
    if captioner["engine"] == "openai":
        from udfs.openai_captioner import OpenAiCaptioner

        return OpenAiCaptioner(_shared(captioner), _key(captioner))
    from udfs.gemini import GeminiEngine

    return GeminiEngine(gemini_options(captioner), _key(captioner))


def batch(captioner: Mapping[str, Any]) -> GeminiBatch:
    """The client of engine gemini-batch; as `engine`."""
    from udfs.gemini_batch import GeminiBatch

    return GeminiBatch(gemini_options(captioner), _key(captioner))


def gemini_options(captioner: Mapping[str, Any]) -> dict[str, Any]:
    """Of GeminiEngine and GeminiBatch."""
    threshold = {"off": "off", "none": "block_none", "default": None}[captioner["safety"]]
    harms = ("harassment", "hate_speech", "sexually_explicit", "dangerous_content")
    safety = {harm: threshold for harm in harms} if threshold is not None else None
    return _shared(captioner) | {name: captioner[name] for name in ("api_version", "thinking")} | {"safety_settings": safety}


def _shared(captioner: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: captioner[name] for name in ("model", "max_output_tokens", "base_url", "media_resolution")}
    return told | {"timeout": captioner["timeout_seconds"]}


def _key(captioner: Mapping[str, Any]) -> str:
    if captioner["key"] is None:
        return ""
    name = captioner["key"]["environment"]
    if not (value := os.environ.get(name, "")):
        raise ValueError(
            f"captions: the environment variable {name} is not set on this worker; spark.executorEnv.{name}, or the cluster's secrets, set it"
        )
    return value
