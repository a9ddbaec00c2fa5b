"""A labels export -> a registered aesthetic scorer: V7's head fitted by petastorm, DeepSpeed and MLflow, with its evaluation.

    python -m training.train_scorer demo/exports/labels-0123456789ab --config conf/demo.yaml

In: the rows of bucket `train` fit the head, those of `held_out` (other images, with all their views) measure it. Out: a
new version of `train_scorer.model` in the registry; the first becomes `champion`, later ones `candidate`. The same
export, settings and code are trained once: a second start finds the version and ends; a start after a kill goes on from the last
checkpoint. `train_scorer.ranks` above 1 starts that many processes on this machine. A bad export is one line and exit status 2.

Cost of the demo, 342 training rows and 40 epochs: 20 CPU-seconds on AMD, most of them imports and the first use of the store.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.settings import Settings, digest
from training import evaluate_scorer, feed, fit_scorer, fragments, loop, process_group, tracker, trainer, vector_heads
from training.baselines import STATISTICS, score_baselines
from training.draw_evaluation import draw
from training.exports import Export
from training.fit_scorer import FitScorer
from training.vector_heads import HELD_OUT, TRAIN, read_vectors
from udfs import score_head

NAME, MODULE, SECTION = "train scorer", "training.train_scorer", "train_scorer"
ARCHITECTURE = "V7 score head: see udfs/score_head.py"
FOLDER = "head"  # of the result that the registered version points to
TRAINER_VERSION = 2  # raised when the same export and settings would give another head
COLUMNS = {
    **{"image_id": "binary", "view": "string", "kind": "string", "value": "float", "rater": "string", "vector": "binary"},
    **dict.fromkeys(STATISTICS, "float"),
}
START_UP, ROWS_A_SECOND = 15.0, 4_400.0  # imports and registration; fp32, width 512, one AMD core [measured in CPU seconds]


def open_rows(settings: Settings, place: str) -> Export:
    return vector_heads.open_export(place, "labels", COLUMNS, (TRAIN, HELD_OUT), settings)


def training_digest(settings: Settings, export: Export) -> str:
    return digest(settings.train_scorer.identity(), export.sha256, score_head.KERNEL_VERSION, TRAINER_VERSION)


def tell_plan(settings: Settings, export: Export) -> None:
    wanted = settings.train_scorer
    seconds = START_UP + wanted.epochs * export.rows(TRAIN) / ROWS_A_SECOND
    print(
        f"{NAME}: {wanted.epochs} epochs of {export.rows(TRAIN)} rows, {export.rows(HELD_OUT)} rows held out, about {seconds:.0f} s on 2 cores"
    )


def plan_rows(settings: Settings, export: Export, ranks: process_group.Ranks) -> feed.Plan:
    return fit_scorer.plan_rows(settings.train_scorer, export, ranks)


def make_task(settings: Settings, export: Export, ranks: process_group.Ranks) -> FitScorer:
    return FitScorer(settings.train_scorer, export, ranks)


def write_result(folder: Path, settings: Settings, export: Export, task: FitScorer, outcome: loop.Outcome) -> Mapping[str, str]:
    """The head, its evaluation beside baselines, the scores of the held-out rows (so that versions are compared row by row), a plot."""
    head, held_out = pack(outcome.weights), feed.read_bucket(export, HELD_OUT)
    scores = score(head, held_out, export)
    baselines = score_baselines(feed.read_bucket(export, TRAIN, ("view", "value", *STATISTICS)), held_out)
    evaluation = evaluate_scorer.evaluate(held_out, scores, baselines, settings.train_scorer.seed)
    (folder / FOLDER).mkdir()
    (folder / FOLDER / "head.safetensors").write_bytes(head)
    (folder / FOLDER / "head.json").write_text(
        json.dumps(vector_heads.describe(export, head, ARCHITECTURE, score_head.KERNEL_VERSION), indent=1)
    )
    (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=1))
    (folder / "label_quality.png").write_bytes(draw(held_out, scores, evaluation))
    write_scores(folder / "held_out.parquet", held_out, scores)
    for line in evaluate_scorer.summarise(evaluation).splitlines():
        print(f"{NAME}: {line}", flush=True)
    return version_tags(settings, export, head, evaluation)


def pack(weights: fragments.Weights) -> bytes:
    """fp32 weights -> the safetensors bytes that are registered; equal weights give equal bytes."""
    import safetensors.torch

    return safetensors.torch.save(weights)


def score(head: bytes, rows: feed.Rows, export: Export) -> score_head.Vectors:
    """Rows -> raw scores [n], exactly as the score stage will compute them."""
    return score_head.score_batch(read_vectors(rows["vector"], export.manifest.encoder["width"]), score_head.load(head))


def write_scores(path: Path, held_out: feed.Rows, scores: score_head.Vectors) -> None:
    """-> parquet: image_id, view, value (the target), prediction, a row for each held-out row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"image_id": pa.array(list(held_out["image_id"]), pa.binary(32)), "view": pa.array([str(view) for view in held_out["view"]])}
    columns |= {"value": pa.array(held_out["value"], pa.float32()), "prediction": pa.array(scores, pa.float32())}
    pq.write_table(pa.table(columns), path)


def version_tags(settings: Settings, export: Export, head: bytes, evaluation: Mapping[str, Any]) -> dict[str, str]:
    """What the registered version says of itself, all as text."""
    told = vector_heads.tags(export, head, evaluation, evaluate_scorer.shorten(evaluation))
    return told | {tracker.DIGEST: training_digest(settings, export)}


def main() -> None:
    trainer.main(sys.modules[__name__], __doc__)


if __name__ == "__main__":
    main()
