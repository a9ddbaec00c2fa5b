"""The addresses of an image -> what a captioner is sent: a JPEG, upright, in sRGB, without metadata, at most so many pixels a side."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from udfs import addresses, decode
from udfs.opener import Opener

RENDER_VERSION = 1  # enters the request, and so its key
QUALITY = 90
MIME = "image/jpeg"


def render(places: Sequence[Any], image_id: bytes, opener: Opener, limits: Mapping[str, Any], max_side: int) -> tuple[bytes, str]:
    """-> (bytes, mime). Raises Reject, as embed does, for what cannot be read or decoded."""
    data = addresses.read_any({}, places, opener, image_id)
    image = decode.decode(data, limits).image
    image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue(), MIME
