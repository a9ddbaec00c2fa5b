"""styles, the centre set's run and its contact sheets -> the report's section on styles: sizes, states, stability, leakage, the largest clusters.

Bounded: a count a cluster and state, one run, and the pages of the largest clusters. Where there is no style yet, it says why.
"""

from __future__ import annotations

import base64
import os
from typing import Any

from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, digest
from jobs import centres, registry, style_sheets
from jobs.centres import Set
from jobs.lake import Lake
from jobs.registry import Version
from udfs import style_sheet
from udfs.opener import to_path

SECTION_VERSION = 1
LARGEST, SHOWN, SIDE = 12, 4, 84  # clusters, images of each, pixels of an image
BARS = 64
STATES = {
    "ok": "has the style of its nearest centre",
    "blocked": "its nearest centre is on the block list",
    "none": "farther from every centre than the threshold of the fit",
}
MEASURES = {  # metric of the fit -> what it says
    "stability_seeds_mean": "adjusted Rand index to fits with other seeds (1 the same clusters, 0 as by chance)",
    "stability_resamples_mean": "adjusted Rand index to fits on 80 % of the sample",
    "unseen_none": "share of vectors that a fit has not seen beyond its threshold",
    "size_entropy": "evenness of sizes (1 all equal, 0 one has all)",
    "leakage_tags": "share of a content tag's uncertainty that the cluster takes away, mean over the frequent tags (style should know little of content)",
    "leakage_tags_most": "the same, of the tag that leaks most",
    "leakage_source": "the same of the source: a source with one style of its own cannot be told from leakage",
}
CHANCE = {"leakage_tags": "leakage_tags_chance", "leakage_source": "leakage_source_chance"}


def identity(lake: Lake, settings: Settings) -> str:
    """What the section depends on beside the tables: the centre set and whether its pages are up to date."""
    try:
        chosen = centres.current(settings)
    except Mistake:
        return digest(SECTION_VERSION, None)
    return digest(SECTION_VERSION, chosen.name, settings.styles, style_sheets.are_current(lake, settings, chosen))


def section(lake: Lake, settings: Settings) -> dict[str, Any]:
    """-> what jobs/report_styles.html shows."""
    try:
        chosen = centres.current(settings)
    except Mistake as mistake:
        return {"absent": str(mistake)}
    rows = lake.read("styles").where(F.col("fingerprint") == centres.fingerprint(chosen, settings))
    counted = rows.groupBy("state", "nearest").agg(F.count("*").alias("n")).collect()  # at most two rows a centre
    total = sum(row["n"] for row in counted)
    if total == 0:
        return {"absent": f"no image has a style by {chosen.name} yet; run the stage assign_styles"}
    sizes = {cluster: 0 for cluster in chosen.centres.ids.tolist()}
    for row in counted:
        sizes[row["nearest"]] += row["n"] if row["state"] != "none" else 0
    ordered = sorted(sizes, key=lambda cluster: (-sizes[cluster], cluster))
    states = [{"name": name, "n": sum(row["n"] for row in counted if row["state"] == name), "told": told} for name, told in STATES.items()]
    fit, metrics = _fit(settings, chosen)
    there = style_sheets.are_current(lake, settings, chosen)
    return {
        "absent": "",
        "name": chosen.name,
        "encoder": centres.encoder(settings),
        "policy": settings.styles.policy,
        "none_above": chosen.centres.none_above,
        "blocked": len(chosen.centres.block),
        "images": total,
        "clusters": len(sizes),
        "states": states,
        "bars": _bars([sizes[cluster] for cluster in ordered]),
        "fit": str(fit),
        "fit_images": int(metrics.get("images", 0)),
        "measures": [
            {"name": name, "value": metrics[name], "chance": metrics.get(CHANCE.get(name, "")), "told": told}
            for name, told in MEASURES.items()
            if name in metrics
        ],
        "index": _link(settings, "index.html") if there else "",
        "largest": [
            _shown(lake, settings, chosen, cluster, sizes[cluster], total, there) for cluster in ordered[:LARGEST] if sizes[cluster]
        ],
    }


def _fit(settings: Settings, chosen: Set) -> tuple[Version, dict[str, float]]:
    """-> the version that the set was fitted as, before centres were added or blocked, and its metrics."""
    here = registry.find(settings.mlflow, f"{chosen.fitted.model}/{chosen.fitted.version}")
    while "derived_from" in here.tags:
        here = registry.find(settings.mlflow, here.tags["derived_from"].replace(":", "/"))
    run = registry.run_of(settings.mlflow, here)
    return here, run.metrics if run is not None else {}


def _bars(sizes: list[int]) -> list[dict[str, Any]]:
    """Sizes, the largest first -> at most BARS bars: each the mean of neighbours."""
    each = -(-len(sizes) // BARS)
    groups = [sizes[start : start + each] for start in range(0, len(sizes), each)]
    means = [sum(group) / len(group) for group in groups]
    return [{"height": 100 * mean / max(means[0], 1), "n": round(mean)} for mean in means]


def _shown(lake: Lake, settings: Settings, chosen: Set, cluster: int, n: int, total: int, there: bool) -> dict[str, Any]:
    """there: the pages are up to date, and the cluster's may be shown."""
    name = style_sheets.file_of(str(cluster))
    uri = f"{style_sheets.folder(settings)}/{name}"
    picture = ""
    if there and lake.opener.exists(uri):
        strip = style_sheet.strip_of(lake.opener.read(uri), min(n, settings.styles.images_per_sheet), SHOWN, SIDE)
        picture = "data:image/jpeg;base64," + base64.b64encode(strip).decode()
    blocked = cluster in chosen.centres.block
    return {
        "name": f"style_cluster_{cluster}",
        "n": n,
        "share": n / total,
        "blocked": blocked,
        "picture": picture,
        "link": _link(settings, name),
    }


def _link(settings: Settings, name: str) -> str:
    """A page's address as the report links to it: relative where both are files."""
    uri = f"{style_sheets.folder(settings)}/{name}"
    if not uri.startswith("file://") or "://" in settings.report.path:
        return uri
    return os.path.relpath(os.fsdecode(to_path(uri)), os.path.dirname(os.path.abspath(settings.report.path)))
