"""Perceptual hashes of a bounded set of images -> groups of near-duplicates, so that no group is cut by a split.

Two images are near when their 256-bit hashes, or one's and the other's mirror, differ in at most DISTANCE bits; a group is what such
pairs connect. Every pair is compared (as a product of matrices of +1 and -1), which is what LIMIT bounds. On the sample the sprites
of one figure lie within 14 bits of each other, two folders of one icon set at 48, the nearest different pictures at 66.

Not the search for duplicates in a corpus: that has to find pairs among millions, this only has to keep some thousand labelled images honest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

BITS = 256
DISTANCE = 40  # bits
LIMIT = 200_000  # images
SCHEMA = "image_id BINARY, near_group BINARY"
_TILE = 2_048  # hashes a side of one matrix
_EDGES = 2_000_000  # pairs that are held before they are reduced to a forest

Hashes = npt.NDArray[np.uint8]  # [n, 32]
Numbers = npt.NDArray[np.intp]


def name_groups(frame: pd.DataFrame) -> pd.DataFrame:
    """(image_id, phash, phash_mirror) -> SCHEMA: a group is named by the smallest image_id in it."""
    frame = frame.sort_values("image_id", ignore_index=True)
    number = find_groups(_packed(frame.phash), _packed(frame.phash_mirror))
    first = frame.image_id.groupby(number).transform("first")
    return pd.DataFrame({"image_id": frame.image_id, "near_group": first})


def find_groups(hashes: Hashes, mirrors: Hashes, distance: int = DISTANCE) -> Numbers:
    """Hashes and mirrored hashes, row by row -> the number of each row's group [n]."""
    assert hashes.shape == mirrors.shape and len(hashes) <= LIMIT, hashes.shape
    one, other = np.empty(0, np.intp), np.empty(0, np.intp)
    for start in range(0, len(hashes), _TILE):
        mine = _signs(hashes[start : start + _TILE])
        for second in range(start, len(hashes), _TILE):
            part = slice(second, second + _TILE)
            # hashes of d differing bits have the product BITS - 2 d; sums of 256 ones are exact in float32
            near = np.maximum(mine @ _signs(hashes[part]).T, mine @ _signs(mirrors[part]).T) >= BITS - 2 * distance
            rows, columns = np.nonzero(near)
            one, other = np.concatenate([one, rows + start]), np.concatenate([other, columns + second])
            if len(one) > _EDGES:  # thousands of one picture
                label = _connect(one, other, len(hashes))
                one, other = np.arange(len(hashes)), np.unique(label, return_index=True)[1][label]
    return _connect(one, other, len(hashes))


def _connect(one: Numbers, other: Numbers, count: int) -> Numbers:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(one), np.int8), (one, other)), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.intp)


def _signs(hashes: Hashes) -> npt.NDArray[np.float32]:
    return np.unpackbits(hashes, axis=1).astype(np.float32) * 2 - 1


def _packed(column: pd.Series[Any]) -> Hashes:
    return np.frombuffer(b"".join(column), np.uint8).reshape(-1, BITS // 8)
