"""Settings -> the Spark session that every stage runs in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from py4j.java_gateway import JavaPackage
from pyspark import SparkConf, SparkContext
from pyspark.sql import SparkSession

from conf.build import Spark
from conf.section import Mistake

DELTA = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
}
DEFAULTS = {
    "spark.app.name": "studbook",
    "spark.scheduler.mode": "FAIR",  # landing a wave runs beside the next wave's computation
    "spark.sql.execution.arrow.maxBytesPerBatch": "64m",
    "spark.sql.parquet.compression.codec": "zstd",
    "spark.sql.session.timeZone": "UTC",
    "spark.ui.showConsoleProgress": "false",
    # Spark's own, and what a worker's environment is given: the event log and the UI would tell a captioner's key
    "spark.redaction.regex": "(?i)secret|password|token|access[.]?key|executorEnv",
}
LOG4J = (Path(__file__).parent / "log4j2.properties").as_uri()
ARCHIVE = "classes.jsa"  # beside the Delta jars, by jobs/archive_classes.py
# a short session never earns back the optimising compiler: 1.5 times faster to the end of the demo on two cores; metaspace: 26,000 classes are
# loaded, each step to their 170 MB was a full collection
JAVA = (
    f'-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=192m -XX:MetaspaceSize=192m -XX:+UseParallelGC "-Dlog4j2.configurationFile={LOG4J}"'
)
LOCAL = {
    "spark.driver.extraJavaOptions": JAVA,
    # Delta reads a snapshot in 50 tasks by default: seconds a table on two cores
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.sql.shuffle.partitions": "4",
    # small data: compiling a query costs more than interpreting it (a fifth of the JVM's CPU in the demo's stages)
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.ui.enabled": "false",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
}


def start(settings: Spark) -> SparkSession:
    """The running session of a notebook or spark-submit where there is one, else a new one. Raises Mistake without the Delta jars."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # else executors take the system's Python
    if (settings.master or "").startswith("local"):
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        os.environ.setdefault("SPARK_LAUNCHER_OPTS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")  # of the JVM that only prints a command
    if "PYSPARK_GATEWAY_PORT" in os.environ:  # under spark-submit: else SparkConf() does not see what it was told
        SparkContext._ensure_initialized()
    given = SparkConf()
    builder = SparkSession.builder
    master = given.get("spark.master", settings.master)
    if master is not None and not given.contains("spark.master"):
        builder = builder.master(master)
    jars = _jars(settings.jars) if settings.jars is not None else []
    wanted = DEFAULTS | DELTA | _local(master or "", jars) | settings.conf
    if jars and "spark.driver.extraClassPath" not in wanted:
        wanted["spark.jars"] = ",".join(jars)
    for key, value in wanted.items():
        if not given.contains(key):  # what spark-submit was told wins
            builder = builder.config(key, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    if settings.jars is not None and isinstance(spark._jvm.io.delta.sql.DeltaSparkSessionExtension, JavaPackage):  # type: ignore[union-attr]
        raise Mistake(
            f"spark.jars: spark-submit started its JVM before it was read, and without Delta; add --jars '{settings.jars}/*.jar' to the command"
        )
    return spark


def _local(master: str, jars: list[str]) -> dict[str, str]:
    """What a session on this machine has besides. With one JVM for all, its jars are on the class path and its classes come from an archive, where
    there is one (jobs/archive_classes.py). A JVM that cannot use the archive starts without it.
    """
    if not jars or not (master == "local" or master.startswith("local[")):
        return LOCAL if master.startswith("local") else {}
    shared = f'{JAVA} "-XX:SharedArchiveFile={Path(jars[0]).parent / ARCHIVE}" -Xlog:disable -Xlog:all=error:stderr'
    return LOCAL | {"spark.driver.extraClassPath": os.pathsep.join(jars), "spark.driver.extraJavaOptions": shared}


def _jars(folder: str) -> list[str]:
    jars = sorted(str(path.resolve()) for path in Path(folder).glob("*.jar"))
    if not jars:
        raise Mistake(
            f"spark.jars: no jar in {folder!r}; fetch the Delta jars with `make jars`, or set spark.jars=null where the cluster has them"
        )
    return jars
