"""sources -> labels: classes of images (`style`, `ai_generated`, ...) as their sources or a file tell them, for a classifier to learn.

    spark-submit --jars '.cache/jars/*.jar' jobs/label_classes.py --config conf/demo.yaml

One entry of `label_classes` is one rater of one kind. What it says of an image by tag, by source and by file is taken together: two different
classes are no label. A row of a file names an image by id, key or address; a name that no image or several have is no label either. Both
are counted and told at every run. An entry's labels carry a digest of the entry and of its file's bytes: changed ones are labels anew.
Cost: a pass over `sources`, and over the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import StringType, StructField, StructType

from conf.enrichment import CLASS, OTHER, ClassLabels
from conf.section import Mistake
from conf.settings import Settings, digest
from jobs import command, progress, waves
from jobs.lake import Lake, hadoop
from jobs.waves import Projection
from udfs.embed import ORIGINAL
from udfs.opener import to_uri
from udfs.reject import Reject

NAME = "label-classes"
RULE = 1  # raised when the same entry and sources would give other labels
MANY = 1_000  # classes of one kind; more are a field that holds something else
KEY = ["image_id", "kind", "rater", "fingerprint"]


Keep = Callable[[DataFrame, str], DataFrame]  # (rows, name) -> the same rows, where the caller keeps them


class Told(NamedTuple):
    """What one entry says: of images (image_id, classes, origin), and what its file names (given, class, origin, images)."""

    votes: DataFrame
    named: DataFrame | None

    @property
    def labels(self) -> DataFrame:
        """-> image_id, class, origin of the images that are told one class."""
        return self.votes.where(F.size("classes") == 1).select("image_id", F.col("classes")[0].alias("class"), "origin")


def run(lake: Lake, settings: Settings, plan_only: bool = False) -> None:
    if plan_only:
        print(progress.estimate(lake, NAME, pending(lake, settings).count(), "labels"))
        return
    with waves.stage(lake, NAME, settings, TABLES) as stage:
        told = tell_all(lake, settings, stage.freeze)
        for entry, one in zip(settings.label_classes, told, strict=True):
            say(entry, one)
        labels = pending(lake, settings, told)  # after the stage has landed what an earlier run had staged
        count = labels.count()
        if count == 0:
            print(f"{NAME}: nothing to do")
            return
        with progress.of(lake, NAME, count, "labels") as line, line.wave(0, 1, count):
            stage.run_whole(labels)


TABLES: dict[str, Projection] = {"labels": lambda staged, run: staged.withColumn("run", F.lit(run))}


def pending(lake: Lake, settings: Settings, told: Sequence[Told] | None = None) -> DataFrame:
    """What the entries say (`told`, where the caller has it) and the table does not hold -> rows of `labels`, without `run`."""
    columns = "image_id BINARY, class STRING, origin STRING, view STRING, kind STRING, value FLOAT, rater STRING, fingerprint STRING"
    rows = lake.spark.createDataFrame([], columns)
    for entry, one in zip(settings.label_classes, told or tell_all(lake, settings), strict=True):
        named = {"view": ORIGINAL, "kind": entry.kind, "rater": entry.rater, "fingerprint": fingerprint(lake, entry)}
        labels = one.labels.withColumns({name: F.lit(value) for name, value in named.items()})
        rows = rows.unionByName(labels.withColumn("value", F.lit(1.0).cast("float")))
    return rows.join(lake.read("labels").select(*KEY), KEY, "left_anti")


def tell_all(lake: Lake, settings: Settings, keep: Keep | None = None) -> list[Told]:
    """What each entry says now. Raises Mistake when two of a kind have one rater."""
    names = [(entry.kind, entry.rater) for entry in settings.label_classes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Mistake(f"label_classes: kind and rater {twice[0]} are given twice; put both into one entry, or name two raters")
    return [tell(lake, entry, lake.read("sources"), keep) for entry in settings.label_classes]


def fingerprint(lake: Lake, entry: ClassLabels) -> str:
    """An entry, and the bytes of its file -> what its labels come from."""
    return digest(entry, RULE, _hash(lake, entry) if entry.file else None)


def tell(lake: Lake, entry: ClassLabels, sources: DataFrame, keep: Keep | None = None) -> Told:
    """An entry over these sources -> what it says of which images."""
    votes = lake.spark.createDataFrame([], "image_id BINARY, class STRING, origin STRING")
    none, named = F.lit(None).cast("string").alias("origin"), None
    keep, name = keep or (lambda rows, _: rows), f"{entry.kind}-{entry.rater}"
    if entry.sources:
        votes = votes.unionByName(sources.select("image_id", _among(entry.sources, F.col("source")).alias("class"), none))
    if entry.tags:
        tagged = sources.select("image_id", F.explode("tags").alias("tag"))
        votes = votes.unionByName(tagged.select("image_id", _among(entry.tags, F.col("tag")).alias("class"), none))
    if entry.file:
        named = keep(_name_images(_read(lake, entry), sources), f"named-{name}")
        votes = votes.unionByName(named.where(F.size("images") == 1).select(F.col("images")[0].alias("image_id"), "class", "origin"))
    classes, origin = F.sort_array(F.collect_set("class")).alias("classes"), F.min("origin").alias("origin")
    told = votes.where(F.col("class").isNotNull()).groupBy("image_id").agg(classes, origin)
    return Told(keep(told, f"votes-{name}"), named)


def say(entry: ClassLabels, told: Told) -> None:
    """Prints what an entry gives. Raises Mistake when what it takes for classes cannot be ones."""
    several = F.size("classes") > 1
    votes = _summed(told.votes, labels=~several, split=several, such=F.when(several, F.concat_ws(", ", "classes")))
    parts = [f"{votes['labels']} images"]
    if votes["split"]:
        parts.append(f"{votes['split']} images without a label, told several classes (such as {votes['such']})")
    if told.named is not None:
        size, given = F.size("images"), F.col("given")
        named = _summed(told.named, none=size == 0, many=size > 1, such_none=F.when(size == 0, given), such_many=F.when(size > 1, given))
        for such, what in (("none", "no image has"), ("many", "several images have")):
            if named[such]:
                parts.append(f"{named[such]} names in {entry.file} that {what} (such as {named[f'such_{such}']!r})")
    found = told.labels.select("class").distinct().orderBy("class").limit(MANY + 1).collect()
    if len(found) > MANY:
        raise Mistake(f"label_classes {entry.kind}: more than {MANY} classes; is {entry.class_field!r} the field that holds the class?")
    print(
        f"{NAME}: {entry.kind} by {entry.rater}: {', '.join(parts)}; classes {', '.join(row['class'] for row in found) or 'none'}",
        flush=True,
    )


def _summed(rows: DataFrame, **columns: Column) -> dict[str, Any]:
    """Conditions -> how many rows have them; text (`such...`) -> one of the rows'."""
    told = [(F.max(column) if name.startswith("such") else F.count_if(column)).alias(name) for name, column in columns.items()]
    found = rows.agg(*told).first()
    assert found is not None
    return found.asDict()


