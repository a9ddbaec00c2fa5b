"""A trainer's export and settings -> the exact order of an epoch's rows, a line a row: to be read, diffed and audited.

    python -m training.print_plan demo/exports/labels-0123456789ab --config conf/demo.yaml --trainer train_scorer --epoch 2

Columns, split by tabs: step, rank, micro-batch, file, row in the file, weight (0: a copy that fills up the last step). Steps count from
`--start`, the row at which a training goes on. The order is a function of manifest, bucket, seed and epoch; the section's ranks and
micro_batch only cut it: `cut -f1,4,5 | sort` is the same for any number of ranks. Nothing is read but the manifest,
and the column by which rows stay together, where the trainer names one.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from typing import Any

from conf.loops import Loop
from conf.section import Mistake
from conf.settings import Settings, command_line, stop
from training import feed, process_group
from training.exports import open_export

OPTIONS: dict[str, dict[str, Any]] = {
    "--trainer": {"required": True, "help": "a file of training/ and the section of its settings, e.g. train_scorer"},
    "--epoch": {"type": int, "default": 0, "help": "from 0"},
    "--start": {"type": int, "default": 0, "help": "the epoch's row to begin at: `start` in a checkpoint's state.json"},
    "--rank": {"type": int, "help": "this rank only"},
}


def main() -> None:
    settings, told = command_line(__doc__, {"export": "folder or uri of an export (it holds manifest.json)"}, OPTIONS)
    feed.quiet()
    try:
        wanted = section(settings, told.trainer)
        export = open_export(told.export, None, None, (), settings)
        plan = import_module(f"training.{told.trainer}").plan_rows(settings, export, process_group.Ranks(0, wanted.ranks))
        if not 0 <= told.start <= plan.rows:
            raise Mistake(f"--start: given {told.start}, the bucket {plan.bucket} has {plan.rows} rows")
        for rank in range(wanted.ranks) if told.rank is None else [told.rank]:
            write(replace(plan, epoch=told.epoch, start=told.start, rank=rank))
    except Mistake as error:
        stop(str(error))
    except BrokenPipeError:  # `| head`
        sys.stderr.close()


def section(settings: Settings, trainer: str) -> Loop:
    """Name of a trainer -> its settings."""
    known = [name for name in Settings.model_fields if isinstance(getattr(settings, name), Loop)]
    if trainer not in known:
        raise Mistake(f"--trainer: given {trainer!r}, expected one of {known}")
    wanted: Loop = getattr(settings, trainer)
    return wanted


def write(plan: feed.Plan) -> None:
    names = [file.file for file in plan.export.files(plan.bucket)]
    for step, places in enumerate(feed.places(plan)):
        mine, weights = plan.mine(len(places.file))
        for number, (place, weight) in enumerate(zip(mine, weights, strict=True)):
            where = f"{names[places.file[place]]}\t{places.row[place]}"
            print(f"{step}\t{plan.rank}\t{number // plan.micro_batch}\t{where}\t{int(weight)}")


if __name__ == "__main__":
    main()
