"""float32 vectors [n, width] -> raw aesthetic scores [n] and V7's bin: the head that training fits and scoring serves.

Architecture and bin rule: the released V7 pipeline (github.com/fuhrriel/pony-captioner, port of the team's notebook). The
state dict has the names of a plain Sequential ("0.weight", "3.weight", "6.bias", ...), so V7's own checkpoint, whose
names are the same behind a prefix `model.`, converts by renaming. Weights travel as safetensors bytes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from udfs.reject import Reject

if TYPE_CHECKING:  # the Spark driver imports this module and must not load torch
    import torch

KERNEL_VERSION = 1
HIDDEN = (1024, 512)  # V7
DROPOUT = (0.5, 0.3)  # V7
NAMES = tuple(f"{layer}.{part}" for layer in (0, 3, 6) for part in ("weight", "bias"))

Vectors = npt.NDArray[np.float32]


def build(width: int) -> torch.nn.Sequential:
    """Vector length -> an untrained head from torch's current random state; [n, width] in, [n, 1] out, no sigmoid."""
    from torch import nn

    first, second = HIDDEN
    return nn.Sequential(
        nn.Linear(width, first),
        nn.ReLU(),
        nn.Dropout(DROPOUT[0]),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Dropout(DROPOUT[1]),
        nn.Linear(second, 1),
    )


def load(weights: bytes) -> torch.nn.Sequential:
    """safetensors bytes -> head in evaluation mode on the CPU. Raises ValueError when they are not a head's weights."""
    import safetensors.torch
    import torch

    state = safetensors.torch.load(weights)
    if set(state) != set(NAMES):
        raise ValueError(f"score head: given tensors {sorted(state)}, expected {sorted(NAMES)}")
    with torch.device("meta"):  # no initial weights: drawing them would move the random state of a training that looks at itself
        head = build(int(state["0.weight"].shape[1]))
    head.load_state_dict(state, assign=True)
    return head.eval()


def normalise(vectors: npt.NDArray[Any]) -> Vectors:
    """[n, width] of any float type -> float32 rows of length 1 (fp16 storage moves a length by up to 1e-3); zero rows stay zero."""
    wide = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.where(lengths == 0.0, np.float32(1.0), lengths), dtype=np.float32)


def score_batch(vectors: Vectors, head: torch.nn.Module) -> Vectors:
    """(float32 [n, width], head from `load`) -> raw scores float32 [n]. A vector that is not finite gives a score that is not."""
    import torch

    if len(vectors) == 0:
        return np.empty(0, dtype=np.float32)
    with torch.inference_mode():
        raw = head(torch.from_numpy(normalise(vectors)))
    return np.asarray(raw.squeeze(1).float().numpy())


def score_bin(raw: float) -> int:
    """Raw score -> 0..9 by V7's rule: ten fixed bins over [0, 1). Raises Reject("not_finite") where V7 gave 9 for a NaN."""
    value = float(raw)
    if not math.isfinite(value):
        raise Reject("not_finite", f"raw score {value}")
    return int(max(0.0, min(0.99, value)) * 10)
