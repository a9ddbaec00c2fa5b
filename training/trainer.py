"""A trainer's parts -> its command: what every trainer does around the one loop.

Opens the export, says what is pending, starts the ranks, goes on from a checkpoint, writes the result, and has the record delivered: run, files,
registered version, alias. A training is known by its digest (export, settings that say what is trained, code versions): its folder under
`training.root` and the registered version carry it, and a start that finds it done ends. Killed anywhere, the same command goes on.

Exit status: 0 done, 2 the user's mistake, 3 another rank was lost, 4 trained but not delivered (the same command, or training.deliver, does it;
a rank under a launcher ends with 0 then: to a launcher any other status is a rank that failed).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from argparse import SUPPRESS
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from conf.loops import Loop
from conf.section import Mistake
from conf.settings import Settings, command_line
from training import checkpoint, engine, feed, loop, process_group, row_losses, tracker
from training.exports import Export
from training.task import Task

RESULT, FINISHED, ABOUT = "result", "finished.json", "training.json"
# what `deepspeed` and Spark's distributor add to a trainer's command line
LAUNCHERS: dict[str, dict[str, Any]] = {
    "--deepspeed": {"action": "store_true", "help": SUPPRESS},
    "--deepspeed_config": {"help": SUPPRESS},
    "--local_rank": {"help": SUPPRESS},
}
LOST, UNDELIVERED = 3, 4


class Trainer(Protocol):
    """What one trainer is made of; a module has these names at its top level."""

    NAME: str  # "train scorer": the start of its lines
    MODULE: str  # "training.train_scorer"
    SECTION: str  # of Settings: "train_scorer"
    FOLDER: str  # of the result that the registered version points to

    def open_rows(self, settings: Settings, place: str) -> Export:
        """The export, checked for this trainer."""

    def training_digest(self, settings: Settings, export: Export) -> str:
        """What is trained (Loop.identity), on what, by which code."""

    def tell_plan(self, settings: Settings, export: Export) -> None:
        """Prints what is pending."""

    def plan_rows(self, settings: Settings, export: Export, ranks: process_group.Ranks) -> feed.Plan:
        """The rows of the first epoch, of this rank."""

    def make_task(self, settings: Settings, export: Export, ranks: process_group.Ranks) -> Task:
        """On every rank."""

    def write_result(self, folder: Path, settings: Settings, export: Export, task: Any, outcome: loop.Outcome) -> Mapping[str, str]:
        """On rank 0: the files of the result, in an empty folder -> the registered version's tags."""


def main(trainer: Trainer, doc: str) -> None:
    settings, arguments = command_line(doc, {"export": "folder or uri of the export (it holds manifest.json)"}, LAUNCHERS)
    tracker.quiet()
    feed.quiet()
    status = 0
    try:
        if arguments.deepspeed_config:
            raise Mistake(
                f"--deepspeed_config: given {arguments.deepspeed_config}; ZeRO stage, precision and batch are the section {trainer.SECTION} of --config"
            )
        status = run(trainer, settings, arguments.export, arguments.plan)
    except Mistake as error:
        status = 2
        print(f"studbook: {error}", file=sys.stderr, flush=True)
    except RuntimeError as error:
        if not process_group.lost(error):
            raise
        status = LOST
        print(
            f"{trainer.NAME}: another rank is gone ({str(error).splitlines()[0]}); start again: it goes on from the last checkpoint",
            flush=True,
        )
    process_group.leave(status)
    if status:
        raise SystemExit(status)


@dataclass(frozen=True)
class Training:
    """One training, as its command knows it."""

    trainer: Trainer
    settings: Settings
    export: Export
    digest: str

    @property
    def wanted(self) -> Loop:
        section: Loop = getattr(self.settings, self.trainer.SECTION)
        return section

    @property
    def folder(self) -> Path:
        return Path(self.settings.training.root).absolute() / f"{self.wanted.model}-{self.digest}"

    @property
    def title(self) -> str:
        """The name of its run: one of a comparison is told by arm and seed."""
        arm = self.settings.mlflow.arm
        return f"{arm}, seed {self.wanted.seed}" if arm else f"{self.trainer.NAME}, seed {self.wanted.seed}, {self.digest}"

    def say(self, line: str) -> None:
        print(f"{self.trainer.NAME}: {line}", flush=True)


