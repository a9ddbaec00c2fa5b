"""Events of a journal -> calls to MLflow. Each may be sent again after a kill and then changes nothing.

What a kill between MLflow's answer and our note of it could double is looked up first: the run by the journal's id, a
checkpoint's LoggedModel by run and name, a version by its training digest. MLflow itself drops a metric that is equal in
name, step, time and value, and overwrites files, params and tags by equal ones.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training import mlflow_store
from training.journal import Event

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric

    from conf.build import Mlflow

JOURNAL = "studbook.journal"  # the run's tag with the id of the journal that it is made from
METRICS, PARAMS = 1000, 100  # MLflow's limits for one call
SKIPPED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "ENDPOINT_NOT_FOUND")
TIMED = ("metrics", "samples")  # of the training, of the machine: several go in one call
MAY_BE_SKIPPED = (*TIMED, "checkpoint", "artifacts", "note", "join")  # without the others the record would be wrong


class Refused(Exception):
    """MLflow will never take this event: the message says why."""


class Events:
    """The receiving end of one journal; `facts` are read and completed: experiment, run, model, version, alias, refused."""

    def __init__(self, settings: Mlflow, facts: dict[str, str]) -> None:
        self._settings, self.facts = settings, facts
        self._client = mlflow_store.connect(settings)

    def send(self, events: Sequence[Event]) -> None:
        """One event, or several of metrics, in one go. Raises Refused for what can be left out, MLflow's error for the rest."""
        from mlflow.exceptions import MlflowException

        kind = events[0]["kind"]
        try:
            if kind in TIMED:
                self._metrics(events)
            else:
                getattr(self, f"_{kind}")(**{key: value for key, value in events[0].items() if key != "kind"})
        except MlflowException as error:
            if kind in MAY_BE_SKIPPED and error.error_code in SKIPPED:
                raise Refused(f"{kind}: {mlflow_store.one_line(error)}") from error
            raise

    def _open(self, time: int, journal: str, name: str, params: dict[str, str], tags: dict[str, str], inputs: list[dict[str, Any]]) -> None:
        from mlflow.entities import Param

        experiment = mlflow_store.find_experiment(self._client, self._settings)
        found = self._client.search_runs([experiment], f"tags.`{JOURNAL}` = '{journal}'", max_results=1)
        run = found[0] if found else self._client.create_run(experiment, time, {**tags, JOURNAL: journal}, name)
        self.facts |= {"experiment": experiment, "run": str(run.info.run_id)}
        for some in _cut([Param(key, value) for key, value in params.items()], PARAMS):
            self._client.log_batch(self.facts["run"], params=some)
        self._client.log_inputs(self.facts["run"], [_describe_input(**one) for one in inputs])

    def _resume(self, time: int) -> None:
        self._client.update_run(self.facts["run"], status="RUNNING")

    def _join(self, time: int, comparison: str, arm: str) -> None:
        settings = self._settings.model_copy(update={"comparison": comparison, "arm": arm})
        mlflow_store.join(self._client, settings, self.facts["run"])

    def _note(self, time: int, key: str, value: str) -> None:
        self._client.set_tag(self.facts["run"], key, value)

    def _metrics(self, events: Iterable[Event]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(key, value, event["time"], event["step"]) for event in events for key, value in event["values"].items()]
        for some in _cut(metrics, METRICS):
            self._client.log_batch(self.facts["run"], metrics=some)

    def _checkpoint(
        self, time: int, step: int, path: str, state: str, values: dict[str, tuple[float, int]], dataset: tuple[str, str] | None
    ) -> None:
        """A LoggedModel with the checkpoint's state.json; `values` name -> value and the time at which the run's own metric has it."""
        from mlflow.entities import LoggedModelOutput, Metric

        run, name = self.facts["run"], f"step-{step:08d}"
        found = self._client.search_logged_models([self.facts["experiment"]], f"name = '{name}' AND source_run_id = '{run}'")
        params = {"path": path, "step": str(step)}
        model = found[0] if found else self._client.create_logged_model(self.facts["experiment"], name, run, params=params)
        if not found or str(model.status) != "READY":
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "state.json").write_text(state)
                self._client.log_model_artifacts(model.model_id, folder)
            self._client.finalize_logged_model(model.model_id, "READY")
        outputs = self._client.get_run(run).outputs
        if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
            self._client.log_outputs(run, [LoggedModelOutput(model.model_id, step)])
        data = {"dataset_name": dataset[0], "dataset_digest": dataset[1]} if dataset else {}
        metrics: list[Metric] = [Metric(key, value, at, step, model.model_id, **data) for key, (value, at) in values.items()]
        for some in _cut(metrics, METRICS):
            self._client.log_batch(run, metrics=some)

    def _artifacts(self, time: int, path: str) -> None:
        if Path(path).is_dir():
            self._client.log_artifacts(self.facts["run"], path)
        elif Path(path).is_file():
            self._client.log_artifact(self.facts["run"], path)
        else:
            raise Refused(f"artifacts: {path} is not there any more")

    def _register(self, time: int, model: str, folder: str, tags: dict[str, str]) -> None:
        version = mlflow_store.register(self._client, model, self.facts["run"], folder, tags)
        alias = mlflow_store.settle_alias(self._client, model, version)
        self.facts |= {"model": model, "version": version, "alias": alias}

    def _close(self, time: int, status: str) -> None:
        self._client.set_terminated(self.facts["run"], status, time)


def _describe_input(name: str, digest: str, context: str, path: str, version: int | None) -> DatasetInput:
    """A table at a version, or (None) the export itself, as an input of a run."""
    from mlflow.data.delta_dataset_source import DeltaDatasetSource
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if version is None:
        kind, source = "studbook_export", json.dumps({"path": path})
    else:
        kind, source = "delta_table", DeltaDatasetSource(path=path, delta_table_version=version).to_json()
    return DatasetInput(Dataset(name, digest, kind, source), [InputTag("mlflow.data.context", context)])


def _cut(things: list[Any], size: int) -> Iterable[list[Any]]:
    return (things[start : start + size] for start in range(0, len(things), size))
