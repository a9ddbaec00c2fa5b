"""generateContent's request: options and a Request -> the body, the same online and in a line of Batch mode, and the most that its answer can cost.

Names and values are checked by google-genai's own types: the service refuses every request of an unknown one.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from typing import Any

from google.genai import types

from udfs.caption_call import Usage
from udfs.caption_request import Request

SERVICE = "https://generativelanguage.googleapis.com"
API_VERSION = "v1"
# tokens of an image by media resolution (Gemini 3); HIGH is the service's own default
IMAGE_TOKENS = {"LOW": 280, "MEDIUM": 560, "HIGH": 1_120, "ULTRA_HIGH": 2_240}
MARGIN = 64  # tokens of a prompt that are in no text: roles, separators


def checked(options: Mapping[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """options: model, max_output_tokens, timeout (seconds); or None: base_url, api_version, media_resolution (low | medium | high | ultra_high),
    safety_settings (category -> threshold), thinking (a level, or tokens). key: the API key, as text.

    -> both, with the service's address and version. ValueError: no request can be made of them.
    """
    if not key.strip() or not key.isascii() or not key.strip().isprintable():
        raise ValueError("the API key is empty, or holds characters that no key has")
    if missing := [name for name in ("model", "max_output_tokens", "timeout") if not options.get(name)]:
        raise ValueError(f"engine options without {', '.join(missing)}")
    if not re.fullmatch(r"[\w.@/-]+", str(options["model"])) or ".." in options["model"]:
        raise ValueError(f"model: given {options['model']}, expected a model's name, as gemini-3.8-flash")
    types.GenerateContentConfig(**generation(Request("", b"", "", "", {}, {}, False), options))
    where = {"base_url": options.get("base_url") or SERVICE, "api_version": options.get("api_version") or API_VERSION}
    return {**options, **where}, key.strip()


def address(options: Mapping[str, Any]) -> str:
    """-> where generateContent of the options' model is."""
    model = str(options["model"])
    path = model if model.startswith(("models/", "tunedModels/")) else f"models/{model}"
    return f"{options['base_url'].rstrip('/')}/{options['api_version']}/{path}:generateContent"


def most_usage(request: Request, options: Mapping[str, Any]) -> Usage:
    """The most that one answer to a request can cost: a token is at least a byte of its text, and thoughts count as output."""
    words = (request.system, request.prompt, json.dumps(request.schema))
    image = IMAGE_TOKENS[_resolution(options) or "HIGH"]
    return Usage(
        sum(len(text.encode("utf-8", "surrogatepass")) for text in words) + MARGIN,
        image,
        int(options["max_output_tokens"]),
        0,
        estimated=True,
    )


def generation(request: Request, options: Mapping[str, Any]) -> dict[str, Any]:
    """-> GenerateContentConfig's members that shape the answer. ValueError, TypeError: the options are wrong."""
    resolution, thinking = _resolution(options), options.get("thinking")
    config: dict[str, Any] = {
        "system_instruction": request.system or None,
        "candidate_count": 1,
        "max_output_tokens": int(options["max_output_tokens"]),
        "response_mime_type": "application/json",
        "response_json_schema": dict(request.schema),
        "media_resolution": f"MEDIA_RESOLUTION_{resolution}" if resolution else None,
        "safety_settings": [
            {"category": _member(types.HarmCategory, name, "HARM_CATEGORY_"), "threshold": _member(types.HarmBlockThreshold, threshold)}
            for name, threshold in (options.get("safety_settings") or {}).items()
        ]
        or None,
    }
    if thinking is not None:  # a level by name, or a budget in tokens
        is_budget = isinstance(thinking, int)
        config["thinking_config"] = (
            {"thinking_budget": thinking} if is_budget else {"thinking_level": _member(types.ThinkingLevel, thinking)}
        )
    return config


def body(request: Request, image: bytes, mime: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """-> the JSON. ValueError, TypeError: as of `generation`."""
    config = {name: value for name, value in generation(request, options).items() if value is not None}
    told: dict[str, Any] = {
        "contents": [
            {
                "role": "user",
                "parts": [{"inlineData": {"data": base64.b64encode(image).decode(), "mimeType": mime}}, {"text": request.prompt}],
            }
        ]
    }
    if words := config.pop("system_instruction", None):
        told["systemInstruction"] = {"role": "user", "parts": [{"text": words}]}
    if safety := config.pop("safety_settings", None):
        told["safetySettings"] = safety
    if thinking := config.pop("thinking_config", None):
        config["thinking_config"] = {_camel(name): value for name, value in thinking.items()}
    return {**told, "generationConfig": {_camel(name): value for name, value in config.items()}}


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _member(kind: Any, name: Any, prefix: str = "") -> str:
    """The SDK takes an unknown name for a new one, and every request would be refused."""
    found = prefix + str(name).upper().removeprefix(prefix)
    if found not in kind.__members__:
        raise ValueError(f"{name}: no {kind.__name__}; there are {', '.join(kind.__members__).lower()}")
    return found


def _resolution(options: Mapping[str, Any]) -> str:
    name = str(options.get("media_resolution") or "").upper().removeprefix("MEDIA_RESOLUTION_")
    if name and name not in IMAGE_TOKENS:
        raise ValueError(f"media_resolution: {name.lower()}, expected one of {', '.join(map(str.lower, IMAGE_TOKENS))}")
    return name
