"""A journal's events -> MLflow, in order, from a thread of its own: training never waits for the server and never fails with it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

from conf.build import Mlflow
from training.journal import Event, Journal
from training.mlflow_events import METRICS, TIMED, Events, Refused
from training.mlflow_store import one_line

LINGER = 1.0  # seconds between two deliveries, in which metrics gather to one call
LONGEST_PAUSE = 30.0  # seconds between two tries of a server that does not answer
LAST_TRIES, LAST_SECONDS = 2, 15.0  # when the training has ended and the server does not answer
PATIENCE = 300.0  # seconds without any event delivered after which the end of a training waits no longer


class Courier:
    """Delivers until `finish`; a failed delivery is tried again after 1, 2, 4, ... LONGEST_PAUSE seconds."""

    def __init__(self, journal: Journal, settings: Mlflow) -> None:
        self._journal, self._settings = journal, settings
        self._events: Events | None = None
        self._changed = threading.Condition()
        self._closing = 0.0  # when `finish` was called
        self._failures, self._last_failures = 0, 0
        self._error = ""
        self._refused: set[str] = set()  # kinds of events of which one was refused: said once
        self._thread = threading.Thread(target=self._work, name="mlflow-courier", daemon=True)

    def wake(self) -> None:
        """There is something to deliver."""
        with self._changed:
            if self._thread.ident is None:
                self._thread.start()
            self._changed.notify()

    def finish(self) -> str:
        """Wait until all is delivered or the server does not answer -> "" or why events are still pending. The thread has ended, or hangs."""
        with self._changed:
            self._closing = time.monotonic()
            self._changed.notify()
        seen, since = self._journal.sent, time.monotonic()
        while self._thread.is_alive() and time.monotonic() - since < PATIENCE:
            self._thread.join(0.2)
            if self._journal.sent != seen:
                seen, since = self._journal.sent, time.monotonic()
        if not self._journal.pending:
            return ""
        return self._error or ("no answer" if self._thread.is_alive() else "the delivery ended by an error, which stands above")

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def _work(self) -> None:
        while self._next():
            try:
                self._deliver()
            except _store_errors() as error:
                self._fail(one_line(error))

    def _next(self) -> bool:
        """Wait for something to deliver and for the pause before it; false when it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._journal.pending)
            pause = min(LONGEST_PAUSE, 2.0 ** (self._failures - 1)) if self._failures else LINGER
            self._changed.wait_for(lambda: self._closing, timeout=pause)
            if not self._closing or not self._last_failures:
                return not self._closing or self._journal.pending > 0
        time.sleep(LINGER)
        return self._last_failures < LAST_TRIES and time.monotonic() - self._closing < LAST_SECONDS

    def _deliver(self) -> None:
        if self._events is None:
            self._events = Events(self._settings, self._journal.facts)
        for events, end in _group(self._journal.read()):
            self._send(events)
            self._journal.mark(end, len(events))
            if self._error:
                say(f"{self._settings.tracking_uri} answers again, {self._journal.pending} events to deliver")
            self._failures, self._last_failures, self._error = 0, 0, ""

    def _send(self, events: list[Event]) -> None:
        assert self._events is not None
        try:
            self._events.send(events)
        except Refused as refused:
            if len(events) > 1:  # the others of the call are not to blame
                for event in events:
                    self._send([event])
                return
            self._journal.facts["refused"] = str(refused)
            if events[0]["kind"] not in self._refused:
                say(f"MLflow refused and does not have: {refused}")
            self._refused.add(events[0]["kind"])

    def _fail(self, error: str) -> None:
        if not self._error:
            say(f"{self._settings.tracking_uri} does not answer, training goes on and its record waits in {self._journal.path}: {error}")
        self._error = error
        self._failures += 1
        self._last_failures += 1 if self._closing else 0


def _group(found: list[tuple[Event, int]]) -> Iterator[tuple[list[Event], int]]:
    """Events with their ends -> what goes in one call, with its end: metrics up to MLflow's limit, any other event alone."""
    group: list[Event] = []
    last = 0
    for event, end in found:
        size = sum(len(one["values"]) for one in [*group, event]) if {one["kind"] for one in [*group, event]} <= set(TIMED) else METRICS + 1
        if group and size > METRICS:
            yield group, last
            group = []
        group.append(event)
        last = end
    if group:
        yield group, last


def _store_errors() -> tuple[type[Exception], ...]:
    """What MLflow and the libraries under it raise when a store, its database or its artifacts cannot be reached."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    errors: tuple[type[Exception], ...] = (MlflowException, RequestException, SQLAlchemyError, OSError)
    s3 = sys.modules.get("botocore.exceptions")  # imported by MLflow where the artifacts lie on S3
    return errors if s3 is None else (*errors, s3.BotoCoreError, s3.ClientError)


def say(line: str) -> None:
    print(f"mlflow: {line}", flush=True)
