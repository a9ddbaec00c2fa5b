"""embeddings -> a registered set of style centres, with its stability, sizes and leakage in MLflow.

    spark-submit --jars '.cache/jars/*.jar' jobs/fit_styles.py --config conf/demo.yaml

k-means (faiss) over a seeded sample of the stored vectors of `styles.encoder`: those with the smallest hash of seed and id, so that a
grown lake changes the sample little. The first version is the champion, later ones are candidates. A version is keyed by its settings
and by the sample: a second run finds nothing to do. With 2048 centres and 524,288 vectors of 768 numbers: 0.8 GB (as stored) and 1.6 GB
(fp32) of Python's memory on the driver, 4 GB at the peak, none of the JVM's; a fit takes about 430 CPU-seconds by the 1.7 measured for a
256th of its work, and there are 1 + 2 x styles.stability_runs of them. A vector that is not finite is left out and counted.

Metrics of the run: `stability_seeds_*`, `stability_resamples_*` (adjusted Rand index over other seeds, and over 80 % resamples on these
80 %), `unseen_none` (share of the other 20 % beyond the threshold of its resample), `size_*`, and leakage: I(cluster; word) / H(word),
the share of a word's uncertainty that the cluster takes away, for the presence of each of the most frequent tags and for the source,
beside the same with shuffled clusters (`*_chance`).
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, Styles, digest
from jobs import centres, command, fitted, snapshot, style_sample, waves
from jobs.fitted import Fitted
from jobs.lake import Lake
from jobs.progress import duration
from jobs.style_sample import Sample
from udfs import style_centres, style_fit
from udfs.opener import to_uri
from udfs.style_centres import Centres
from udfs.style_fit import Labelled, Recipe

NAME = "fit-styles"
MATTERS = {"clusters", "over_cluster", "sample", "iterations", "seed", "none_quantile"}


def run(lake: Lake, settings: Settings, plan_only: bool = False) -> None:
    drawn = style_sample.draw(lake, settings)
    told = drawn.agg(F.count("*").alias("n"), snapshot.content(["image_id"]).alias("content")).first()
    assert told is not None
    count = min(told["n"], settings.styles.sample)
    check_enough(settings, count)
    block = read_block(settings, lake)
    centres.check_block(set(range(settings.styles.clusters)), block, "styles.block")
    identity = digest(recipe(settings, block), centres.vectors_fingerprint(settings), told["n"], str(told["content"]))
    if made := fitted.find(settings.mlflow, settings.styles.model, identity):
        print(f"{NAME}: nothing to do, {made.name} was fitted on these {count} vectors")
        return
    if plan_only:
        fits = 1 + 2 * settings.styles.stability_runs
        print(f"{NAME}: {count} vectors -> {settings.styles.clusters} clusters, {fits} fits, pending; see the command's help for the time")
        return
    with waves.stage(lake, NAME, settings, {}) as stage:
        sample = style_sample.gather(stage, settings, drawn)
        check_enough(settings, len(sample.vectors))  # those that are not finite are out
        made = fit(settings, sample, identity, block)
    print(f"{NAME}: {centres.tell_alias(settings, made)}", flush=True)


def check_enough(settings: Settings, count: int) -> None:
    """Raises Mistake when 80 % of so many vectors cannot be clustered."""
    clusters = settings.styles.over_cluster or settings.styles.clusters
    fewest = math.ceil(clusters / style_fit.RESAMPLED)
    if count < fewest:
        raise Mistake(
            f"fit styles: {count} images have a vector of {centres.encoder(settings)}; {clusters} clusters need at least {fewest}, for the fit is "
            f"repeated on 80 % of them. Set styles.clusters (about one for 16 images or more), or embed more images"
        )


def ensure(lake: Lake, settings: Settings) -> None:
    """For the whole job: fits when there is no version of the alias, nor a candidate, by these settings on these vectors. Images that came since make
    no new set: their styles are told by the centres that are there, until someone runs fit_styles.
    """
    wanted = {"recipe": recipe(settings, read_block(settings, lake)), "encoder_fingerprint": centres.vectors_fingerprint(settings)}
    for alias in dict.fromkeys((settings.styles.alias, fitted.CANDIDATE)):
        known = fitted.latest(settings.mlflow, settings.styles.model, alias)
        if known is not None and wanted.items() <= known.items():
            print(f"{NAME}: nothing to do, {settings.styles.model} has a {alias} by these settings on these vectors")
            return
    run(lake, settings)


def recipe(settings: Settings, block: set[int]) -> str:
    """Digest of what makes a set, but for the vectors."""
    return digest(style_fit.FIT_VERSION, style_centres.FORMAT, settings.styles.model_dump(include=MATTERS), sorted(block))


def read_block(settings: Settings, lake: Lake) -> set[int]:
    """`styles.block` -> ids. Raises Mistake for what is no list of them."""
    if settings.styles.block is None:
        return set()
    uri = to_uri(settings.styles.block)
    if not lake.opener.exists(uri):
        raise Mistake(f"styles.block: no file at {settings.styles.block}; expected cluster ids, one a line")
    lines = [line.partition("#")[0].strip() for line in lake.opener.read(uri).decode().splitlines()]
    if wrong := [line for line in lines if line and not re.fullmatch(r"(style_cluster_)?\d+", line)]:
        raise Mistake(f"styles.block: {settings.styles.block}: given {wrong[0]!r}, expected cluster ids, one a line")
    return {int(line.removeprefix("style_cluster_")) for line in lines if line}


def fit(settings: Settings, sample: Sample, identity: str, block: set[int]) -> Fitted:
    """Sample -> the registered version."""
    options = settings.styles
    made = Recipe(options.clusters, options.over_cluster, options.iterations, len(os.sched_getaffinity(0)))
    n, width = sample.vectors.shape
    print(f"{NAME}: {n} vectors of {width} numbers, {options.clusters} clusters, {made.threads} threads", flush=True)
    clock = Clock(1 + 2 * options.stability_runs)
    with clock.fit("the centres"):
        points = style_fit.fit(sample.vectors, made, options.seed)
        labelled = style_fit.label(sample.vectors, points, made.threads)
    metrics, plots = measure(options, sample, made, points, labelled, clock)
    fact = {"how": "fit", "digest": identity, "clusters": options.clusters, "images": n}
    whole = Centres(
        centres=points,
        ids=np.arange(len(points), dtype=np.int64),
        none_above=style_fit.threshold(labelled.distances, options.none_quantile),
        encoder=centres.vectors_fingerprint(settings),
        digest=identity,
        next_id=len(points),
        block=tuple(sorted(block)),
        history=(fact,),
    )
    params = options.model_dump(include=MATTERS | {"stability_runs"}) | {"threads": made.threads, "encoder": centres.encoder(settings)}
    metrics |= {
        "none_above": whole.none_above,
        "clusters": len(points),
        "images": n,
        "not_finite": sample.not_finite,
        "blocked": len(block),
    }
    tags = {"encoder_fingerprint": whole.encoder, "recipe": recipe(settings, block)}
    return fitted.register(settings.mlflow, options.model, style_centres.pack(whole), identity, params, metrics, tags, plots)


def measure(
    options: Styles, sample: Sample, made: Recipe, points: np.ndarray, labelled: Labelled, clock: Clock
) -> tuple[dict[str, float], dict[str, bytes]]:
    """-> (metrics, artifacts) of a fit: sizes, stability, leakage."""
    metrics = style_fit.describe_sizes(labelled.places, len(points))
    metrics |= {f"distance_p{q}": float(np.percentile(labelled.distances, q)) for q in (5, 50, 95)}
    seeds, resampled, unseen = [], [], []
    others = style_fit.other_seeds(sample.vectors, labelled.places, made, options.seed, options.stability_runs)
    again = style_fit.resamples(sample.vectors, labelled.places, made, options.seed, options.stability_runs, options.none_quantile)
    for number in range(1, options.stability_runs + 1):
        with clock.fit(f"another seed ({number})"):
            seeds.append(next(others))
        with clock.fit(f"80 % of the sample ({number})"):
            index, far = next(again)
            resampled.append(index)
            unseen.append(far)
    for name, values in (("seeds", seeds), ("resamples", resampled)):
        metrics |= {f"stability_{name}_mean": float(np.mean(values)), f"stability_{name}_least": min(values)}
    metrics["unseen_none"] = float(np.mean(unseen))
    leaked = style_fit.leakage(labelled.places, sample.tags, options.seed)
    if leaked:
        real, chance = (np.array(values) for values in zip(*leaked.values(), strict=True))
        metrics |= {"leakage_tags": float(real.mean()), "leakage_tags_most": float(real.max()), "leakage_tags_chance": float(chance.mean())}
    by_source = style_fit.leakage(labelled.places, {"source": sample.sources}, options.seed)
    if "source" in by_source:  # one source alone cannot leak
        metrics |= {"leakage_source": by_source["source"][0], "leakage_source_chance": by_source["source"][1]}
    told = {
        "leakage.json": {name: {"explained": real, "by_chance": chance} for name, (real, chance) in (leaked | by_source).items()},
        "stability.json": {"seeds": seeds, "resamples": resampled, "unseen_none": unseen},
        "sizes.json": np.bincount(labelled.places, minlength=len(points)).tolist(),
    }
    return metrics, {name: _json(value) for name, value in told.items()}


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


class Clock:
    """Says after each fit how long it took, and how long the rest will take at that pace."""

    def __init__(self, fits: int) -> None:
        self._fits, self._done, self._start = fits, 0, time.monotonic()

    @contextmanager
    def fit(self, what: str) -> Iterator[None]:
        print(f"{NAME}: fit {self._done + 1} of {self._fits}: {what}", flush=True)
        yield
        self._done += 1
        spent = time.monotonic() - self._start
        left = f", about {duration(spent / self._done * (self._fits - self._done))} left" if self._done < self._fits else ""
        print(f"{NAME}: {self._done} of {self._fits} fits in {duration(spent)}{left}", flush=True)


if __name__ == "__main__":
    command.main(__doc__, run)
