"""A picture -> its perceptual hashes in other frames: as if a border were taken off it, or what was cut off were put back.

A hash answers to where things lie in the frame, so a crop of a twentieth already moves a fifth of its bits. What may have
been done to a picture is undone here in guesses: uniform borders are trimmed, others cut off at fixed widths; for a crop, the picture
is set smaller into a frame whose missing parts repeat its edge (recall .93 at a crop of 5 % and 46 bits, where reflection gave .88 [measured
once on the sample]; `python -m benchmarks.deny_part` for the rest). A list that holds crops of its pictures as well meets the query half-way.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from udfs.perceptual_hash import SIDE, hash_squares

KERNEL_VERSION = 1  # of the guesses
CROPS = (0.03, 0.06, 0.1, 0.15, 0.2)  # shares of width and height that may have been cut off
BORDERS = (0.05, 0.1, 0.15)  # widths of a border that is not uniform, in shares of the picture's shorter side
WORKING = 160  # pixels a side, from which the guesses are made: 2.5 times what a hash looks at
TOLERANCES = (8, 32)  # levels of luma within which a border is uniform: as it was drawn, and after JPEG at low quality
LARGEST = 0.5  # of a side that a trimmed border may take
_PLACES = [(y, x) for y in (0.0, 0.5, 1.0) for x in (0.0, 0.5, 1.0)]  # what was cut off: share of it above, and on the left


def guesses(luma: Image.Image) -> np.ndarray:
    """Luma of a picture that may be a cut, bordered or mirrored copy -> uint8[n, 32]: hashes that its original may have."""
    small = luma.resize((WORKING, WORKING), Image.Resampling.HAMMING)
    squares = [_square(luma), *_without_border(luma, small)]
    for share in CROPS:
        squares += _set_in(small, share)
    return np.concatenate(hash_squares(np.stack(squares)))


def mirrored(luma: Image.Image) -> np.ndarray:
    """Luma -> uint8[2, 32]: its hash and that of its mirror."""
    return np.concatenate(hash_squares(_square(luma)[None]))


def crops(luma: Image.Image) -> np.ndarray:
    """Luma of an original -> uint8[n, 32]: its own hash, and those of its crops, for a list."""
    small, squares = luma.resize((WORKING, WORKING), Image.Resampling.HAMMING), [_square(luma)]
    for share in CROPS:
        for above, left in _PLACES:
            x, y, side = WORKING * share * left, WORKING * share * above, WORKING * (1 - share)
            squares.append(_square(small, (x, y, x + side, y + side)))
    return hash_squares(np.stack(squares))[0]


def _square(luma: Image.Image, box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    return np.asarray(luma.resize((SIDE, SIDE), Image.Resampling.HAMMING, box))


def _set_in(small: Image.Image, share: float) -> list[np.ndarray]:
    """The picture in frames of which `share` of the width and height is missing, at each of _PLACES."""
    missing = round(SIDE * share)
    inner = np.asarray(small.resize((SIDE - missing, SIDE - missing), Image.Resampling.HAMMING))
    put = [(round(missing * above), round(missing * left)) for above, left in _PLACES]
    nearest = {first: np.clip(np.arange(SIDE) - first, 0, SIDE - missing - 1) for first in {first for two in put for first in two}}
    return [inner[nearest[top][:, None], nearest[left]] for top, left in put]  # beyond its edge: the edge


def _without_border(luma: Image.Image, small: Image.Image) -> list[np.ndarray]:
    width, height = luma.size
    levels = np.asarray(luma, dtype=np.int16)
    boxes = {_inside(levels, tolerance) for tolerance in TOLERANCES}
    found = [_square(luma, box) for box in sorted(filter(None, boxes))]
    for share in BORDERS:
        border = share * min(width, height) / (1 + 2 * share)  # of the picture inside, which the border has made larger
        across, down = border / width * WORKING, border / height * WORKING
        found.append(_square(small, (across, down, WORKING - across, WORKING - down)))
    return found


def _inside(levels: np.ndarray, tolerance: int) -> tuple[float, float, float, float] | None:
    """Levels [h, w] -> the box (left, top, right, bottom) without rows and columns that are like the corner; None when all is inside, or little."""
    like = np.abs(levels - levels[0, 0]) <= tolerance
    rows, columns = np.flatnonzero(~like.all(axis=1)), np.flatnonzero(~like.all(axis=0))
    if not len(rows):
        return None
    height, width = levels.shape
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    little = box[2] - box[0] < width * (1 - LARGEST) or box[3] - box[1] < height * (1 - LARGEST)
    return None if little or box == (0, 0, width, height) else box
