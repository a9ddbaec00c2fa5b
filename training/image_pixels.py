"""An image's bytes -> the square of pixels that a model is trained on, by the kernel's one decode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from conf.section import Mistake
from udfs.decode import decoding
from udfs.reject import Reject

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.uint8]


def read_pixels(data: bytes, image_id: bytes, size: int, limits: Mapping[str, Any]) -> Pixels:
    """A file's bytes -> uint8 [3, size, size]. Raises Mistake with the image and the reject's code: a frozen export holds what decoded."""
    try:
        with decoding(data, limits) as decoded:
            return cut(decoded.image, size)
    except Reject as reject:
        failure = f"image {image_id.hex()}: {reject.code}: {reject.detail}"
    raise Mistake(f"{failure}; it was exported, so it decoded once: look at limits, or select and export again")


def cut(image: Image.Image, size: int) -> Pixels:
    """RGB picture -> its centred square, scaled to `size`. The one place that knows the geometry of a training picture."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    square = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
