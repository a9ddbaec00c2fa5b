"""detections, classes, images.ai_marks -> flags: rating, tags, AI-generated, text and watermark of every image, under settings.flags.

    spark-submit --jars '.cache/jars/*.jar' jobs/flag.py --config conf/demo.yaml

An image has a row when every detector of embed.detectors and the classifiers of `style` and `ai_generated` in `classify`, where there are such,
have said their word; one that a detector refused (`rejects`) waits, and fails every rule over a flag but `none_of`. Another threshold, another
version of a detector or classifier: new rows, and no model runs. What is not configured is NULL, and `ai_evidence` says `no detector`.

Strings at edges are counted over all images that the text detectors have seen, when the stage runs; rows that are there keep what was known
then (settings.flags.recount). Copies of one picture count as pictures. Cost: 0.16 CPU-ms an image with 60 tags, and a pass over the images with text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.enrichment import Detector
from conf.section import Mistake
from conf.settings import Settings, digest, load_detector
from jobs import classify, command, deny_lists, embedding, progress, waves
from jobs.lake import Lake
from jobs.registry import Head
from jobs.waves import Projection
from udfs import class_head
from udfs import flags as kernel
from udfs.embed import ORIGINAL

NAME = "flag"
STYLE, AI = "style", "ai_generated"  # kinds of classifiers whose word counts here
IS_AI = "ai"  # the class of AI


class Evidence(NamedTuple):
    """What flags are made from: detectors by name, and the fingerprint of each; classifiers by the kind of their labels."""

    detectors: dict[str, Detector]
    outputs: dict[str, str]
    heads: dict[str, Head]
    fingerprint: str

    @property
    def versions(self) -> str:
        heads = [f"{label} {head.model}:{head.version}" for label, head in sorted(self.heads.items())]
        return "; ".join([*sorted(self.outputs.values()), *heads]) or "the bytes alone"


def run(lake: Lake, settings: Settings, plan_only: bool = False, heads: Sequence[Head] | None = None) -> None:
    """`heads`: the champions of settings.classify, where the caller has resolved them."""
    known = evidence(settings, heads)
    if plan_only:
        count = pending(lake, known).count()
        print(progress.estimate(lake, NAME, count))
        tell_waiting(lake, known, count)
        return
    with waves.stage(lake, NAME, settings, TABLES) as stage:
        stage.run_pending(pending(lake, known), lambda images: compute(lake, images, settings, known))
    tell_waiting(lake, known, 0)


def evidence(settings: Settings, heads: Sequence[Head] | None = None) -> Evidence:
    """What counts under these settings now. Raises Mistake for a threshold that no stored number can answer, or a classifier that is not there."""
    detectors = {one.name: one for one in map(load_detector, settings.embed.detectors)}
    _check_thresholds(settings, detectors)
    outputs = {name: fingerprint for name, fingerprint in embedding.outputs(settings).items() if name in detectors}
    if heads is None:
        heads = [classify.champion(settings, entry) for entry in settings.classify if entry.label in (STYLE, AI)]
    by_label = {class_head.read_about(head.weights).label: head for head in heads}
    by_label = {label: head for label, head in by_label.items() if label in (STYLE, AI)}
    if AI in by_label and IS_AI not in (classes := class_head.read_about(by_label[AI].weights).classes):
        raise Mistake(f"flag: the classifier of {AI} knows the classes {list(classes)}; expected one that is named {IS_AI!r}")
    classifiers = {label: (classify.fingerprint(head), label == AI and trusted(head)) for label, head in by_label.items()}
    told = digest(settings.flags, kernel.KERNEL_VERSION, outputs, {one.name: one.kernel for one in detectors.values()}, classifiers)
    return Evidence(detectors, outputs, by_label, f"{NAME}:{told}")


def _check_thresholds(settings: Settings, detectors: dict[str, Detector]) -> None:
    flags = settings.flags
    if unknown := sorted(set(flags.thresholds) - set(detectors)):
        raise Mistake(f"flags.thresholds: given {unknown}, which embed.detectors {sorted(detectors)} do not name")
    for name, one in detectors.items():
        asked = {"tagger": [flags.thresholds[name]] if name in flags.thresholds else [flags.general, flags.character]}
        asked["text"] = [flags.text_confidence]
        if (lowest := min(asked.get(one.kernel, [1.0]))) < one.keep:
            raise Mistake(
                f"flags: the threshold {lowest:g} is below what detector {name} stores (keep: {one.keep:g}); lower its keep, which runs it anew"
            )


def pending(lake: Lake, known: Evidence) -> DataFrame:
    """Images without flags by this evidence, all of which is there -> (image_id, ai_marks)."""
    lacking = unflagged(lake, known)
    if known.outputs:
        seen = _detections(lake, known).groupBy("image_id").agg(F.count_distinct("fingerprint").alias("outputs"))
        lacking = lacking.join(seen.where(F.col("outputs") == len(known.outputs)).select("image_id"), "image_id", "left_semi")
    for head in known.heads.values():
        classified = lake.read("classes").where(F.col("fingerprint") == classify.fingerprint(head)).select("image_id")
        lacking = lacking.join(classified, "image_id", "left_semi")
    return lacking


def unflagged(lake: Lake, known: Evidence) -> DataFrame:
    """-> (image_id, ai_marks) of the images that have no flags by this evidence, whether or not it is there."""
    done = lake.read("flags").where(F.col("fingerprint") == known.fingerprint).select("image_id")
    return deny_lists.allowed(lake, lake.read("images").select("image_id", "ai_marks")).join(done, "image_id", "left_anti")


def tell_waiting(lake: Lake, known: Evidence, count: int) -> None:
    """Says how many images are neither flagged nor among the `count` pending ones."""
    if waiting := unflagged(lake, known).count() - count:
        print(
            f"{NAME}: {waiting} images wait: a detector or classifier has not seen them, or has refused them (the table rejects says which)"
        )


def compute(lake: Lake, images: DataFrame, settings: Settings, known: Evidence) -> DataFrame:
    """(image_id, ai_marks) -> staged rows of `flags`."""
    seen = _detections(lake, known).withColumn("one", F.struct("detector", "labels", "regions"))
    seen = seen.groupBy("image_id").agg(F.to_json(F.sort_array(F.collect_list("one"))).alias("detections"))
    marks = F.transform("ai_marks", _told)
    rows = images.select("image_id", marks.alias("ai_marks")).join(seen, "image_id", "left")
    for joined in (_style(lake, known), _ai(lake, known), repeated(lake, settings, known)):
        rows = rows.join(joined, "image_id", "left")
    kernels = {name: one.kernel for name, one in known.detectors.items()}
    worker = partial(kernel.flag, options=settings.flags.model_dump(), kernels=kernels)
    columns = ("image_id", "style", "ai_marks", "ai_p", "ai_by", "detections", "repeated")
    told = {"fingerprint": F.lit(known.fingerprint), "versions": F.lit(known.versions)}
    return rows.select(*columns).mapInPandas(worker, kernel.SCHEMA).withColumns(told)


def repeated(lake: Lake, settings: Settings, known: Evidence) -> DataFrame:
    """-> image_id, `repeated`: its strings at an edge that flags.repeated images or more show there."""
    texts = [fingerprint for name, fingerprint in known.outputs.items() if known.detectors[name].kernel == "text"]
    mine = (F.col("view") == ORIGINAL) & F.col("fingerprint").isin(texts) & (F.size("regions") > 0)
    worker = partial(kernel.edge_strings, options=settings.flags.model_dump())
    pairs = (
        lake.read("detections")
        .where(mine)
        .select("image_id", F.to_json("regions").alias("regions"))
        .mapInPandas(worker, kernel.EDGE_SCHEMA)
    )
    counted = pairs.groupBy("string").agg(F.count_distinct("image_id").alias("images"))
    many = counted.where(F.col("images") >= settings.flags.repeated).select("string")
    return pairs.join(many, "string").groupBy("image_id").agg(F.sort_array(F.collect_set("string")).alias("repeated"))


def _told(mark: Column) -> Column:
    """A mark -> one line of its place and the beginning of its text."""
    text = F.substring(F.trim(F.regexp_replace(mark["text"], r"\s+", " ")), 1, 80)
    return F.concat_ws(": ", mark["where"], F.when(text != "", text))


def _detections(lake: Lake, known: Evidence) -> DataFrame:
    mine = (F.col("view") == ORIGINAL) & F.col("fingerprint").isin(list(known.outputs.values()))
    return lake.read("detections").where(mine)


def _style(lake: Lake, known: Evidence) -> DataFrame:
    return _classes(lake, known, STYLE).select("image_id", F.col("class").alias("style"))


def _ai(lake: Lake, known: Evidence) -> DataFrame:
    """-> image_id, ai_p (NULL where the classifier is not to be trusted), ai_by."""
    if AI not in known.heads or not trusted(known.heads[AI]):
        return _classes(lake, known, AI).select("image_id", F.lit(None).cast("double").alias("ai_p"), _named().alias("ai_by"))
    p = F.get(F.filter("probabilities", lambda one: one["class"] == IS_AI), 0)["p"].cast("double")
    return _classes(lake, known, AI).select("image_id", p.alias("ai_p"), _named().alias("ai_by"))


def trusted(head: Head) -> bool:
    """Whether a classifier's held-out images say more than its baselines and than where the images are from (training.evaluate_classifier)."""
    return head.tags.get("beats_baselines") == "true" and head.tags.get("confounded") == "false"


def _named() -> Column:
    return F.concat_ws(":", "model", "model_version")


def _classes(lake: Lake, known: Evidence, label: str) -> DataFrame:
    told = classify.fingerprint(known.heads[label]) if label in known.heads else ""
    return lake.read("classes").where(F.col("fingerprint") == told)


TABLES: dict[str, Projection] = {"flags": lambda staged, run: staged.withColumn("run", F.lit(run))}


if __name__ == "__main__":
    command.main(__doc__, run)
