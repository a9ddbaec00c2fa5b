"""RGB images -> regions of text: what stands there, how sure the reader is, and where. PP-OCRv4 through rapidocr-onnxruntime, its own weights.

A picture is looked at with at most `image_size` squared pixels (default 960) and is never enlarged; letters below some 8 px of height there are
missed. Its sides are kept below four times image_size and its regions below MOST, so that no strip and no wall of letters costs
more than a few seconds: of more regions the largest are read.

Cost [measured, 549 images of at most 448 px, 1 thread of 2 shared AMD cores]: 35 CPU-ms an image in the mean, half of it to read; at the
worst (960 x 960 pixels full of text) 2.1 CPU-s and 270 MB while it runs; import and load 0.3 CPU-s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from udfs.detection import Detection, Region
from udfs.onnx_file import open_session

if TYPE_CHECKING:
    from rapidocr_onnxruntime import RapidOCR

KERNEL_VERSION = 2  # 2: a picture is looked at as large as `prepare` leaves it; before, the library made its longer side 2000
LIBRARIES = ("rapidocr-onnxruntime",)
PREPROCESSING = "at most image_size squared pixels and four times image_size a side (bicubic, never enlarged), BGR"
FINDER, READER = "ch_PP-OCRv4_det_infer.onnx", "ch_PP-OCRv4_rec_infer.onnx"
SIZE = 960
LEAST = 32  # pixels of a side: the model works on multiples of it
MOST = 64  # regions that are read
FLATTEST = 24.0  # width / height of a region that is read; a longer line is squeezed


class Reader(NamedTuple):
    engine: RapidOCR
    keep: float


def load(detector: Mapping[str, Any], device: str) -> Reader:
    """(conf.enrichment.Detector as a dict, "cpu" or "cuda:1") -> the two models, one thread each."""
    if detector["weights"] is not None or detector["vocabulary"] is not None:
        raise ValueError(f"detector {detector['name']!r}: weights, vocabulary: kernel text has those of its library; give none")
    import rapidocr_onnxruntime as library
    from rapidocr_onnxruntime.ch_ppocr_det.utils import DetPreProcess

    longest = 4 * (detector["image_size"] or SIZE)
    threads = {"intra_op_num_threads": 1, "inter_op_num_threads": 1}
    # one region at a time: as fast on one thread, six long lines would take 250 MB, and a line is read the same whatever stands beside it
    engine = library.RapidOCR(**threads)
    # `prepare` has bounded the picture; the library's own bound is 2000 pixels, whatever it is told
    engine.text_det.get_preprocess = lambda _: DetPreProcess(longest, "max", engine.text_det.mean, engine.text_det.std)
    engine.text_rec.rec_batch_num = 1
    if device != "cpu":  # the library knows one GPU, and goes on without it where it has none
        models = Path(library.__file__).parent / "models"
        engine.text_det.infer.session = open_session(models / FINDER, device, arena=False)
        engine.text_rec.session.session = open_session(models / READER, device, arena=False)
    return Reader(engine, detector["keep"])


def prepare(image: Image.Image, detector: Mapping[str, Any]) -> np.ndarray:
    """RGB image of any size -> uint8 (height, width, 3), blue first, as large as it is looked at."""
    size = detector["image_size"] or SIZE
    width, height = image.size
    scale = min(1.0, size / (width * height) ** 0.5, 4 * size / max(width, height))
    if scale < 1:
        image = image.resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


def detect(model: Reader, batch: Sequence[np.ndarray]) -> list[Detection]:
    """Arrays of `prepare` -> the regions of each, in reading order. One image at a time: shapes differ."""
    return [{"labels": [], "regions": _read(model, pixels)} for pixels in batch]


def _read(model: Reader, pixels: np.ndarray) -> list[Region]:
    height, width = pixels.shape[:2]
    lacking = (max(0, LEAST - height), max(0, LEAST - width))
    canvas = np.pad(pixels, ((0, lacking[0]), (0, lacking[1]), (0, 0)), constant_values=255) if any(lacking) else pixels
    boxes, _ = model.engine.auto_text_det(canvas)
    if boxes is None:
        return []
    boxes = _largest(boxes)
    texts, _ = model.engine.text_rec([_squeezed(crop) for crop in model.engine.get_crop_img_list(canvas, boxes)])
    shares = [np.clip(np.asarray(box, np.float64) / (width, height), 0, 1).ravel().tolist() for box in boxes]
    told = zip(texts, shares, strict=True)
    return [{"text": text, "p": float(p), "box": box} for (text, p), box in told if text and not p < model.keep]


def _largest(boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """-> at most MOST boxes, in the same order."""
    sizes = [np.linalg.norm(box[0] - box[1]) * np.linalg.norm(box[0] - box[3]) for box in boxes]
    chosen = sorted(np.argsort(sizes, kind="stable")[::-1][:MOST])
    return [boxes[at] for at in chosen]


def _squeezed(crop: np.ndarray) -> np.ndarray:
    height, width = crop.shape[:2]
    if width <= FLATTEST * height:
        return crop
    import cv2

    return cv2.resize(crop, (int(FLATTEST * height), height), interpolation=cv2.INTER_AREA)
