"""An images export -> a registered captioner: adapters (LoRA) that teach InternVL the captions that others gave, such as paid ones.

    python -m training.train_captioner demo/exports/images-0123456789ab --config conf/demo.yaml --set train_captioner.pretrained=models/InternVL3-8B-hf

In: the rows of bucket `train` (an image's bytes and all its captions, with their ids) fit the adapters, those of `held_out` measure them. A row is
asked as inference asks and answers as its teacher did; `train_captioner.teachers` says whose captions count, `captions.prompt` the words. Out: a new
version of `train_captioner.model` in the registry, peft's own two files; the first becomes `champion`, later ones `candidate`. In its run: the loss an
answer token and whole generated answers, checked, of the model before and after, on the same images; the rows that were left out, by name.
`--plan` says what is pending and prints parameters, memory a rank for each ZeRO stage and FLOPs, without loading a weight. A bad export, or an image of
it that does not decode, is one line and exit status 2.

    python -m training.merge_captioner champion models/captioner-hf --config conf/demo.yaml --set train_captioner.pretrained=models/InternVL3-8B-hf

makes of a version the folder that captions (udfs/internvl.py, or a server).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from conf.settings import Settings, digest, load_prompt
from training import (
    captioner_adapters,
    captioner_cost,
    captioner_evaluation,
    captioner_lesson,
    feed,
    fit_captioner,
    loop,
    process_group,
    tracker,
    trainer,
)
from training.captioner_evaluation import Measured
from training.captioner_lesson import Lesson
from training.exports import Export, open_export
from training.fit_captioner import HELD_OUT, LEFT_OUT, METRIC, TRAIN, FitCaptioner, folder_of
from training.fit_image_model import COLUMNS
from training.result_files import digest_of, hash_files
from udfs import caption_answer, caption_request, decode, internvl, internvl_prompt, token_count

NAME, MODULE, SECTION = "train captioner", "training.train_captioner", "train_captioner"
FOLDER = "captioner"
TRAINER_VERSION = 1  # raised when the same export and settings would give another model
ABOUT, LOSSES, ANSWERS = "captioner.json", "held_out_losses.parquet", "held_out_answers.parquet"


def open_rows(settings: Settings, place: str) -> Export:
    return open_export(place, "images", COLUMNS, (TRAIN, HELD_OUT), settings)


def training_digest(settings: Settings, export: Export) -> str:
    """What is trained, from what and on what: not how it is run, and not where the pretrained weights lie."""
    trained = settings.train_captioner.identity() | {"pretrained": base_of(settings), "task": task_of(settings)}
    versions = (decode.KERNEL_VERSION, internvl_prompt.KERNEL_VERSION, captioner_lesson.KERNEL_VERSION, TRAINER_VERSION)
    return digest(trained, export.sha256, *versions)


def base_of(settings: Settings) -> str:
    """-> the hash of the folder that the training starts from."""
    return _hash(folder_of(settings.train_captioner))


@lru_cache
def _hash(folder: str) -> str:
    return internvl.folder_hash(folder)  # all of its bytes: once a process


def task_of(settings: Settings) -> str:
    """-> what is asked and what counts as an answer: versions of one task compare by their loss."""
    wanted, prompt = settings.train_captioner, load_prompt(settings.captions.prompt)
    told = digest(
        prompt, caption_request.REQUEST_VERSION, caption_answer.RULES_VERSION, list(wanted.parts), list(wanted.teachers), wanted.notes
    )
    return f"{prompt.name}:{told}"


def tell_plan(settings: Settings, export: Export) -> None:
    wanted = settings.train_captioner
    task = make_task(settings, export, process_group.Ranks(0, wanted.ranks))
    steps = wanted.epochs * -(-export.rows(TRAIN) // wanted.rows_per_step)
    say(f"{wanted.epochs} epochs of {export.rows(TRAIN)} images in {steps} steps, {len(task.lessons)} held out")
    for line in captioner_cost.tell(wanted, task.folder, task.mean_row):
        say(line)


def plan_rows(settings: Settings, export: Export, ranks: process_group.Ranks) -> feed.Plan:
    return fit_captioner.plan_rows(settings.train_captioner, export, ranks)


def make_task(settings: Settings, export: Export, ranks: process_group.Ranks) -> FitCaptioner:
    wanted, options = settings.train_captioner, settings.captions
    prompt = load_prompt(options.prompt)
    counter = token_count.load(options.tokenizer, options.tokenizer_sha256)
    course, rules = captioner_lesson.course(prompt, wanted), caption_answer.rules(prompt.model_dump())
    return FitCaptioner(wanted, export, settings.limits, course, rules, counter, ranks)


def write_result(folder: Path, settings: Settings, export: Export, task: FitCaptioner, outcome: loop.Outcome) -> dict[str, str]:
    """The adapters, what they are, and how the model was before and after on the same held-out images -> the version's tags."""
    wanted, model = settings.train_captioner, folder / FOLDER
    assert task.measured is not None and task.base is not None and outcome.metrics[METRIC] == task.measured.metrics[METRIC], outcome.metrics
    model.mkdir()
    captioner_adapters.save(model, outcome.weights, wanted.lora, Path(task.folder).name)
    about = describe(settings, export, hash_files(model))
    (model / ABOUT).write_text(json.dumps(about, indent=1))
    teachers = captioner_evaluation.teachers_tokens(task.lessons, task.answering.count)
    evaluation = {
        "before": task.base.metrics,
        "after": task.measured.metrics,
        "teachers_tokens": teachers,
        "held_out_images": len(task.lessons),
    }
    evaluation |= {"generated": len(task.measured.answers), "tokenizer": settings.captions.tokenizer}
    (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=1))
    (folder / "left_out.json").write_text(json.dumps({code: sorted(task.left_out[code]) for code in LEFT_OUT}, indent=1))
    write_answers(folder / ANSWERS, task, task.base, task.measured)
    write_losses(folder / LOSSES, task.lessons, task.base, task.measured)
    tell(task, task.base, task.measured)
    return version_tags(settings, export, about, outcome.metrics)


