"""Texts found in a file -> those that say a model made the picture. Evidence in the bytes, not a detector."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_TEXT = 200  # characters of a mark that are kept

# PNG text keys that only image generators write, whatever they say.
# Stable Diffusion WebUI and its forks; ComfyUI (two); InvokeAI (three); the original dream.py; Fooocus; SwarmUI; Draw Things' sidecar
KEYS = frozenset(
    [
        "parameters",
        "prompt",
        "workflow",
        "invokeai_metadata",
        "invokeai_graph",
        "sd-metadata",
        "dream",
        "fooocus_scheme",
        "sui_image_params",
        "generation_data",
    ]
)
# Keys in which programs name themselves: of PNG and EXIF; of XMP; of C2PA
NAMING_KEYS = frozenset(
    [
        *("software", "comment", "description", "title", "source", "author"),
        *("creatortool", "credit"),
        *("claim_generator", "claim_generator_info", "softwareagent"),
    ]
)
SOURCE_TYPES = ("xmp:DigitalSourceType", "c2pa:digitalSourceType")
# IPTC's digital source types (https://cv.iptc.org/newscodes/digitalsourcetype/, as of 2024-09-17) that a model or a formula had part in:
# made by a trained model; edited by one (in- and outpainting); a composite with a generated element; made by a formula without training
# data. All others (digitalCapture, computationalCapture, humanEdits, algorithmicallyEnhanced, digitalCreation, ...) are no mark.
AI_SOURCE_TYPES = frozenset(["trainedalgorithmicmedia", "compositewithtrainedalgorithmicmedia", "compositesynthetic", "algorithmicmedia"])
# Words that name a generator. Each is specific enough to stand in a sentence: `Imagen` alone is Spanish, `Firefly` alone an insect.
GENERATORS = (
    r"stable[ _-]?diffusion", r"sdxl", r"automatic1111", r"comfy[ _-]?ui", r"invoke[ _-]?ai", r"novel[ _-]?ai", r"fooocus", r"swarm[ _-]?ui",
    r"draw ?things", r"dream ?studio", r"midjourney", r"dall[ ._·-]?e[ _-]?[23]?", r"gpt-image", r"bing image creator", r"adobe firefly",
    r"google imagen", r"imagen ?[2-9]", r"made with google ai", r"leonardo\.ai", r"ideogram(?:\.ai)?", r"black forest labs", r"flux\.[12]",
    r"playground ?ai", r"craiyon", r"kandinsky ?[2-9]", r"hunyuan", r"recraft", r"ai[ -]generated image",
)  # fmt: skip
_GENERATOR = re.compile(r"(?<!\w)(?:" + "|".join(GENERATORS) + r")(?!\w)", re.IGNORECASE)


def marks(texts: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """(where, text) pairs as in file_layout.Layout -> the telling ones as {"where", "text"}, text cut to MAX_TEXT.

    An ordinary program (Photoshop, GIMP) is no mark, and a C2PA manifest alone is none: cameras sign too.
    """
    return [{"where": where, "text": _clean(text)} for where, text in texts if _tells(where, text)]


def _tells(where: str, text: str) -> bool:
    if where in SOURCE_TYPES:
        return re.split("[/:]", text)[-1].lower() in AI_SOURCE_TYPES  # a URI, or as news systems write it: digsrctype:NAME
    key = where.partition(":")[2].lower()
    if where.startswith("c2pa:"):
        text = re.sub("[_/]", " ", text)  # Adobe_Firefly/1.0, the form of HTTP's user agents
    return key in KEYS or (key in NAMING_KEYS and _GENERATOR.search(text) is not None)


def _clean(text: str) -> str:
    """No NUL and no lone surrogate: a table column is UTF-8."""
    return text[: 2 * MAX_TEXT].replace("\0", "").encode("utf-8", "replace").decode()[:MAX_TEXT]
