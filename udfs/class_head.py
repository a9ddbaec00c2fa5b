"""float32 vectors [n, width] -> probabilities of the classes of one kind (`style`, `ai_generated`): the head that training fits and jobs serve.

Linear, or with one hidden layer (GELU). A head travels as safetensors bytes whose metadata hold all that serving needs: the kind of labels,
the classes in the order of the outputs, the temperature (Guo et al. 2017, "On Calibration of Modern Neural Networks": logits are
divided by it) and the probability below which an image is of no class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from udfs.reject import Reject
from udfs.score_head import Vectors, normalise

if TYPE_CHECKING:  # the Spark driver imports this module and must not load torch
    import torch

KERNEL_VERSION = 1
OTHER = "other"  # no class is named so (conf.enrichment.CLASS)
METADATA = "class_head"  # one key: the order of several in a safetensors header is not fixed, and equal heads must be equal bytes

Logits = npt.NDArray[np.float64]


class About(NamedTuple):
    """What a head says of itself."""

    label: str
    classes: tuple[str, ...]
    temperature: float
    other_below: float


class Head(NamedTuple):
    about: About
    model: torch.nn.Sequential


def build(width: int, classes: int, hidden: int | None) -> torch.nn.Sequential:
    """Sizes -> an untrained head from torch's current random state; [n, width] as `scale` gives them in, logits [n, classes] out."""
    from torch import nn

    if hidden is None:
        return nn.Sequential(nn.Linear(width, classes))
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, classes))


def pack(weights: Mapping[str, torch.Tensor], about: About) -> bytes:
    """fp32 weights by name, and what they are -> the safetensors bytes that are registered; equal heads give equal bytes."""
    import safetensors.torch

    return safetensors.torch.save(dict(weights), {METADATA: json.dumps(about._asdict(), sort_keys=True)})


def read_about(head: bytes) -> About:
    """safetensors bytes -> what their metadata say, without torch. Raises ValueError when they are no head."""
    try:
        told = json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])["__metadata__"][METADATA]
        about = About(**json.loads(told))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"class head: the file's metadata are not those of one ({type(error).__name__}: {error})") from None
    return about._replace(classes=tuple(about.classes))


def load(head: bytes) -> Head:
    """safetensors bytes -> head in evaluation mode on the CPU. Raises ValueError when they are not one."""
    import safetensors.torch
    import torch

    about, state = read_about(head), safetensors.torch.load(head)
    names = [("0.weight", "0.bias"), ("0.weight", "0.bias", "2.weight", "2.bias")]
    if set(state) not in map(set, names):
        raise ValueError(f"class head: given tensors {sorted(state)}, expected {' or '.join(map(str, names))}")
    first, last = state["0.weight"], state.get("2.weight", state["0.weight"])
    if last.shape[0] != len(about.classes):
        raise ValueError(f"class head: {last.shape[0]} outputs for {len(about.classes)} classes {about.classes}")
    with torch.device("meta"):  # no initial weights: drawing them would move the random state of a training that looks at itself
        model = build(int(first.shape[1]), len(about.classes), int(first.shape[0]) if "2.weight" in state else None)
    model.load_state_dict(state, assign=True)
    return Head(about, model.eval())


def logits_batch(vectors: npt.NDArray[Any], head: Head) -> Logits:
    """(float [n, width], head from `load`) -> logits float64 [n, classes]."""
    import torch

    with torch.inference_mode():
        return np.asarray(head.model(torch.from_numpy(scale(vectors))).numpy(), dtype=np.float64)


def scale(vectors: npt.NDArray[Any]) -> Vectors:
    """[n, width] of any float type -> float32 rows of length sqrt(width): components of about 1, so that one learning rate serves every width."""
    return np.asarray(normalise(vectors) * np.float32(np.sqrt(vectors.shape[1])), dtype=np.float32)


def softmax(logits: npt.NDArray[Any], temperature: float) -> Logits:
    """Logits [n, classes] -> probabilities float64 [n, classes] of softmax(logits / temperature). What is not finite stays so."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    with np.errstate(invalid="ignore"):
        powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def classify_batch(vectors: Vectors, head: Head) -> Logits:
    """(float32 [n, width], head from `load`) -> calibrated probabilities float64 [n, classes]. A vector that is not finite gives rows that are not."""
    if len(vectors) == 0:
        return np.empty((0, len(head.about.classes)))
    return softmax(logits_batch(vectors, head), head.about.temperature)


def decide(probabilities: Logits, about: About) -> tuple[str, float]:
    """One image's probabilities [classes] -> (its class or `other`, the largest probability). Raises Reject("not_finite")."""
    if not np.isfinite(probabilities).all():
        raise Reject("not_finite", f"probabilities of {about.label}: {probabilities.tolist()}")
    best = int(probabilities.argmax())
    p = float(probabilities[best])
    return (about.classes[best] if p >= about.other_below else OTHER), p
