"""folders, tar shards, parquet files with an image column and manifests -> images, sources, rejects.

    spark-submit --jars '.cache/jars/*.jar' jobs/ingest.py --config conf/demo.yaml

One pass over the bytes of what is new: sha256, header, AI-generation marks, address. The bytes stay where they lie. A
grown folder costs its listing and what is new; a file that changed is a new image; nothing is deleted. Cost: bound by
the store (reading) and by sha256, about 1 CPU-second a GB. A bad input gets a row in `rejects` with a code.
"""

from __future__ import annotations

from functools import partial, reduce
from operator import and_
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.build import Source
from conf.section import Mistake
from conf.settings import Settings
from jobs import command, deny_lists, progress, rejects, waves
from jobs.lake import Lake, hadoop
from jobs.tables import TABLES
from jobs.waves import Projection
from udfs import addresses, listing
from udfs import ingest as kernel
from udfs.handles import Stat
from udfs.opener import to_uri
from udfs.reject import Reject

NAME = "ingest"
UNIT = "inputs"  # files, archives, parquet files, manifest rows
KEY = list(TABLES["sources"].key)
SEVERAL = {"tar": r"\.(tar|tar\.gz|tgz)$", "parquet": r"\.parquet$"}  # kinds whose entries hold several images -> names of such files
MANIFEST_BYTES = {"csv": 2**16, "parquet": 2**13}  # of a manifest: a task's, each of whose rows is looked up in the store
COST_BYTES = 2**18  # an archive counts as its bytes in images of this size, so that a wave of archives is a wave


def run(lake: Lake, settings: Settings, plan_only: bool = False) -> int:
    """-> how many inputs are (or were, when this is no plan) pending."""
    if plan_only:
        count = pending(lake, settings, listed(lake, settings)).count()
        print(progress.estimate(lake, NAME, count, UNIT))
        return count
    with waves.stage(lake, NAME, settings, tables(lake, settings)) as stage:
        entries = stage.freeze(listed(lake, settings), "listing")
        plan = stage.plan(pending(lake, settings, entries), ["uri", "offset"])
        if plan.rows:
            deny_lists.unapply_others(lake, settings)
        # mostly nobody is refused: a look at the start instead of a join in every wave
        refused = deny_lists.refused(lake, settings)
        nobody = refused.isEmpty()

        def read(inputs: DataFrame) -> DataFrame:
            rows = compute(inputs, settings)
            return rows if nobody else deny_lists.screened(rows, refused)

        stage.run(plan, read, UNIT)
        return plan.rows


def listed(lake: Lake, settings: Settings) -> DataFrame:
    """Every source of the config -> its entries (listing.SCHEMA), listed by tasks."""
    frames = [_listed(lake, source, settings) for source in settings.ingest.sources]
    whole = frames[0]
    for frame in frames[1:]:
        whole = whole.unionByName(frame)
    return whole.dropDuplicates(["source", "entry", "seen"])


def pending(lake: Lake, settings: Settings, entries: DataFrame) -> DataFrame:
    """Entries that no table holds in this state."""
    state, keys = ["source", "entry", "seen"], ["input_key", "fingerprint"]
    keyed = entries.withColumns({"input_key": input_key(), "fingerprint": _fingerprint(settings)})
    settled = rejects.settled(lake, NAME)
    taken = lake.read("sources").select(*state, input_key().alias("input_key"), place().alias("place"))
    # an archive or parquet file with members that other limits refused and nobody took is read once more: these limits take or refuse them
    refused = states(lake.read("rejects").where((F.col("stage") == NAME) & F.col("permanent"))).where("place > 0")
    refused = refused.join(taken, ["input_key", "seen", "place"], "left_anti").select("input_key", "seen")
    again = keyed.where(F.col("kind").isin(*SEVERAL)).join(refused, ["input_key", "seen"], "left_semi")
    again = again.join(settled, keys, "left_anti").select(*state)
    done = taken.select(*state).unionByName(deny_lists.settled(lake, entries)).distinct().join(again, state, "left_anti")
    new = keyed.join(done, state, "left_anti").join(settled, keys, "left_anti").drop(*keys)
    images = F.greatest(F.lit(1), F.ceil(F.col("size") / COST_BYTES))
    return new.withColumn("cost", F.when(F.col("kind").isin(*SEVERAL), images).otherwise(F.lit(1)).cast("bigint"))


def compute(inputs: DataFrame, settings: Settings) -> DataFrame:
    """Entries -> staged rows (udfs.ingest.SCHEMA)."""
    columns = {source.name: source.column_names for source in settings.ingest.sources if source.kind == "parquet"}
    worker = partial(kernel.ingest, limits=settings.limits.model_dump(), stores=settings.store_options, columns=columns)
    return inputs.mapInPandas(worker, kernel.SCHEMA).withColumn("fingerprint", _fingerprint(settings))


def tables(lake: Lake, settings: Settings) -> dict[str, Projection]:
    def rejects_of(staged: DataFrame, run: str) -> DataFrame | None:
        refused = staged.where(F.col("reject").isNotNull()).withColumn("input_key", input_key())
        place = [column for column in addresses.PLACE if column in refused.columns]  # a wave that an older version had staged lacks some
        told = refused.select("input_key", "fingerprint", "image_id", *place, "reject.*")
        return rejects.rows(lake, told, NAME, run, settings.waves.attempts)

    def images_of(staged: DataFrame, run: str) -> DataFrame:
        found = staged.where(F.col("image").isNotNull()).select("image_id", "image.*").dropDuplicates(["image_id"])
        return _unknown(lake, "images", found, ["image_id"]).withColumn("run", F.lit(run))

    def sources_of(staged: DataFrame, run: str) -> DataFrame:
        absent = {"derived_from": F.lit(None).cast("binary"), "run": F.lit(run)}
        found = rejects.with_place(staged.where(F.col("image").isNotNull()).drop("image", "reject", "fingerprint"))
        # known ones are members of an archive that is read again
        return _unknown(lake, "sources", found.dropDuplicates(KEY), KEY).withColumns(absent)

    return {"rejects": rejects_of, "images": images_of, "sources": sources_of}


