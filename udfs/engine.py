"""What runs a tower on a device: torch, or onnxruntime over a graph that torch exported once (udfs/export_tower.py).

On a CPU in fp32 onnxruntime is the default: some 20 % less work an image than torch, and a worker that finds the graph imports neither
torch nor the tower's library. bf16 and GPUs are torch's, by torch.compile where the config says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from udfs import export_tower
from udfs.onnx_file import open_session

if TYPE_CHECKING:
    import torch
    from onnxruntime import InferenceSession

VERSION = 1


class How(NamedTuple):
    """How a worker runs its towers.

    device: "cpu" or "cuda:N"; precision: "fp32" or "bf16"; engine: "torch" or "onnxruntime"; cache: folder of exported graphs, None: one of
    this user in the temporary folder; threads: of the CPU, None: OMP_NUM_THREADS, which Spark sets to a task's cores, else the engine's choice.
    """

    device: str
    precision: str = "fp32"
    engine: str = "torch"
    compile: bool = False
    cache: str | None = None
    threads: int | None = None


class Graph(NamedTuple):
    """A tower that onnxruntime runs."""

    session: InferenceSession


def fingerprint(engine: str, compiled: bool) -> str:
    """What a vector's last digits depend on besides precision."""
    return f"{engine}{'-compiled' if compiled else ''}:{VERSION}"


def load(tower: Any, encoder: Mapping[str, Any], how: How) -> Any:
    """(module udfs.tower_*, conf.enrichment.Encoder as a dict, How) -> what the tower's `encode` takes."""
    if not has_weights(encoder):  # nothing for an engine to do
        return tower.load(encoder, how.device, how.precision)
    if how.engine == "onnxruntime":
        if how.precision != "fp32":
            raise ValueError(f"engine: onnxruntime runs the towers in fp32, given precision {how.precision}; take engine torch")
        threads = how.threads or int(os.environ.get("OMP_NUM_THREADS") or 0) or None  # torch reads it by itself, onnxruntime does not
        return Graph(open_session(export_tower.exported(encoder, how.cache), how.device, threads=threads))
    import torch

    if how.threads is not None:
        torch.set_num_threads(how.threads)
    model = tower.load(encoder, how.device, how.precision)
    # dynamic: the last batch of a task is smaller, and a new size would compile for a minute
    return torch.compile(model, dynamic=True) if how.compile else model


def has_weights(encoder: Mapping[str, Any]) -> bool:
    """Whether the tower is a torch module. A model alone may have weights: open_clip's hf-hub:owner/name."""
    return encoder["model"] is not None or encoder["weights"] is not None


def vectors(model: torch.nn.Module | Graph, batch: np.ndarray) -> np.ndarray:
    """(a tower, float32 (n, 3, side, side)) -> float32 (n, width), as the tower gives them: not normalised."""
    if isinstance(model, Graph):
        return np.asarray(model.session.run(None, {export_tower.INPUT: batch})[0])
    import torch

    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d)).weight  # every tower cuts its patches by one
    with torch.inference_mode():
        images = torch.from_numpy(batch)
        if first.device.type == "cuda":  # from pinned memory the copy runs beside the host; a cast on the way would be made on the host
            images = images.pin_memory().to(first.device, non_blocking=True)
        return model(images.to(first.device, first.dtype)).float().cpu().numpy()


def normalised(rows: np.ndarray) -> np.ndarray:
    """float32 (n, width) -> rows of length 1; a row that is not finite or zero is not finite."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)
