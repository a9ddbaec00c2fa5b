"""a selection -> a frozen export: what a training run of an image model reads; `exports`.

    spark-submit jobs/export_selection.py --config conf/demo.yaml

A row is one selected image: address, size, score tag and the texts of its sources (tags as JSON). The bytes stay where they lie.
"""

from __future__ import annotations

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.settings import Mistake, Settings, digest
from jobs import command, facts, score, select_images, snapshot
from jobs.lake import Lake

NAME = "export-selection"
KIND = "selection"


def run(lake: Lake, settings: Settings, plan_only: bool = False) -> None:
    versions = lake.versions(facts.TABLES)
    scores = score.fingerprint(score.champion(settings))
    selection = select_images.identity(lake, settings, scores, versions)
    if not select_images.is_made(lake, selection):
        raise Mistake(f"export selection: selection {selection} of this config and these tables is not made; run the stage select first")
    rows = selected(lake, selection, versions)
    export, count = digest(KIND, selection, settings.export.model_dump(exclude={"root"})), rows.count()
    if count == 0:
        raise Mistake(
            f"export selection: selection {selection} keeps no image; loosen select.rules (`decisions` says which rule dropped what)"
        )
    if plan_only:
        print(f"{NAME}: {count} images, export {export}")
        return
    order = [F.xxhash64(F.lit(settings.export.seed), "image_id"), F.col("image_id")]
    made = snapshot.make(lake, settings, KIND, export, rows, order, {"made_from": versions, "selection": selection, "scores": scores})
    done = f"{count} images in {snapshot.folder(settings, KIND, export)}"
    print(f"{NAME}: {done}" if made else f"{NAME}: nothing to do, {done}")


def selected(lake: Lake, selection: str, versions: dict[str, int]) -> DataFrame:
    """-> image_id, address, size, score, texts of the first source by name, bucket."""
    chosen = lake.read("selections").where(F.col("selection") == selection).select("image_id", "score")
    images = lake.read("images", versions["images"]).select("image_id", "format", "width", "height")
    told = F.struct("source", "key", "mtime_us", "uri", "offset", "length", "size", F.to_json("tags").alias("tags"), "alt_text", "licence")
    sources = lake.read("sources", versions["sources"]).groupBy("image_id").agg(F.min(told).alias("told")).select("image_id", "told.*")
    return chosen.join(images, "image_id").join(sources, "image_id").withColumn("bucket", F.lit("all"))


if __name__ == "__main__":
    command.main(__doc__, run)
