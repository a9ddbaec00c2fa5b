"""Items -> results of a model in parts that fit its memory: a part that does not is halved, and no item is lost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
# in the messages of errors that have no class of their own: torch on a CPU, onnxruntime's arena, the C++ library
SAID = ("can't allocate memory", "Failed to allocate memory", "bad_alloc", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass
class Loaded:
    """A model of a worker, and how many items it takes at once (None: any number): fewer from the first time that they were too many."""

    model: Any
    most: int | None = None


def in_parts(run: Callable[[Any, Sequence[Item]], Sequence[Result]], items: Sequence[Item], loaded: Loaded) -> list[Result | None]:
    """(run(model, part), items, Loaded) -> a result an item, in order; None for one that does not fit alone."""
    done: list[Result | None] = []
    while len(done) < len(items):
        part = items[len(done) :][: loaded.most]
        found = _tried(run, part, loaded.model)
        if found is not None:
            done.extend(found)  # not +=, which an array on the right would make an addition
        elif len(part) == 1:
            done.append(None)
        else:
            loaded.most = len(part) // 2
    return done


def _tried(run: Callable[[Any, Sequence[Item]], Sequence[Result]], part: Sequence[Item], model: Any) -> Sequence[Result] | None:
    """-> the results, or None when memory was not enough. By then the error and what its frames held are gone, and free memory is free."""
    try:
        return run(model, part)
    except _errors() as error:
        if not is_out_of_memory(error):
            raise
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _errors() -> tuple[type[Exception], ...]:
    """torch's are RuntimeErrors; onnxruntime's are not."""
    library = sys.modules.get("onnxruntime.capi.onnxruntime_pybind11_state")
    return (MemoryError, RuntimeError, *((library.RuntimeException, library.Fail) if library is not None else ()))


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller part may help."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return any(said in str(error) for said in SAID)
