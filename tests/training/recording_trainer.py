"""A trainer that trains nothing: it records a run as a real one does, with a metric that its settings decide."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from conf.settings import load
from training import tracker, train_scorer
from training.exports import open_export


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("export")
    parser.add_argument("--config")
    parser.add_argument("--set", action="append")
    arguments = parser.parse_args()
    settings = load(arguments.config, arguments.set)
    scorer = settings.train_scorer
    export = open_export(arguments.export, None, None, ())
    digest = train_scorer.training_digest(settings, export)
    folder = Path(settings.training.root) / f"{scorer.model}-{digest}"
    if (folder / "finished.json").is_file():
        print("nothing to do", flush=True)
        return
    if scorer.learning_rate > 1 and not (folder.parent / "mended").is_file():
        sys.exit("it explodes")
    record = tracker.Record(folder, settings.mlflow)
    record.open("train_scorer", scorer.model_dump(), export, {tracker.TRAINING: digest})
    record.metrics(1, {"exported_held_out_srcc": 0.5 + scorer.learning_rate / 10 + scorer.seed / 100})
    record.register(scorer.model, "head", {tracker.DIGEST: digest})
    assert record.close("FINISHED").delivered
    (folder / "finished.json").write_text("{}")


if __name__ == "__main__":
    main()
