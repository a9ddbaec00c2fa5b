"""Near-duplicates fall in one group, whatever connects them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from udfs import near_groups


def flip(packed: np.ndarray, bits: int, seed: int) -> np.ndarray:
    """32 bytes -> the same with so many bits changed."""
    unpacked = np.unpackbits(packed)
    unpacked[np.random.default_rng(seed).permutation(256)[:bits]] ^= 1
    return np.packbits(unpacked)


@pytest.fixture
def hashes() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (8, 32), dtype=np.uint8)


def test_the_bound_is_the_last_distance_that_is_near(hashes: np.ndarray) -> None:
    hashes[1] = flip(hashes[0], near_groups.DISTANCE, 1)
    hashes[3] = flip(hashes[2], near_groups.DISTANCE + 1, 2)
    number = near_groups.find_groups(hashes, hashes)
    assert number[0] == number[1]
    assert len(set(number)) == 7


def test_a_chain_and_a_mirrored_picture_are_one_group(hashes: np.ndarray) -> None:
    mirrors = np.random.default_rng(6).integers(0, 256, hashes.shape, dtype=np.uint8)
    hashes[1] = flip(hashes[0], 30, 1)
    hashes[2] = flip(hashes[1], 30, 2)  # about 60 from the first
    mirrors[7], mirrors[2] = flip(hashes[2], 3, 3), flip(hashes[7], 3, 4)
    number = near_groups.find_groups(hashes, mirrors)
    assert len({number[i] for i in (0, 1, 2, 7)}) == 1
    assert len(set(number)) == 5


def test_many_copies_are_grouped_across_tiles_with_few_pairs_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = np.random.default_rng(7).integers(0, 256, (90, 32), dtype=np.uint8)
    hashes[10:80:2] = hashes[0]
    expected = near_groups.find_groups(hashes, hashes)
    monkeypatch.setattr(near_groups, "_TILE", 16)
    monkeypatch.setattr(near_groups, "_EDGES", 20)
    found = near_groups.find_groups(hashes, hashes)
    assert len(set(expected)) == 90 - 35
    assert all((found == found[i]).tolist() == (expected == expected[i]).tolist() for i in range(90))


def test_a_group_is_named_by_its_smallest_id_in_any_order_of_rows(hashes: np.ndarray) -> None:
    hashes[6] = hashes[2]
    packed = [row.tobytes() for row in hashes]
    frame = pd.DataFrame({"image_id": [bytes([i]) * 32 for i in (9, 8, 7, 6, 5, 4, 3, 2)], "phash": packed, "phash_mirror": packed})
    told = near_groups.name_groups(frame).set_index("image_id").near_group.to_dict()
    assert told[b"\x07" * 32] == told[b"\x03" * 32] == b"\x03" * 32
    assert sum(one == group for one, group in told.items()) == 7
    again = near_groups.name_groups(frame.sample(frac=1, random_state=1)).set_index("image_id").near_group.to_dict()
    assert again == told
