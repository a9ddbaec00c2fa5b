"""A training -> its record in MLflow: run, dataset inputs, metrics, checkpoints, artifacts, a registered version and its alias.

`Record` writes what happens into the training's journal and returns; a thread delivers the journal to MLflow. So a training
never waits for the server, and never ends because the server did: what is not delivered waits in the folder and is replayed
by the next start of the same training, or by `python -m training.deliver FOLDER`.

The registered version is the record: its tag `training_digest` says which settings, export and code made it, and a
training with that digest is not done again. It comes after all its files; the alias comes last and is settled again by
every later start. Needs no Spark: table versions enter as Delta dataset inputs by path and version.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from conf.build import Mlflow
from training import machine
from training.courier import Courier, say
from training.exports import Export
from training.journal import Event, Journal

# what a trainer needs of the store beside its record
from training.mlflow_store import CANDIDATE as CANDIDATE
from training.mlflow_store import CHAMPION as CHAMPION
from training.mlflow_store import DIGEST as DIGEST
from training.mlflow_store import TRAINING as TRAINING
from training.mlflow_store import connect as connect
from training.mlflow_store import exists as exists
from training.mlflow_store import find_version as find_version
from training.mlflow_store import join as join
from training.mlflow_store import promotion_command as promotion_command
from training.mlflow_store import quiet as quiet
from training.mlflow_store import settle_alias as settle_alias
from training.mlflow_store import unreachable as unreachable

DIGEST_LENGTH = 36  # MLflow's limit for a dataset's digest; the whole sha256 is a tag of run and version
LONGEST = {"params": 6000, "tags": 8000}  # MLflow's limits, in characters
CUT = " ... (cut)"


@dataclass(frozen=True)
class Delivery:
    """How a record stands in MLflow when its training has ended."""

    delivered: bool
    pending: int  # events that wait in the journal
    error: str  # why they wait, or which event MLflow refused; "" when all is there
    run: str | None
    version: str | None
    alias: str


class Record:
    """The record of one training, on rank 0: opened again after a restart it goes on in the same run.

    Raises Mistake when another process has it open. A step that was recorded before is ignored, for each metric by itself:
    a resumed training repeats steps with equal values. A NaN is recorded as such.
    """

    def __init__(self, folder: Path, settings: Mlflow) -> None:
        quiet()
        import mlflow  # noqa: F401  # by this thread, not by the courier's while another import of it runs

        self._folder, self._settings = folder, settings
        self._journal = Journal(folder)
        store = f"{settings.tracking_uri} {settings.experiment}"
        if self._journal.facts.get("store", store) != store:
            self._journal.rewind()  # the new store gets all of it
        self._journal.facts["store"] = store
        self._opened: Event | None = None
        self._last: dict[str, tuple[int, float, int]] = {}  # metric -> its highest step, the value and time there
        self._checkpoints: set[int] = set()
        self._samples = 0
        self._unwritable = self._closed = False
        for event in self._journal:
            self._learn(event)
        self._sampler = machine.Sampler(self._keep_sample)
        self._courier = Courier(self._journal, settings)
        if self._journal.pending:
            self._courier.wake()

    @property
    def step(self) -> int:
        """The highest step that has a metric, 0 when none."""
        return max((step for step, _, _ in self._last.values()), default=0)

    def open(self, name: str, params: Mapping[str, Any], export: Export, tags: Mapping[str, str]) -> None:
        """Begin the run, or go on with it: params that changed since (ranks, say) are then its tags `resumed.KEY`.

        `tags` hold studbook.training: the training's digest.
        """
        assert TRAINING in tags
        texts = {key: shorten(str(value), "params") for key, value in params.items()}
        if self._opened is None:
            all_tags = {"manifest_sha256": export.sha256, "mlflow.source.name": name, **machine.describe_source(), **tags}
            all_tags = {key: shorten(value, "tags") for key, value in all_tags.items()}
            self._append("open", journal=uuid.uuid4().hex, name=name, params=texts, tags=all_tags, inputs=_list_inputs(export))
        else:
            self._append("resume")
            for key, value in texts.items():
                if self._opened["params"].get(key) != value:
                    self.note(f"resumed.{key}", value)
        if self._settings.comparison is not None:
            self._append("join", comparison=self._settings.comparison, arm=self._settings.arm)
        self._keep_environment()
        self._sampler.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a step -> the run's metrics. Returns as soon as they are in the journal."""
        fresh = {key: float(value) for key, value in values.items() if key not in self._last or step > self._last[key][0]}
        if fresh:
            self._append("metrics", sync=False, step=step, values=fresh)

    def checkpoint(self, step: int, folder: Path, values: Mapping[str, float]) -> None:
        """A complete checkpoint -> a LoggedModel of the run: its state.json, where it lies, and the metrics it was found to have.

        It stays in MLflow when the folder is deleted by retention: its metrics are the history, its param `path` is then empty of files.
        """
        if step in self._checkpoints:
            return
        now, timed = _now(), {}
        for key, value in values.items():
            last = self._last.get(key)  # the run has the same value as its own metric: with the same time MLflow keeps one point
            timed[key] = (float(value), last[2] if last is not None and last[:2] == (step, float(value)) else now)
        assert self._opened is not None
        held_out = self._opened["inputs"][-1]
        dataset = (held_out["name"], held_out["digest"])
        self._append("checkpoint", step=step, path=str(folder), state=(folder / "state.json").read_text(), values=timed, dataset=dataset)

    def artifacts(self, folder: Path) -> None:
        """A folder's files (or one file) -> the run's artifacts. It has to stay until it is delivered."""
        self._append("artifacts", path=str(folder.resolve()))

    def register(self, model: str, artifact_folder: str, tags: Mapping[str, str]) -> None:
        """-> a version of the registered model, made of that folder of the run's artifacts, and its alias. `tags` hold training_digest."""
        assert DIGEST in tags
        self._append("register", model=model, folder=artifact_folder, tags=dict(tags))

    def note(self, key: str, value: str) -> None:
        """A tag of the run; a later one of the same key replaces it."""
        self._append("note", key=key, value=shorten(value, "tags"))

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> Delivery:
        """End the run, wait for the delivery (not for a server that does not answer), say how the record stands."""
        self._sampler.stop()
        if self._opened is not None:
            self._append("close", status=status)
        return self.settle()

    @property
    def closed(self) -> bool:
        """Whether its last start recorded the run's end."""
        return self._closed

    def settle(self) -> Delivery:
        """Deliver what is pending, without an end of the run -> how the record stands. Nothing can be recorded after that."""
        self._sampler.stop()
        error = self._courier.finish()
        pending, facts = self._journal.pending + self._journal.unwritten, self._journal.facts
        if self._courier.ended:
            self._journal.close()
        refused = f"MLflow refused {facts['refused']}" if "refused" in facts else ""
        return Delivery(pending == 0, pending, error or refused, facts.get("run"), facts.get("version"), facts.get("alias", ""))

    def _append(self, kind: str, sync: bool = True, **body: Any) -> None:
        event = {"kind": kind, "time": _now(), **body}
        self._learn(event)
        error = self._journal.append(event, sync)
        if error and not self._unwritable:
            say(f"{self._journal.path} cannot be written, events are kept in memory: {error}")
        self._unwritable = bool(error)
        self._courier.wake()

    def _learn(self, event: Event) -> None:
        kind = event["kind"]
        self._closed = kind == "close"
        if kind == "open":
            self._opened = event
        elif kind == "checkpoint":
            self._checkpoints.add(event["step"])
        elif kind == "samples":
            self._samples += 1
        elif kind == "metrics":
            self._last |= {key: (event["step"], value, event["time"]) for key, value in event["values"].items()}

    def _keep_sample(self, values: Mapping[str, float]) -> None:
        """A sample of the machine -> metrics `system/...`, numbered through all starts as MLflow's own are."""
        self._append("samples", sync=False, step=self._samples, values=dict(values))

    def _keep_environment(self) -> None:
        """environment.txt of this start -> an artifact; one more (environment-2.txt) when it is another than the last."""
        known = sorted(self._folder.glob("environment*.txt"), key=lambda path: (len(path.name), path.name))
        text = machine.describe_environment()
        if not known or known[-1].read_text() != text:
            path = self._folder / (f"environment-{len(known) + 1}.txt" if known else "environment.txt")
            path.write_text(text)
            self.artifacts(path)