def _unknown(lake: Lake, table: str, found: DataFrame, key: list[str]) -> DataFrame:
    """Rows of a wave that the table does not hold. The table, at a pinned version, is passed over and not shuffled: hashes of the
    wave's keys (8 bytes each) are sent round first, and only rows with such a hash are compared.
    """
    hashed = F.xxhash64(*key).alias("hashed")
    near = lake.read(table, lake.version(table)).select(*key, hashed).join(F.broadcast(found.select(hashed)), "hashed", "left_semi")
    known = near.select(*[F.col(column).alias(f"known_{column}") for column in key])
    same = [F.col(column).eqNullSafe(F.col(f"known_{column}")) for column in key]  # a parquet row has no offset, a file no row
    return found.join(known, reduce(and_, same), "left_anti")


def _listed(lake: Lake, source: Source, settings: Settings) -> DataFrame:
    if source.kind == "manifest":
        told: dict[str, Any] = {"columns": source.column_names, "licence": source.licence, "stores": settings.store_options}
        lines = _manifest_lines(lake, source)
        return lines.mapInPandas(partial(listing.list_manifest, source=source.name, manifest=source.uri, **told), listing.SCHEMA)
    columns = source.column_names if source.kind == "parquet" else None
    if columns is not None and (stat := _file(lake, source)) is not None:
        alone = listing.list_file(to_uri(source.uri), source.name, source.kind, source.licence, columns, stat)
        return lake.spark.createDataFrame(alone, listing.SCHEMA)
    try:
        work = listing.split_tree(source.uri, lake.opener)
    except Reject as reject:
        expected = "a folder that this machine can list" + (" or a .parquet file" if source.kind == "parquet" else "")
        raise Mistake(f"ingest.sources.{source.name}: {source.uri}: {reject.code}; expected {expected}") from None
    folders = lake.spark.createDataFrame(work, listing.WORK_SCHEMA).repartition(min(len(work), 64))
    told = {"source": source.name, "root": source.uri, "licence": source.licence, "stores": settings.store_options, "columns": columns}
    entries = folders.mapInPandas(partial(listing.list_folders, kind="file", **told), listing.SCHEMA)
    if source.kind in SEVERAL:
        is_several = F.lower("uri").rlike(SEVERAL[source.kind])
        entries = entries.withColumn("kind", F.when(is_several, F.lit(source.kind)).otherwise(F.col("kind")))
    return entries


def _file(lake: Lake, source: Source) -> Stat | None:
    """The state of a source that is one file; None: it is a folder, or not there."""
    try:
        return lake.opener.stat(to_uri(source.uri))
    except Reject:
        return None


def _manifest_lines(lake: Lake, source: Source) -> DataFrame:
    """A manifest of any format -> one `line` of JSON a row."""
    uri = to_uri(source.uri)
    try:
        size = lake.opener.stat(uri).size
    except Reject as reject:
        if reject.code == "missing":
            raise Mistake(f"ingest.sources.{source.name}: no manifest at {source.uri}; expected a .jsonl, .csv or .parquet file") from None
        raise Mistake(f"ingest.sources.{source.name}: {source.uri}: {reject.code}; expected a manifest file") from None
    suffix = uri.rpartition(".")[2]
    if suffix in ("jsonl", "json", "ndjson"):
        return lake.spark.read.text(hadoop(uri)).select(F.col("value").alias("line"))
    if suffix not in MANIFEST_BYTES:
        raise Mistake(f"ingest.sources.{source.name}: given a .{suffix} manifest, expected .jsonl, .csv or .parquet")
    rows = (
        lake.spark.read.csv(hadoop(uri), header=True, multiLine=True, escape='"')
        if suffix == "csv"
        else lake.spark.read.parquet(hadoop(uri))
    )
    tasks = min(1 + size // MANIFEST_BYTES[suffix], 64)  # a CSV with quoted line breaks is read by one
    return rows.select(F.to_json(F.struct("*")).alias("line")).repartition(tasks)


def states(refused: DataFrame) -> DataFrame:
    """Rejects of this stage -> with `seen`, the state of the entry that was refused, and `place`, where in it."""
    return refused.withColumns({"seen": F.substring_index("fingerprint", "|", -1), "place": place()})


def place() -> Column:
    """An address -> where in its entry it lies, as a number: 0 for the whole entry, the offset of a member of an archive, row group and row
    (counted from 1) of a parquet row.
    """
    of_row = F.shiftleft(F.col("row_group").cast("bigint") + 1, 32) + F.col("row") + 1
    return F.coalesce(of_row, F.col("offset"), F.lit(0))


def input_key() -> Any:
    """How an entry is named in `rejects`."""
    return F.concat_ws("|", "source", "entry")


def _fingerprint(settings: Settings) -> Any:
    """Ends in `seen`, which has no bar (see `states`)."""
    return F.concat_ws("|", F.lit(kernel.fingerprint(settings.limits.model_dump())), "seen")


if __name__ == "__main__":
    command.main(__doc__, run)
