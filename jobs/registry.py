"""The model registry, as the jobs read it: which version is champion, and its weights; which versions a training made, and by which run."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from conf.build import Mlflow
from conf.section import Mistake
from udfs.score_bins import V7, Bins

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

# what training.tracker writes on a version and the jobs read
TAGS = ("sha256", "encoder_fingerprint", "evaluation", "beats_baselines", "export", "manifest_sha256", "made_from")

TRAINING = "training_digest"  # the tag that says which training made a version
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
SQLITE = "sqlite:///"
SYSTEM = "system/"  # how the machine did: no metrics of the model


class Head(NamedTuple):
    """One registered version of a head: `weights` are the safetensors bytes, checked against the registered sha256.

    bins: of a scorer, the rule that makes its raw scores bins.
    """

    model: str
    version: str
    sha256: str
    encoder_fingerprint: str
    tags: dict[str, str]
    weights: bytes
    bins: Bins = V7


def resolve(settings: Mlflow, model: str, alias: str, trainer: str = "training.train_scorer") -> Head:
    """Alias -> the version it stands for now. Raises Mistake when there is none or its file is not what was registered.

    trainer: the command that makes one, for the message.
    """
    from mlflow.exceptions import MlflowException

    try:
        version = connect(settings).get_model_version_by_alias(model, alias)
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        raise Mistake(
            f"no version of model {model!r} has the alias {alias!r} in {settings.tracking_uri}; "
            f"train one (python -m {trainer}) or set the alias in MLflow"
        ) from None
    wanting = [tag for tag in TAGS if tag not in version.tags]
    if wanting:
        raise Mistake(f"model {model!r} version {version.version} lacks the tags {wanting}; register heads by {trainer}")
    sha256 = version.tags["sha256"]
    weights = _weights(f"{version.source}/head.safetensors", sha256, f"model {model!r} version {version.version}")
    return Head(model, str(version.version), sha256, version.tags["encoder_fingerprint"], dict(version.tags), weights)


@lru_cache(maxsize=8)
def _weights(uri: str, sha256: str, named: str) -> bytes:
    """A version's file, checked. It never changes, and several stages of one session ask for it."""
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder)).read_bytes()
    if (found := hashlib.sha256(weights).hexdigest()) != sha256:
        raise Mistake(f"{named}: its file has sha256 {found}, registered was {sha256}; register it anew")
    return weights


class Version(NamedTuple):
    """A registered version as its record tells it; `aliases` it holds now."""

    model: str
    version: str
    aliases: tuple[str, ...]
    run: str
    tags: dict[str, str]

    def __str__(self) -> str:
        return f"{self.model} version {self.version}" + (f" ({', '.join(self.aliases)})" if self.aliases else "")


class Run(NamedTuple):
    """What a training run's record says of it: `status` FINISHED, FAILED, ...; `seconds`: None while it runs; metrics at its last step."""

    name: str
    status: str
    seconds: float | None
    metrics: dict[str, float]


def connect(settings: Mlflow) -> MlflowClient:
    """Settings -> a client of their store, that is quiet and gives up in half a minute."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name, value in (("MAX_RETRIES", "1"), ("BACKOFF_FACTOR", "1"), ("TIMEOUT", "15")):
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    mlflow.set_tracking_uri(settings.tracking_uri)
    return mlflow.MlflowClient()


def silence(settings: Mlflow) -> str:
    """-> why the store can tell nothing (no sqlite file yet, or no answer), in one line; empty when it answers."""
    uri = settings.tracking_uri
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        return f"there is no MLflow store at {uri} yet"
    from mlflow.exceptions import MlflowException

    try:
        connect(settings).search_experiments(max_results=1)
    except MlflowException as error:
        return f"MLflow at {uri} does not answer: {' '.join(str(error).split())[-200:]}"
    return ""


def made_by(settings: Mlflow, model: str, training: str) -> list[Version]:
    """(registered name, training digest) -> the versions that it made, the oldest first."""
    client = connect(settings)
    found = client.search_model_versions(f"name = '{model}' and tags.{TRAINING} = '{training}'")
    held = aliases(client, model) if found else {}
    return sorted((_version(one, held) for one in found), key=lambda one: int(one.version))


def find(settings: Mlflow, wanted: str) -> Version:
    """MODEL, MODEL@alias or MODEL/version -> the version; of a bare name the champion, else the newest. Raises Mistake when there is none."""
    from mlflow.exceptions import MlflowException

    client = connect(settings)
    name, at, alias = wanted.partition("@")
    if not at:
        name, _, number = wanted.partition("/")
    try:
        held = aliases(client, name)
        if at:
            return _version(client.get_model_version_by_alias(name, alias), held)
        numbers = [int(one.version) for one in client.search_model_versions(f"name = '{name}'")] if not number else []
        number = number or held.get("champion") or str(max(numbers, default=0))
        return _version(client.get_model_version(name, number), held)
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        known = ", ".join(sorted(model.name for model in client.search_registered_models())) or "none"
        raise Mistake(f"model: given {wanted!r}, which {settings.tracking_uri} has not (registered models: {known})") from None


def run_of(settings: Mlflow, version: Version) -> Run | None:
    """-> the run that made the version; None when it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = connect(settings).get_run(version.run)
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        return None
    seconds = (run.info.end_time - run.info.start_time) / 1000 if run.info.end_time else None
    metrics = {name: value for name, value in sorted(run.data.metrics.items()) if not name.startswith(SYSTEM)}
    return Run(run.info.run_name, run.info.status, seconds, metrics)


def aliases(client: MlflowClient, model: str) -> dict[str, str]:
    """-> alias -> version of a registered model."""
    return {alias: str(version) for alias, version in client.get_registered_model(model).aliases.items()}


def _version(found: ModelVersion, held: dict[str, str]) -> Version:
    aliases = tuple(sorted(alias for alias, version in held.items() if version == str(found.version)))
    return Version(found.name, str(found.version), aliases, found.run_id or "", dict(found.tags))
