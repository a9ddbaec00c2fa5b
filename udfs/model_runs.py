"""A batch of prepared rows -> the same rows with vectors and detections: the models of a worker, each loaded once.

A model's number that is not finite, or an image that a model's memory does not hold alone, is a reject of that output; the row keeps
its others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from typing import Any, Literal

import numpy as np

from udfs import decode, engine
from udfs.addresses import NOWHERE
from udfs.detection import checked
from udfs.engine import How
from udfs.micro_batches import Loaded, in_parts
from udfs.reject import Reject

Kind = Literal["tower", "detector"]
Model = Mapping[str, Any]  # conf.enrichment.Encoder or Detector as a mapping


def kernel_of(kind: Kind, model: Model) -> Any:
    """The module that runs an encoder or a detector."""
    return import_module(f"udfs.{kind}_{model['kernel']}")


def encoder_parts(encoder: Model) -> dict[str, Any]:
    """What a vector depends on besides precision, engine and view: weights, preprocessing, decode, kernel."""
    weights = {key: encoder[key] for key in ("model", "config", "pretrained", "sha256", "width", "image_size")}
    return _kernel_parts("tower", encoder) | weights


def detector_parts(detector: Model) -> dict[str, Any]:
    """What a detection depends on."""
    files = {key: detector[key] for key in ("sha256", "vocabulary_sha256", "image_size", "keep", "resize")}
    libraries = getattr(kernel_of("detector", detector), "LIBRARIES", ())
    return _kernel_parts("detector", detector) | files | {"libraries": {name: version(name) for name in libraries}}


def _kernel_parts(kind: Kind, model: Model) -> dict[str, Any]:
    kernel = kernel_of(kind, model)
    told = {"kernel": model["kernel"], "kernel_version": kernel.KERNEL_VERSION, "preprocessing": kernel.PREPROCESSING}
    return told | {"decode": decode.SCALED}


def encode(encoder: Model, batch: Iterable[dict[str, Any]], how: How) -> None:
    """Adds one encoder's vectors (fp16) to the rows of a batch that have its tensor."""
    tower = kernel_of("tower", encoder)
    for row, vector in _run(
        encoder, batch, lambda: _tower(json.dumps(encoder, sort_keys=True), how), lambda m, part: tower.encode(m, np.stack(part))
    ):
        assert vector.shape == (encoder["width"],), (vector.shape, encoder["width"])
        with np.errstate(over="ignore"):
            stored = vector.astype("<f2")
        if np.isfinite(stored).all():
            row["embeddings"].append({"encoder": encoder["name"], "vector": stored.tobytes()})
        else:
            _refuse(row, encoder, Reject("not_finite", f"encoder {encoder['name']}"))


def detect(detector: Model, batch: Iterable[dict[str, Any]], how: How) -> None:
    """Adds what one detector sees to the rows of a batch that have its tensor."""
    kernel = kernel_of("detector", detector)
    for row, found in _run(detector, batch, lambda: _detector(json.dumps(detector, sort_keys=True), how.device), kernel.detect):
        try:
            row["detections"].append({"detector": detector["name"], **checked(found)})
        except Reject as reject:
            _refuse(row, detector, Reject(reject.code, f"detector {detector['name']}: {reject.detail}"))


def _run(
    model: Model, batch: Iterable[dict[str, Any]], load: Callable[[], Loaded], run: Callable[[Any, Sequence[np.ndarray]], Sequence[Any]]
) -> Iterator[tuple[dict[str, Any], Any]]:
    """The rows that have a tensor of this model, each with its result; one whose image the memory does not hold is refused."""
    mine = [row for row in batch if model["name"] in row["tensors"]]
    if not mine:
        return
    results = in_parts(run, [row["tensors"].pop(model["name"]) for row in mine], load())
    for row, result in zip(mine, results, strict=True):
        if result is None:
            _refuse(row, model, Reject("out_of_memory", f"{model['name']}: not even one image"))
        else:
            yield row, result


def _refuse(row: dict[str, Any], model: Model, reject: Reject) -> None:
    """Notes that one output of a row could not be made, beside those that could not already; one that may pass makes all worth a retry."""
    known = row["reject"] or {"code": reject.code, "detail": "", "transient": False, "outputs": []}
    detail = "; ".join(filter(None, (known["detail"], reject.detail)))[:300]
    told = {"code": known["code"], "detail": detail, "transient": known["transient"] or reject.transient}
    row["reject"] = told | NOWHERE | {"outputs": [*known["outputs"], model["name"]]}


@lru_cache(maxsize=16)
def _tower(encoder: str, how: How) -> Loaded:
    """One tower a worker, encoder and device."""
    told = json.loads(encoder)
    return Loaded(engine.load(kernel_of("tower", told), told, how))


@lru_cache(maxsize=16)
def _detector(detector: str, device: str) -> Loaded:
    """One detector a worker and device."""
    told = json.loads(detector)
    return Loaded(kernel_of("detector", told).load(told, device))
