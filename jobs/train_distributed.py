"""A trainer's file and an export -> a training on Spark's executors, one rank a task; its result is in the registry and in its folder.

    spark-submit --properties-file infra/spark-train.conf jobs/train_distributed.py training/train_scorer.py EXPORT --config my.yaml

The trainer is given to pyspark's DeepspeedTorchDistributor by its path: nothing of it is imported here, it runs under torchrun in a
barrier stage, and registers its model itself. The number of ranks is that of the trainer's section. When a rank ends early all of
them are started again, and the trainer goes on from its last checkpoint. The trainer's file, this room, the config, the export and
`training.root` must lie at the same paths on every node. Needs both extras (`studbook[spark,train]`) there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from conf.loops import Loop
from conf.section import Mistake
from conf.settings import Settings, command_line, stop
from jobs import session

REGISTERING = 60.0  # seconds that executors may take to register
STARTS, PAUSE = 4, 15.0  # seconds until the ranks of a start that failed are gone (jobs/rank.py)
EXIT = re.compile(r"exitcode\s*: (-?\d+)")  # of a rank, as torchrun tells it
FINAL = {2, 4}  # a trainer's statuses: the user's mistake; trained, but its record waits for MLflow (training/trainer.py)
RANK = str(Path(__file__).with_name("rank.py").absolute())


class Launch(NamedTuple):
    """What Spark is asked to run: the trainer's path, its command line, so many ranks, on GPUs or not."""

    section: str
    trainer: str
    arguments: list[str]
    ranks: int
    gpu: bool


def main() -> None:
    told = {"trainer": "the trainer's file, e.g. training/train_scorer.py", "export": "folder or uri of its export"}
    settings, given = command_line(__doc__ or "", told)
    try:
        launch = plan(settings, given.trainer, given.export, given.config, given.set)
        spark = session.start(settings.spark)
        check_cluster(launch, settings, dict(spark.sparkContext.getConf().getAll()))
        slots = wait_for_slots(lambda: count_slots(spark), launch, REGISTERING)
        if given.plan:
            print(
                f"train distributed: {launch.ranks} ranks of {launch.trainer} on {slots} task slots; what is pending the trainer says: --plan"
            )
            return
        run(launch)
    except Mistake as mistake:
        stop(str(mistake))


def plan(settings: Settings, trainer: str, export: str, config: str, overrides: Sequence[str]) -> Launch:
    """The command line -> what is to be launched. Raises Mistake when there is no such trainer."""
    path = Path(trainer)
    wanted = getattr(settings, path.stem, None)
    if not isinstance(wanted, Loop):
        known = sorted(name for name in type(settings).model_fields if isinstance(getattr(settings, name), Loop))
        raise Mistake(f"trainer: given {trainer!r}, expected the path of a trainer's file: training/NAME.py, NAME one of {known}")
    if not path.is_file():
        raise Mistake(f"trainer: no file at {path.absolute()}; give the path that it has on every node")
    place = export if "://" in export else str(Path(export).absolute())
    arguments = [place, "--config", str(Path(config).absolute()), *(part for one in overrides for part in ("--set", one))]
    return Launch(path.stem, str(path.absolute()), arguments, wanted.ranks, wanted.device == "cuda")


def check_cluster(launch: Launch, settings: Settings, conf: Mapping[str, str]) -> None:
    """Raises Mistake for what would hang, or fail on the executors only."""
    if conf.get("spark.dynamicAllocation.enabled", "false") == "true":
        raise Mistake(
            "spark.dynamicAllocation.enabled: given true, but all ranks start at once or never; set it to false, and the executors' number"
        )
    if conf.get("spark.master", "").startswith("local"):
        return
    if launch.gpu and float(conf.get("spark.task.resource.gpu.amount", "0")) != 1:
        amount = conf.get("spark.task.resource.gpu.amount", "nothing")
        raise Mistake(
            f"spark.task.resource.gpu.amount: given {amount}, expected 1: one rank a task, one GPU a rank (infra/spark-train.conf)"
        )
    places = {"training.root": settings.training.root, "mlflow.tracking_uri": settings.mlflow.tracking_uri.removeprefix("sqlite:///")}
    for key, place in places.items():
        if "://" not in place and not Path(place).is_absolute():
            raise Mistake(f"{key}: given {place!r}; executors have folders of their own, give an absolute path that every node sees")


def wait_for_slots(count: Callable[[], int], launch: Launch, seconds: float) -> int:
    """-> task slots, when they are as many as the ranks. Raises Mistake when they are not after so many seconds: a barrier would wait on."""
    end = time.monotonic() + seconds
    while (slots := count()) < launch.ranks:
        if time.monotonic() >= end:
            counted = "cores / spark.task.cpus and GPUs" if launch.gpu else "cores / spark.task.cpus"
            raise Mistake(
                f"{launch.section}.ranks: given {launch.ranks}, but Spark can run {slots} tasks at once ({counted}), and all ranks start "
                f"together; give it more executors, or --set {launch.section}.ranks={max(slots, 1)}"
            )
        time.sleep(0.5)
    return slots


def count_slots(spark: SparkSession) -> int:
    """Tasks that can run at once now, by Spark's own count for barriers: it goes by cores and by every other resource of a task."""
    context = spark.sparkContext._jsc.sc()
    return int(context.maxNumConcurrentTasks(context.resourceProfileManager().defaultResourceProfile()))


def run(launch: Launch) -> None:
    """Trains; starts all ranks again when one ended early, as Spark itself does not do for the distributor's stage. Raises Mistake
    when the trainer said that it is the user's, or when the ranks ended early STARTS times.
    """
    from pyspark.ml.deepspeed.deepspeed_distributor import DeepspeedTorchDistributor

    for start in range(1, STARTS + 1):
        distributor = DeepspeedTorchDistributor(numGpus=1, nnodes=launch.ranks, localMode=False, useGpu=launch.gpu)
        try:
            distributor.run(RANK, launch.trainer, *launch.arguments)
            return
        except (PySparkException, Py4JJavaError) as error:
            statuses = {int(status) for status in EXIT.findall(str(error))}
        if statuses & FINAL:
            raise Mistake(f"{launch.section}: a rank ended with status {max(statuses & FINAL)}; what it said stands above")
        if start < STARTS:
            print(f"train distributed: a rank ended early; all of them start again (start {start + 1} of {STARTS})", flush=True)
            time.sleep(PAUSE)
    raise Mistake(
        f"{launch.section}: ranks ended early {STARTS} times; what they said stands above. Run again: the training goes on from its last checkpoint"
    )


if __name__ == "__main__":
    main()
