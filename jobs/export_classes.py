"""labels, embeddings, pixels, sources -> a frozen export that a classifier trains on; `exports`.

    spark-submit --jars '.cache/jars/*.jar' jobs/export_classes.py --config conf/demo.yaml

A row is one image with its class of the kind `train_classifier.label` and its vector. It also says where the image is from (`source`, and
`origin`, the collection that a rater names), because a class that comes from one collection is confounded with it. The split is by
group of near-duplicates (udfs/near_groups.py), by a seeded hash within a class: `held_out` measures, `calibrate` fits the temperature, `train`
the weights; a group lies in one of them. An image that raters of this kind disagree on, or that any source opts out, is in none, and both are
told. The export's id is a digest of its rows. Cost: every pair of labelled images is compared (20,000: 4 CPU-s, 200,000: 6 CPU-min).
"""

from __future__ import annotations

from typing import Any

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, load_encoder
from jobs import command, deny_lists, embedding, label_classes, occurrences, snapshot
from jobs.lake import Lake
from udfs import near_groups
from udfs.embed import ORIGINAL, PIXELS

NAME = "export-classes"
KIND = "classes"
TABLES = ("labels", "embeddings", "pixels", "sources")


def run(lake: Lake, settings: Settings, plan_only: bool = False) -> str:
    """-> URI of the export of the labels that are there now."""
    if not label_classes.pending(lake, settings).isEmpty():
        raise Mistake(
            "export classes: entries of label_classes have labels that are not in the table yet; run the stage label_classes first"
        )
    versions = lake.versions(TABLES)
    rows = labelled(lake, settings, versions).persist()  # at most near_groups.LIMIT rows, which are read several times
    try:
        return _export(lake, settings, rows, versions, plan_only)
    finally:
        rows.unpersist()


def _export(lake: Lake, settings: Settings, rows: DataFrame, versions: dict[str, int], plan_only: bool) -> str:
    export, count = snapshot.identity(KIND, rows, settings)
    root, wanted = snapshot.folder(settings, KIND, export), settings.train_classifier
    if count == 0:
        raise Mistake(
            f"export classes: no image has a label of kind {wanted.label!r} and a vector of this config; run the stage embed first"
        )
    if plan_only:
        print(f"{NAME}: {count} rows, export {export}")
        return root
    encoder, name = encoder_of(settings)
    width = lake.read("embeddings", versions["embeddings"]).where(F.col("fingerprint") == encoder).select("width").first()
    assert width is not None
    facts: dict[str, Any] = {
        "made_from": versions,
        "encoder": {"name": name, "fingerprint": encoder, "width": width["width"]},
        "label": wanted.label,
        "classes": count_classes(rows),
        "near_distance": near_groups.DISTANCE,
    }
    order = [F.xxhash64(F.lit(settings.export.seed), "image_id"), F.col("image_id")]
    made = snapshot.make(lake, settings, KIND, export, rows, order, facts)
    if made:
        say_left_out(lake, settings, versions, count)
    done = f"{count} rows of {len(facts['classes'])} classes in {root}"
    print(f"{NAME}: {done}" if made else f"{NAME}: nothing to do, {done}")
    return root


def encoder_of(settings: Settings) -> tuple[str, str]:
    """-> (fingerprint, name) of the vectors that the classifier reads."""
    wanted = settings.train_classifier.encoder or settings.encoder
    if wanted not in settings.embed.encoders:
        raise Mistake(f"train_classifier.encoder: given {wanted!r}, expected one of embed.encoders {list(settings.embed.encoders)}")
    name = load_encoder(wanted).name
    return embedding.outputs(settings)[name], name


def labelled(lake: Lake, settings: Settings, versions: dict[str, int]) -> DataFrame:
    """-> image_id, view, kind, class_name, rater, vector, source, origin, near_group, bucket.

    class_name: petastorm makes a namedtuple of the columns, and `class` is a word of Python's.
    """
    kind = settings.train_classifier.label
    sources = lake.read("sources", versions["sources"])
    agreed = _agreed(_told(lake, settings, versions))
    from_ = occurrences.latest(sources, "source").join(_opted_out(sources), "image_id", "left_anti")
    vectors = _original(lake.read("embeddings", versions["embeddings"]), encoder_of(settings)[0]).select("image_id", "vector")
    pixels = _original(lake.read("pixels", versions["pixels"]), embedding.outputs(settings)[PIXELS])
    rows = agreed.join(from_, "image_id").join(vectors, "image_id")
    rows = rows.join(pixels.select("image_id", "phash", "phash_mirror"), "image_id")
    named = {"view": F.lit(ORIGINAL), "kind": F.lit(kind), "origin": F.coalesce("origin", "source")}
    rows = rows.withColumns(named).join(_groups(rows), "image_id")
    columns = ("image_id", "view", "kind", "class_name", "rater", "vector", "source", "origin", "near_group")
    return rows.select(*columns).join(_buckets(rows, settings), "near_group").select(*columns, "bucket")


