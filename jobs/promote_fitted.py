"""A candidate that a job fitted (style centres, score bins) -> the champion, by a person's word: look at its run, sheets and report first.

    python -m jobs.promote_fitted style-centres --config conf/demo.yaml       # the candidate
    python -m jobs.promote_fitted style-centres 3 --config conf/demo.yaml     # a version by number, to go back too

There is no held-out figure that would decide it, so none is asked for; models that training fits have one: training.promote.
"""

from __future__ import annotations

from typing import Any

from conf.section import Mistake
from conf.settings import Settings, command_line, stop
from jobs import fitted

NAME = "promote-fitted"


def main() -> None:
    version: dict[str, Any] = {"nargs": "?", "default": fitted.CANDIDATE, "help": "number of the version; none: the candidate"}
    settings, arguments = command_line(__doc__ or "", {"model": "registered name"}, {"version": version})
    try:
        run(settings, arguments.model, arguments.version, arguments.plan)
    except Mistake as mistake:
        stop(str(mistake))


def run(settings: Settings, model: str, version: str, plan_only: bool = False) -> None:
    chosen = fitted.load(settings.mlflow, model, version)  # refuses what no job fitted
    before = fitted.latest(settings.mlflow, model, fitted.CHAMPION)
    if before is not None and before == chosen.tags:
        print(f"{NAME}: nothing to do, {chosen.name} is the champion")
    elif plan_only:
        print(f"{NAME}: {chosen.name} is to become the champion")
    else:
        fitted.settle(settings.mlflow, model, chosen.version, fitted.CHAMPION)
        print(f"{NAME}: {chosen.name} is the champion; the stages that read it have their rows pending now")


if __name__ == "__main__":
    main()
