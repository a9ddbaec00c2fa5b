"""Captions by a model that workers run themselves, in a real lake: a tiny InternVL of the true class, taught one answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyspark.errors import PythonException

from conf.captions import PromptFile
from conf.section import Mistake
from conf.settings import Settings
from jobs import caption, caption_rows, ingest
from jobs.lake import Lake
from tests import tiny_internvl
from tests.jobs.conftest import REPOSITORY, MakeSettings
from udfs import caption_work, internvl

IMAGES = 12
ANSWER = json.dumps({"short": "A red fox stands in deep snow.", "tags": ["fox", "snow"], "language": "en"})
MakeLake = Callable[[Settings], Lake]
Make = Callable[..., Settings]


@pytest.fixture
def make(tmp_path: Path, images: Path, make_settings: MakeSettings) -> Make:
    """Settings over an untaught model and a short prompt of its own."""
    words = yaml.safe_load((REPOSITORY / "conf/prompts/studbook-1.yaml").read_text())
    words |= {"name": "tiny-1", "system": "Describe.", "content": "short: one sentence.", "style": "", "rest": "tags: some."}
    words["repair"] = "Refused: {why}"
    (tmp_path / "tiny-1.yaml").write_text(yaml.safe_dump(PromptFile.model_validate(words, strict=False).model_dump(mode="json")))
    folder = tiny_internvl.write(tmp_path / "TinyVL-hf")

    def made(**local: Any) -> Settings:
        local = {
            "folder": str(folder),
            "sha256": internvl.folder_hash(folder),
            "device": "cpu",
            "precision": "fp32",
            "max_tiles": 1,
        } | local
        captioner = {"engine": "internvl", "max_output_tokens": 120, "local": {"chunk": 5, **local}}
        tier = {"name": "all", "captioner": "own", "parts": ["short", "tags"]}
        return make_settings(captions={"prompt": str(tmp_path / "tiny-1.yaml"), "captioners": {"own": captioner}, "tiers": [tier]})

    return made


def test_an_own_model_captions_every_image_once_and_what_it_cannot_has_a_name(
    make: Make, images: Path, tmp_path: Path, make_lake: MakeLake, capsys: pytest.CaptureFixture[str]
) -> None:
    lake = make_lake(make())
    ingest.run(lake, make())
    with pytest.raises(PythonException, match="hash of the folder: expected 00ff, found"):
        caption.run(lake, make(sha256="00ff"))
    with pytest.raises(Mistake, match=r"captions: local\.folder: given /nowhere"):
        caption.run(lake, make(folder="/nowhere"))
    (images / "part-0/00.png").write_bytes(b"not what ingest saw")
    caption.run(lake, make())
    refused = {row["code"]: row["n"] for row in lake.read("rejects").groupBy("code").count().withColumnRenamed("count", "n").collect()}
    assert refused == {"answer_refused": IMAGES - 1, "bytes_changed": 1} and lake.read("captions").isEmpty(), "it is random"

    work = caption_work.work(caption_rows.of_worker(make(), make().captions.tiers[0]))
    known = {"tags": [], "alt_text": ""}
    asked = [
        (work.render({"image_id": bytes([n]) * 32, **known}), (images / f"part-{n % 2}/{n:02d}.png").read_bytes()) for n in range(1, 3)
    ]
    tiny_internvl.teach(tmp_path / "TinyVL-hf", asked, ANSWER)
    taught = make()
    capsys.readouterr()
    caption.run(lake, taught, plan_only=True)
    assert f"tier all: {IMAGES} images by own (internvl): nothing to pay" in capsys.readouterr().out
    caption.run(lake, taught)
    rows = lake.read("captions").collect()
    assert {(row["kind"], row["text"]) for row in rows} == {("short", "A red fox stands in deep snow."), ("tags", "fox, snow")}
    assert len({bytes(row["image_id"]) for row in rows}) == IMAGES - 1 and len(rows) == 2 * (IMAGES - 1)
    assert {(row["engine"], row["model"], row["prompt"]) for row in rows} == {("internvl", "TinyVL-hf", "tiny-1")}
    version = lake.version("captions")
    caption.run(lake, make(device="cpu", batch_tiles=1, chunk=1, threads=1))
    assert "caption: nothing to do" in capsys.readouterr().out and lake.version("captions") == version
    assert lake.read("caption_calls").isEmpty()
