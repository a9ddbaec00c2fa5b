"""labels, embeddings, pixels -> a frozen export that the scorer trains on; `exports`.

    spark-submit --jars '.cache/jars/*.jar' jobs/export_labels.py --config conf/demo.yaml

A row is one view of one image: its target, its vector and its pixel statistics. The split is by image (a seeded hash), so
that no view of a held-out image is ever trained on: bucket `train` or `held_out`. The export's id is a digest of its rows.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, load_encoder
from jobs import command, embedding, label, snapshot
from jobs.lake import Lake
from udfs.embed import ORIGINAL, PIXELS

NAME = "export-labels"
KIND = "labels"
TABLES = ("labels", "embeddings", "pixels")
STATISTICS = ("mean", "contrast", "saturation", "sharpness", "entropy")


def run(lake: Lake, settings: Settings, plan_only: bool = False) -> None:
    if not label.pending(lake, settings).where((F.size("untried") > 0) | (F.size("want") == 0)).isEmpty():
        raise Mistake("export labels: chosen views have no label or no vector of this config yet; run the stage label first")
    versions = lake.versions(TABLES)
    rows = labelled(lake, settings, versions)
    export, count = snapshot.identity(KIND, rows, settings)
    if count == 0:
        raise Mistake("export labels: no image has a label and a vector of this config; run the stages embed and label first")
    if plan_only:
        print(f"{NAME}: {count} rows, export {export}")
        return
    encoder = embedding.of_scorer(settings)
    width = lake.read("embeddings", versions["embeddings"]).where(F.col("fingerprint") == encoder).select("width").first()
    assert width is not None
    facts = {
        "made_from": versions,
        "encoder": {"name": load_encoder(settings.encoder).name, "fingerprint": encoder, "width": width["width"]},
    }
    order = [F.xxhash64(F.lit(settings.export.seed), "image_id"), F.col("image_id"), F.col("view")]
    made = snapshot.make(lake, settings, KIND, export, rows, order, facts)
    done = f"{count} rows in {snapshot.folder(settings, KIND, export)}"
    print(f"{NAME}: {done}" if made else f"{NAME}: nothing to do, {done}")


def folder(lake: Lake, settings: Settings) -> str:
    """URI of the export of the labels that are there now."""
    return snapshot.folder(settings, KIND, snapshot.identity(KIND, labelled(lake, settings, lake.versions(TABLES)), settings)[0])


def labelled(lake: Lake, settings: Settings, versions: dict[str, int]) -> DataFrame:
    """-> image_id, view, kind, value, rater, vector, STATISTICS, bucket."""
    rule, told = label.rater(settings.label)
    labels = lake.read("labels", versions["labels"]).where((F.col("rater") == rule) & (F.col("fingerprint") == told))
    labels = labels.select("image_id", "view", "kind", "value", "rater")
    labels = labels.join(label.chosen(lake, settings), "image_id", "left_semi")  # not those that a grown lake no longer chooses
    seed = settings.label.seed
    vector = _of_view(embedding.of_scorer(settings), embedding.of_scorer(settings, seed))
    pixel = _of_view(embedding.outputs(settings)[PIXELS], embedding.outputs(settings, seed)[PIXELS])
    vectors = lake.read("embeddings", versions["embeddings"]).where(vector).select("image_id", "view", "vector")
    pixels = lake.read("pixels", versions["pixels"]).where(pixel).select("image_id", "view", *STATISTICS)
    return labels.join(vectors, ["image_id", "view"]).join(pixels, ["image_id", "view"]).select("*", snapshot.bucket(settings))


def _of_view(original: str, degraded: str) -> Column:
    return F.col("fingerprint") == F.when(F.col("view") == ORIGINAL, F.lit(original)).otherwise(F.lit(degraded))


if __name__ == "__main__":
    command.main(__doc__, run)
