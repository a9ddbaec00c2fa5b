"""The model registry, as the jobs read it: which version is champion, and its weights."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import NamedTuple

from conf.settings import Mistake, Mlflow

# what training.tracker writes on a version and the jobs read
TAGS = ("sha256", "encoder_fingerprint", "evaluation", "beats_baselines", "export", "manifest_sha256", "made_from")


class Head(NamedTuple):
    """One registered version of a head: `weights` are the safetensors bytes, checked against the registered sha256."""

    model: str
    version: str
    sha256: str
    encoder_fingerprint: str
    tags: dict[str, str]
    weights: bytes


def resolve(settings: Mlflow, model: str, alias: str) -> Head:
    """Alias -> the version it stands for now. Raises Mistake when there is none or its file is not what was registered."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    mlflow.set_tracking_uri(settings.tracking_uri)
    try:
        version = mlflow.MlflowClient().get_model_version_by_alias(model, alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise Mistake(
            f"no version of model {model!r} has the alias {alias!r} in {settings.tracking_uri}; "
            f"train one (python -m training.train_scorer) or set the alias in MLflow"
        ) from None
    wanting = [tag for tag in TAGS if tag not in version.tags]
    if wanting:
        raise Mistake(f"model {model!r} version {version.version} lacks the tags {wanting}; register heads by training.train_scorer")
    path = Path(mlflow.artifacts.download_artifacts(artifact_uri=f"{version.source}/head.safetensors"))
    weights = path.read_bytes()
    found = hashlib.sha256(weights).hexdigest()
    if found != version.tags["sha256"]:
        raise Mistake(
            f"model {model!r} version {version.version}: its file has sha256 {found}, registered was {version.tags['sha256']}; register it anew"
        )
    return Head(model, str(version.version), found, version.tags["encoder_fingerprint"], dict(version.tags), weights)
