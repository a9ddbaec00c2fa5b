"""Prints, as JSON, the GPU address that Spark assigned to each of 6 tasks: submitted by test_standalone.py."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator

from pyspark import TaskContext
from pyspark.sql import SparkSession


def main() -> None:
    def addresses(numbers: Iterable[int]) -> Iterator[list[str]]:
        time.sleep(1)  # long enough that neither worker takes all tasks
        context = TaskContext.get()
        assert context is not None
        yield context.resources()["gpu"].addresses

    spark = SparkSession.builder.appName("gpu_addresses").getOrCreate()
    print(json.dumps(spark.sparkContext.parallelize(range(6), 6).mapPartitions(addresses).collect()))
    spark.stop()


if __name__ == "__main__":
    main()
