"""A task of the embed stage that tells what it did: decodes, models loaded, images that went through each model. On a worker: importable."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd

from jobs import embedding
from udfs import decode, engine, model_runs


def on_worker(frames: Iterator[pd.DataFrame], log: str, **options: Any) -> Iterator[pd.DataFrame]:
    """embedding.on_worker with its functions wrapped: each call adds a line to the file `log`."""
    with ExitStack() as wrapped:
        Spy(log, wrapped).watch([*options["encoders"], *options["detectors"]])
        yield from embedding.on_worker(frames, **options)


class Spy:
    def __init__(self, log: str, wrapped: ExitStack) -> None:
        self._log, self._wrapped, self._model = log, wrapped, ""

    def watch(self, models: list[dict[str, Any]]) -> None:
        self._wrap(decode, "decoding", lambda *_: "decode 1")
        self._wrap(engine, "load", lambda _tower, encoder, _how: f"load:{encoder['name']} 1")
        for kind, run, call in (("tower", model_runs.encode, "encode"), ("detector", model_runs.detect, "detect")):
            self._wrapped.enter_context(patch.object(model_runs, run.__name__, self._named(run)))
            for kernel in {model["kernel"] for model in models if _is(kind, model["kernel"])}:
                module = import_module(f"udfs.{kind}_{kernel}")
                self._wrap(module, call, lambda _model, batch: f"{self._model} {len(batch)}")
                if kind == "detector":
                    self._wrap(module, "load", lambda detector, _device: f"load:{detector['name']} 1")

    def _named(self, run: Callable[..., None]) -> Callable[..., None]:
        """Kernels are not told their model's name."""

        def known(model: dict[str, Any], *given: Any) -> None:
            self._model = model["name"]
            run(model, *given)

        return known

    def _wrap(self, module: Any, name: str, line: Callable[..., str]) -> None:
        real = getattr(module, name)

        def told(*given: Any, **named: Any) -> Any:
            with open(self._log, "a") as log:  # a line in one write: threads and workers share the file
                log.write(f"{line(*given)}\n")
            return real(*given, **named)

        self._wrapped.enter_context(patch.object(module, name, told))


def _is(kind: str, kernel: str) -> bool:
    return (Path(embedding.__file__).parents[1] / f"udfs/{kind}_{kernel}.py").exists()


def counts(log: Path) -> dict[str, int]:
    """What the tasks told since the last call: how often what was done."""
    told: Counter[str] = Counter()
    if log.exists():
        for line in log.read_text().splitlines():
            what, _, count = line.rpartition(" ")
            told[what] += int(count)
        os.unlink(log)
    return dict(told)