def run(trainer: Trainer, settings: Settings, place: str, plan: bool) -> int:
    """-> exit status."""
    export = trainer.open_rows(settings, place)
    if process_group.launched():
        return run_rank(trainer, settings, export)
    training = Training(trainer, settings, export, trainer.training_digest(settings, export))
    status = finished(training, plan)
    if status is not None:
        return status
    if training.wanted.ranks > 1:
        return _launch(training)
    return train(training, engine.start(training.wanted.device, settings.training.patience_seconds))


def run_rank(trainer: Trainer, settings: Settings, export: Export) -> int:
    """As one rank of a launcher -> exit status."""
    wanted: Loop = getattr(settings, trainer.SECTION)
    ranks = engine.start(wanted.device, settings.training.patience_seconds)
    if ranks.world != wanted.ranks:
        raise Mistake(f"{trainer.SECTION}.ranks: given {wanted.ranks}, but the launcher started {ranks.world} ranks")
    # by one rank: it may hash a whole pretrained model
    (digest, *_) = process_group.collect(trainer.training_digest(settings, export) if ranks.rank == 0 else None)
    training = Training(trainer, settings, export, digest)
    signal.signal(signal.SIGTERM, lambda *_: _terminated(training))
    # the launcher may start them again after their work is done, as jobs/train_distributed.py does
    (status, *_) = process_group.collect(finished(training, False) if ranks.rank == 0 else None)
    if status is None:
        status = train(training, ranks)
    return 0 if status == UNDELIVERED else int(status)


def finished(training: Training, plan: bool) -> int | None:
    """Says how the training stands -> exit status when there is nothing to train (or this is a plan), else None."""
    settings, wanted, folder, say = training.settings, training.wanted, training.folder, training.say
    version, alias, silent = None, "", ""
    if tracker.exists(settings.mlflow):
        client = tracker.connect(settings.mlflow)
        if silent := tracker.unreachable(client):
            say(f"{settings.mlflow.tracking_uri} does not answer ({silent}); whether this was trained before is known by {folder} alone")
        else:
            version = tracker.find_version(client, wanted.model, training.digest)
            if version is not None and version.run_id and not plan:
                tracker.join(client, settings.mlflow, version.run_id)
                alias = tracker.settle_alias(client, wanted.model, version.version)
    closed = (folder / FINISHED).is_file()
    left_open = version is not None and tracker.left_open(folder, version.run_id)  # a kill came between its registration and its end
    if version is not None and not left_open and (closed or not folder.is_dir()):
        say(f"nothing to do, version {version.version} was made from this export" + (f" ({alias})" if alias else ""))
        return 0
    if plan:
        training.trainer.tell_plan(settings, training.export)
        found = checkpoint.latest(folder, wanted)
        say(f"pending: goes on after step {found.state.step}" if found else "pending: starts from its first row")
        return 0
    if closed:
        if silent:
            say("nothing to train; its record is not delivered yet: start again when MLflow answers")
            return UNDELIVERED
        if version is None:
            say("trained, but not registered there: its record is delivered anew")
            tracker.forget_delivery(folder)
        record = tracker.Record(folder, settings.mlflow)
        return _settle(training, record.settle() if record.closed else record.close("FINISHED"))
    return None


