"""Cluster ids that must not be used, or may be used again -> a new version of the centre set. No image is read, no centre changes.

    python -m jobs.block_styles 12 40 --config conf/demo.yaml          # block these
    python -m jobs.block_styles 12 --unblock --config conf/demo.yaml

Images nearest to a blocked centre get the state `blocked` from the next `assign_styles`. What derives from the champion becomes the
champion. (`styles.block` is the list that a fit begins with.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from conf.section import Mistake
from conf.settings import Settings, command_line, digest, stop
from jobs import centres
from jobs.checks import check

NAME = "block-styles"


def main() -> None:
    options: dict[str, dict[str, Any]] = {
        "ids": {"nargs": "+", "type": int, "metavar": "ID", "help": "clusters of the set"},
        "--unblock": {"action": "store_true", "help": "they may be used again"},
    }
    settings, arguments = command_line(__doc__ or "", options=options)
    try:
        check(settings)
        run(settings, set(arguments.ids), arguments.unblock, arguments.plan)
    except Mistake as mistake:
        stop(str(mistake))


def run(settings: Settings, ids: set[int], unblock: bool = False, plan_only: bool = False) -> None:
    parent = centres.current(settings)
    known, before = set(parent.centres.ids.tolist()), set(parent.centres.block)
    centres.check_block(known, ids - before, "block styles")
    block = centres.check_block(known, before - ids if unblock else before | ids, "block styles")
    if block == parent.centres.block:
        print(f"{NAME}: nothing to do, {parent.name} has {'none' if unblock else 'all'} of these on its block list")
        return
    if plan_only:
        print(f"{NAME}: a new version of {parent.name} with {len(block)} blocked clusters instead of {len(before)}, pending")
        return
    identity = digest("block", parent.fitted.sha256, block)
    event = {"how": "unblock" if unblock else "block", "clusters": sorted(ids), "parent": parent.name}
    child = replace(parent.centres, block=block, digest=identity, history=(*parent.centres.history, event))
    made = centres.derive(settings, parent, child, {"how": event["how"], "clusters": sorted(ids)})
    print(f"{NAME}: {len(block)} of {len(known)} clusters are blocked now")
    print(f"{NAME}: {centres.tell_alias(settings, made)}; next: python -m jobs.assign_styles")


if __name__ == "__main__":
    main()
