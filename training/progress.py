"""Where a training stands -> lines on the screen."""

from __future__ import annotations

import time

from conf.loops import Loop
from training.checkpoint import State


class Progress:
    """A line every `say_every` seconds and at the end: where it stands, rows a second, loss, time left."""

    def __init__(self, name: str, settings: Loop, steps: int, first: int) -> None:
        self._name, self._settings, self._steps, self._first = name, settings, steps, first
        self._began = self._said = time.monotonic()

    def __call__(self, step: int, state: State, rank: int) -> None:
        now = time.monotonic()
        if rank > 0 or (now - self._said < self._settings.say_every and step < self._steps):
            return
        self._said, spent = now, now - self._began
        rate = (step - self._first) / spent
        loss = f", loss {state.recent[-1]:.4f}" if state.recent else ""
        print(
            f"{self._name}: step {step}/{self._steps}, epoch {state.epoch + 1}/{self._settings.epochs}, "
            f"{rate * self._settings.rows_per_step:.0f} rows/s{loss}, {(self._steps - step) / rate:.0f} s left",
            flush=True,
        )
