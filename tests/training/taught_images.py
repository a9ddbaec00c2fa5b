"""A small export of drawn images with a teacher's captions, as jobs/export_images.py writes it; a short prompt; and the settings of a tiny training."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from conf.settings import Settings, load
from udfs import image_files
from udfs.snapshot import id_sum

ROOT = Path(__file__).parents[2]
TEACHER = "gemini:gemini-x:tiny:0123456789ab"
TRAIN, HELD_OUT = 8, 4
COLOURS = ("red", "green", "blue", "white")
SIZES = [(64, 48), (28, 28), (90, 60)]
SMALL = (
    "epochs=2",
    "rows_per_step=4",
    "micro_batch=2",
    "learning_rate=0.02",
    "max_tiles=4",
    "generated=2",
    "most_output=8",
    "evaluations=1",
)


def answer(number: int) -> dict[str, Any]:
    colour = COLOURS[number % 4]
    ocr = ["EXIT", "2"] if number % 3 == 0 else []
    return {"short": f"A {colour} field.", "tags": [colour, "flat"], "ocr": ocr, "language": "en"}


def captions(number: int) -> list[dict[str, str]]:
    told = answer(number)
    rows = [
        ("short", 0, told["short"]),
        ("tags", 0, ", ".join(told["tags"])),
        *(("ocr", place, text) for place, text in enumerate(told["ocr"] or [""])),
    ]
    own = [{"id": f"{TEACHER}/{kind}/{part}", "kind": kind, "text": text} for kind, part, text in rows]
    return [
        {"id": "alt_text/ab", "kind": "alt_text", "text": "a wall"},
        {"id": "source_tags/cd", "kind": "source_tags", "text": "paint, wall"},
        *own,
    ]


def picture(number: int) -> bytes:
    with io.BytesIO() as file:
        Image.new("RGB", SIZES[number % 3], COLOURS[number % 4]).save(file, "PNG")
        return file.getvalue() + str(number).encode()  # bytes behind the end: another image


def noise(number: int) -> bytes:
    """Two kinds of pictures that a random tower tells apart, as it does not one colour from another."""
    pixels = np.random.default_rng(number % 2).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue() + str(number).encode()


def write(folder: Path, texts: dict[int, list[dict[str, str]]] | None = None, draw: Callable[[int], bytes] = picture) -> Path:
    """texts: the captions of some images, by number, instead of their own."""
    folder.mkdir(parents=True)
    files = []
    for bucket, numbers in (("train", range(TRAIN)), ("held_out", range(TRAIN, TRAIN + HELD_OUT))):
        data = [draw(number) for number in numbers]
        told = [(texts or {}).get(number, captions(number)) for number in numbers]
        columns: dict[str, list[Any]] = {
            "image_id": [hashlib.sha256(one).digest() for one in data],
            "bytes": data,
            "captions": [json.dumps(one).encode() for one in told],
            **{name: [5] * len(data) for name in ("score", "style_cluster", "width", "height")},
            "rating": ["safe"] * len(data),
        }
        path = folder / f"{bucket}-00000.parquet"
        pq.write_table(pa.table(columns, schema=image_files.COLUMNS), path)
        about = {"rows": len(data), "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        files.append({"file": path.name, "bucket": bucket, "ids": f"{id_sum(columns['image_id']):016x}", **about})
    manifest = {"export": "0123456789ab", "kind": "images", "rows": TRAIN + HELD_OUT, "made_from": {"images": 3}, "lake": "demo/lake"}
    manifest |= {"columns": {field.name: str(field.type) for field in image_files.COLUMNS}, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_prompt(path: Path) -> Path:
    """The house's prompt in few words: a byte is a token here."""
    told = yaml.safe_load((ROOT / "conf/prompts/studbook-1.yaml").read_text())
    words = {
        "name": "tiny",
        "system": "Describe.",
        "content": "short: a sentence.",
        "style": "style: how.",
        "rest": "tags, ocr.",
        "banned": [],
    }
    path.write_text(yaml.safe_dump(told | words | {"bands": {part: [1, 99] for part in ("short", "medium", "long", "style")}}))
    return path


def overrides(model: Path, prompt: Path, *more: str) -> list[str]:
    section = [f"train_captioner.{one}" for one in (f"pretrained={model}", "parts=[short, tags, ocr]", *SMALL, *more)]
    return [*section, f"captions.prompt={prompt}"]


def settings_of(model: Path, prompt: Path, *more: str) -> Settings:
    return load(ROOT / "conf/demo.yaml", overrides(model, prompt, *more))
