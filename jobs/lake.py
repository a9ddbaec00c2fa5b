"""The lake: named tables and versions in, DataFrames out; appends that count once. The only file that knows Delta."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings
from jobs.lease import landing
from jobs.tables import TABLES
from udfs.opener import Opener, to_uri
from udfs.reject import Reject

FENCE = 2**62  # a txnVersion above every wave number
HISTORY = "interval 365 days"
# columns whose least and largest values Delta writes into its log, for skipping files: those that tell nothing of an image, since a log
# is kept long after the rows
STATISTICS = ("stage", "view", "fingerprint", "selection", "export", "training", "run")
STATISTICS_OF = "delta.dataSkippingStatsColumns"
CREATING = 60  # seconds of the lock under which tables are made
VIOLATION = re.compile(  # the message of Delta's invariant exceptions
    r"\[DELTA_(?:VIOLATE_CONSTRAINT_WITH_VALUES|NOT_NULL_CONSTRAINT_VIOLATED|MISSING_NOT_NULL_COLUMN_VALUE)\] (.*)"
)


class ConstraintViolated(RuntimeError):
    """A table refused rows that a stage computed: a kernel's mistake, not the user's."""


class Lake:
    """Tables under `lake.root`, or in a Unity Catalog schema with staging and leases under `lake.root`."""

    def __init__(self, spark: SparkSession, settings: Settings) -> None:
        self.spark = spark
        self.opener = Opener(settings.store_options)
        self.root = to_uri(settings.lake.root).rstrip("/")
        self._schema = settings.lake.catalog and f"{settings.lake.catalog}.{settings.lake.schema_name}"
        self.has_catalog = self._schema is not None

    def create(self) -> None:
        """Every table of jobs/tables.py that is not there yet, with its constraints."""
        if all(map(self._exists, TABLES)):
            return
        with landing(self, f"create-{uuid.uuid4().hex[:8]}", CREATING):  # of two drivers that start at once, one makes them
            missing = [name for name in TABLES if not self._exists(name)]
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(self._create, missing))

    def read(self, table: str, version: int | None = None) -> DataFrame:
        """A table as it is now, or pinned to a version (what a plan that appends to the same table must do). Has every column of
        jobs/tables.py: those that the table did not have yet are NULL.
        """
        if version is None:
            return _with_later(table, self.spark.table(self._name(table)))
        return _with_later(table, self.spark.sql(f"SELECT * FROM {self._name(table)} VERSION AS OF {version}"))

    def version(self, table: str) -> int:
        return int(self.spark.sql(f"DESCRIBE HISTORY {self._name(table)} LIMIT 1").first()["version"])  # type: ignore[index]

    def versions(self, tables: Iterable[str]) -> dict[str, int]:
        tables = sorted(tables)
        with ThreadPoolExecutor(4) as pool:
            return dict(zip(tables, pool.map(self.version, tables), strict=True))

    def append(self, table: str, rows: DataFrame, app: str, number: int) -> None:
        """Lands rows once for (app, number): a repeat, or a number below the last, is skipped by Delta without computing it.

        Numbers of one app must ascend, and a number must never mean two different sets of rows. Raises ConstraintViolated,
        and appends nothing, when a row breaks a constraint of jobs/tables.py.
        """
        columns = [field.name for field in self.read(table).schema]
        writer = _with_later(table, rows).select(*columns).write.format("delta").mode("append")
        writer = writer.option("txnAppId", f"{app}/{table}").option("txnVersion", number)
        if TABLES[table].later:  # a lake of older code gets the columns with its first append
            writer = writer.option("mergeSchema", "true")
        try:
            if self._schema:
                writer.saveAsTable(self._name(table))
            else:
                writer.save(self._path(table))
        except (PySparkException, Py4JJavaError) as error:
            if (refused := VIOLATION.search(str(error))) is None:
                raise
            raise ConstraintViolated(f"table {table}: {refused[1]}") from error

    def fence(self, table: str, app: str) -> None:
        """After this no append of `app` lands: what a driver that lost its lease may still send is skipped."""
        self.append(table, self.read(table).limit(0), app, FENCE)

    def remove(self, table: str, rows: DataFrame, *on: str) -> None:
        """Takes out the table's rows that are equal to one of `rows` in the columns `on` (NULL is equal to NULL). By MERGE: the log tells
        the condition of a DELETE, with the ids. Their files stay, as history: see `unread`.
        """
        rows.select(*on).distinct().createOrReplaceTempView("removed")
        same = " AND ".join(f"t.{column} <=> r.{column}" for column in on)
        self.spark.sql(f"MERGE INTO {self._name(table)} t USING removed r ON {same} WHEN MATCHED THEN DELETE")

    def clear(self, table: str, column: str, rows: DataFrame) -> None:
        """Makes a column NULL where it is equal to the first column of `rows`."""
        rows.select(F.col(rows.columns[0]).alias("value")).distinct().createOrReplaceTempView("cleared")
        condition = f"MERGE INTO {self._name(table)} t USING cleared r ON t.{column} = r.value"
        self.spark.sql(f"{condition} WHEN MATCHED THEN UPDATE SET {column} = NULL")

    def unread(self, table: str) -> list[str]:
        """URIs of the table's parquet files that its present version does not read: those of its history, and of appends that failed."""
        read = {uri.rpartition("/")[2] for uri in self.read(table).inputFiles()}
        there = [entry.uri for entry in self.opener.entries(self.area(table)) if entry.uri.endswith(".parquet")]
        return [uri for uri in there if uri.rpartition("/")[2] not in read]

    def delete_files(self, uris: Iterable[str]) -> None:
        """Files that Hadoop wrote, each with the checksum that it keeps beside it on a local disk."""
        for uri in uris:
            folder, _, name = uri.rpartition("/")
            self.opener.delete(uri)
            if uri.startswith("file://"):
                self.opener.delete(f"{folder}/.{name}.crc")

    def conceal(self, table: str) -> None:
        """A table that older code made tells least and largest keys and addresses in its log: takes them out of the log, and has them written
        no more. Does nothing to others. Nobody else may write the table meanwhile.
        """
        properties = {row["key"]: row["value"] for row in self.spark.sql(f"SHOW TBLPROPERTIES {self._name(table)}").collect()}
        wanted = _statistics(table)
        if properties.get(STATISTICS_OF) == wanted:
            return
        entries = [entry.uri for entry in self.opener.entries(self._log(table)) if not entry.is_folder]
        if not any(uri.endswith(f"/{0:020}.json") for uri in entries):
            raise Mistake(
                f"{self._log(table)}: the log's first commit is gone, and without it its checkpoints cannot be; nothing was taken out of it"
            )
        for uri in entries:
            if uri.endswith(".json"):
                self.opener.write(uri, _without_values(self.opener.read(uri)))
        self.delete_files(uri for uri in entries if not uri.endswith(".json"))  # checkpoints and checksums: the commits say all of it
        for uri in entries:
            folder, _, name = uri.rpartition("/")
            self.opener.delete(f"{folder}/.{name}.crc")  # of the file as it was
        self.spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()  # type: ignore[union-attr]  # it holds the old values
        self.spark.sql(f"ALTER TABLE {self._name(table)} SET TBLPROPERTIES ('{STATISTICS_OF}' = '{wanted}')")

    def area(self, *parts: str) -> str:
        """URI below the root for what is no table: staging, leases, rates."""
        return "/".join((self.root, *parts))

    def staged(self, uri: str) -> DataFrame:
        return self.spark.read.parquet(hadoop(uri))

    def stage(self, rows: DataFrame, uri: str) -> None:
        rows.write.mode("overwrite").parquet(hadoop(uri))

    def folders(self, uri: str) -> list[str]:
        """Names of the folders in an area, sorted; none when the area is not there."""
        try:
            return sorted(entry.uri.rpartition("/")[2] for entry in self.opener.entries(uri) if entry.is_folder)
        except Reject as reject:
            if reject.code != "missing":
                raise
            return []

    def _path(self, table: str) -> str:
        return hadoop(f"{self.root}/{table}")

    def _name(self, table: str) -> str:
        assert table in TABLES, table
        return f"{self._schema}.{table}" if self._schema else f"delta.`{self._path(table)}`"

    def _exists(self, table: str) -> bool:
        if self._schema:
            return self.spark.catalog.tableExists(self._name(table))
        try:
            return any(entry.uri.endswith((".json", ".parquet")) for entry in self.opener.entries(self._log(table)))
        except Reject as reject:
            if reject.code != "missing":
                raise
            return False

    def _log(self, table: str) -> str:
        return self.area(table, "_delta_log")

    def _create(self, name: str) -> None:
        table = TABLES[name]
        if not self.has_catalog:
            self.opener.delete(self._log(name))  # of a driver killed before the first commit: Delta would take the folder for the table
        properties = {
            "delta.logRetentionDuration": HISTORY,
            "delta.deletedFileRetentionDuration": HISTORY,
            "delta.enableDeletionVectors": "false",  # a table may be read as parquet
            STATISTICS_OF: _statistics(name),
        }
        # in the same commit as the table: an ALTER a constraint takes a second each
        properties |= {f"delta.constraints.{check}": condition for check, condition in table.checks}
        told = ", ".join(f"'{key}' = {quoted(value)}" for key, value in properties.items())
        self.spark.sql(f"CREATE TABLE IF NOT EXISTS {self._name(name)} ({table.ddl}) USING DELTA TBLPROPERTIES ({told})")


