"""What a job has to record -> one MLflow run of the experiment: parameters, metrics, files; found again by the digest of what it was made from."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from conf.build import Mlflow
from jobs import registry

if TYPE_CHECKING:
    from mlflow import MlflowClient

DIGEST = "studbook.fit"  # the run's tag with name and digest, by which a run that a kill left open is taken up again
PARAMS, METRICS = 100, 1000  # MLflow's limits for one call
LONGEST = 6000  # characters of a parameter


def connect(settings: Mlflow) -> MlflowClient:
    """A client of the store. A new sqlite store is made whole, beside its place: one that a kill left half migrated is never opened."""
    uri = settings.tracking_uri
    if not uri.startswith(registry.SQLITE) or (path := Path(uri.removeprefix(registry.SQLITE))).exists():
        return registry.connect(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.new-") as folder:
        fresh = Path(folder) / path.name
        registry.connect(settings.model_copy(update={"tracking_uri": f"{registry.SQLITE}{fresh}"})).search_experiments(max_results=1)
        with suppress(FileExistsError):  # another process was first
            os.link(fresh, path)
    return registry.connect(settings)


def open_run(client: MlflowClient, settings: Mlflow, name: str, digest: str, tags: Mapping[str, str] | None = None) -> str:
    """-> id of a run of the experiment, the one that a kill left open where there is one."""
    found = client.get_experiment_by_name(settings.experiment)
    if found is None:
        place = settings.artifacts
        place = place if place is None or "://" in place else Path(place).resolve().as_uri()
        experiment = client.create_experiment(settings.experiment, place)
    else:
        experiment = str(found.experiment_id)
    left = client.search_runs([experiment], f"tags.`{DIGEST}` = '{name}-{digest}' and attributes.status = 'RUNNING'", max_results=1)
    if left:
        return str(left[0].info.run_id)
    told = {DIGEST: f"{name}-{digest}", "mlflow.source.name": Path(sys.argv[0]).name, **(tags or {})}
    return str(client.create_run(experiment, run_name=f"{name} {digest}", tags=told).info.run_id)


def record(client: MlflowClient, run: str, params: Mapping[str, object], metrics: Mapping[str, float]) -> None:
    from mlflow.entities import Metric, Param

    at = client.get_run(run).info.start_time  # the same time again: MLflow keeps one point of a metric that is recorded twice
    known = set(client.get_run(run).data.params)
    texts = [Param(key, str(value)[:LONGEST]) for key, value in params.items() if key not in known]
    values = [Metric(key, float(value), at, 0) for key, value in metrics.items()]
    for start in range(0, len(texts), PARAMS):
        client.log_batch(run, params=texts[start : start + PARAMS])
    for start in range(0, len(values), METRICS):
        client.log_batch(run, metrics=values[start : start + METRICS])


def put(client: MlflowClient, run: str, files: Mapping[str, bytes]) -> None:
    """Path -> bytes, into the run's artifacts. One call for all: a call a file is slow with a tracking server."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        client.log_artifacts(run, folder)


def finished(settings: Mlflow, name: str, tag: str, value: str) -> str | None:
    """-> id of the newest finished run of this name whose tag has this value (tag DIGEST: `name-digest`); None: there is none, or no store."""
    if registry.silence(settings):
        return None
    client = registry.connect(settings)
    if (known := client.get_experiment_by_name(settings.experiment)) is None:
        return None
    wanted = f"tags.`{DIGEST}` LIKE '{name}-%' and tags.`{tag}` = '{value}' and attributes.status = 'FINISHED'"
    found = client.search_runs([known.experiment_id], wanted, max_results=1, order_by=["attributes.start_time DESC"])
    return str(found[0].info.run_id) if found else None


def files(settings: Mlflow, run: str) -> dict[str, bytes]:
    """-> a run's artifacts: path -> bytes."""
    import mlflow

    client = registry.connect(settings)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(mlflow.artifacts.download_artifacts(artifact_uri=client.get_run(run).info.artifact_uri, dst_path=folder))
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
