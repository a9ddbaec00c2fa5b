from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from udfs import style_centres
from udfs.style_centres import Centres, Finder

WIDTH, K = 48, 40


def make_centres(seed: int = 0, **changes: object) -> Centres:
    centres = np.random.default_rng(seed).normal(size=(K, WIDTH)).astype(np.float32)
    ids = np.arange(K, dtype=np.int64) * 2 + 3  # ids are names, not places
    return replace(Centres(centres, ids, none_above=4.0, encoder="e", digest="d", next_id=200), **changes)  # type: ignore[arg-type]


def make_vectors(n: int, seed: int = 1, scale: float = 0.5) -> np.ndarray:
    """fp16 vectors about the centres."""
    rng = np.random.default_rng(seed)
    return (make_centres().centres[rng.integers(0, K, n)] + scale * rng.normal(size=(n, WIDTH))).astype("<f2")


def batch(vectors: np.ndarray) -> pa.RecordBatch:
    ids = [number.to_bytes(32, "big") for number in range(len(vectors))]
    return pa.RecordBatch.from_pydict({"image_id": pa.array(ids), "vector": pa.array([one.tobytes() for one in vectors])})


def assign(centres: Centres, vectors: np.ndarray, policy: style_centres.Policy = "states", cut: int = 1000) -> list[dict[str, object]]:
    whole = batch(vectors)
    parts = [whole.slice(start, cut) for start in range(0, len(vectors), cut)]
    return [row for out in style_centres.assign(parts, style_centres.pack(centres), policy) for row in out.to_pylist()]


def test_the_distances_are_euclidean_on_the_vectors_as_stored() -> None:
    centres, vectors = make_centres(), make_vectors(50, scale=3.0)
    true = np.linalg.norm(vectors.astype(np.float64)[:, None] - centres.centres.astype(np.float64)[None], axis=2)
    order = np.argsort(true, axis=1)[:, :5]
    for row, near, far in zip(assign(centres, vectors), order, true, strict=True):
        assert [one["cluster"] for one in row["top"]] == centres.ids[near].tolist()  # type: ignore[attr-defined]
        assert [one["distance"] for one in row["top"]] == pytest.approx(far[near], rel=1e-6)  # type: ignore[attr-defined]
        assert row["nearest"] == centres.ids[near[0]] and row["distance"] == pytest.approx(far[near[0]], rel=1e-6)
        assert row["margin"] == pytest.approx(far[near[1]] - far[near[0]], abs=1e-5)


def test_a_vector_has_the_same_result_bit_for_bit_in_any_batch() -> None:
    vectors = make_vectors(700, scale=2.0)
    whole = assign(make_centres(), vectors)
    for cut in (1, 7, 256):
        assert [row | {"image_id": 0} for row in assign(make_centres(), vectors, cut=cut)] == [row | {"image_id": 0} for row in whole]


def test_equal_distances_go_to_the_lower_id_even_when_more_centres_tie_than_are_candidates() -> None:
    same = np.repeat(np.random.default_rng(5).normal(size=(1, WIDTH)).astype(np.float32), 30, axis=0)
    centres = make_centres()
    tied = replace(centres, centres=np.concatenate([centres.centres[:10], same]))
    vectors = same[:3].astype("<f2")
    for cut in (1, 3):
        for row in assign(tied, vectors, cut=cut):
            assert [one["cluster"] for one in row["top"]] == tied.ids[10:15].tolist()  # type: ignore[attr-defined]
            assert row["margin"] == 0
    finder = Finder(tied)
    finder.find(vectors.astype(np.float32))
    assert finder.compared_with_all == 3


def test_states_say_blocked_and_none_and_v7_says_neither() -> None:
    centres = make_centres()
    near = centres.centres[:2].astype("<f2")
    far = np.full((1, WIDTH), 50, "<f2")
    blocked = replace(centres, block=(3,))  # the id of the first centre
    rows = assign(blocked, np.concatenate([near, far]))
    assert [(row["state"], row["cluster"], row["nearest"]) for row in rows[:2]] == [("blocked", None, 3), ("ok", 5, 5)]
    assert (rows[2]["state"], rows[2]["cluster"]) == ("none", None)
    assert rows[2]["distance"] > centres.none_above  # type: ignore[operator]
    released = assign(blocked, np.concatenate([near, far]), "v7")
    true = np.linalg.norm(near[0].astype(np.float64) - centres.centres[1:], axis=1)
    assert [row["state"] for row in released] == ["ok"] * 3
    assert released[0]["cluster"] == released[0]["nearest"] == centres.ids[1:][true.argmin()]  # the nearest that may be used
    assert released[2]["cluster"] is not None


def test_a_vector_that_is_not_finite_is_a_reject_and_changes_no_other() -> None:
    vectors = make_vectors(5)
    clean = assign(make_centres(), vectors)
    vectors[2, 0] = np.nan
    rows = assign(make_centres(), vectors)
    assert rows[2]["reject"] == {"code": "not_finite", "detail": "the stored vector holds NaN or infinity", "transient": False}
    assert rows[2]["state"] is rows[2]["nearest"] is rows[2]["margin"] is None
    assert [rows[i] for i in (0, 1, 3, 4)] == [clean[i] for i in (0, 1, 3, 4)]


def test_a_set_comes_back_from_its_files_and_the_same_set_gives_the_same_bytes() -> None:
    centres = make_centres(block=(5, 9), history=({"how": "fit", "digest": "d"},))
    files = style_centres.pack(centres)
    again = style_centres.unpack(files)
    assert style_centres.pack(again) == files
    assert (again.block, again.history, again.none_above, again.next_id) == (centres.block, centres.history, 4.0, 200)
    assert again.centres.tobytes() == centres.centres.tobytes()


def test_a_slice_of_an_arrow_column_is_read_at_its_own_place() -> None:
    vectors = make_vectors(9)
    column = batch(vectors).column("vector").slice(4, 3)
    assert np.array_equal(style_centres.read_vectors(column, WIDTH), vectors[4:7].astype(np.float32))
