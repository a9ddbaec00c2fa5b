"""embeddings + registered classifiers -> classes, rejects: the class of every embedded image, or `other`, and the probabilities of all.

    spark-submit --jars '.cache/jars/*.jar' jobs/classify.py --config conf/demo.yaml

One entry of `classify` is one classifier; its alias is resolved to a version once, at the start. A new champion recomputes its rows only.
Cost: some 50,000 vectors/s a core in the kernel (width 768, 8 classes). A probability that is no number gets the reject `not_finite`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.enrichment import Classify
from conf.section import Mistake
from conf.settings import Settings
from jobs import command, embedding, progress, registry, rejects, waves
from jobs.lake import Lake
from jobs.registry import Head
from jobs.waves import Projection
from udfs import class_head
from udfs import classify as kernel
from udfs.embed import ORIGINAL

NAME = "classify"


def run(lake: Lake, settings: Settings, plan_only: bool = False, heads: Sequence[Head] | None = None) -> None:
    """`heads`: the champions of settings.classify, where the caller has resolved them."""
    heads = champions(settings) if heads is None else heads
    if plan_only:
        print(progress.estimate(lake, NAME, sum(pending(lake, head).count() for head in heads)))
        return
    with waves.stage(lake, NAME, settings, tables(lake, settings)) as stage:
        counts = [pending(lake, head).count() for head in heads]  # after the stage has landed what an earlier run had staged
        if not any(counts):
            print(f"{NAME}: nothing to do")
            return
        with progress.of(lake, NAME, sum(counts)) as told:
            for number, (head, count) in enumerate(zip(heads, counts, strict=True)):
                if count:
                    with told.wave(number, len(heads), count):
                        stage.run_whole(compute(pending(lake, head), head), number)


def champions(settings: Settings) -> list[Head]:
    """The version of each entry that classifies now."""
    labels = [entry.label for entry in settings.classify]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise Mistake(f"classify: two entries of the kind {twice[0]!r}; an image has one class of a kind, name one classifier")
    return [champion(settings, entry) for entry in settings.classify]


def champion(settings: Settings, entry: Classify) -> Head:
    """An entry -> its version now. Raises Mistake when there is none, or it is for other labels or reads vectors that are not embedded here."""
    trainer = f"training.train_classifier EXPORT --config FILE --set train_classifier.model={entry.model} --set train_classifier.label={entry.label}"
    head = registry.resolve(settings.mlflow, entry.model, entry.alias, trainer)
    about, ours = class_head.read_about(head.weights), embedding.outputs(settings)
    if about.label != entry.label:
        raise Mistake(f"classify: {head.model} version {head.version} was trained on labels of kind {about.label!r}, given {entry.label!r}")
    if head.encoder_fingerprint not in ours.values():
        raise Mistake(
            f"{head.model} version {head.version} was trained on vectors {head.encoder_fingerprint}, this config embeds {sorted(ours.values())}; "
            f"train a classifier on these vectors (python -m {trainer}) and make it the {entry.alias}, or set `embed` to what it was trained on"
        )
    return head


def fingerprint(head: Head) -> str:
    return f"{head.model}:{head.sha256[:12]}:{class_head.KERNEL_VERSION}/{head.encoder_fingerprint}"


def pending(lake: Lake, head: Head) -> DataFrame:
    """Vectors of the head's encoder that it has not classified -> (image_id, vector)."""
    vectors = lake.read("embeddings").where((F.col("view") == ORIGINAL) & (F.col("fingerprint") == head.encoder_fingerprint))
    done = lake.read("classes").where(F.col("fingerprint") == fingerprint(head)).select("image_id")
    settled = rejects.settled_images(lake, NAME, fingerprint(head))
    return vectors.select("image_id", "vector").join(done, "image_id", "left_anti").join(settled, "image_id", "left_anti")


def compute(vectors: DataFrame, head: Head) -> DataFrame:
    """(image_id, vector) -> staged rows (udfs.classify.SCHEMA and which head it was)."""
    told = {
        "fingerprint": fingerprint(head),
        "label": class_head.read_about(head.weights).label,
        "model": head.model,
        "model_version": head.version,
        "embedding_fingerprint": head.encoder_fingerprint,
    }
    rows = vectors.mapInPandas(partial(kernel.classify, weights=head.weights), kernel.SCHEMA)
    return rows.withColumns({name: F.lit(value) for name, value in told.items()})


def tables(lake: Lake, settings: Settings) -> dict[str, Projection]:
    def rejects_of(staged: DataFrame, run: str) -> DataFrame | None:
        return rejects.of_images(lake, staged, NAME, run, settings.waves.attempts)

    def classes_of(staged: DataFrame, run: str) -> DataFrame:
        return staged.where(F.col("reject").isNull()).withColumn("run", F.lit(run))

    return {"rejects": rejects_of, "classes": classes_of}


if __name__ == "__main__":
    command.main(__doc__, run)
