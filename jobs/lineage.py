"""A registered model -> what it was made from, down to rows: run, training, export, selection, table versions.

    python -m jobs.lineage MODEL[@alias|/version] --config conf/demo.yaml

A bare name means its champion, or its newest version. Every link is checked where it can be: the manifest's sha256 that the
version carries against the manifest on disk and the table `exports`; the tables' rows at the versions that the export was made from.
What is missing or different is said in its line.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, command_line, stop
from jobs import registry, session
from jobs.lake import Lake
from jobs.tables import TABLES
from udfs.opener import to_uri
from udfs.reject import Reject

METRICS = 8  # of the run that are shown


def main() -> None:
    settings, arguments = command_line(__doc__ or "", {"model": "a registered name, with @alias or /version where it is not the champion"})
    try:
        if silent := registry.silence(settings.mlflow):
            raise Mistake(f"lineage: {silent}; train a model first, or see mlflow.tracking_uri")
        version = registry.find(settings.mlflow, arguments.model)  # before Spark starts
        tell(Lake(session.start(settings.spark), settings), settings, version)
    except Mistake as mistake:
        stop(str(mistake))


def tell(lake: Lake, settings: Settings, version: registry.Version) -> None:
    """Prints the chain."""
    lake.create()
    _say("model", str(version))
    _tell_run(settings, version)
    _tell_training(lake, settings, version)
    sha256 = version.tags.get("manifest_sha256")
    if sha256 is None:
        _say("export", "the version has no tag manifest_sha256: what it was made from is not known")
        return
    export = _find_export(lake, version.tags.get("export", "?"), sha256)
    manifest = _tell_export(lake, export, sha256)
    made_from = manifest.get("made_from") or json.loads(version.tags.get("made_from", "{}"))
    if selection := manifest.get("selection"):
        kept = lake.read("selections").where(F.col("selection") == selection).count()
        name = lake.read("selections").where(F.col("selection") == selection).select("name").first()
        told = (
            f"{name['name']} ({selection}), {kept} images" if name is not None else f"{selection} is not in the table selections any more"
        )
        _say("selection", told)
    elsewhere = export["manifest_sha256"] != sha256 and manifest.get("lake")  # an export that this lake's table knows was made from it
    _tell_tables(lake, settings, made_from, elsewhere or None)


def _tell_run(settings: Settings, version: registry.Version) -> None:
    run = registry.run_of(settings.mlflow, version)
    if run is None:
        _say("run", f"{version.run or 'none is recorded'}: MLflow has no such run (any more)")
        return
    took = "has not ended" if run.seconds is None else f"{run.seconds:.0f} s"
    _say("run", f"{version.run} ({run.name}) {run.status}, {took}")
    shown = list(run.metrics.items())[:METRICS]
    more = f" and {len(run.metrics) - len(shown)} more" if len(run.metrics) > len(shown) else ""
    _say("metrics", ", ".join(f"{name} {value:.4g}" for name, value in shown) + more if shown else "the run has none")


def _tell_training(lake: Lake, settings: Settings, version: registry.Version) -> None:
    training = version.tags.get(registry.TRAINING)
    if training is None:
        _say("training", f"the version has no tag {registry.TRAINING}")
        return
    folder = f"{to_uri(settings.training.root).rstrip('/')}/{version.model}-{training}"
    there = "is there" if lake.opener.exists(f"{folder}/training.json") else "is not there (any more)"
    _say("training", f"{training}, its folder {folder} {there}")
    summed = lake.read("train_stats").where(F.col("training") == training)
    seen = summed.agg(F.count("*").alias("images"), F.sum("times_seen").alias("rows"), F.avg("loss_mean").alias("loss")).first()
    assert seen is not None
    if seen["images"]:
        _say("trained on", f"{seen['images']} images, {seen['rows']} rows over all epochs, mean loss of an image {seen['loss']:.4g}")
    else:
        _say("trained on", "train_stats has no row of this training; python -m jobs.land_train_stats lands them")


def _find_export(lake: Lake, export: str, sha256: str) -> dict[str, Any]:
    """-> what the table `exports` knows: export, kind, root, files, rows, and `sha256` of the manifest, of the one with this hash if any."""
    rows = lake.read("exports").where((F.col("manifest_sha256") == sha256) | (F.col("export") == export))
    told = rows.groupBy("export", "kind", "root", "manifest_sha256").agg(F.count("*").alias("files"), F.sum("rows").alias("rows"))
    found = told.orderBy((F.col("manifest_sha256") != sha256), "export").first()
    if found is None:
        return {"export": export, "kind": None, "root": None, "files": 0, "rows": 0, "manifest_sha256": None}
    return found.asDict()


def _tell_export(lake: Lake, export: dict[str, Any], sha256: str) -> dict[str, Any]:
    """-> its manifest, where that is what the version was trained on; else {}."""
    if export["root"] is None:
        _say("export", f"{export['export']}: the table exports does not know it; manifest sha256 {sha256}")
        return {}
    _say("export", f"{export['kind']} {export['export']}, {export['files']} files, {export['rows']} rows, {export['root']}")
    landed = "the same in the table exports" if export["manifest_sha256"] == sha256 else "ANOTHER in the table exports"
    try:
        raw = lake.opener.read(f"{export['root']}/manifest.json")
    except Reject as reject:
        _say("manifest", f"sha256 {sha256}: {landed}, none on disk ({reject.code})")
        return {}
    same = hashlib.sha256(raw).hexdigest() == sha256
    _say("manifest", f"sha256 {sha256}: {landed}, {'the same' if same else 'ANOTHER'} on disk")
    return json.loads(raw) if same else {}


def _tell_tables(lake: Lake, settings: Settings, made_from: dict[str, int], elsewhere: str | None) -> None:
    if not made_from:
        _say("tables", "neither the manifest nor the version says which table versions the export was made from")
    if elsewhere is not None and to_uri(elsewhere).rstrip("/") != lake.root:
        _say("tables", f"of another lake, {elsewhere}; this config's is {settings.lake.root}: " + json.dumps(made_from))
        return
    for table, number in sorted(made_from.items()):
        _say("table", f"{table} version {number}: {_rows_at(lake, table, number)}")


def _rows_at(lake: Lake, table: str, number: int) -> str:
    if table not in TABLES:
        return "this code knows no such table"
    try:
        return f"{lake.read(table, number).count()} rows (now version {lake.version(table)})"
    except (PySparkException, Py4JJavaError) as error:
        return f"cannot be read any more: {str(error).splitlines()[0][:200]}"


def _say(what: str, told: str) -> None:
    print(f"{what:<11}{told}")


if __name__ == "__main__":
    main()
