"""A labels export -> a registered aesthetic scorer: V7's head fitted by petastorm, DeepSpeed and MLflow, with its evaluation.

    python -m training.train_scorer demo/exports/labels-0123456789ab --config conf/demo.yaml

In: the rows of bucket `train` fit the head, those of `held_out` (other images, with all their views) measure it. Out: a
new version of `train_scorer.model` in the registry; the first becomes `champion`, later ones `candidate`. The same
export, settings and code are trained once: a second start finds the version and ends. `train_scorer.ranks` above 1
starts that many processes on this machine. A bad export is one line and exit status 2.

Cost of the demo, 342 training rows and 40 epochs: 16 CPU-seconds on AMD, 13 of them imports and the first use of the store.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from conf.settings import Mistake, Settings, command_line, digest, stop
from training import engine, evaluate_scorer, feed, tracker
from training.baselines import STATISTICS, score_baselines
from training.draw_evaluation import draw
from training.exports import Export, open_export, verify
from training.fit_scorer import State, fit, read_vectors
from udfs import score_head

TRAINER_VERSION = 1  # raised when the same export and settings would give another head
TRAIN, HELD_OUT = "train", "held_out"
COLUMNS = {
    **{"image_id": "binary", "view": "string", "kind": "string", "value": "float", "rater": "string", "vector": "binary"},
    **dict.fromkeys(STATISTICS, "float"),
}
HEAD = "head"  # folder of the run's artifacts that the registered version points to
START_UP, ROWS_A_SECOND = 15.0, 4_400.0  # imports and registration; fp32, width 512, one AMD core [measured in CPU seconds]


def main() -> None:
    settings, arguments = command_line(__doc__, {"export": "folder of a labels export (it holds manifest.json)"})
    tracker.quiet()
    feed.quiet()
    try:
        run(settings, Path(arguments.export), arguments.plan)
    except Mistake as error:
        stop(str(error))
    engine.leave()


def run(settings: Settings, folder: Path, plan: bool) -> None:
    export = open_export(folder, "labels", COLUMNS, (TRAIN, HELD_OUT))
    if lacking := {"name", "fingerprint", "width"} - set(export.manifest.encoder):
        raise Mistake(f"export {folder}: the manifest's encoder has no {', '.join(sorted(lacking))}; export again")
    if not engine.launched() and (finished(settings, export, plan) or plan):
        return
    verify(export)
    check_split(export)
    wanted = settings.train_scorer.ranks
    if wanted > 1 and not engine.launched():
        status = engine.launch("training.train_scorer", sys.argv[1:], wanted)
        if status != 0:
            raise Mistake(f"a rank ended with status {status}; what it said stands above. Nothing was registered; run again")
        return
    ranks = engine.start(settings.train_scorer.device)
    if ranks.world != wanted:
        raise Mistake(f"train_scorer.ranks: given {wanted}, but the launcher started {ranks.world} ranks")
    train(settings, export, ranks)


def finished(settings: Settings, export: Export, plan: bool) -> bool:
    """Say what is pending; true when the registry has the version, whose alias is then settled (unless this is a plan)."""
    name, version = settings.train_scorer.model, None
    if tracker.exists(settings.mlflow):
        client = tracker.connect(settings.mlflow)
        version = tracker.find_version(client, name, training_digest(settings, export))
    if version is None:
        rows = export.rows(TRAIN) * settings.train_scorer.epochs
        say(
            f"pending: {settings.train_scorer.epochs} epochs of {export.rows(TRAIN)} rows, {export.rows(HELD_OUT)} rows held out, "
            f"about {START_UP + rows / ROWS_A_SECOND:.0f} s on 2 cores"
        )
        return False
    alias = "" if plan else tracker.settle_alias(client, name, version.version)
    say(f"nothing to do, version {version.version} was made from this export" + (f" ({alias})" if alias else ""))
    return True


def training_digest(settings: Settings, export: Export) -> str:
    return digest(settings.train_scorer, export.sha256, score_head.KERNEL_VERSION, TRAINER_VERSION)


def check_split(export: Export) -> None:
    """Raises Mistake when an image has rows in both buckets: a view of a training image must not measure the head."""
    train, held_out = (set(feed.read_bucket(export, bucket, ("image_id",))["image_id"]) for bucket in (TRAIN, HELD_OUT))
    if both := train & held_out:
        raise Mistake(f"export {export.root}: {len(both)} images are in both {TRAIN} and {HELD_OUT}, e.g. {min(both).hex()}")


def train(settings: Settings, export: Export, ranks: engine.Ranks) -> None:
    """Fit on every rank; rank 0 keeps the record: run, evaluation, files, version, and last the alias."""
    if ranks.rank > 0:
        fit(export, TRAIN, settings.train_scorer, ranks, lambda _: {})
        return
    client = tracker.connect(settings.mlflow)
    params = settings.train_scorer.model_dump() | {"export": export.manifest.export, "encoder": export.manifest.encoder["name"]}
    with tracker.open_run(client, settings.mlflow, f"train_scorer {export.manifest.export}", params, export) as run:
        held_out = feed.read_bucket(export, HELD_OUT)

        def look(weights: State) -> dict[str, float]:
            return {"held_out_srcc": evaluate_scorer.correlate(score(pack(weights), held_out, export), held_out["value"])}

        fitted = fit(export, TRAIN, settings.train_scorer, ranks, look)
        head = pack(fitted.weights)
        scores = score(head, held_out, export)
        baselines = score_baselines(feed.read_bucket(export, TRAIN, ("view", "value", *STATISTICS)), held_out)
        evaluation = evaluate_scorer.evaluate(held_out, scores, baselines, settings.train_scorer.seed)
        tracker.log_metrics(client, run, fitted.epochs)
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder), settings, export, head, evaluation, draw(held_out, scores, evaluation))
            client.log_artifacts(run, folder)
    say(evaluate_scorer.summarise(evaluation))
    name = settings.train_scorer.model
    version = tracker.register(client, name, run, HEAD, version_tags(settings, export, head, evaluation))
    alias = tracker.settle_alias(client, name, version)
    say(f"registered {name} version {version} as {alias}")
    if alias == tracker.CANDIDATE:
        say(f"to make it the champion: {tracker.promotion_command(settings.mlflow, name, version)}")


def pack(weights: State) -> bytes:
    """fp32 weights -> the safetensors bytes that are registered; equal weights give equal bytes."""
    import safetensors.torch

    return safetensors.torch.save(weights)


def score(head: bytes, rows: feed.Rows, export: Export) -> score_head.Vectors:
    """Rows -> raw scores [n], exactly as the score stage will compute them."""
    return score_head.score_batch(read_vectors(rows["vector"], export.manifest.encoder["width"]), score_head.load(head))


def write_files(folder: Path, settings: Settings, export: Export, head: bytes, evaluation: Mapping[str, Any], plot: bytes) -> None:
    """The run's artifacts: what went in (manifest, config), what came out (head), how good it is (evaluation, plot)."""
    manifest = export.manifest
    about = {
        "architecture": "V7 score head: see udfs/score_head.py",
        "kernel_version": score_head.KERNEL_VERSION,
        "sha256": hashlib.sha256(head).hexdigest(),
        "encoder": manifest.encoder,
        "export": manifest.export,
        "manifest_sha256": export.sha256,
        "made_from": manifest.made_from,
    }
    (folder / HEAD).mkdir()
    (folder / HEAD / "head.safetensors").write_bytes(head)
    (folder / HEAD / "head.json").write_text(json.dumps(about, indent=1))
    (folder / "manifest.json").write_bytes((export.root / "manifest.json").read_bytes())
    (folder / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=1))
    (folder / "label_quality.png").write_bytes(plot)


def version_tags(settings: Settings, export: Export, head: bytes, evaluation: Mapping[str, Any]) -> dict[str, str]:
    """What the registered version says of itself, all as text."""
    manifest = export.manifest
    return {
        "sha256": hashlib.sha256(head).hexdigest(),
        "encoder": str(manifest.encoder["name"]),
        "encoder_fingerprint": str(manifest.encoder["fingerprint"]),
        "width": str(manifest.encoder["width"]),
        "export": manifest.export,
        "manifest_sha256": export.sha256,
        "made_from": json.dumps(manifest.made_from, sort_keys=True),
        tracker.DIGEST: training_digest(settings, export),
        "beats_baselines": str(evaluation["beats_baselines"]).lower(),
        "evaluation": json.dumps(evaluate_scorer.shorten(evaluation), separators=(",", ":")),
    }


def say(lines: str) -> None:
    for line in lines.splitlines():
        print(f"train scorer: {line}", flush=True)


if __name__ == "__main__":
    main()
