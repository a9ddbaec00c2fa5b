"""The tables -> what the report says of the scores beside their histogram: bins by source and style, the bias table, the probe.

`section` gives plain values under the names that jobs/report_scores.html renders: `bias` of its template.
"""

from __future__ import annotations

from typing import Any

from conf.settings import Settings
from jobs import score_bias
from jobs.lake import Lake
from jobs.registry import Head
from udfs import explained

SHOWN = 40  # groups of a kind that the page shows, the largest first


def section(lake: Lake, settings: Settings, head: Head) -> dict[str, Any]:
    told = score_bias.measure(lake, settings, head)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for one in told["groups"]:
        kinds.setdefault(one["group"], []).append(one)
    tables = [
        {"kind": kind, "rows": rows[:SHOWN], "more": max(0, len(rows) - SHOWN), "most": max(max(one["bins"]) for one in rows)}
        for kind, rows in kinds.items()
    ]
    regressions = [one for table in tables for one in table["rows"] if one["alone"] is not None]
    facts = {"statistics": score_bias.STATISTICS, "fewest": score_bias.FEWEST, "units": score_bias.UNITS, "note": score_bias.NOTE_PROBE}
    coverage = {"coverage": round(100 * explained.COVERAGE), "resamples": explained.RESAMPLES}
    return facts | coverage | {"tables": tables, "regressions": regressions, "probe": told["probe"], "bins": told["bins"]}
