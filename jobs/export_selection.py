"""a selection -> a frozen export: what a training run of an image model reads; `exports`.

    spark-submit --jars '.cache/jars/*.jar' jobs/export_selection.py --config conf/demo.yaml

A row is one selected image: score, and address, size and texts (tags as JSON) by its latest source. The bytes stay where they lie.
The export's id is a digest of its rows: a changed address or text makes another export of the same selection.
"""

from __future__ import annotations

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings
from jobs import command, facts, occurrences, score, select_images, snapshot
from jobs.lake import Lake
from jobs.registry import Head
from udfs import addresses

NAME = "export-selection"
KIND = "selection"


def run(lake: Lake, settings: Settings, plan_only: bool = False, head: Head | None = None) -> None:
    """`head`: the champion where the caller has resolved it."""
    selection, scores, versions = current(lake, settings, head, "export selection")
    rows = selected(lake, selection, versions)
    export, count = snapshot.identity(KIND, rows, settings)
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


def current(lake: Lake, settings: Settings, head: Head | None, who: str) -> tuple[str, str, dict[str, int]]:
    """-> the selection of this config and the tables as they are, the scores' fingerprint, the tables' versions. Raises Mistake
    when it is not made yet.
    """
    versions = lake.versions(facts.TABLES)
    scores = score.fingerprint(head or score.champion(settings))
    selection = select_images.identity(lake, settings, scores, versions)
    if not select_images.is_made(lake, selection):
        raise Mistake(f"{who}: selection {selection} of this config and these tables is not made; run the stage select first")
    return selection, scores, versions


def selected(lake: Lake, selection: str, versions: dict[str, int]) -> DataFrame:
    """-> image_id, selection's score, facts of the bytes, address and texts of the latest source, bucket."""
    chosen = lake.read("selections").where(F.col("selection") == selection).select("image_id", "score")
    images = lake.read("images", versions["images"]).select("image_id", "format", "width", "height")
    told = ("source", "key", "mtime_us", *addresses.PLACE, "size", "tags", "alt_text", "licence")
    sources = occurrences.latest(lake.read("sources", versions["sources"]), *told).withColumn("tags", F.to_json("tags"))
    return chosen.join(images, "image_id").join(sources, "image_id").withColumn("bucket", F.lit("all"))


if __name__ == "__main__":
    command.main(__doc__, run)
