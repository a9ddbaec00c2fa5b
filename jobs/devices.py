"""The device of a task: a GPU where Spark assigned one."""

from __future__ import annotations

from typing import NamedTuple

from pyspark import TaskContext

from conf.section import Mistake


class Device(NamedTuple):
    """name: "cpu" or "cuda:N"; place: "gpuN" of the assigned GPU, used or not, "" without one."""

    name: str
    place: str


def of_task(wanted: str, setting: str) -> Device:
    """("cpu" or "cuda", the name of the setting that says so) -> the device of this task. Raises Mistake when there is no GPU for it."""
    context = TaskContext.get()
    assert context is not None
    resources = context.resources()
    gpu = resources["gpu"].addresses[0] if "gpu" in resources else None
    if wanted == "cuda" and gpu is None:
        raise Mistake(
            f"{setting}: given cuda, but Spark assigned this task no GPU; set spark.task.resource.gpu.amount (infra/spark-gpu.conf)"
        )
    return Device(f"cuda:{gpu}" if wanted == "cuda" else wanted, "" if gpu is None else f"gpu{gpu}")
