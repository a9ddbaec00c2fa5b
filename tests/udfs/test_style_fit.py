from __future__ import annotations

import numpy as np
import pytest

from udfs import style_centres, style_fit
from udfs.style_fit import Recipe

WIDTH = 32


def make_groups(groups: int, each: int, spread: float = 0.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """-> (vectors in well apart groups, shuffled; the group of each)."""
    rng = np.random.default_rng(seed)
    of = rng.permutation(np.repeat(np.arange(groups), each))
    places = 3 * rng.normal(size=(groups, WIDTH))
    return (places[of] + spread * rng.normal(size=(len(of), WIDTH))).astype(np.float32), of


def test_the_same_sample_gives_the_same_centres_bit_for_bit_and_another_seed_others() -> None:
    vectors, _ = make_groups(12, 200, spread=2.0)
    for recipe in (Recipe(24, None, 10, 2), Recipe(24, 40, 10, 2)):
        first = style_fit.fit(vectors, recipe, 7)
        assert style_fit.fit(vectors, recipe, 7).tobytes() == first.tobytes()
        assert style_fit.fit(vectors, recipe, 8).tobytes() != first.tobytes()
        assert first.shape == (24, WIDTH)


def test_centres_come_with_the_largest_cluster_first() -> None:
    vectors, _ = make_groups(5, 60)
    vectors = np.concatenate([vectors, vectors[:1] + 0.01 * make_groups(1, 300)[0]])
    sizes = np.bincount(style_fit.label(vectors, style_fit.fit(vectors, Recipe(5, None, 20, 1), 1), 1).places)
    assert (np.diff(sizes) <= 0).all()


def test_over_clustering_then_merging_finds_groups_that_kmeans_alone_splits() -> None:
    from sklearn.metrics import adjusted_rand_score

    vectors, groups = make_groups(20, 50)
    alone = style_fit.label(vectors, style_fit.fit(vectors, Recipe(20, None, 20, 1), 3), 1).places
    merged = style_fit.label(vectors, style_fit.fit(vectors, Recipe(20, 80, 20, 1), 3), 1).places
    assert adjusted_rand_score(groups, alone) < 0.95
    assert adjusted_rand_score(groups, merged) == 1.0


def test_a_merge_weighs_centres_by_their_sizes() -> None:
    centres = np.array([[0, 0], [1, 0], [9, 0]], np.float32)
    places, sizes = style_fit.merge(centres, np.array([3, 1, 5]), 2)
    assert places.tolist() == [[0.25, 0], [9, 0]] and sizes.tolist() == [4, 5]
    # Ward: two small clusters that lie apart cost less than a large pair that lies near
    places, sizes = style_fit.merge(np.array([[0, 0], [1, 0], [5, 0], [7, 0]], np.float32), np.array([900, 900, 1, 1]), 3)
    assert sizes.tolist() == [900, 900, 2]


def test_stability_is_one_for_groups_that_are_there_and_low_for_noise() -> None:
    recipe = Recipe(4, 16, 20, 1)
    vectors, _ = make_groups(4, 100)
    places = style_fit.label(vectors, style_fit.fit(vectors, recipe, 1), 1).places
    assert list(style_fit.other_seeds(vectors, places, recipe, 1, 2)) == [1.0, 1.0]
    again = list(style_fit.resamples(vectors, places, recipe, 1, 2, 0.99))
    assert [index for index, _ in again] == [1.0, 1.0] and all(far < 0.1 for _, far in again)
    noise = np.random.default_rng(0).normal(size=(400, WIDTH)).astype(np.float32)
    places = style_fit.label(noise, style_fit.fit(noise, recipe, 1), 1).places
    assert max(style_fit.other_seeds(noise, places, recipe, 1, 2)) < 0.5


def test_leakage_is_the_share_of_a_words_uncertainty_that_clusters_take_away() -> None:
    places = np.repeat(np.arange(4), 100)
    words = {"source": np.where(places < 2, "a", "b"), "coin": np.random.default_rng(0).integers(0, 2, 400), "all": np.ones(400)}
    told = style_fit.leakage(places, words, 0)
    assert told["source"][0] == pytest.approx(1.0) and told["source"][1] < 0.05
    assert told["coin"][0] < 0.05
    assert "all" not in told  # a word that all have tells nothing


def test_sizes_have_an_entropy_of_one_when_all_are_equal() -> None:
    assert style_fit.describe_sizes(np.repeat(np.arange(4), 5), 4)["size_entropy"] == pytest.approx(1.0)
    told = style_fit.describe_sizes(np.array([0, 0, 0, 2]), 4)
    assert (told["size_largest"], told["size_smallest"], told["empty"]) == (3, 0, 2)


def test_a_new_style_is_one_more_centre_under_an_id_never_used_and_all_others_stay_bit_for_bit() -> None:
    vectors, _ = make_groups(4, 20)
    centres = style_centres.Centres(style_fit.fit(vectors, Recipe(4, None, 5, 1), 1), np.array([0, 1, 2, 5]), 2.0, "e", "d", 9, (2,))
    new = style_fit.extend(centres, vectors[:3], {"how": "add"}, "d2")
    assert new.ids.tolist() == [0, 1, 2, 5, 9] and new.next_id == 10
    assert new.centres[:4].tobytes() == centres.centres.tobytes()
    assert new.centres[4] == pytest.approx(vectors[:3].mean(axis=0), abs=1e-6)
    assert (new.block, new.none_above, new.encoder, new.history) == ((2,), 2.0, "e", ({"cluster": 9, "how": "add"},))
