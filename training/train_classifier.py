"""An export of classes -> a registered classifier of vectors (style, AI-generated or not, ...), with its evaluation and its confounding.

    python -m training.train_classifier demo/exports/classes-0123456789ab --config conf/demo.yaml

In: the rows of bucket `train` fit the weights, those of `calibrate` the temperature, those of `held_out` measure; near-duplicates lie in one bucket.
Out: a new version of `train_classifier.model` in the registry; the first becomes `champion`, later ones `candidate`. In its run: precision and
recall of each class with intervals, the confusion matrix, the calibration before and after, the class of every held-out image. The same export,
settings and code are trained once; a start after a kill goes on from the last checkpoint. A bad export is one line and exit status 2.

A classifier of another kind of labels: export with --set train_classifier.label=KIND, and train with the same and --set train_classifier.model=NAME.
Cost of the demo, 158 training rows and 30 epochs: 10 CPU-seconds, most of them imports and the first use of the store.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.section import Mistake
from conf.settings import Settings, digest
from training import (
    classifier_summary,
    evaluate_classifier,
    feed,
    fit_classifier,
    loop,
    process_group,
    temperature,
    tracker,
    trainer,
    vector_heads,
)
from training.draw_confusion import draw
from training.exports import Export
from training.fit_classifier import CALIBRATE, FitClassifier, classes_of
from training.vector_heads import HELD_OUT, TRAIN, read_vectors
from udfs import class_head

NAME, MODULE, SECTION = "train classifier", "training.train_classifier", "train_classifier"
FOLDER = "head"  # of the result that the registered version points to
TRAINER_VERSION = 1  # raised when the same export and settings would give another head
COLUMNS = {
    **dict.fromkeys(("view", "kind", "class_name", "rater", "source", "origin"), "string"),
    **dict.fromkeys(("image_id", "vector", "near_group"), "binary"),
}
START_UP, ROWS_A_SECOND = 15.0, 20_000.0  # imports and registration; fp32, linear, width 512, one AMD core [measured in CPU seconds]
ABOUT = ("class_name", "near_group", "origin", "source")
READ = {TRAIN: ABOUT, CALIBRATE: (*ABOUT, "vector"), HELD_OUT: (*ABOUT, "vector", "image_id")}  # columns that the evaluation reads


def open_rows(settings: Settings, place: str) -> Export:
    export = vector_heads.open_export(place, "classes", COLUMNS, (TRAIN, CALIBRATE, HELD_OUT), settings)
    manifest, wanted = export.manifest, settings.train_classifier
    if manifest.label != wanted.label:
        raise Mistake(f"export {place}: its labels are of kind {manifest.label!r}, train_classifier.label is {wanted.label!r}")
    untrained = sorted(name for name, buckets in manifest.classes.items() if not buckets.get(TRAIN))
    if untrained or len(manifest.classes) < 2:
        told = f"no image to train on of {', '.join(untrained)}" if untrained else f"only the class {', '.join(manifest.classes) or 'none'}"
        raise Mistake(f"export {place}: {told}; label more images, or take the class out of label_classes, and export again")
    return export


def training_digest(settings: Settings, export: Export) -> str:
    return digest(settings.train_classifier.identity(), export.sha256, class_head.KERNEL_VERSION, TRAINER_VERSION)


def tell_plan(settings: Settings, export: Export) -> None:
    wanted = settings.train_classifier
    seconds = START_UP + wanted.epochs * export.rows(TRAIN) / ROWS_A_SECOND
    print(
        f"{NAME}: {wanted.epochs} epochs of {export.rows(TRAIN)} images of {len(export.manifest.classes)} classes, {export.rows(CALIBRATE)} to "
        f"calibrate, {export.rows(HELD_OUT)} held out, about {seconds:.0f} s on 2 cores"
    )


def plan_rows(settings: Settings, export: Export, ranks: process_group.Ranks) -> feed.Plan:
    return fit_classifier.plan_rows(settings.train_classifier, export, ranks)


def make_task(settings: Settings, export: Export, ranks: process_group.Ranks) -> FitClassifier:
    return FitClassifier(settings.train_classifier, export, ranks)


def write_result(folder: Path, settings: Settings, export: Export, task: FitClassifier, outcome: loop.Outcome) -> Mapping[str, str]:
    """The head, its evaluation, what it says of each held-out image (so that versions are compared row by row), a plot."""
    wanted, classes, width = settings.train_classifier, classes_of(export), export.manifest.encoder["width"]
    about = class_head.About(wanted.label, classes, 1.0, wanted.other_below)
    plain = class_head.load(class_head.pack(outcome.weights, about))
    buckets = {bucket: feed.read_bucket(export, bucket, columns) for bucket, columns in READ.items()}
    logits = {bucket: class_head.logits_batch(read_vectors(buckets[bucket]["vector"], width), plain) for bucket in (CALIBRATE, HELD_OUT)}
    fitted = temperature.fit(logits[CALIBRATE], evaluate_classifier.number(classes, buckets[CALIBRATE]["class_name"]))
    head = class_head.pack(outcome.weights, about._replace(temperature=fitted.value))
    evaluation = evaluate_classifier.evaluate(classes, buckets, logits[HELD_OUT], fitted, wanted.other_below, wanted.seed)
    (folder / FOLDER).mkdir()
    (folder / FOLDER / "head.safetensors").write_bytes(head)
    told = vector_heads.describe(export, head, "see udfs/class_head.py", class_head.KERNEL_VERSION)
    (folder / FOLDER / "head.json").write_text(json.dumps(told | class_head.read_about(head)._asdict(), indent=1))
    (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=1))
    (folder / "confusion.png").write_bytes(draw(classes, evaluation))
    write_classes(folder / "held_out_classes.parquet", buckets[HELD_OUT], class_head.softmax(logits[HELD_OUT], fitted.value), classes)
    for line in classifier_summary.summarise(evaluation).splitlines():
        print(f"{NAME}: {line}", flush=True)
    return version_tags(settings, export, head, evaluation)


def write_classes(path: Path, held_out: feed.Rows, probabilities: class_head.Logits, classes: tuple[str, ...]) -> None:
    """-> parquet: image_id, near_group, class (the label), prediction (the likeliest class) and p, a row for each held-out image."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    binary = {name: pa.array(list(held_out[name]), pa.binary(32)) for name in ("image_id", "near_group")}
    columns = {**binary, "class": pa.array([str(name) for name in held_out["class_name"]])}
    columns["prediction"] = pa.array([classes[place] for place in probabilities.argmax(axis=1)])
    columns["p"] = pa.array(probabilities.max(axis=1), pa.float32())
    pq.write_table(pa.table(columns), path)


def version_tags(settings: Settings, export: Export, head: bytes, evaluation: Mapping[str, Any]) -> dict[str, str]:
    """What the registered version says of itself, all as text."""
    about = class_head.read_about(head)
    return vector_heads.tags(export, head, evaluation, evaluate_classifier.shorten(evaluation)) | {
        "label": about.label,
        "classes": json.dumps(about.classes),
        "temperature": f"{about.temperature:.4f}",
        "other_below": f"{about.other_below:g}",
        "confounded": str(evaluation["confounded"]).lower(),
        tracker.DIGEST: training_digest(settings, export),
    }


def main() -> None:
    trainer.main(sys.modules[__name__], __doc__)


if __name__ == "__main__":
    main()
