"""Run by several ranks (torch.distributed.run): the real scorer's fit through the loop, as the arguments say; rank 0 writes the weights.

    fit_on_ranks.py EXPORT OUT STAGE:PRECISION:FOLDER[:KEEP_STEP] ...

For each argument: fits in FOLDER. With KEEP_STEP its checkpoint of that step is copied to FOLDER-KEEP_STEP, and the training goes on from there once
more, in that folder.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import safetensors.torch

from conf.loops import TrainScorer
from tests.training.conftest import COLUMNS
from training import engine, feed, loop, process_group, tracker
from training.exports import open_export
from training.fit_scorer import FitScorer


def settings(stage: int, precision: str, ranks: int) -> TrainScorer:
    told = {"rows_per_step": 32, "micro_batch": 8, "epochs": 16, "evaluations": 2, "checkpoint_every": 35, "keep": 99, "ema_decay": 0.95}
    return TrainScorer(**told, zero_stage=stage, precision=precision, ranks=ranks, say_every=1000.0)  # type: ignore[arg-type]


def main() -> None:
    place, out, *wanted = sys.argv[1:]
    tracker.quiet()
    feed.quiet()
    ranks = engine.start("cpu", 60)
    export = open_export(place, "labels", COLUMNS, ("train", "held_out"))
    for one in wanted:
        stage, precision, name, *keep = one.split(":")
        told = settings(int(stage), precision, ranks.world)
        folders = [Path(out) / name]
        if keep:
            folders.append(Path(out) / f"{name}-{keep[0]}")
        for number, folder in enumerate(folders):
            if number and ranks.rank == 0:
                for part in ("checkpoints", "row_losses"):
                    (folder / part).mkdir(parents=True)
                shutil.copytree(folders[0] / f"checkpoints/step-{int(keep[0]):08d}", folder / f"checkpoints/step-{int(keep[0]):08d}")
                for path in (folders[0] / "row_losses").iterdir():
                    shutil.copy(path, folder / "row_losses")
            process_group.barrier()
            outcome = loop.run(FitScorer(told, export, ranks), told, folder, ranks, None)
            if ranks.rank == 0:
                safetensors.torch.save_file(outcome.weights, folder / "weights.safetensors")
    process_group.leave()


if __name__ == "__main__":
    main()
