"""A training run and its model -> MLflow: run, dataset inputs, metrics, artifacts, a registered version and its alias.

The registered version is the record: its tag `training_digest` says which settings, export and code made it, and a
training with that digest is not done again. It is created in one call, after all its files, so a kill leaves either a
complete version or a run that nothing points to. The alias comes last and is settled again by every later start.
Needs no Spark: table versions enter as Delta dataset sources by path and version.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.exports import Export

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from conf.settings import Mlflow

CHAMPION, CANDIDATE = "champion", "candidate"
DIGEST = "training_digest"  # the tag by which a finished training is found again
DIGEST_LENGTH = 36  # MLflow's limit for a dataset's digest; the whole sha256 is a tag of run and version
SQLITE = "sqlite:///"


def quiet() -> None:
    """Before anything imports MLflow (DeepSpeed does): no telemetry, no migration logs, no information lines."""
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING"}
    logging.getLogger("alembic").setLevel(logging.WARNING)


def connect(settings: Mlflow) -> MlflowClient:
    """Settings -> client of their store. A new sqlite store is made on first use, in a folder that is made too."""
    from mlflow import MlflowClient

    if settings.tracking_uri.startswith(SQLITE):
        Path(settings.tracking_uri.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(settings.tracking_uri, settings.tracking_uri)


def exists(settings: Mlflow) -> bool:
    """Whether there can be anything in the store: false only for a sqlite file that is not there yet."""
    uri = settings.tracking_uri
    return not uri.startswith(SQLITE) or Path(uri.removeprefix(SQLITE)).is_file()


def find_version(client: MlflowClient, model: str, digest: str) -> ModelVersion | None:
    """(registered name, training digest) -> its newest version that training made, if any."""
    found = client.search_model_versions(f"name = '{model}' and tags.{DIGEST} = '{digest}'")
    return max(found, key=lambda version: int(version.version), default=None)


def settle_alias(client: MlflowClient, model: str, version: str) -> str:
    """Version -> the alias it holds now: champion when the name has none, candidate when it is newer than champion and candidate.

    Empty when others hold both. Promotion of a candidate is a person's decision.
    """
    aliases = {alias: int(held) for alias, held in client.get_registered_model(model).aliases.items()}
    if CHAMPION not in aliases:
        client.set_registered_model_alias(model, CHAMPION, version)
        return CHAMPION
    if int(version) > max(aliases[CHAMPION], aliases.get(CANDIDATE, 0)):
        client.set_registered_model_alias(model, CANDIDATE, version)
        return CANDIDATE
    return next((alias for alias in (CHAMPION, CANDIDATE) if aliases.get(alias) == int(version)), "")


@contextmanager
def open_run(client: MlflowClient, settings: Mlflow, name: str, params: Mapping[str, Any], export: Export) -> Iterator[str]:
    """-> id of a new run with parameters and dataset inputs; it ends FINISHED, or FAILED when the block raises."""
    from mlflow.entities import Param

    run = client.create_run(_experiment(client, settings), run_name=name, tags={"manifest_sha256": export.sha256}).info.run_id
    try:
        client.log_batch(run, params=[Param(key, str(value)) for key, value in params.items()])
        _log_inputs(client, run, export)
        yield run
    except BaseException:
        client.set_terminated(run, "FAILED")
        raise
    client.set_terminated(run, "FINISHED")


def log_metrics(client: MlflowClient, run: str, epochs: Sequence[Mapping[str, float]]) -> None:
    """(run, name -> value of each epoch) -> the run's metrics, step = epoch."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, step) for step, epoch in enumerate(epochs, 1) for name, value in epoch.items()]
    for start in range(0, len(metrics), 1000):  # MLflow's limit for one batch
        client.log_batch(run, metrics=metrics[start : start + 1000])


def register(client: MlflowClient, model: str, run: str, folder: str, tags: Mapping[str, str]) -> str:
    """(name, run, folder of the run's artifacts that holds the model, tags) -> number of the new version."""
    if not client.search_registered_models(f"name = '{model}'"):
        client.create_registered_model(model)
    source = f"{client.get_run(run).info.artifact_uri}/{folder}"
    return str(client.create_model_version(model, source, run_id=run, tags=dict(tags)).version)


def promotion_command(settings: Mlflow, model: str, version: str) -> str:
    """The shell command that makes a version the champion."""
    call = f"MlflowClient('{settings.tracking_uri}').set_registered_model_alias('{model}', '{CHAMPION}', '{version}')"
    return f'python -c "from mlflow import MlflowClient; {call}"'


def _experiment(client: MlflowClient, settings: Mlflow) -> str:
    """Id of the experiment; a new one keeps its files in settings.artifacts, or where the tracking server says."""
    found = client.get_experiment_by_name(settings.experiment)
    if found is not None:
        return str(found.experiment_id)
    place = settings.artifacts
    return client.create_experiment(settings.experiment, place if place is None or "://" in place else Path(place).resolve().as_uri())


def _log_inputs(client: MlflowClient, run: str, export: Export) -> None:
    """One dataset a source table: its path, its version and the manifest's sha256, cut to what MLflow takes, as the digest."""
    from mlflow.data.delta_dataset_source import DeltaDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    manifest, inputs = export.manifest, []
    for table, version in manifest.made_from.items():
        source = DeltaDatasetSource(path=f"{manifest.lake}/{table}", delta_table_version=version)
        name = f"{manifest.kind}-{manifest.export}:{table}"
        dataset = MetaDataset(source, name=name, digest=export.sha256[:DIGEST_LENGTH])  # type: ignore[abstract]
        inputs.append(DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "training")]))
    client.log_inputs(run, inputs)
