"""MLflow's artifacts and tags -> the same without traces of forgotten images.

Of every run of the experiment: rows of parquet artifacts go, traces in texts and tags are overwritten, pictures in folders of sheets (which
show images) are deleted. A store that does not answer is an error: what it holds would stay.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.section import Mistake
from conf.settings import Settings
from jobs import registry, style_sheets
from udfs import traces as kernel
from udfs.traces import Traces

if TYPE_CHECKING:
    from mlflow.entities import Run

PAGE = 500


def reachable(settings: Settings) -> bool:
    """Whether there is a store. Raises Mistake when there is one that does not answer."""
    uri = settings.mlflow.tracking_uri
    if uri.startswith(registry.SQLITE) and not Path(uri.removeprefix(registry.SQLITE)).is_file():
        return False
    if silent := registry.silence(settings.mlflow):
        raise Mistake(f"forget: {silent}; what its artifacts hold could not be removed, run again when it answers")
    return True


def clean(settings: Settings, traces: Traces, plan_only: bool) -> list[str]:
    """-> `run: artifact or tag` of what holds a trace; changed, or deleted, when this is no plan."""
    client, found = registry.connect(settings.mlflow), []
    for run in _runs(client, settings.mlflow.experiment):
        for path in _artifacts(client, run.info.run_id):
            if _clean_artifact(run, path, traces, plan_only):
                found.append(f"{run.info.run_id}: {path}")
        found += _clean_tags(client, run, traces, plan_only)
    if found and not plan_only and settings.mlflow.tracking_uri.startswith(registry.SQLITE):
        with sqlite3.connect(settings.mlflow.tracking_uri.removeprefix(registry.SQLITE)) as store:
            store.execute("VACUUM")  # an overwritten text stays in the file's free pages
        store.close()
    return found


def _runs(client: Any, experiment: str) -> Iterator[Run]:
    known = client.get_experiment_by_name(experiment)
    token = None
    while known is not None:
        page = client.search_runs([known.experiment_id], run_view_type=3, max_results=PAGE, page_token=token)  # 3: deleted ones too
        yield from page
        if not (token := page.token):
            return


def _artifacts(client: Any, run: str, folder: str | None = None) -> Iterator[str]:
    for one in client.list_artifacts(run, folder):
        if one.is_dir:
            yield from _artifacts(client, run, one.path)
        else:
            yield one.path


def _clean_artifact(run: Run, path: str, traces: Traces, plan_only: bool) -> bool:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    store = get_artifact_repository(run.info.artifact_uri)
    if style_sheets.FOLDER in path.split("/")[:-1]:
        if not plan_only:
            store.delete_artifacts(path)
        return True
    if not path.endswith((".parquet", *kernel.TEXTS)):
        return False
    with tempfile.TemporaryDirectory() as folder:
        file = Path(store.download_artifacts(path, folder))
        change = kernel.without if path.endswith(".parquet") else kernel.blanked
        changed = change(file.read_bytes(), traces)
        if changed is not None and not plan_only:
            file.write_bytes(changed)
            store.log_artifact(str(file), path.rpartition("/")[0] or None)
    return changed is not None


def _clean_tags(client: Any, run: Run, traces: Traces, plan_only: bool) -> list[str]:
    found = []
    for key, value in run.data.tags.items():
        changed = kernel.blanked(value.encode(), traces)
        if changed is not None:
            found.append(f"{run.info.run_id}: tag {key}")
            if not plan_only:
                client.set_tag(run.info.run_id, key, changed.decode(errors="replace"))
    return found