def _among(classes: dict[str, str], column: Column) -> Column:
    return F.element_at(F.create_map(*[F.lit(part) for pair in classes.items() for part in pair]), column)


def _name_images(rows: DataFrame, sources: DataFrame) -> DataFrame:
    """(given, class, origin) -> the same with `images`, the ids of those that are named so by id, key or address."""
    address = F.when(F.col("given").startswith("/") | F.col("given").contains("://"), F.udf(to_uri)("given"))
    names_ = F.array_distinct(F.array("given", F.lower("given"), F.coalesce(address, "given")))
    meant = rows.withColumn("name", F.explode(names_))
    names = [F.lower(F.hex("image_id")), F.col("key"), F.col("uri")]
    known = sources.select("image_id", F.explode(F.array_distinct(F.array(*names))).alias("name")).distinct()
    found = meant.join(known, "name", "left").groupBy("given", "class")
    return found.agg(F.min("origin").alias("origin"), F.collect_set("image_id").alias("images"))


def _read(lake: Lake, entry: ClassLabels) -> DataFrame:
    """The file -> (given, class, origin), all text. Raises Mistake when a row has no image or no class, or one that cannot be a class."""
    assert entry.file is not None
    _hash(lake, entry)  # it is there
    fields = {"given": entry.image_field, "class": entry.class_field} | ({"origin": entry.origin_field} if entry.origin_field else {})
    uri, suffix = to_uri(entry.file), entry.file.rpartition(".")[2]
    if suffix in ("jsonl", "json", "ndjson"):
        kind = StructType([StructField(field, StringType()) for field in dict.fromkeys(fields.values())])
        lines = lake.spark.read.text(hadoop(uri)).where(F.trim("value") != "")
        rows = lines.select(F.from_json("value", kind).alias("row")).select("row.*")
    elif suffix == "csv":
        rows = lake.spark.read.csv(hadoop(uri), header=True, multiLine=True, escape='"')
    else:
        raise Mistake(f"label_classes {entry.kind}: file: given {entry.file}, expected .jsonl or .csv")
    if lacking := sorted(set(fields.values()) - set(rows.columns)):
        raise Mistake(f"label_classes {entry.kind}: {entry.file} has no column {', '.join(lacking)}; its columns are {rows.columns}")
    rows = rows.select(*[F.trim(rows[field]).alias(name) for name, field in fields.items()])
    wrong = (
        F.col("given").isNull()
        | (F.col("given") == "")
        | F.col("class").isNull()
        | ~F.col("class").rlike(CLASS)
        | (F.col("class") == OTHER)
    )
    if bad := rows.where(wrong).first():
        raise Mistake(
            f"label_classes {entry.kind}: {entry.file}: a row has {entry.image_field} {bad['given']!r} and {entry.class_field} {bad['class']!r}; "
            f"expected an id, key or address, and a class of at most 60 letters, digits, spaces, dots and dashes, which is not {OTHER!r}; "
            "mend the file, or name its fields in image_field and class_field"
        )
    return rows if entry.origin_field else rows.withColumn("origin", F.lit(None).cast("string"))


def _hash(lake: Lake, entry: ClassLabels) -> str:
    """-> sha256 of the entry's file. Raises Mistake when there is none."""
    assert entry.file is not None
    found = hashlib.sha256()
    try:
        with lake.opener.stream(to_uri(entry.file)) as stream:
            while part := stream.read(2**20):
                found.update(part)
    except Reject as reject:
        raise Mistake(f"label_classes {entry.kind}: file: {entry.file}: {reject.code}; expected a .jsonl or .csv file") from None
    return found.hexdigest()


if __name__ == "__main__":
    command.main(__doc__, run)
