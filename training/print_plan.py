"""An export and the numbers of a plan -> the exact order of its rows, a line a row: to be read, diffed and audited.

    python -m training.print_plan demo/exports/labels-0123456789ab --config conf/demo.yaml --bucket train --epoch 2 --ranks 2 --rank 0

Columns, split by tabs: step, rank, micro-batch, file, row in the file, weight (0: a copy that fills up the last step). The order of an
epoch is a function of manifest, bucket, seed, epoch and `--together`; ranks and micro-batch only cut it. Nothing is read but the manifest, and the
column `--together` where it is given. The scorer trains with --together image_id, image models without.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from conf.settings import Mistake, command_line, stop
from training import feed
from training.exports import open_export

NUMBERS = {"seed": 7, "epoch": 0, "rows-per-step": 64, "micro-batch": 64, "ranks": 1, "start": 0}


def main() -> None:
    options: dict[str, dict[str, Any]] = {f"--{name}": {"type": int, "default": default} for name, default in NUMBERS.items()}
    options |= {"--rank": {"type": int, "help": "this rank only"}, "--bucket": {"default": "train"}, "--together": {"help": "a column"}}
    settings, told = command_line(__doc__, {"export": "folder or uri of an export (it holds manifest.json)"}, options)
    feed.quiet()
    try:
        if told.rows_per_step % (told.micro_batch * told.ranks):
            raise Mistake(f"rows-per-step: given {told.rows_per_step}, expected a multiple of micro-batch x ranks")
        export = open_export(told.export, None, None, (told.bucket,), settings)
        numbers = (told.seed, told.epoch, told.rows_per_step, told.micro_batch)
        plan = feed.Plan(export, told.bucket, *numbers, world=told.ranks, start=told.start, together=told.together)
        for rank in range(told.ranks) if told.rank is None else [told.rank]:
            write(replace(plan, rank=rank))
    except Mistake as error:
        stop(str(error))
    except BrokenPipeError:  # `| head`
        sys.stderr.close()


def write(plan: feed.Plan) -> None:
    names = [file.file for file in plan.export.files(plan.bucket)]
    for step, places in enumerate(feed.places(plan)):
        mine, weights = plan.mine(len(places.file))
        for number, (place, weight) in enumerate(zip(mine, weights, strict=True)):
            where = f"{names[places.file[place]]}\t{places.row[place]}"
            print(f"{step}\t{plan.rank}\t{number // plan.micro_batch}\t{where}\t{int(weight)}")


if __name__ == "__main__":
    main()
