"""a selection -> a frozen export of the images themselves: parquet files with their bytes and all their texts; `exports`, `rejects`.

    spark-submit --jars '.cache/jars/*.jar' jobs/export_images.py --config conf/demo.yaml

A row is one selected image: the original file's bytes unchanged, every text it has (JSON), score and size; the split into `train`
and `held_out` is by image. Addresses are sorted and cut into files first; then each task reads the bytes of its files, compares
them with the image's sha256 and writes them: bytes cross Spark nowhere. An image that no source gives any more is a reject of this
export, which lacks it; `export.image_attempt=2` makes another export that tries again. A killed run goes on with the files that lack.

Cost: reading and writing the bytes once. A task needs twice the bytes of a file (export.image_rows_per_file images) in memory.
"""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings
from jobs import command, embedding, export_selection, occurrences, ordering, progress, prompt_facts, rejects, snapshot, waves
from jobs.lake import Lake
from jobs.registry import Head
from jobs.waves import Plan, Projection, Stage
from udfs import image_files as kernel

NAME = "export-images"
KIND = snapshot.IMAGES
TEXTS = 1_000  # of one image at most: a placeholder picture has thousands of sources
NO_SCORE = -1
TEXT = "array<struct<id:string,kind:string,text:string>>"
UNIT = "files"
NAMED = 5  # unreadable images that are named on the screen; all are in `rejects`
MARKS = ("score", "rating", "style_cluster")  # -1 and "": none
CONTENT = ("image_id", "captions", *MARKS, "width", "height", "bucket")


def run(lake: Lake, settings: Settings, plan_only: bool = False, head: Head | None = None) -> None:
    """`head`: the champion where the caller has resolved it."""
    export(lake, settings, *export_selection.current(lake, settings, head, "export images"), plan_only=plan_only)


def export(lake: Lake, settings: Settings, selection: str, scores: str, versions: dict[str, int], plan_only: bool = False) -> None:
    """One selection, with the tables at `versions`; `scores`: the fingerprint that it was made by."""
    rows = planned(lake, settings, selection, scores, versions)
    id_, count = snapshot.identity(KIND, rows.select(*CONTENT), settings)
    if count == 0:
        raise Mistake(
            f"export images: selection {selection} keeps no image; loosen select.rules (`decisions` says which rule dropped what)"
        )
    root = snapshot.folder(settings, KIND, id_)
    written = lake.opener.exists(f"{root}/manifest.json")
    if plan_only:
        print(
            f"{NAME}: nothing to do, export {id_}"
            if written
            else f"{progress.estimate(lake, NAME, -(-count // settings.export.image_rows_per_file), UNIT)}; {count} images, export {id_}"
        )
        return
    if written and snapshot.is_landed(lake, id_):
        print(f"{NAME}: nothing to do, {_told(lake, root)}")
        return
    facts = {"export": id_, "kind": KIND, "made_from": versions, "selection": selection, "scores": scores}
    with waves.stage(lake, NAME, settings, tables(lake)) as stage:
        last = 0
        if not lake.opener.exists(f"{root}/manifest.json"):
            plan = _plan(stage, settings, rows)
            last = len(plan.waves)
            stage.run(plan, lambda files: compute(files, settings, root, id_), UNIT)
            _close(lake, settings, root, count, facts)
        if not snapshot.is_landed(lake, id_):
            stage.run_whole(snapshot.lines(lake, root), last)
        lake.opener.delete(f"{root}/{kernel.LINES}")
    print(f"{NAME}: {_told(lake, root)}")


def planned(lake: Lake, settings: Settings, selection: str, scores: str, versions: dict[str, int]) -> DataFrame:
    """-> CONTENT, and `addresses` of every source of the image, the latest first."""
    chosen = lake.read("selections").where(F.col("selection") == selection)
    chosen = chosen.select("image_id", F.coalesce("score", F.lit(NO_SCORE)).alias("score"))
    images = lake.read("images", versions["images"]).select("image_id", "width", "height")
    sources = lake.read("sources", versions["sources"])
    told = sources.groupBy("image_id").agg(texts().alias("texts"), embedding.addresses().alias("addresses"))
    rows = chosen.join(images, "image_id").join(told, "image_id").join(prompt_facts.captions(lake, settings), "image_id", "left")
    rows = prompt_facts.with_marks(lake, settings, rows)
    made = {
        "captions": F.to_json(F.concat("texts", F.coalesce("captions", F.array().cast(TEXT)))).cast("binary"),
        "rating": F.coalesce("rating", F.lit("")),
        "style_cluster": F.coalesce("cluster", F.lit(NO_SCORE)),
    }
    return rows.withColumns(made).drop("texts", "cluster").withColumn("bucket", snapshot.bucket(settings))


