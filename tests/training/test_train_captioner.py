"""Teaching InternVL captions: a tiny random model of the true class, drawn images through petastorm, DeepSpeed, and what inference makes of it."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from conf.section import Mistake
from conf.settings import Settings, load
from tests import tiny_internvl
from tests.odd_images import LIMITS
from tests.training import taught_images
from tests.training.taught_images import HELD_OUT, ROOT, TRAIN, answer, captions, overrides, picture, settings_of
from training import (
    captioner_cost,
    captioner_evaluation,
    captioner_lesson,
    engine,
    feed,
    image_model_cost,
    loop,
    merge_captioner,
    process_group,
    tracker,
    train_captioner,
    trainer,
)
from training.answer_loss import IGNORED, answer_losses
from training.fit_captioner import FitCaptioner
from udfs import internvl, traces
from udfs.caption_call import Reply


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_internvl.write(tmp_path_factory.mktemp("model") / "tiny-hf")


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught_images.write_prompt(tmp_path_factory.mktemp("prompt") / "tiny.yaml")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught_images.write(tmp_path_factory.mktemp("images") / "export")


def make_task(settings: Settings, place: Path, ranks: process_group.Ranks | None = None) -> FitCaptioner:
    export = train_captioner.open_rows(settings, str(place))
    task = train_captioner.make_task(settings, export, ranks or engine.start("cpu"))
    task.start("cpu")
    return task


@pytest.fixture(scope="module")
def task(model: Path, prompt: Path, place: Path) -> FitCaptioner:
    return make_task(settings_of(model, prompt), place)


def rows_of(task: FitCaptioner) -> feed.Rows:
    return feed.read_bucket(task.export, "train")


def tensors(arrays: feed.Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def test_labels_are_the_answer_and_its_end_and_nothing_else(task: FitCaptioner) -> None:
    arrays, tokenizer = task.prepare(rows_of(task), 0), task.reader.processor.tokenizer
    for number in range(TRAIN):
        labels, tokens, mask = (arrays[name][number] for name in ("labels", "tokens", "mask"))
        taught = labels != IGNORED
        assert np.array_equal(labels[taught], tokens[taught])
        text = tokenizer.decode(labels[taught])
        assert text.endswith("<|im_end|>") and json.loads(text.removesuffix("<|im_end|>")) == answer(number)
        rest = tokenizer.decode(tokens[~taught & (mask == 1)])
        assert rest.endswith("<|im_start|>assistant\n") and answer(number)["short"] not in rest
        assert (
            np.all(np.diff(mask) <= 0) and mask.sum() == np.flatnonzero(taught)[-1] + 1
        )  # the answer ends the row, padding is on the right
    assert arrays["answer_tokens"].tolist() == (arrays["labels"] != IGNORED).sum(1).tolist()
    assert arrays["weight"].tolist() == [1.0] * TRAIN


def test_a_row_is_asked_token_for_token_as_inference_asks(task: FitCaptioner) -> None:
    """With and without notes, each by the draw; what the real model is given in serving is what stands before the answer in fitting."""
    rows, noted = rows_of(task), set()
    asked: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    how = internvl.How(task.folder, internvl.folder_hash(task.folder), max_tiles=4, most_output=1)
    served: Any = internvl._load(how.folder, how.sha256, how.device, how.precision).model.module
    embedded = served.get_input_embeddings().register_forward_pre_hook(lambda _, given: asked.append(given[0]))
    looked = served.model.vision_tower.register_forward_pre_hook(
        lambda _, given, named: seen.append(named["pixel_values"]), with_kwargs=True
    )
    for number in range(TRAIN):
        one = captioner_lesson.lesson(task.course, rows["captions"][number], rows["image_id"][number], task.settings.seed, 0)
        assert one is not None
        noted.add(one.request.noted)
        assert isinstance(internvl.answers([one.request], [picture(number)], task.maker.limits, how)[0], Reply)
    embedded.remove()
    looked.remove()
    assert noted == {True, False} and len(asked) == len(seen) == TRAIN
    for number in range(TRAIN):
        alone = task.prepare({name: column[number : number + 1] for name, column in rows.items()}, 0)
        before = alone["tokens"][0][alone["labels"][0] == IGNORED]
        assert np.array_equal(before, asked[number][0].numpy()) and np.array_equal(alone["pixels"], seen[number].numpy())


def test_a_rows_loss_is_of_its_answer_alone_and_does_not_depend_on_the_rows_beside_it(task: FitCaptioner) -> None:
    module, rows = task.build(), rows_of(task)
    together = answer_losses(module, tensors(task.prepare(rows, 0)))
    for number in range(TRAIN):
        arrays = tensors(task.prepare({name: column[number : number + 1] for name, column in rows.items()}, 0))
        torch.testing.assert_close(answer_losses(module, arrays)[0], together[number], rtol=1e-4, atol=1e-4)
        told = {"input_ids": arrays["tokens"], "pixel_values": arrays["pixels"], "labels": arrays["labels"]}
        expected = module(**told).loss * arrays["answer_tokens"]  # transformers' own
        torch.testing.assert_close(expected[0], together[number], rtol=1e-4, atol=1e-4)
    together.sum().backward()
    touched = {name for name, one in module.named_parameters() if one.grad is not None}
    assert touched == {name for name, one in module.named_parameters() if one.requires_grad}
    assert touched and all("language_model" in name and ".lora_" in name for name in touched)


def test_a_row_that_is_too_long_and_one_without_a_teacher_are_counted_and_named_and_weigh_nothing(
    model: Path, prompt: Path, tmp_path: Path
) -> None:
    long = [one | {"text": "word " * 400} if one["kind"] == "short" else one for one in captions(1)]
    other = [one | {"id": one["id"].replace("gemini", "tags")} for one in captions(2)]
    task = make_task(settings_of(model, prompt, "most_tokens=900"), taught_images.write(tmp_path / "export", {1: long, 2: other, 9: long}))
    assert len(task.lessons) == HELD_OUT - 1
    arrays = task.prepare(rows_of(task), 0)
    assert arrays["too_long"].tolist() == [0, 1, 0, 0, 0, 0, 0, 0] and arrays["no_answer"].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert arrays["weight"].tolist() == [1, 0, 0, 1, 1, 1, 1, 1] and arrays["tokens"].shape[1] <= 900
    names = {code: {hashlib.sha256(picture(number)).hexdigest()} for code, number in (("too_long", 1), ("no_answer", 2))}
    assert task.left_out == names
    module = task.build()
    only = task.losses(module, tensors(task.prepare({name: column[1:3] for name, column in rows_of(task).items()}, 0)))
    assert only["loss"].tolist() == [0.0, 0.0]
    only["loss"].sum().backward()  # a pass as any other: no rank waits
    outcome = loop.run(task, task.settings, tmp_path / "training", task.ranks, None)
    assert outcome.state.step == 4
    recorded = set(pq.read_table(tmp_path / "training/row_losses").to_pydict()["image_id"])
    assert {one.hex() for one in recorded} == {hashlib.sha256(picture(number)).hexdigest() for number in (0, 3, 4, 5, 6, 7)}
    with pytest.raises(
        Mistake,
        match=r"4 held-out images 0 have no caption by \['gemini'\] .* as captions.prompt tiny asks for it, and 4 are longer than most_tokens \(50\)",
    ):
        make_task(settings_of(model, prompt, "most_tokens=50"), tmp_path / "export")


def test_an_answer_is_one_teachers_and_asks_for_the_parts_it_has(task: FitCaptioner) -> None:
    def lesson(rows: list[dict[str, str]]) -> captioner_lesson.Lesson | None:
        return captioner_lesson.lesson(task.course, json.dumps(rows).encode(), b"i" * 32, 7, 0)

    whole = lesson(captions(1))
    assert whole is not None and whole.parts == answer(1) and list(whole.parts) == list(whole.request.schema["properties"])
    other = [{"id": f"openai:x:tiny:1/{kind}/0", "kind": kind, "text": "No."} for kind in ("short", "medium", "tags")]
    both = lesson([*other, *captions(1)])
    assert both is not None and both.parts == whole.parts
    cut = lesson([one for one in captions(1) if one["kind"] not in ("tags", "ocr")])
    assert cut is not None and set(cut.parts) == {"short", "language"}  # no text in the picture, or none told: nobody knows
    looked = lesson([one for one in captions(1) if one["kind"] != "tags"])
    assert looked is not None and looked.parts["ocr"] == []  # an empty row says that none is there
    assert lesson([one for one in captions(1) if one["kind"] == "ocr"]) is None
    before = [one | {"id": one["id"].replace(":tiny:", ":tiny-0:")} for one in captions(1)]
    assert lesson(before) is None  # of another prompt version: its answers are to another request
    digests = {one.digest for one in (whole, cut, looked)}
    assert len(digests) == 3 and both.digest == whole.digest
    assert lesson(other[:0]) is None and lesson(captions(1)[:2]) is None
    many = [{"id": f"{taught_images.TEACHER}/ocr/{number}", "kind": "ocr", "text": str(number)} for number in (10, 9, 2)]
    regions = lesson([*captions(1), *many])
    assert regions is not None and regions.parts["ocr"] == ["2", "9", "10"]


def test_a_generated_answer_is_checked_as_every_captioners_is(task: FitCaptioner) -> None:
    lesson = task.lessons[1]  # image 9: green, text in it
    right = captioner_evaluation.look_at(task.answering, 1, lesson, "ok", json.dumps(dict(lesson.parts)))
    half = dict(lesson.parts) | {"tags": ["GREEN", "sky"], "short": ""}
    wrong = captioner_evaluation.look_at(task.answering, 1, lesson, "ok", json.dumps(half))
    none = captioner_evaluation.look_at(task.answering, 1, lesson, "cut", '{"short": "A gr')
    assert (right.faults, right.recall, right.tokens) == ([], 1.0, {"short": 4})
    assert (wrong.faults, wrong.recall, wrong.tokens) == ([("short", "empty")], 0.5, {})
    assert none.recall == 0.0 and ("answer", "cut") in none.faults
    told = captioner_evaluation.tell([right, wrong, none])
    assert told == pytest.approx({"answers_parsed": 2 / 3, "answers_whole": 1 / 3, "tag_recall": 0.5, "tokens_short": 4.0})


@pytest.mark.parametrize("world", [2, 3])
def test_what_is_measured_is_the_same_at_any_number_of_ranks(
    task: FitCaptioner, place: Path, model: Path, prompt: Path, world: int
) -> None:
    module, passes, shares, answers = task.build().eval(), [], [], []
    for rank in range(world):
        one = make_task(settings_of(model, prompt, f"rows_per_step={2 * world}"), place, process_group.Ranks(rank, world))
        calls: list[int] = []
        with module.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1)):
            shares.append(captioner_evaluation.losses_share(one, module))
        passes.append(len(calls))
        answers += captioner_evaluation.generated_share(one, module)
    assert len(set(passes)) == 1
    assert np.allclose(sum(shares), captioner_evaluation.losses_share(task, module), rtol=1e-6)
    assert {(one.place, one.text) for one in answers} == {
        (one.place, one.text) for one in captioner_evaluation.generated_share(task, module)
    }


def test_the_flops_by_formula_are_those_that_torch_counts(task: FitCaptioner) -> None:
    module, rows = internvl.load_module(task.folder, "fp32"), rows_of(task)
    arrays = task.prepare({name: column[:1] for name, column in rows.items()}, 0)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # torch's counter does not know the CPU's fused attention
        counted = image_model_cost.count_flops(lambda: answer_losses(module, tensors(arrays)))
    sizes = captioner_cost.measure(task.folder, task.settings.lora)
    assert sizes.parameters == sum(one.numel() for one in module.parameters())
    row = (arrays["tokens"].shape[1], len(arrays["pixels"]), arrays["answer_tokens"][0])
    assert sum(captioner_cost.forward_flops(sizes, *row)) == pytest.approx(counted, rel=1e-6)


def test_a_training_overfits_a_few_images_and_one_that_goes_on_gives_the_same_bits(
    model: Path, prompt: Path, place: Path, tmp_path: Path
) -> None:
    settings = settings_of(model, prompt, "epochs=12", "checkpoint_every=9", "keep=9", "generated=0", "notes=0.0")
    task = make_task(settings, place)
    folder, again = tmp_path / "training", tmp_path / "again"
    outcome = loop.run(task, settings.train_captioner, folder, task.ranks, None)
    losses = pq.read_table(folder / "row_losses").to_pandas().groupby("epoch")["loss"].mean()
    assert losses.iloc[-1] < 0.6 * losses.iloc[0], losses
    assert outcome.metrics["base_held_out_loss"] > outcome.metrics["held_out_loss"]  # the held-out pictures are of the same kind
    shutil.copytree(folder / "checkpoints/step-00000009", again / "checkpoints/step-00000009")
    resumed = loop.run(make_task(settings, place), settings.train_captioner, again, task.ranks, None)
    assert outcome.weights and all(torch.equal(value, resumed.weights[name]) for name, value in outcome.weights.items())
    assert resumed.metrics == outcome.metrics


def test_the_command_trains_on_two_ranks_and_registers_a_captioner_that_merges_into_one_that_serves(
    model: Path, prompt: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    store = [
        f"mlflow.tracking_uri=sqlite:///{tmp_path}/mlflow.db",
        f"mlflow.artifacts={tmp_path}/artifacts",
        f"training.root={tmp_path}/trainings",
    ]
    given = overrides(model, prompt, "ranks=2", "micro_batch=1", "learning_rate=0.1", "zero_stage=2")
    sets = [part for one in (*store, *given) for part in ("--set", one)]
    line = ["train_captioner", str(place), "--config", str(ROOT / "conf/demo.yaml"), *sets]
    monkeypatch.setattr("sys.argv", [*line, "--plan"])
    trainer.main(train_captioner, "")
    planned = capfd.readouterr().out
    assert (
        "2 epochs of 8 images in 4 steps, 4 held out" in planned and "ZeRO 3" in planned and "pending: starts from its first row" in planned
    )
    monkeypatch.setattr("sys.argv", line)
    trainer.main(train_captioner, "")
    told = capfd.readouterr().out
    assert "registered captioner version 1 as champion" in told
    client = tracker.connect(load(ROOT / "conf/demo.yaml", store).mlflow)
    version = client.get_model_version_by_alias("captioner", "champion")
    run = client.get_run(version.run_id).data
    assert run.metrics["base_held_out_loss"] != run.metrics["held_out_loss"] and "answers_parsed" in run.metrics
    files = Path(client.download_artifacts(version.run_id, "", str(tmp_path)))
    assert {path.name for path in (files / "captioner").iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "captioner.json"}
    evaluation = json.loads((files / "evaluation.json").read_text())
    assert evaluation["after"]["held_out_loss"] == run.metrics["held_out_loss"] and evaluation["held_out_images"] == HELD_OUT
    losses = pq.read_table(files / "held_out_losses.parquet").to_pydict()
    assert np.average(losses["base_loss"], weights=losses["answer_tokens"]) == pytest.approx(
        evaluation["before"]["held_out_loss"], rel=1e-5
    )
    assert len(set(losses["lesson"])) == HELD_OUT  # by which two versions' rows pair
    answers = pq.read_table(files / "held_out_answers.parquet").to_pylist()
    assert len(answers) == 2 and json.loads(answers[0]["teacher"]) == answer(TRAIN)
    first = answers[0]["image_id"]
    left = traces.without((files / "held_out_answers.parquet").read_bytes(), traces.Traces(frozenset([first.hex()])))
    assert left is not None and [one["image_id"] for one in pq.read_table(io.BytesIO(left)).to_pylist()] == [answers[1]["image_id"]]

    merged, same = tmp_path / "captioner-hf", tmp_path / "same-hf"
    tail = ["--config", str(ROOT / "conf/demo.yaml"), *sets]
    for folder, *more in ((merged, "champion"), (same, str(files / "captioner"), "--scale", "0")):
        monkeypatch.setattr("sys.argv", ["merge_captioner", more[0], str(folder), *more[1:], *tail])
        merge_captioner.main()
    sha256 = internvl.folder_hash(merged)
    assert client.get_model_version("captioner", version.version).tags["merged_sha256"] == sha256
    assert f"merge captioner: {merged}, sha256 {sha256}" in capfd.readouterr().out
    texts, lessons = [], make_task(settings_of(model, prompt), place).lessons
    for folder in (model, merged, same):
        how = internvl.How(str(folder), internvl.folder_hash(folder), max_tiles=4, most_output=24)
        replies = internvl.answers([one.request for one in lessons], [picture(TRAIN + number) for number in range(HELD_OUT)], LIMITS, how)
        texts.append([reply.text for reply in replies if isinstance(reply, Reply)])
    assert texts[0] == texts[2] != texts[1] and len(texts[1]) == HELD_OUT
    for one, base, taught in zip(answers, texts[0], texts[1], strict=False):  # what was measured in training is what serves
        assert base.startswith(one["before"]["text"]) and taught.startswith(one["after"]["text"]) and len(one["after"]["text"]) > 2
    with pytest.raises(Mistake, match="is there already"):
        merge_captioner.merge(files / "captioner", str(model), merged, {})
    with pytest.raises(Mistake, match="the captioner was taught on tiny-hf with"):
        merge_captioner.check(files / "captioner", str(tiny_internvl.write(tmp_path / "other-hf", seed=8)))


@pytest.mark.proof
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")])
def test_every_zero_stage_teaches_the_same(
    model: Path, prompt: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, precision: str
) -> None:
    """On two ranks, with activations computed twice; also whole answers, which end at different tokens on different ranks."""
    store = [
        f"mlflow.tracking_uri=sqlite:///{tmp_path}/mlflow.db",
        f"mlflow.artifacts={tmp_path}/artifacts",
        f"training.root={tmp_path}/trainings",
    ]
    alone = settings_of(model, prompt, "micro_batch=1", "generated=3", "most_output=24", "ema_decay=0.9")
    task = make_task(alone, place)
    expected = loop.run(task, alone.train_captioner, tmp_path / "alone", task.ranks, None).metrics
    more = ("ranks=2", "micro_batch=1", "generated=3", "most_output=24", "checkpointing=true", "ema_decay=0.9")
    given = overrides(model, prompt, *more, f"zero_stage={stage}", f"precision={precision}")
    sets = [part for one in (*store, *given) for part in ("--set", one)]
    monkeypatch.setattr("sys.argv", ["train_captioner", str(place), "--config", str(ROOT / "conf/demo.yaml"), *sets])
    trainer.main(train_captioner, "")
    (about,) = (tmp_path / "trainings").glob("*/finished.json")
    metrics = json.loads(about.read_text())["metrics"]
    near = 1e-3 if precision == "fp32" else 0.05
    for name in ("held_out_loss", "base_held_out_loss"):
        assert metrics[name] == pytest.approx(expected[name], rel=near)
    assert metrics["held_out_loss"] < metrics["base_held_out_loss"]


@pytest.mark.proof
def test_a_model_that_said_nothing_answers_for_each_picture_what_its_teacher_said(model: Path, prompt: Path, tmp_path: Path) -> None:
    """Random weights and adapters beside every layer: what is learned was in no one before. The pictures are held out, their kinds are not."""
    texts = {number: captions(1 + number % 2) for number in range(TRAIN + HELD_OUT)}
    everywhere = "layers: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, fc1, fc2, projection_layer, linear_1, linear_2]"
    lora = f"lora={{rank: 32, alpha: 64, within: [language_model, vision_tower, multi_modal_projector], {everywhere}}}"
    more = (
        "parts=[short, tags]",
        "notes=0.0",
        "max_tiles=1",
        "rows_per_step=8",
        "micro_batch=8",
        "epochs=200",
        "learning_rate=0.005",  # the others' .02 ends at one answer for all pictures
        "generated=4",
        "most_output=99",
    )
    settings = settings_of(model, prompt, *more, lora)
    task = make_task(settings, taught_images.write(tmp_path / "export", texts, taught_images.noise))
    metrics = loop.run(task, settings.train_captioner, tmp_path / "training", task.ranks, None).metrics
    assert (metrics["base_answers_parsed"], metrics["base_tag_recall"]) == (0.0, 0.0)
    assert (metrics["answers_whole"], metrics["tag_recall"]) == (1.0, 1.0)  # one answer for all pictures would be a recall of .75
    assert task.measured is not None
    assert [json.loads(one.text)["short"] for one in task.measured.answers] == ["A green field.", "A blue field."] * 2


def test_the_digest_is_of_what_is_trained_and_not_of_how_or_where(model: Path, prompt: Path, place: Path, tmp_path: Path) -> None:
    def digest(*more: str, folder: Path = model) -> str:
        settings = settings_of(folder, prompt, *more)
        return train_captioner.training_digest(settings, train_captioner.open_rows(settings, str(place)))

    moved = shutil.copytree(model, tmp_path / "moved-hf")
    same = {digest(), digest("micro_batch=1", "zero_stage=3", "checkpointing=true"), digest(folder=moved)}
    others = {digest(one) for one in ("lora={rank: 2}", "max_tiles=6", "notes=0.1", "teachers=[tags]", "parts=[short]", "most_tokens=99")}
    assert len(same) == 1 and len(others - same) == 6


def test_a_mistake_says_what_to_give(model: Path, prompt: Path, place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        Mistake, match=r"train_captioner.pretrained: required, not given; give a local folder such as OpenGVLab/InternVL3-8B-hf"
    ):
        make_task(settings_of(model, prompt, "pretrained=null"), place)
    with pytest.raises(Mistake, match=r"train_captioner.lora.layers: given \['to_q'\], .*self_attn.q_proj"):
        make_task(settings_of(model, prompt, "lora={layers: [to_q]}"), place).build()
    other = tiny_internvl.write(tmp_path / "other-hf")
    told = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(told | {"eos_token_id": 5}))
    with pytest.raises(Mistake, match=r"ends a text by the token 2, its generation_config.json an answer by \[5\]"):
        make_task(settings_of(other, prompt), place).build()
