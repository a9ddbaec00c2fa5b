"""A trainer's parts -> its command: what every trainer does around the one loop.

Opens the export, says what is pending, starts the ranks, goes on from a checkpoint, writes the result, and has the record delivered: run, files,
registered version, alias. A training is known by its digest (export, settings that say what is trained, code versions): its folder under
`training.root` and the registered version carry it, and a start that finds it done ends. Killed anywhere, the same command goes on.

Exit status: 0 done, 2 the user's mistake, 3 another rank was lost, 4 trained but not delivered (the same command, or training.deliver, does it).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from argparse import SUPPRESS
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

from conf.settings import Loop, Mistake, Settings, command_line
from training import checkpoint, engine, feed, loop, row_losses, tracker
from training.exports import Export

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
        """What is trained, on what, by which code; nothing of how it is run (conf.settings.RUN_ONLY)."""

    def tell_plan(self, settings: Settings, export: Export) -> None:
        """Prints what is pending."""

    def make_task(self, settings: Settings, export: Export, ranks: engine.Ranks) -> loop.Task:
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
        if not engine.lost(error):
            raise
        status = LOST
        print(
            f"{trainer.NAME}: another rank is gone ({str(error).splitlines()[0]}); start again: it goes on from the last checkpoint",
            flush=True,
        )
    engine.leave(status)
    if status:
        raise SystemExit(status)


def run(trainer: Trainer, settings: Settings, place: str, plan: bool) -> int:
    """-> exit status."""
    export = trainer.open_rows(settings, place)
    wanted: Loop = getattr(settings, trainer.SECTION)
    digest = trainer.training_digest(settings, export)
    folder = Path(settings.training.root).absolute() / f"{wanted.model}-{digest}"
    say = _Say(trainer.NAME)
    if engine.launched():
        signal.signal(signal.SIGTERM, lambda *_: _terminated(say, folder))
    else:
        status = finished(trainer, settings, export, folder, say, plan)
        if status is not None:
            return status
        if wanted.ranks > 1:
            return _launch(trainer, wanted.ranks, folder, say)
    ranks = engine.start(wanted.device, settings.training.patience_seconds)
    if ranks.world != wanted.ranks:
        raise Mistake(f"{trainer.SECTION}.ranks: given {wanted.ranks}, but the launcher started {ranks.world} ranks")
    if engine.launched():  # by a launcher that starts them again, too: a barrier of Spark
        done = finished(trainer, settings, export, folder, say, plan) if ranks.rank == 0 else None
        (status, *_) = engine.collect(done)
        if status is not None:
            return int(status)
    return train(trainer, settings, export, folder, ranks)


def finished(trainer: Trainer, settings: Settings, export: Export, folder: Path, say: _Say, plan: bool) -> int | None:
    """Says how the training stands -> exit status when there is nothing to train (or this is a plan), else None."""
    wanted: Loop = getattr(settings, trainer.SECTION)
    digest, version, alias, silent = trainer.training_digest(settings, export), None, "", ""
    if tracker.exists(settings.mlflow):
        client = tracker.connect(settings.mlflow)
        if silent := tracker.unreachable(client):
            say(f"{settings.mlflow.tracking_uri} does not answer ({silent}); whether this was trained before is known by {folder} alone")
        else:
            version = tracker.find_version(client, wanted.model, digest)
            if version is not None and version.run_id and not plan:
                tracker.join(client, settings.mlflow, version.run_id)
                alias = tracker.settle_alias(client, wanted.model, version.version)
    closed = (folder / FINISHED).is_file()
    if version is not None and (closed or not folder.is_dir()):  # else a kill came between its registration and its end
        say(f"nothing to do, version {version.version} was made from this export" + (f" ({alias})" if alias else ""))
        return 0
    if plan:
        trainer.tell_plan(settings, export)
        found = checkpoint.latest(folder, wanted)
        say(f"pending: goes on after step {found.state.step}" if found else "pending: starts from its first row")
        return 0
    if closed:
        if silent:
            say("nothing to train; its record is not delivered yet: start again when MLflow answers")
            return UNDELIVERED
        say("trained, but not registered there: its record is delivered anew")
        tracker.forget_delivery(folder)
        return _settle(trainer, settings, folder, tracker.Record(folder, settings.mlflow).settle(), say)
    return None


def train(trainer: Trainer, settings: Settings, export: Export, folder: Path, ranks: engine.Ranks) -> int:
    """The loop on every rank; the record and the result on rank 0."""
    wanted: Loop = getattr(settings, trainer.SECTION)
    task, say = trainer.make_task(settings, export, ranks), _Say(trainer.NAME)
    if ranks.rank > 0:
        loop.run(task, wanted, folder, ranks, None)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    digest = trainer.training_digest(settings, export)
    _describe(trainer, settings, export, folder, digest)
    record = tracker.Record(folder, settings.mlflow)
    params = wanted.model_dump() | {"export": export.manifest.export, "manifest_sha256": export.sha256}
    record.open(f"{trainer.NAME} {export.manifest.export}", params, export, {tracker.TRAINING: digest})
    try:
        outcome = loop.run(task, wanted, folder, ranks, record)
        tags = _write_result(trainer, settings, export, folder, task, outcome)
    except BaseException as error:
        record.note("ended_by", f"{type(error).__name__}: {error}"[:500])
        record.close("FAILED")
        raise
    record.artifacts(folder / RESULT)
    record.register(wanted.model, trainer.FOLDER, tags)
    state = outcome.state
    about: dict[str, Any] = {
        "digest": digest,
        "model": wanted.model,
        "steps": state.step,
        "epochs": state.epoch,
        "metrics": outcome.metrics,
    }
    about |= {"rows_seen": state.epoch * task.plan.rows + state.start, "export": export.manifest.export, "manifest_sha256": export.sha256}
    _write(folder / FINISHED, json.dumps(about | {"files": row_losses.digests(folder)}, indent=1))
    delivery = record.close("FINISHED")
    return _settle(trainer, settings, folder, delivery, say)


def _write_result(
    trainer: Trainer, settings: Settings, export: Export, folder: Path, task: Any, outcome: loop.Outcome
) -> Mapping[str, str]:
    """What every trainer's result has, and the trainer's own; a folder that is there is of a start that was killed."""
    result = folder / RESULT
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    (result / "manifest.json").write_bytes(export.text)
    (result / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    return trainer.write_result(result, settings, export, task, outcome)


def _describe(trainer: Trainer, settings: Settings, export: Export, folder: Path, digest: str) -> None:
    if not (folder / ABOUT).exists():
        wanted: Loop = getattr(settings, trainer.SECTION)
        manifest = export.manifest
        about: dict[str, Any] = {
            "model": wanted.model,
            "digest": digest,
            "trainer": trainer.MODULE,
            "export": manifest.export,
            "manifest_sha256": export.sha256,
        }
        about |= {"made_from": manifest.made_from, "settings": wanted.model_dump(mode="json")}
        _write(folder / ABOUT, json.dumps(about, indent=1))


def _settle(trainer: Trainer, settings: Settings, folder: Path, delivery: tracker.Delivery, say: _Say) -> int:
    """Says what became of the record -> exit status."""
    model = getattr(settings, trainer.SECTION).model
    if not delivery.delivered:
        say(f"trained, but {delivery.pending} events of its record are not in MLflow ({delivery.error}); nothing is lost: run again, or")
        say(f"    python -m training.deliver {folder} --config FILE")
        return UNDELIVERED
    say(f"registered {model} version {delivery.version}" + (f" as {delivery.alias}" if delivery.alias else ""))
    if delivery.alias == tracker.CANDIDATE:
        assert delivery.version is not None
        say(f"to make it the champion, if it is better: {tracker.promotion_command(settings.mlflow, model, delivery.version)}")
    return 0


def _launch(trainer: Trainer, ranks: int, folder: Path, say: _Say) -> int:
    status = engine.launch(trainer.MODULE, sys.argv[1:], ranks)
    if status not in (0, UNDELIVERED):
        raise Mistake(f"{trainer.NAME}: a rank ended early (status {status}); what it said stands above. {_where(folder)}")
    return status


def _where(folder: Path) -> str:
    there = checkpoint.complete(folder)
    return f"Run again: it goes on from {there[-1].name}" if there else "Run again: it starts anew, there was no checkpoint yet"


def _terminated(say: _Say, folder: Path) -> None:
    say(f"told to end (SIGTERM; a launcher does so when another rank is gone). {_where(folder)}")
    engine.leave(128 + signal.SIGTERM)


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


class _Say:
    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, line: str) -> None:
        print(f"{self._name}: {line}", flush=True)