def describe(settings: Settings, export: Export, files: Mapping[str, str]) -> dict[str, Any]:
    """What the adapters are, how they were trained and how they are used."""
    wanted = settings.train_captioner
    return {
        "what": "LoRA of InternVL",
        "load": "peft.PeftModel.from_pretrained(InternVLForConditionalGeneration, folder), or training.merge_captioner",
        "base": Path(folder_of(wanted)).name,
        "base_sha256": base_of(settings),
        "lora": wanted.lora.model_dump(mode="json"),
        "prompt": load_prompt(settings.captions.prompt).name,
        "task": task_of(settings),
        "parts": list(wanted.parts),
        "teachers": list(wanted.teachers),
        "max_tiles": wanted.max_tiles,
        "weights": "last" if wanted.ema_decay is None else f"moving average, {wanted.ema_decay}",
        "export": export.manifest.export,
        "manifest_sha256": export.sha256,
        "made_from": export.manifest.made_from,
        "files": files,
    }


def write_answers(path: Path, task: FitCaptioner, before: Measured, after: Measured) -> None:
    """-> parquet, a row an image with generated answers: image_id, what its teacher said (JSON), and text, code and faults (`part: code`) of the model
    before and after. Rows by image_id: one that is forgotten goes with all its texts (udfs/traces.py).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    said = pa.struct({"text": pa.string(), "code": pa.string(), "faults": pa.list_(pa.string())})
    rows: list[dict[str, Any]] = []
    for old, new in zip(before.answers, after.answers, strict=True):
        both = {
            name: {"text": one.text, "code": one.code, "faults": [": ".join(fault) for fault in one.faults]}
            for name, one in (("before", old), ("after", new))
        }
        teacher = json.dumps(dict(task.lessons[new.place].parts), ensure_ascii=False)
        rows.append({"image_id": bytes(task.held_out["image_id"][new.place]), "teacher": teacher, **both})
    schema = pa.schema({"image_id": pa.binary(32), "teacher": pa.string(), "before": said, "after": said})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def write_losses(path: Path, lessons: Sequence[Lesson], before: Measured, after: Measured) -> None:
    """-> parquet: image_id, loss an answer token and the same of the model before, tokens, lesson (of which request and answer). Two versions' files
    pair by image_id and lesson.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"image_id": pa.array(list(after.image_id), pa.binary(32)), "answer_tokens": pa.array(after.tokens, pa.int32())}
    for name, one in (("loss", after), ("base_loss", before)):
        columns[name] = pa.array(one.loss / one.tokens, pa.float32())
    columns["lesson"] = pa.array([one.digest for one in lessons], pa.string())
    pq.write_table(pa.table(columns), path)


def tell(task: FitCaptioner, before: Measured, after: Measured) -> None:
    for name, value in after.metrics.items():
        old = f"{before.metrics[name]:.4f}" if name in before.metrics else "none"
        say(f"{name}: {old} before, {value:.4f} after, on {len(task.lessons) if name == METRIC else len(after.answers)} images")
    for code in LEFT_OUT:
        if task.left_out[code]:
            say(f"{len(task.left_out[code])} images were left out as {code} since this start, see left_out.json")


def version_tags(settings: Settings, export: Export, about: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, str]:
    """What the registered version says of itself, all as text. `about`: as `describe` gave it."""
    return {
        **{name: str(about[name]) for name in ("what", "base", "base_sha256", "prompt", "max_tiles", "manifest_sha256", "export")},
        "sha256": digest_of(about["files"]),
        "captions": about["task"],  # training.promote compares losses of one task only
        "teachers": json.dumps(about["teachers"]),
        "made_from": json.dumps(export.manifest.made_from, sort_keys=True),
        tracker.DIGEST: training_digest(settings, export),
        **{name: f"{value:.6g}" for name, value in metrics.items()},
    }


def say(line: str) -> None:
    print(f"{NAME}: {line}", flush=True)


if __name__ == "__main__":
    trainer.main(sys.modules[__name__], __doc__)
