"""Which outputs a build has, under which fingerprints, by which engine; no Spark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conf.section import Mistake
from conf.settings import Settings, load
from jobs import checks, embedding
from udfs import jpeg

DEMO = Path(__file__).parents[2] / "conf/demo.yaml"


def demo(**embed: Any) -> Settings:
    told = {"encoders": ["clip-vit-b-16-demo", "colour-grid"], "detectors": ["rapidocr"], "device": "cpu", "engine": None} | embed
    return load(DEMO, [f"embed.{key}={'null' if value is None else str(value).replace(chr(39), '')}" for key, value in told.items()])


def test_detectors_are_outputs_of_originals_and_degraded_views_have_what_the_scorer_reads() -> None:
    assert set(embedding.outputs(demo())) == {"pixels", "clip-vit-b-16-demo", "colour-grid", "rapidocr"}
    assert set(embedding.outputs(demo(), seed=7)) == {"pixels", "clip-vit-b-16-demo"}


def test_the_engine_is_onnxruntime_on_a_cpu_in_fp32_and_torch_elsewhere_and_says_so_in_the_fingerprint() -> None:
    settings = [
        demo(),
        demo(engine="onnxruntime"),
        demo(engine="torch"),
        demo(precision="bf16"),
        demo(device="cuda"),
        demo(device="cuda", compile=True),
    ]
    assert [one.embed.engine_used for one in settings] == ["onnxruntime", "onnxruntime", "torch", "torch", "torch", "torch"]
    told = [embedding.outputs(one)["clip-vit-b-16-demo"] for one in settings]
    assert told[0] == told[1]
    assert len(set(told)) == 4  # the same engine in the same precision is one fingerprint, whatever the device


def test_a_detectors_fingerprint_depends_on_what_it_keeps_and_not_on_the_towers_engine(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("{name: rapidocr, kernel: text, keep: 0.4}")
    first, other = demo(), demo(detectors=[str(tmp_path / "other.yaml")])
    assert embedding.outputs(first)["rapidocr"] != embedding.outputs(other)["rapidocr"]
    assert embedding.outputs(first)["rapidocr"] == embedding.outputs(demo(engine="torch"))["rapidocr"]


def test_another_choice_of_jpeg_decode_is_another_fingerprint_of_every_output(monkeypatch: pytest.MonkeyPatch) -> None:
    from udfs import decode

    before = embedding.outputs(demo())
    assert jpeg.CHOICE in decode.SCALED
    monkeypatch.setattr(decode, "SCALED", "1+another")
    after = embedding.outputs(demo())
    assert all(before[name] != after[name] for name in before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": "onnxruntime", "precision": "bf16"}, "onnxruntime runs the towers in fp32, given precision bf16"),
        ({"compile": True}, "compile: given with engine onnxruntime"),
        ({"encoders": ["clip-vit-b-16-demo", "clip-vit-b-16-demo"]}, "two of its encoders and detectors are named"),
    ],
)
def test_an_engine_that_cannot_is_refused_before_the_job(given: dict[str, Any], message: str) -> None:
    with pytest.raises(Mistake, match=message):
        embedding.outputs(demo(**given))


def test_onnxruntime_on_a_gpu_that_it_cannot_use_is_refused_before_spark() -> None:
    with pytest.raises(Mistake, match="given onnxruntime with device cuda, but onnxruntime here has"):
        checks._check_models(demo(engine="onnxruntime", device="cuda"))


def test_a_missing_file_of_a_detector_is_named(tmp_path: Path) -> None:
    (tmp_path / "tagger.yaml").write_text(
        f"{{name: tags, kernel: tagger, weights: /nowhere/model.onnx, sha256: '{'0' * 64}', vocabulary: {DEMO}, vocabulary_sha256: '{'0' * 64}'}}"
    )
    with pytest.raises(Mistake, match="detector tags: weights: no file at /nowhere"):
        checks._check_models(demo(detectors=[str(tmp_path / "tagger.yaml")]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("select.rules=[{name: r, value: rating, within: [saef]}]", r"select.rules.r: rating: given \['saef'\], allowed \['safe'"),
        ("select.rules=[{name: r, value: has_text, none_of: ['yes']}]", r"has_text: given \['yes'\], allowed \['true', 'false'\]"),
        ("select.caps=[{name: c, value: ai_generated, words: [ai], at_most: 3}]", r"select.caps.c: ai_generated: given \['ai'\]"),
    ],
)
def test_a_word_that_no_image_can_have_is_refused_before_spark_starts(change: str, message: str) -> None:
    with pytest.raises(Mistake, match=message):
        checks.check(load(DEMO, [change]))