def shorten(text: str, kind: str) -> str:
    """Text -> as much of it as MLflow takes for a param or a tag, with a mark when it was cut."""
    longest = LONGEST[kind]
    return text if len(text) <= longest else text[: longest - len(CUT)] + CUT


def _list_inputs(export: Export) -> list[dict[str, Any]]:
    """One dataset a source table, and last the export's held-out rows; the manifest's sha256, cut to what MLflow takes, is the digest."""
    manifest, digest = export.manifest, export.sha256[:DIGEST_LENGTH]
    name = f"{manifest.kind}-{manifest.export}"
    tables = [
        {"name": f"{name}:{table}", "digest": digest, "context": "training", "path": f"{manifest.lake}/{table}", "version": version}
        for table, version in manifest.made_from.items()
    ]
    return [*tables, {"name": f"{name}:held_out", "digest": digest, "context": "evaluation", "path": str(export.root), "version": None}]


def _now() -> int:
    return int(time.time() * 1000)


def left_open(folder: Path, run: str | None) -> bool:
    """Whether a run is made from this folder's record, and the end of that is not delivered."""
    facts, ended = Journal.look(folder)
    return run is not None and facts.get("run") == run and not ended


def all_delivered(folder: Path) -> bool:
    """Whether a training's record is in MLflow as a whole, its end too."""
    return Journal.look(folder)[1]


def forget_delivery(folder: Path) -> None:
    """The store has lost what was delivered (another store, a restored one): the next record of the folder delivers all of it again."""
    Journal.forget(folder)
