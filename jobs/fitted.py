"""What a job fits (centres, bins) -> one MLflow run and one registered version that holds its files; and back, checked by sha256.

As in training: the registered version is the record. Its tag `digest` says what it was made from, and what has a digest is not
made again. It comes after all its files, the alias comes last, and `find` settles an alias that a kill left out.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from conf.build import Mlflow
from conf.section import Mistake
from jobs import registry, runs

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CANDIDATE = "champion", "candidate"
FOLDER = "fitted"  # of the run's artifacts: the version's source


class Fitted(NamedTuple):
    """One registered version. sha256: `hash_of` its files. run: the id of the run that made it."""

    model: str
    version: str
    sha256: str
    tags: dict[str, str]
    files: dict[str, bytes]
    run: str

    @property
    def name(self) -> str:
        """How tables and messages name it."""
        return f"{self.model}:{self.version}"


def register(
    settings: Mlflow,
    model: str,
    files: Mapping[str, bytes],
    digest: str,
    params: Mapping[str, object],
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    plots: Mapping[str, bytes] | None = None,
    alias: str | None = None,
) -> Fitted:
    """Files of one fit -> a run and a registered version whose source holds them; `plots` (path -> bytes) are artifacts of the run alone.

    alias: of the version; None: champion when the model has none, else candidate.
    """
    client = runs.connect(settings)
    run = runs.open_run(client, settings, model, digest)
    runs.record(client, run, params, metrics)
    runs.put(client, run, {f"{FOLDER}/{name}": data for name, data in files.items()} | dict(plots or {}))
    if not client.search_registered_models(f"name = '{model}'"):
        client.create_registered_model(model)
    told = {**tags, "digest": digest, "sha256": hash_of(files)}
    source = f"{client.get_run(run).info.artifact_uri}/{FOLDER}"
    version = client.create_model_version(model, source, run_id=run, tags=told)
    settle(settings, model, str(version.version), alias)
    client.set_terminated(run)
    return Fitted(model, str(version.version), told["sha256"], told, dict(files), run)


def find(settings: Mlflow, model: str, digest: str) -> Fitted | None:
    """(registered name, digest) -> its newest version, None when it is still to be made (or there is no store yet)."""
    uri = settings.tracking_uri
    if uri.startswith(registry.SQLITE) and not Path(uri.removeprefix(registry.SQLITE)).is_file():
        return None
    client = registry.connect(settings)
    found = client.search_model_versions(f"name = '{model}' and tags.digest = '{digest}'")
    if not found:
        return None
    newest = max(found, key=lambda one: int(one.version))
    aliases = registry.aliases(client, model)
    newest_of_all = max(int(one.version) for one in client.search_model_versions(f"name = '{model}'"))
    left_out = int(newest.version) == newest_of_all and str(newest.version) not in aliases.values()
    if CHAMPION not in aliases or left_out:
        settle(settings, model, str(newest.version))
    return _read(newest)


def latest(settings: Mlflow, model: str, alias: str) -> dict[str, str] | None:
    """-> tags of the version that holds the alias (or is of that number), without its files; None when there is none."""
    from mlflow.exceptions import MlflowException

    if registry.silence(settings):
        return None
    try:
        return dict(_version(settings, model, alias).tags)
    except MlflowException as error:
        if error.error_code not in registry.ABSENT:
            raise
        return None


def load(settings: Mlflow, model: str, alias_or_version: str) -> Fitted:
    """(registered name, alias or number) -> the version, its files checked. Raises Mistake when there is none or a file is another."""
    from mlflow.exceptions import MlflowException

    if why := registry.silence(settings):
        raise Mistake(f"no version of {model!r}: {why}; fit one first")
    client = registry.connect(settings)
    try:
        return _read(_version(settings, model, alias_or_version))
    except MlflowException as error:
        if error.error_code not in registry.ABSENT:
            raise
    known = sorted(int(one.version) for one in client.search_model_versions(f"name = '{model}'"))
    raise Mistake(
        f"model {model!r} in {settings.tracking_uri} has no version or alias {alias_or_version!r}; "
        + (f"it has the versions {known}: python -m jobs.promote_fitted {model} VERSION" if known else "fit one first")
    )


def settle(settings: Mlflow, model: str, version: str, alias: str | None = None) -> str:
    """Gives the version the alias (None: champion when the model has none, else candidate) -> the alias. A champion is no candidate."""
    client = registry.connect(settings)
    aliases = registry.aliases(client, model)
    alias = alias or (CANDIDATE if CHAMPION in aliases else CHAMPION)
    if aliases.get(alias) != version:
        client.set_registered_model_alias(model, alias, version)
    if alias == CHAMPION and aliases.get(CANDIDATE) == version:
        client.delete_registered_model_alias(model, CANDIDATE)
    return alias


def standing(settings: Mlflow, made: Fitted) -> str:
    """-> in words, whether the version is the champion, and how it becomes it."""
    champion = held(settings, made.model)[CHAMPION]
    if champion == made.version:
        return f"{made.name} is the champion"
    return f"{made.name} is a {CANDIDATE} beside {made.model}:{champion}: python -m jobs.promote_fitted {made.model} {made.version}"


def held(settings: Mlflow, model: str) -> dict[str, str]:
    """-> the aliases of a model that is there: alias -> version."""
    return registry.aliases(registry.connect(settings), model)


def replace_artifacts(settings: Mlflow, run: str, folder: str, files: Mapping[str, bytes]) -> None:
    """Files (name -> bytes) -> the run's artifacts in `folder`, instead of what lay there. The version's own files are not touched."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    assert folder != FOLDER
    client = registry.connect(settings)
    if any(one.path == folder for one in client.list_artifacts(run)):
        get_artifact_repository(f"{client.get_run(run).info.artifact_uri}/{folder}").delete_artifacts()
    if files:
        runs.put(client, run, {f"{folder}/{name}": data for name, data in files.items()})


def hash_of(files: Mapping[str, bytes]) -> str:
    """Files -> the sha256 of the only one, or, of several, of the lines `sha256 name`, sorted by name."""
    if len(files) == 1:
        return hashlib.sha256(*files.values()).hexdigest()
    lines = [f"{hashlib.sha256(files[name]).hexdigest()} {name}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _version(settings: Mlflow, model: str, alias_or_version: str) -> ModelVersion:
    client = registry.connect(settings)
    if alias_or_version.isdecimal():
        return client.get_model_version(model, alias_or_version)
    return client.get_model_version_by_alias(model, alias_or_version)


def _read(version: ModelVersion) -> Fitted:
    named = f"model {version.name!r} version {version.version}"
    if version.source is None or not {"digest", "sha256"} <= set(version.tags):
        raise Mistake(f"{named} was not fitted by a job (it lacks the tags digest and sha256); give the section another model's name")
    sha256 = version.tags["sha256"]
    files = _files(version.source, sha256, named)
    return Fitted(version.name, str(version.version), sha256, dict(version.tags), dict(files), version.run_id or "")


@lru_cache(maxsize=8)
def _files(source: str, sha256: str, named: str) -> dict[str, bytes]:
    """A version's files, checked. They never change, and several stages of one session ask for them."""
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        root = Path(mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=folder))
        files = {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    if (found := hash_of(files)) != sha256:
        raise Mistake(f"{named}: its files {sorted(files)} have sha256 {found}, registered was {sha256}; fit it anew")
    return files
