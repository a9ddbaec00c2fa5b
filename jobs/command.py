"""The command line of a stage: settings -> session -> lake -> the stage. A user's mistake is one line and exit status 2."""

from __future__ import annotations

from collections.abc import Callable

from conf.section import Mistake
from conf.settings import Settings, command_line, stop
from jobs import session
from jobs.checks import check
from jobs.lake import Lake


def main(doc: str, run: Callable[[Lake, Settings, bool], object]) -> None:
    """`run(lake, settings, plan_only)` under the settings of sys.argv."""
    settings, arguments = command_line(doc)
    try:
        check(settings)
        lake = Lake(session.start(settings.spark), settings)
        lake.create()
        run(lake, settings, arguments.plan)
    except Mistake as mistake:
        stop(str(mistake))
