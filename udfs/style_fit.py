"""A sample of vectors -> style centres, and how good they are: sizes, stability, leakage. numpy, faiss and scikit-learn; no Spark.

The same sample in the same order, seed and number of threads gives the same centres, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from udfs import style_centres
from udfs.style_centres import Centres, Finder

FIT_VERSION = 1  # raise it when the same sample gives other centres
RESAMPLED = 0.8  # share of the sample in a resample


class Recipe(NamedTuple):
    """How centres are made: `over` centres are fitted and the nearest merged until `clusters` are left; None: none are merged."""

    clusters: int
    over: int | None
    iterations: int
    threads: int


class Labelled(NamedTuple):
    """The place of each vector's nearest centre (int64), and its Euclidean distance (float32)."""

    places: np.ndarray
    distances: np.ndarray


def fit(vectors: np.ndarray, recipe: Recipe, seed: int) -> np.ndarray:
    """float32 [n, width] -> centres, float32 [clusters, width], the one with most vectors first."""
    centres = kmeans(vectors, recipe.over or recipe.clusters, recipe.iterations, seed, recipe.threads)
    sizes = np.bincount(label(vectors, centres, recipe.threads).places, minlength=len(centres))
    if recipe.over is not None:
        centres, sizes = merge(centres, sizes, recipe.clusters)
        sizes = np.bincount(label(vectors, centres, recipe.threads).places, minlength=len(centres))
    return np.ascontiguousarray(centres[np.argsort(-sizes, kind="stable")])