def texts() -> Column:
    """Aggregate over the sources of an image -> TEXT: every alt text, the latest first, then all its tags as one text."""
    alt_texts = F.transform(occurrences.newest_first(TEXTS, "alt_text"), lambda one: one["alt_text"])
    alt_texts = F.filter(alt_texts, lambda text: F.trim(text) != "")
    tags = F.flatten(F.transform(occurrences.newest_first(TEXTS, "tags"), lambda one: one["tags"]))
    joined = F.array_join(F.array_distinct(tags), ", ")
    told = F.transform(alt_texts, lambda text: _text("alt_text", text))
    return F.concat(told, F.filter(F.array(_text("source_tags", joined)), lambda one: one["text"] != ""))


def _text(kind: str, text: Column) -> Column:
    """A source's text under an id that it keeps; those of captioners have ids of their own (jobs/prompt_facts.py)."""
    named = F.concat(F.lit(f"{kind}/"), F.substring(F.sha2(text, 256), 1, 16))
    return F.struct(named.alias("id"), F.lit(kind).alias("kind"), text.alias("text"))


def compute(files: DataFrame, settings: Settings, root: str, export: str) -> DataFrame:
    """(bucket, file, images) -> staged rows (udfs.image_files.SCHEMA and `export`), by reading and writing the bytes."""
    worker = partial(kernel.write_files, root=root, stores=settings.store_options)
    return files.select("bucket", "file", "images").mapInArrow(worker, kernel.SCHEMA).withColumn("export", F.lit(export))


def tables(lake: Lake) -> dict[str, Projection]:
    """Staged are lines of files with what they refused, and at the end the lines of the manifest."""

    def rejects_of(staged: DataFrame, run: str) -> DataFrame | None:
        if "refused" not in staged.columns:
            return None
        refused = staged.select("export", F.explode("refused").alias("one")).select(F.col("export").alias("fingerprint"), "one.*")
        refused = refused.withColumn("input_key", F.lower(F.hex("image_id")))
        # a run that goes on with a killed one's files finds what that one refused, and may have landed
        known = lake.read("rejects", lake.version("rejects")).where(F.col("stage") == NAME).select("input_key", "fingerprint")
        unknown = refused.join(known, ["input_key", "fingerprint"], "left_anti")
        return rejects.rows(lake, unknown, NAME, run, attempts=1)  # a frozen export tries once

    def exports_of(staged: DataFrame, run: str) -> DataFrame | None:
        return None if "refused" in staged.columns else staged.withColumn("run", F.lit(run))

    return {"rejects": rejects_of, "exports": exports_of}


def _plan(stage: Stage, settings: Settings, rows: DataFrame) -> Plan:
    """CONTENT and addresses -> the plan of the files. Deterministic in the export: a killed run's files are this run's too."""
    order = [F.col("bucket"), F.xxhash64(F.lit(settings.export.seed), "image_id"), F.col("image_id")]
    numbered, _ = ordering.numbered(stage.lake, rows, order, stage.lake.area("_staging", stage.name, stage.run_id, "ordered-rows"))
    one = F.struct("at", "image_id", "captions", *MARKS, "width", "height", "addresses")
    images = F.sort_array(F.collect_list(one)).alias("images")
    filed = snapshot.place(numbered, settings.export.image_rows_per_file).groupBy("bucket", "file").agg(images)
    return stage.plan(filed.withColumn("cost", F.size("images")), ["bucket", "file"])


def _close(lake: Lake, settings: Settings, root: str, count: int, facts: dict[str, Any]) -> None:
    """The files' lines -> the manifest, and on the screen what the export lacks. Raises Mistake when it lacks every image."""
    files: list[dict[str, Any]] = []
    lacking: Counter[str] = Counter()
    named: list[str] = []
    uris = [entry.uri for entry in lake.opener.entries(f"{root}/{kernel.LINES}")]
    with ThreadPoolExecutor(16) as pool:
        for raw in pool.map(lake.opener.read, uris):
            line = json.loads(raw)
            refused = line.pop("refused")
            lacking.update(one["code"] for one in refused)
            named += [f"  {one['image_id']}: {one['code']}: {one['uri']}" for one in refused[: NAMED - len(named)]]
            files += [line] if line["rows"] else []
    assert sum(file["rows"] for file in files) + lacking.total() == count, (root, count)
    if lacking:
        print(f"{NAME}: {lacking.total()} of {count} images could not be read, among them\n" + "\n".join(named), flush=True)
    if not files:
        raise Mistake(
            f"export images: no image of the selection could be read ({_codes(lacking)}); raise export.image_attempt to try again"
        )
    columns = {field.name: str(field.type) for field in kernel.COLUMNS}
    snapshot.write_manifest(lake, settings, root, columns, files, facts | {"lacking": dict(lacking)})


def _told(lake: Lake, root: str) -> str:
    manifest = json.loads(lake.opener.read(f"{root}/manifest.json"))
    told = f"{manifest['rows']} images in {root}"
    if not manifest["lacking"]:
        return told
    return f"{told}; it lacks {_codes(manifest['lacking'])} (rejects of the stage {NAME}), raise export.image_attempt to try them again"


def _codes(lacking: dict[str, int]) -> str:
    return ", ".join(f"{count} {code}" for code, count in sorted(lacking.items()))


if __name__ == "__main__":
    command.main(__doc__, run)