def count_classes(rows: DataFrame) -> dict[str, dict[str, int]]:
    """Rows of an export -> class -> bucket -> number of its images. At most label_classes.MANY classes: a rater has no more."""
    counted = rows.groupBy("class_name", "bucket").count().orderBy("class_name", "bucket").collect()
    told: dict[str, dict[str, int]] = {}
    for row in counted:
        told.setdefault(row["class_name"], {})[row["bucket"]] = row["count"]
    return told


def say_left_out(lake: Lake, settings: Settings, versions: dict[str, int], count: int) -> None:
    """Prints why labelled images are not in an export of `count` rows."""
    opted_out = _opted_out(lake.read("sources", versions["sources"])).withColumn("out", F.lit(True))
    told = _told(lake, settings, versions).join(opted_out, "image_id", "left")
    split, out = F.size("classes") > 1, (F.size("classes") == 1) & F.coalesce("out", F.lit(False))
    found = told.agg(F.count("*").alias("all"), F.count_if(split).alias("split"), F.count_if(out).alias("out")).first()
    assert found is not None
    if left := found["all"] - count:
        rest = left - found["split"] - found["out"]
        print(
            f"{NAME}: {left} labelled images are left out: {found['split']} whose raters disagree, {found['out']} opted out, "
            f"{rest} without a vector of this config"
        )


def _told(lake: Lake, settings: Settings, versions: dict[str, int]) -> DataFrame:
    """-> image_id, classes, rater (all of them), origin: the labels that the raters of the kind still give."""
    entries = [entry for entry in settings.label_classes if entry.kind == settings.train_classifier.label]
    if not entries:
        known = ", ".join(sorted({entry.kind for entry in settings.label_classes})) or "no kind"
        raise Mistake(f"train_classifier.label: given {settings.train_classifier.label!r}, label_classes has entries of {known}")
    sources, labels = lake.read("sources", versions["sources"]), lake.read("labels", versions["labels"])
    rows = labels.limit(0).select("image_id", "class", "rater", "origin")
    for entry in entries:
        told = label_classes.fingerprint(lake, entry)
        mine = labels.where((F.col("kind") == entry.kind) & (F.col("rater") == entry.rater) & (F.col("fingerprint") == told))
        still = label_classes.tell(lake, entry, sources).labels.select("image_id", "class")  # a grown lake may tell it two classes by now
        rows = rows.unionByName(mine.join(still, ["image_id", "class"], "left_semi").select("image_id", "class", "rater", "origin"))
    rows = deny_lists.allowed(lake, rows)
    raters = F.concat_ws(",", F.sort_array(F.collect_set("rater")))
    return rows.groupBy("image_id").agg(F.collect_set("class").alias("classes"), raters.alias("rater"), F.min("origin").alias("origin"))


def _agreed(told: DataFrame) -> DataFrame:
    """-> image_id, class_name, rater, origin of the images that all raters put in one class."""
    return told.where(F.size("classes") == 1).select("image_id", F.col("classes")[0].alias("class_name"), "rater", "origin")


def _opted_out(sources: DataFrame) -> DataFrame:
    return sources.where("opt_out").select("image_id").distinct()


def _groups(rows: DataFrame) -> DataFrame:
    """(image_id, phash, phash_mirror) -> image_id, near_group; in one task, once. Raises Mistake when there are too many for that."""
    hashes = rows.select("image_id", "phash", "phash_mirror")
    if (count := hashes.count()) > near_groups.LIMIT:
        raise Mistake(
            f"export classes: {count} labelled images, of which near-duplicates are told apart by comparing every pair: at most "
            f"{near_groups.LIMIT}; label fewer"
        )
    grouped = hashes.groupBy(F.lit(0)).applyInPandas(near_groups.name_groups, near_groups.SCHEMA)
    return rows.sparkSession.createDataFrame(grouped.toPandas(), near_groups.SCHEMA)  # bounded by LIMIT, 64 bytes a row


def _buckets(rows: DataFrame, settings: Settings) -> DataFrame:
    """(near_group, class_name) -> near_group, bucket. By class, so that a small one has some of its groups in each bucket: its groups in the order
    of their draw are held out, calibrate and train, by their shares, and each bucket has one where a class has three."""
    strata = rows.groupBy("near_group").agg(F.min("class_name").alias("stratum"))  # near-duplicates may be told different classes
    of_stratum = Window.partitionBy("stratum")
    place = F.row_number().over(of_stratum.orderBy(snapshot.draw(settings, "near_group"), "near_group"))
    count = F.count("*").over(of_stratum)
    fewest = F.when(count >= 3, 1).otherwise(0)
    strata = strata.select("near_group", place.alias("place"), count.alias("count"), fewest.alias("fewest"))
    held_out = F.greatest(F.col("fewest"), F.round(F.col("count") * settings.export.held_out))
    calibrate = F.greatest(F.col("fewest"), F.round((F.col("count") - held_out) * settings.train_classifier.calibration))
    bucket = F.when(F.col("place") <= held_out, "held_out").when(F.col("place") <= held_out + calibrate, "calibrate").otherwise("train")
    return strata.select("near_group", bucket.alias("bucket"))


def _original(rows: DataFrame, fingerprint: str) -> DataFrame:
    return rows.where((F.col("view") == ORIGINAL) & (F.col("fingerprint") == fingerprint))


if __name__ == "__main__":
    command.main(__doc__, run)