def _with_later(table: str, rows: DataFrame) -> DataFrame:
    """Rows -> the same with the columns that came later than they did, as NULL."""
    lacking = [(name, kind) for name, kind in TABLES[table].later if name not in rows.columns]
    return rows.withColumns({name: F.lit(None).cast(kind) for name, kind in lacking}) if lacking else rows


def _statistics(table: str) -> str:
    columns = TABLES[table].columns
    hidden = ("fingerprint",) if "input_key" in columns else ()  # a reject's ends in the state of the file
    return ",".join(name for name in STATISTICS if f"{name} STRING" in columns and name not in hidden)


def _without_values(commit: bytes) -> bytes:
    """A commit of Delta's log -> the same without the least and largest values of the files that it adds."""
    lines = []
    for line in commit.splitlines():
        action = json.loads(line)
        for told in (action.get("add"), action.get("remove")):
            if told and told.get("stats"):
                statistics = {key: value for key, value in json.loads(told["stats"]).items() if key not in ("minValues", "maxValues")}
                told["stats"] = json.dumps(statistics, separators=(",", ":"))
        lines.append(json.dumps(action, separators=(",", ":"), ensure_ascii=False).encode())
    return b"\n".join(lines) + b"\n"


def quoted(text: str) -> str:
    """Text -> a string literal of Spark SQL."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def hadoop(uri: str) -> str:
    """Our URI -> the path as Hadoop writes it: not percent-encoded."""
    return unquote(uri).replace("s3://", "s3a://", 1)
