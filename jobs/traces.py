"""Where in files, outside the tables, an image may have left something; and taking it out: staging, exports, trainings, the report.

An export is frozen by its sha256, so it is withdrawn as a whole: its files go, `withdrawn.json` says so to who asks for it. A training's
losses and held-out scores are rewritten without the image's rows; its weights stay as they are.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterable, Iterator
from functools import partial

import pyarrow.parquet as pq

from conf.settings import Settings
from jobs.lake import Lake
from udfs import traces as kernel
from udfs.opener import to_uri
from udfs.reject import Reject
from udfs.traces import Traces

WITHDRAWN, MANIFEST, FINISHED = "withdrawn.json", "manifest.json", "finished.json"
WAVE = "wave-"


def holding(lake: Lake, settings: Settings, traces: Traces, uris: Iterable[str]) -> dict[str, int]:
    """Parquet files -> those that hold a trace, and in how many rows. Read by Spark's tasks; those that do reach the driver."""
    listed = [(uri,) for uri in uris]
    if not listed:
        return {}
    files = lake.spark.createDataFrame(listed, "uri STRING").repartition(min(len(listed), 256))
    worker = partial(kernel.holding, told=traces.to_json(), stores=settings.store_options)
    return {row["uri"]: row["rows"] for row in files.mapInArrow(worker, kernel.SCHEMA).collect()}


def files(lake: Lake, uri: str) -> Iterator[str]:
    """URIs of the files in a folder and below it; none when it is not there."""
    try:
        for entry in lake.opener.entries(uri):
            if entry.is_folder:
                yield from files(lake, entry.uri)
            else:
                yield entry.uri
    except Reject as reject:
        if reject.code != "missing":
            raise


def staged(lake: Lake, settings: Settings, traces: Traces) -> list[str]:
    """Folders that stopped runs left in staging and that may name the image: their plans, which nobody uses again, and the waves that hold
    it, whose inputs are then pending again.
    """
    found: list[str] = []
    waves: dict[str, str] = {}
    for stage in lake.folders(lake.area("_staging")):
        for run in lake.folders(lake.area("_staging", stage)):
            for part in lake.folders(lake.area("_staging", stage, run)):
                folder = lake.area("_staging", stage, run, part)
                if part.startswith(WAVE):
                    waves |= {uri: folder for uri in files(lake, folder) if uri.endswith(".parquet")}
                else:
                    found.append(folder)
    return sorted({*found, *(waves[uri] for uri in holding(lake, settings, traces, waves))})


def exports(lake: Lake, settings: Settings, traces: Traces) -> list[str]:
    """Folders of the exports that hold the image, also of unfinished ones."""
    home = to_uri(settings.export.root).rstrip("/")
    roots = {row["root"] for row in lake.read("exports").select("root").distinct().collect()}  # an export each
    roots |= {f"{home}/{name}" for name in lake.folders(home)}
    of = {uri: root for root in roots for uri in files(lake, root) if uri.endswith(".parquet")}
    return sorted({of[uri] for uri in holding(lake, settings, traces, of)})


def withdraw(lake: Lake, settings: Settings, root: str) -> None:
    """An export -> its folder with nothing but the note that it was withdrawn; copies that trainers on this machine keep go too."""
    told = {"on": time.strftime("%Y-%m-%d", time.gmtime()), "why": "it held an image that is denied"}
    if lake.opener.exists(manifest := f"{root}/{MANIFEST}"):
        raw = lake.opener.read(manifest)
        stated = json.loads(raw)
        told |= {"export": stated["export"], "kind": stated["kind"], "manifest_sha256": hashlib.sha256(raw).hexdigest()}
        for file in stated["files"]:
            lake.opener.delete(f"{to_uri(settings.training.spool)}/{file['sha256']}.parquet")
    if not lake.opener.exists(f"{root}/{WITHDRAWN}"):
        lake.opener.write(f"{root}/{WITHDRAWN}", json.dumps(told).encode())
    for entry in list(lake.opener.entries(root)):
        if not entry.uri.endswith(f"/{WITHDRAWN}"):
            lake.opener.delete(entry.uri)


def trainings(lake: Lake, settings: Settings, traces: Traces) -> list[str]:
    """Folders of trainings with a file that holds a trace."""
    root = to_uri(settings.training.root).rstrip("/")
    of = {uri: f"{root}/{name}" for name in lake.folders(root) for uri in files(lake, f"{root}/{name}")}
    found = {of[uri] for uri in holding(lake, settings, traces, (uri for uri in of if uri.endswith(".parquet")))}
    texts = [uri for uri in of if uri.endswith(kernel.TEXTS)]
    return sorted(found | {of[uri] for uri in texts if kernel.blanked(lake.opener.read(uri), traces) is not None})


def clean_training(lake: Lake, settings: Settings, traces: Traces, folder: str) -> None:
    """A training's folder -> without traces; what it says of its files of losses is said anew, so that they can still land."""
    for uri in list(files(lake, folder)):
        if uri.endswith(".parquet") or uri.endswith(kernel.TEXTS):
            change = kernel.without if uri.endswith(".parquet") else kernel.blanked
            if (changed := change(lake.opener.read(uri), traces)) is not None:
                lake.opener.write(uri, changed)
    if lake.opener.exists(end := f"{folder}/{FINISHED}"):
        done, rows = json.loads(lake.opener.read(end)), 0
        for name in done["files"]:
            data = lake.opener.read(f"{folder}/row_losses/{name}")
            done["files"][name], rows = hashlib.sha256(data).hexdigest(), rows + pq.read_metadata(io.BytesIO(data)).num_rows
        lake.opener.write(end, json.dumps(done | {"rows_seen": rows}).encode())