def kmeans(vectors: np.ndarray, clusters: int, iterations: int, seed: int, threads: int) -> np.ndarray:
    """float32 [n, width] -> float32 [clusters, width], by Lloyd's iterations from randomly drawn vectors (faiss)."""
    import faiss

    faiss.omp_set_num_threads(threads)
    # all vectors of the sample count, however many a centre: faiss would draw 256 a centre, and warn below 39
    options = {"niter": iterations, "seed": seed, "min_points_per_centroid": 1, "max_points_per_centroid": 1 + len(vectors) // clusters}
    fitted = faiss.Kmeans(vectors.shape[1], clusters, **options)
    fitted.train(np.ascontiguousarray(vectors, dtype=np.float32))
    return np.asarray(fitted.centroids, dtype=np.float32)


def merge(centres: np.ndarray, sizes: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres and their sizes -> `clusters` of them, by merging at each step the two that cost least.

    Ward's cost, n m / (n + m) |a - b|^2: what the merge adds to the sum of squared distances. Each keeps its cheapest partner, so that
    no k x k matrix is held; only those whose partner was merged look again, because a merge never makes a cheaper partner than its parts
    were (Ward's cost is reducible).
    """
    places, weights = centres.astype(np.float64), np.maximum(sizes, 1).astype(np.float64)
    norms = np.square(places).sum(axis=1)
    alive = np.ones(len(places), bool)
    nearest, costs = np.zeros(len(places), np.int64), np.zeros(len(places))

    def look(some: np.ndarray) -> None:
        """Finds the cheapest partner of each."""
        apart = norms[some, None] + norms - 2 * places[some] @ places.T
        cost = apart * (weights[some, None] * weights / (weights[some, None] + weights))
        cost[:, ~alive] = np.inf
        cost[np.arange(len(some)), some] = np.inf
        nearest[some], costs[some] = cost.argmin(axis=1), cost.min(axis=1)

    for start in range(0, len(places), 256):
        look(np.arange(start, min(start + 256, len(places))))
    for _ in range(len(places) - clusters):
        kept = int(costs.argmin())
        gone = int(nearest[kept])
        whole = weights[kept] + weights[gone]
        places[kept] = (places[kept] * weights[kept] + places[gone] * weights[gone]) / whole
        norms[kept], weights[kept] = np.square(places[kept]).sum(), whole
        alive[gone], costs[gone] = False, np.inf
        look(np.flatnonzero(alive & (np.isin(nearest, (kept, gone)) | (np.arange(len(places)) == kept))))
    return places[alive].astype(np.float32), weights[alive].astype(np.int64)


def label(vectors: np.ndarray, centres: np.ndarray, threads: int) -> Labelled:
    """Vectors x centres -> the nearest, as `style_centres` finds it."""
    finder = Finder(Centres(centres, np.arange(len(centres)), np.inf, "", "", len(centres)), threads)
    found = [finder.find(vectors[start : start + 2**16]) for start in range(0, len(vectors), 2**16)]
    return Labelled(np.concatenate([one.ids[:, 0] for one in found]), np.concatenate([one.distances[:, 0] for one in found]))


def describe_sizes(places: np.ndarray, clusters: int) -> dict[str, float]:
    """-> sizes of the clusters in the sample; size_entropy: 1 when all are equal, 0 when one has all."""
    sizes = np.bincount(places, minlength=clusters)
    shares = sizes[sizes > 0] / sizes.sum()
    entropy = float(-(shares * np.log(shares)).sum() / np.log(clusters))
    return {
        "size_smallest": float(sizes.min()),
        "size_median": float(np.median(sizes)),
        "size_largest": float(sizes.max()),
        "size_entropy": entropy,
        "empty": float((sizes == 0).sum()),
    }


def other_seeds(vectors: np.ndarray, places: np.ndarray, recipe: Recipe, seed: int, runs: int) -> Iterator[float]:
    """-> the adjusted Rand index of the fit's clusters to those of each other seed: 1 the same, 0 as by chance."""
    from sklearn.metrics import adjusted_rand_score

    for run in range(1, runs + 1):
        other = label(vectors, fit(vectors, recipe, seed + run), recipe.threads).places
        yield float(adjusted_rand_score(places, other))


def resamples(
    vectors: np.ndarray, places: np.ndarray, recipe: Recipe, seed: int, runs: int, quantile: float
) -> Iterator[tuple[float, float]]:
    """-> of each fit on 80 % of the sample: its adjusted Rand index to the fit's clusters on these 80 %, and the share of the other
    20 % that lies beyond its own threshold: what the threshold says of vectors that the centres have not seen.
    """
    from sklearn.metrics import adjusted_rand_score

    for run in range(1, runs + 1):
        inside = np.zeros(len(vectors), bool)
        inside[np.random.default_rng([seed, run]).permutation(len(vectors))[: round(RESAMPLED * len(vectors))]] = True
        mine = vectors[inside]
        centres = fit(mine, recipe, seed)
        seen = label(mine, centres, recipe.threads)
        unseen = label(vectors[~inside], centres, recipe.threads)
        far = np.mean(unseen.distances > np.quantile(seen.distances, quantile)) if len(unseen.distances) else 0.0
        yield float(adjusted_rand_score(places[inside], seen.places)), float(far)


def explained(places: np.ndarray, words: np.ndarray) -> float | None:
    """Clusters and a word of each image -> I(cluster; word) / H(word): the share of the word's uncertainty that the cluster takes away.

    None when all have the same word. Many small clusters explain something by chance: compare with shuffled clusters.
    """
    from sklearn.metrics import mutual_info_score

    counts = np.unique(words, return_counts=True)[1] / len(words)
    entropy = float(-(counts * np.log(counts)).sum())
    return float(mutual_info_score(places, words) / entropy) if len(counts) > 1 else None


def leakage(places: np.ndarray, words: Mapping[str, np.ndarray], seed: int) -> dict[str, tuple[float, float]]:
    """Name -> (explained, the same with the clusters shuffled: what chance gives)."""
    shuffled = np.random.default_rng(seed).permutation(places)
    told = {name: (explained(places, each), explained(shuffled, each)) for name, each in words.items()}
    return {name: (real, chance) for name, (real, chance) in told.items() if real is not None and chance is not None}


def threshold(distances: np.ndarray, quantile: float) -> float:
    """Distances of the sample to their centres -> `none_above`."""
    return float(np.quantile(distances.astype(np.float64), quantile))


def extend(centres: Centres, vectors: np.ndarray, note: Mapping[str, object], digest: str) -> Centres:
    """A set and the vectors of a new style -> the set with their mean as one more centre, under the next free id; the rest as it was."""
    mean = vectors.astype(np.float64).mean(axis=0).astype(np.float32)
    return style_centres.Centres(
        centres=np.concatenate([centres.centres, mean[None]]),
        ids=np.append(centres.ids, np.int64(centres.next_id)),
        none_above=centres.none_above,
        encoder=centres.encoder,
        digest=digest,
        next_id=centres.next_id + 1,
        block=centres.block,
        history=(*centres.history, {"cluster": centres.next_id, **note}),
    )