def train(training: Training, ranks: process_group.Ranks) -> int:
    """The loop on every rank; the record and the result on rank 0."""
    settings, wanted, export, folder = training.settings, training.wanted, training.export, training.folder
    task = training.trainer.make_task(settings, export, ranks)
    if ranks.rank > 0:
        loop.run(task, wanted, folder, ranks, None)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    _describe(training)
    record = tracker.Record(folder, settings.mlflow)
    params = wanted.model_dump() | {"export": export.manifest.export, "manifest_sha256": export.sha256}
    training.say(f"training {training.digest}, in {folder}")
    record.open(training.title, params, export, {tracker.TRAINING: training.digest})
    try:
        outcome = loop.run(task, wanted, folder, ranks, record)
        tags = _write_result(training, task, outcome)
    except BaseException as error:
        record.note("last_failure", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {type(error).__name__}: {error}"[:500])
        record.close("FAILED")
        raise
    record.artifacts(folder / RESULT)
    record.register(wanted.model, training.trainer.FOLDER, tags)
    state = outcome.state
    about: dict[str, Any] = {"digest": training.digest, "model": wanted.model, "steps": state.step, "epochs": state.epoch}
    about |= {"rows_seen": state.epoch * task.plan.rows + state.start, "metrics": outcome.metrics, "export": export.manifest.export}
    about |= {"manifest_sha256": export.sha256, "files": row_losses.digests(folder)}
    _write(folder / FINISHED, json.dumps(about, indent=1))
    return _settle(training, record.close("FINISHED"))


def _write_result(training: Training, task: Any, outcome: loop.Outcome) -> Mapping[str, str]:
    """What every trainer's result has, and the trainer's own; a folder that is there is of a start that was killed."""
    result, settings = training.folder / RESULT, training.settings
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    (result / "manifest.json").write_bytes(training.export.text)
    (result / "config.yaml").write_text(yaml.safe_dump(describe_settings(training), sort_keys=False))
    return training.trainer.write_result(result, settings, training.export, task, outcome)


def describe_settings(training: Training) -> dict[str, Any]:
    """The settings that a training reads: a build's others may hold what is nobody's business (spark.conf takes any key of a store)."""
    read = {"limits", "training", "mlflow", training.trainer.SECTION}
    return training.settings.model_dump(mode="json", include=read)


def _describe(training: Training) -> None:
    if not (training.folder / ABOUT).exists():
        manifest = training.export.manifest
        about: dict[str, Any] = {"model": training.wanted.model, "digest": training.digest, "trainer": training.trainer.MODULE}
        about |= {"export": manifest.export, "manifest_sha256": training.export.sha256, "made_from": manifest.made_from}
        _write(training.folder / ABOUT, json.dumps(about | {"settings": training.wanted.model_dump(mode="json")}, indent=1))


def _settle(training: Training, delivery: tracker.Delivery) -> int:
    """Says what became of the record -> exit status."""
    model, say = training.wanted.model, training.say
    if not delivery.delivered:
        say(f"trained, but {delivery.pending} events of its record are not in MLflow ({delivery.error}); nothing is lost: run again, or")
        say(f"    python -m training.deliver {training.folder} --config FILE")
        return UNDELIVERED
    say(f"registered {model} version {delivery.version}" + (f" as {delivery.alias}" if delivery.alias else ""))
    if delivery.alias == tracker.CANDIDATE:
        assert delivery.version is not None
        say(f"to make it the champion, if it is better: {tracker.promotion_command(model, delivery.version)}")
    return 0


def _launch(training: Training) -> int:
    """Starts the ranks on this machine -> exit status."""
    status = process_group.launch(training.trainer.MODULE, sys.argv[1:], training.wanted.ranks)
    if status != 0:
        raise Mistake(
            f"{training.trainer.NAME}: a rank ended early; what it said stands above. If that is a mistake, mend it. {_where(training.folder)}"
        )
    return 0 if tracker.all_delivered(training.folder) else UNDELIVERED


def _where(folder: Path) -> str:
    there = checkpoint.complete(folder)
    return f"Run again: it goes on from {there[-1].name}" if there else "Run again: it starts anew, there was no checkpoint yet"


def _terminated(training: Training) -> None:
    training.say(f"told to end (SIGTERM; a launcher does so when another rank is gone). {_where(training.folder)}")
    process_group.leave(128 + signal.SIGTERM)


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)
