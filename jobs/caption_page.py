"""captions, the ledger and the newest comparison -> one HTML page: the report's sections on captions alone, for notebooks/captions.py.

It asks for no selection and no evaluation, so that it can be made right after the stage `caption`.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from conf.section import Mistake
from conf.settings import Settings
from jobs import pages, report, report_captioners, report_captions, score
from jobs.lake import Lake
from udfs.opener import to_uri


def uri(settings: Settings) -> str:
    """-> where the page is kept: beside the report. `forget` deletes it there."""
    return f"{to_uri(settings.report.path).rpartition('/')[0]}/captions.html"


def html(lake: Lake, settings: Settings) -> str:
    """-> the page. Its prompts have no score where there is no champion."""
    scores = ""
    with suppress(Mistake):
        scores = score.fingerprint(score.champion(settings))
    draw = partial(report.pictures, lake, settings)
    told = {
        "captions": report_captions.section(lake, settings, scores, draw),
        "captioners": report_captioners.section(lake, settings, draw),
    }
    return pages.render("caption_page.html", told | {"lake": settings.lake.root}).decode()
