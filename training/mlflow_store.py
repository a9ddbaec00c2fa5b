"""Settings -> the MLflow store as training uses it: a client, the experiment, comparisons, registered versions and their aliases.

Needs no Spark and no journal: what promotes, compares or looks something up goes straight to the store by these.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import tempfile
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from conf.section import Mistake

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from conf.build import Mlflow

CHAMPION, CANDIDATE = "champion", "candidate"
DIGEST = "training_digest"  # a version's tag, by which a finished training is found again
TRAINING = "studbook.training"  # the run's tag with the same digest
COMPARISON = "studbook.comparison"  # the parent's tag with the comparison's name; `COMPARISON.name` is its arm on a run
ARM = "studbook.arm"
PARENT = "mlflow.parentRunId"
SQLITE = "sqlite:///"
STORE = ("mlflow.tracking_uri", "mlflow.experiment")  # the settings that say which store is meant


def quiet() -> None:
    """Before anything imports MLflow (DeepSpeed does): no telemetry, no information lines, and a failed call ends in half a minute.

    MLflow's own way is 7 retries over minutes; the user's environment wins over the figures here.
    """
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING"}
    os.environ |= {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
    for name, value in (("MAX_RETRIES", "1"), ("BACKOFF_FACTOR", "1"), ("BACKOFF_JITTER", "0"), ("TIMEOUT", "15")):
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a warning at each retry: the tracker says it once


def connect(settings: Mlflow) -> MlflowClient:
    """Settings -> client of their store. A new sqlite store is made on first use, in a folder that is made too."""
    from mlflow import MlflowClient

    if settings.tracking_uri.startswith(SQLITE):
        path = Path(settings.tracking_uri.removeprefix(SQLITE))
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _make_store(path)
    return MlflowClient(settings.tracking_uri, settings.tracking_uri)


def _make_store(path: Path) -> None:
    """A new sqlite store, all of it or nothing: one that a kill left in the middle of MLflow's migrations is never opened again."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.new-") as folder:
        fresh = Path(folder) / path.name
        MlflowClient(f"{SQLITE}{fresh}", f"{SQLITE}{fresh}").search_experiments(max_results=1)
        with suppress(FileExistsError):  # another process was first
            os.link(fresh, path)


def exists(settings: Mlflow) -> bool:
    """Whether there can be anything in the store: false only for a sqlite file that is not there yet."""
    uri = settings.tracking_uri
    return not uri.startswith(SQLITE) or Path(uri.removeprefix(SQLITE)).is_file()


def unreachable(client: MlflowClient) -> str:
    """-> "" when the store answers, else why not, in one line."""
    from mlflow.exceptions import MlflowException

    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        return one_line(error)
    return ""


def one_line(error: BaseException) -> str:
    """An error -> one line of 300 characters at most: its beginning, and its end, where MLflow names the cause."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-175:]}"


def find_experiment(client: MlflowClient, settings: Mlflow) -> str:
    """Id of the experiment; a new one keeps its files in settings.artifacts, or where the tracking server says."""
    found = client.get_experiment_by_name(settings.experiment)
    if found is not None:
        return str(found.experiment_id)
    place = settings.artifacts
    return client.create_experiment(settings.experiment, place if place is None or "://" in place else Path(place).resolve().as_uri())


def find_version(client: MlflowClient, model: str, digest: str) -> ModelVersion | None:
    """(registered name, training digest) -> its newest version that training made, if any."""
    found = client.search_model_versions(f"name = '{model}' and tags.{DIGEST} = '{digest}'")
    return max(found, key=lambda version: int(version.version), default=None)


def register(client: MlflowClient, model: str, run: str, folder: str, tags: dict[str, str]) -> str:
    """(name, run, folder of the run's artifacts that holds the model, tags) -> number of the version; one a training digest."""
    if known := find_version(client, model, tags[DIGEST]):
        return str(known.version)
    if not client.search_registered_models(f"name = '{model}'"):
        client.create_registered_model(model)
    source = f"{client.get_run(run).info.artifact_uri}/{folder}"
    return str(client.create_model_version(model, source, run_id=run, tags=tags).version)


def settle_alias(client: MlflowClient, model: str, version: str) -> str:
    """Version -> the alias it holds now: champion when the name has none, candidate when it is newer than champion and candidate.

    Empty when others hold both. A candidate becomes champion by training.promote.
    """
    aliases = find_aliases(client, model)
    if CHAMPION not in aliases:
        client.set_registered_model_alias(model, CHAMPION, version)
        return CHAMPION
    if int(version) > max(aliases[CHAMPION], aliases.get(CANDIDATE, 0)):
        client.set_registered_model_alias(model, CANDIDATE, version)
        return CANDIDATE
    return next((alias for alias in (CHAMPION, CANDIDATE) if aliases.get(alias) == int(version)), "")


def find_aliases(client: MlflowClient, model: str) -> dict[str, int]:
    """Registered name -> alias -> version. Raises Mistake when there is no such model."""
    if not client.search_registered_models(f"name = '{model}'"):
        raise Mistake(f"model: given {model!r}, which is not registered; `mlflow` lists what is, or train it first")
    return {alias: int(version) for alias, version in client.get_registered_model(model).aliases.items()}


def promotion_command(model: str, version: str) -> str:
    """The shell command that makes a version the champion if it is better, with the config that this command was given."""
    given = [*sys.argv, "--config", "FILE"]
    chosen = [value for flag, value in pairwise(given) if flag == "--set" and value.partition("=")[0] in STORE]
    line = ["python", "-m", "training.promote", model, version, "--config", given[given.index("--config") + 1]]
    return shlex.join([*line, *(part for value in chosen for part in ("--set", value))])


def join(client: MlflowClient, settings: Mlflow, run: str) -> None:
    """Make a run an arm of the comparison that the settings name, if they do. A run has one parent: that of its first comparison."""
    if settings.comparison is None or settings.arm is None:
        return
    tags = client.get_run(run).data.tags
    wanted = {f"{COMPARISON}.{settings.comparison}": settings.arm, ARM: tags.get(ARM, settings.arm)}
    if PARENT not in tags:
        wanted[PARENT] = find_parent(client, settings, settings.comparison)
    for key, value in wanted.items():
        if tags.get(key) != value:
            client.set_tag(run, key, value)


def find_parent(client: MlflowClient, settings: Mlflow, comparison: str) -> str:
    """Comparison -> id of its parent run, made if there is none. It has no training of its own and so is finished from the start."""
    experiment = find_experiment(client, settings)
    found = client.search_runs([experiment], f"tags.`{COMPARISON}` = '{comparison}'", order_by=["attributes.start_time ASC"], max_results=1)
    if found:
        return str(found[0].info.run_id)
    run = str(client.create_run(experiment, run_name=comparison, tags={COMPARISON: comparison}).info.run_id)
    client.set_terminated(run)
    return run
