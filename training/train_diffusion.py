"""An images export -> a registered image model of the AuraFlow class: the transformer fine-tuned in full or by LoRA.

    python -m training.train_diffusion demo/exports/images-0123456789ab --config conf/demo.yaml

In: the rows of bucket `train` (an image's bytes and all its captions, of which one is taken each epoch) fit the transformer, those of
`held_out` measure it on fixed noise, by quarters of t. `train_diffusion.pretrained` names a local folder in diffusers' layout; without one
the parts are a tiny random model of the true classes, which shows that the path works and nothing else. Out: a new version of
`train_diffusion.model` in the registry; the first becomes `champion`, later ones `candidate`. `--plan` says what is pending and prints
parameters, memory a rank for each ZeRO stage and FLOPs a step, without loading a weight. A bad export, or an image of it that does not decode, is
one line and exit status 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.settings import Settings, digest
from training import adapters, feed, fit_image_model, image_model, image_model_cost, loop, process_group, tracker, trainer
from training.exports import Export, open_export
from training.fit_image_model import COLUMNS, HELD_OUT, METRIC, TIME_MEANS, TRAIN, FitImageModel, HeldOut
from training.result_files import digest_of, hash_files
from udfs import compose_prompt, decode

NAME, MODULE, SECTION = "train diffusion", "training.train_diffusion", "train_diffusion"
FOLDER = "image_model"
TRAINER_VERSION = 1  # raised when the same export and settings would give another model
TRANSFORMER, ABOUT, LOSSES = "transformer", "image_model.json", "held_out_losses.parquet"


def open_rows(settings: Settings, place: str) -> Export:
    return open_export(place, "images", COLUMNS, (TRAIN, HELD_OUT), settings)


def training_digest(settings: Settings, export: Export) -> str:
    """What is trained, from what and on what: not how it is run, and not where the pretrained weights lie."""
    trained = settings.train_diffusion.identity() | {"pretrained": base_of(settings)}
    prompts = None if settings.train_diffusion.mix is None else compose_prompt.KERNEL_VERSION
    return digest(trained, export.sha256, decode.KERNEL_VERSION, TRAINER_VERSION, prompts)


def base_of(settings: Settings) -> str:
    """-> what the training starts from, by content: the sha256 of a pretrained folder, or the stand-in's name."""
    pretrained = settings.train_diffusion.pretrained
    return image_model.TINY if pretrained is None else image_model.fingerprint(pretrained)


def tell_plan(settings: Settings, export: Export) -> None:
    wanted = settings.train_diffusion
    steps = wanted.epochs * -(-export.rows(TRAIN) // wanted.rows_per_step)
    say(f"{wanted.epochs} epochs of {export.rows(TRAIN)} images in {steps} steps, {min(wanted.held_out, export.rows(HELD_OUT))} held out")
    for line in image_model_cost.tell(wanted):
        say(line)


def plan_rows(settings: Settings, export: Export, ranks: process_group.Ranks) -> feed.Plan:
    return fit_image_model.plan_rows(settings.train_diffusion, export, ranks)


def make_task(settings: Settings, export: Export, ranks: process_group.Ranks) -> FitImageModel:
    if ranks.rank == 0:
        say(f"starts from {image_model.describe(settings.train_diffusion)}")
    return FitImageModel(settings.train_diffusion, export, settings.limits, ranks)


def write_result(folder: Path, settings: Settings, export: Export, task: FitImageModel, outcome: loop.Outcome) -> dict[str, str]:
    """What came out (weights, and what they are) and how good it is (losses of held-out rows) -> the version's tags."""
    wanted, model = settings.train_diffusion, folder / FOLDER
    assert task.measured is not None and outcome.metrics[METRIC] == task.measured.by_quarter.mean(), outcome.metrics
    model.mkdir()
    if wanted.lora is not None:
        adapters.save(model, outcome.weights, wanted.lora)
    else:
        image_model.save_transformer(model / TRANSFORMER, outcome.weights, wanted)
    about = describe(settings, export, hash_files(model))
    (model / ABOUT).write_text(json.dumps(about, indent=1))
    (folder / "evaluation.json").write_text(json.dumps(outcome.metrics, indent=1))
    write_losses(folder / LOSSES, task.measured)
    say(
        f"held-out loss {outcome.metrics[METRIC]:.4f} on {len(task.measured.loss)} images; by quarter of t, from image to noise: "
        + ", ".join(f"{outcome.metrics[name]:.4f}" for name in TIME_MEANS)
    )
    return version_tags(settings, export, about, outcome.metrics)


def describe(settings: Settings, export: Export, files: Mapping[str, str]) -> dict[str, Any]:
    """What the weights are, how they were trained and how they are loaded."""
    wanted = settings.train_diffusion
    if wanted.lora is not None:
        what, load = "LoRA of an AuraFlow transformer", f"AuraFlowPipeline.load_lora_weights(folder, weight_name={adapters.FILE!r})"
    else:
        what, load = "AuraFlow transformer", f"AuraFlowTransformer2DModel.from_pretrained(folder, subfolder={TRANSFORMER!r})"
    return {
        "what": what,
        "load": load,
        "base": image_model.describe(wanted),
        "base_sha256": None if wanted.pretrained is None else base_of(settings),
        "lora": None if wanted.lora is None else wanted.lora.model_dump(mode="json"),
        "image_size": wanted.image_size,
        "positions": "centre of the learned grid",
        "text_length": wanted.text_length,
        "flow": {"mix": "(1 - t) x + t noise", "answer": "noise - x", "times": wanted.times, "time_shift": wanted.time_shift},
        "weights": "last" if wanted.ema_decay is None else f"moving average, {wanted.ema_decay}",
        "export": export.manifest.export,
        "manifest_sha256": export.sha256,
        "made_from": export.manifest.made_from,
        "files": files,
    }


def write_losses(path: Path, measured: HeldOut) -> None:
    """-> parquet: image_id, loss and its four parts by t, a row for each held-out image. Two versions' files pair by image_id."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {"image_id": pa.array(list(measured.image_id), pa.binary(32)), "loss": pa.array(measured.loss, pa.float32())}
    for name, part in zip(TIME_MEANS, measured.by_quarter.T, strict=True):
        columns[name] = pa.array(part, pa.float32())
    pq.write_table(pa.table(columns), path)


def version_tags(settings: Settings, export: Export, about: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, str]:
    """What the registered version says of itself, all as text. `about`: as `describe` gave it."""
    return {
        "what": about["what"],
        "base": about["base"],
        "base_sha256": about["base_sha256"] or "",
        "sha256": digest_of(about["files"]),
        "image_size": str(about["image_size"]),
        "text_length": str(about["text_length"]),
        "captions": settings.train_diffusion.mix or json.dumps(settings.train_diffusion.captions, sort_keys=True),
        "export": export.manifest.export,
        "manifest_sha256": export.sha256,
        "made_from": json.dumps(export.manifest.made_from, sort_keys=True),
        tracker.DIGEST: training_digest(settings, export),
        **{name: f"{metrics[name]:.6g}" for name in (METRIC, *TIME_MEANS)},
    }


def say(line: str) -> None:
    print(f"{NAME}: {line}", flush=True)


if __name__ == "__main__":
    trainer.main(sys.modules[__name__], __doc__)
