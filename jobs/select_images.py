"""images and what is known of them -> decisions (one row for EVERY image, all rules it failed) and a frozen selection.

    spark-submit --jars '.cache/jars/*.jar' jobs/select_images.py --config conf/demo.yaml

The rules are YAML (`select`): floors, maxima, allowed and excluded words, caps (of AI-generated images at most so many a style, say) and a
seeded limit. Two rules stand always: an image that any of its sources has opted out is dropped (`opted_out`), and one that is denied is dropped
for that alone (`denied`). Same tables, same rules, same selection: its id is the digest of the rules and of the values they ask for, and one
that is there is not made again. An image without a value fails the rules over that value, named, but for
`none_of`: what is not known to be there is not there (`within` asks for a value). Cost: a join of narrow tables, no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from conf.build import Select
from conf.section import Mistake
from conf.settings import Settings, digest, load_detector, load_encoder
from jobs import (
    assign_styles,
    caption_sample,
    centres,
    classify,
    command,
    deny_lists,
    embed,
    embedding,
    facts,
    flag,
    score,
    snapshot,
    waves,
)
from jobs.lake import Lake
from jobs.registry import Head
from jobs.waves import Projection
from udfs import class_head
from udfs.embed import PIXELS

NAME = "select"
OPTED_OUT = Select.Rule(name="opted_out", value="opt_out", none_of=("true",))
DENIED = Select.Rule(name="denied", value="denied", none_of=("true",))
STANDING = (OPTED_OUT, DENIED)
Keep = Callable[[DataFrame, str], DataFrame]
FAILED = "array<struct<rule:string,value:string,bound:string,version:string>>"


def run(lake: Lake, settings: Settings, plan_only: bool = False, head: Head | None = None) -> None:
    """`head`: the champion where the caller has resolved it."""
    head = head or score.champion(settings)
    _demand(lake, settings, head)
    scores = score.fingerprint(head)
    versions = lake.versions(facts.TABLES)
    selection = identity(lake, settings, scores, versions)
    if plan_only:
        joined = ", ".join(facts.tables_read(facts.used(settings.select)))
        told = "is there, nothing to do" if is_made(lake, selection) else f"is to be made: a join of {joined}, no model"
        print(f"{NAME}: selection {selection} {told}")
        return
    with waves.stage(lake, NAME, settings, TABLES) as stage:
        if is_made(lake, selection):
            print(f"{NAME}: nothing to do, selection {selection} is there")
            return
        values = facts.used(settings.select)
        known = facts.gather(lake, settings, values, scores, versions, made_by(settings, values))
        decided = decide(known, settings.select, stage.freeze)
        stage.run_whole(decided.withColumns({"selection": F.lit(selection), "name": F.lit(settings.select.name)}))
    kept = lake.read("selections").where(F.col("selection") == selection).count()
    print(f"{NAME}: selection {selection} keeps {kept} of {lake.read('images', versions['images']).count()} images")


def _demand(lake: Lake, settings: Settings, head: Head) -> None:
    """Raises Mistake when a stage has not given yet what the selection asks for: a missing value must not be a stage that was left out."""
    deny_lists.require_applied(lake, settings, "select")
    values = facts.used(settings.select)
    found = late(lake, settings, values, head)
    if "embed" in found:
        raise Mistake(
            "select: images have no vector, detection or pixel statistics by this config yet; run the stages embed and score first"
        )
    if "score" in found:
        raise Mistake(f"select: images have no score by {head.model} version {head.version} yet; run the stage score first")
    if found:
        asked = ", ".join(facts.tables_used(values))
        raise Mistake(f"select: rules or caps ask for {asked}, and images have none yet; run the stages {', '.join(found)} first")


def late(lake: Lake, settings: Settings, values: Sequence[str], head: Head | None) -> list[str]:
    """-> the stages that have not given yet what rules over these values ask for, in their order; where vectors or scores lack, these alone, as the
    others come after them. head: the scorer whose scores are asked for; None: none are. Each is a look for one pending row.
    """
    asked, versions = facts.tables_used(values), {(facts.NUMBERS | facts.WORDS)[value] for value in values}
    heads = _heads(settings) if {"flags", "classes"} & set(asked) else []
    outputs = [PIXELS] if head is not None or "pixels_version" in versions else []
    outputs += [load_encoder(settings.encoder).name] if head is not None or heads else []
    outputs += [load_detector(name).name for name in settings.embed.detectors] if "flags" in asked else []
    outputs += [centres.encoder(settings)] if "styles" in asked else []
    needed = F.array(*[F.lit(name) for name in outputs])
    if outputs and not embed.pending(lake, settings).where(F.arrays_overlap("untried", needed)).isEmpty():
        return ["embed"] if head is None else ["embed", "score"]
    if head is not None and not score.pending(lake, settings, head).isEmpty():
        return ["score"]
    found = ["classify"] if any(not classify.pending(lake, one).isEmpty() for one in heads) else []
    if "styles" in asked and not assign_styles.pending(lake, settings, centres.current(settings)).isEmpty():
        found.append("assign_styles")
    if "flags" in asked and not flag.pending(lake, flag.evidence(settings, heads)).isEmpty():
        found.append("flag")
    if "captions" in asked and not caption_sample.pending(lake, settings).isEmpty():
        found.append("caption")
    return found


def made_by(settings: Settings, values: Sequence[str]) -> dict[str, str]:
    """-> table of facts.MADE that the values live in -> the fingerprint of the rows that count now."""
    asked, told = facts.tables_used(values), {}
    heads = _heads(settings) if {"flags", "classes"} & set(asked) else []
    if "flags" in asked:
        told["flags"] = flag.evidence(settings, heads).fingerprint
    if "styles" in asked:
        told["styles"] = centres.fingerprint(centres.current(settings), settings)
    if "classes" in asked:
        style = [one for one in heads if class_head.read_about(one.weights).label == flag.STYLE]
        told["classes"] = classify.fingerprint(style[0])
    if "captions" in asked:
        told["captions"] = caption_sample.fingerprints(settings)
    return told


def _heads(settings: Settings) -> list[Head]:
    """The classifiers that a selection may ask."""
    return [classify.champion(settings, entry) for entry in settings.classify if entry.label in (flag.STYLE, flag.AI)]


def identity(lake: Lake, settings: Settings, scores: str, versions: dict[str, int]) -> str:
    """The digest of the rules and of the facts they are over: commits that change no fact make no new selection."""
    values = facts.used(settings.select)
    made = made_by(settings, values)
    asked = digest(lake.root, settings.lake, *STANDING, settings.select, scores, embedding.outputs(settings)[PIXELS], made, versions)
    if asked not in _identities:  # a pass over the facts: several stages of one session ask the same
        _identities[asked] = _summed(facts.gather(lake, settings, values, scores, versions, made), settings, scores, made)
    return _identities[asked]


_identities: dict[str, str] = {}


def _summed(known: DataFrame, settings: Settings, scores: str, made: dict[str, str]) -> str:
    content = snapshot.content(["image_id", *facts.used(settings.select)])
    summed = known.agg(F.count("*").alias("images"), content.alias("content")).first()
    assert summed is not None
    by = (scores, embedding.outputs(settings)[PIXELS], made)
    return digest(*STANDING, settings.select, *by, summed["images"], str(summed["content"]))


def is_made(lake: Lake, selection: str) -> bool:
    return not lake.read("decisions").where(F.col("selection") == selection).isEmpty()


def decide(known: DataFrame, settings: Select, keep: Keep = lambda rows, _: rows) -> DataFrame:
    """facts.gather rows -> (image_id, kept, failed, score), deterministic in the seed.

    keep: (rows, name) -> the same rows, written down, where the caller can: each cap and the limit read them several times.
    """
    rules = (OPTED_OUT, *settings.rules)
    failures = F.filter(F.array(*[failure(rule) for rule in rules]).cast(FAILED), lambda failed: failed.isNotNull())
    denied = failure(DENIED)  # nothing else is told of such an image
    failed = F.when(denied.isNotNull(), F.array(denied).cast(FAILED)).otherwise(failures)
    asked = [F.col(value).alias(f"of_{value}") for value in _of_caps(settings.caps)]
    rows = known.select("image_id", failed.alias("failed"), F.col("score").cast("int").alias("score"), *asked)
    if settings.caps or settings.limit is not None:
        rows = keep(rows, "judged")
    for number, cap in enumerate(settings.caps):
        rows = keep(_capped(rows, cap, settings.seed), f"cap-{number}")
    rows = rows.select("image_id", "failed", "score")
    if settings.limit is not None:
        draw = F.xxhash64(F.lit(settings.seed), "image_id")
        left = rows.where(F.size("failed") == 0).select(F.lit("all").alias("group"), draw.alias("draw"))
        if (row := _last(left, settings.limit).first()) is not None:
            last = row["last"]
            over = _failed("limit", F.hex(draw), f"<= {settings.limit} images (draw {last})", F.lit(f"seed {settings.seed}"))
            beyond = (F.size("failed") == 0) & (draw > F.lit(last))
            rows = rows.withColumn("failed", F.when(beyond, F.array(over)).otherwise(F.col("failed")))
    return rows.withColumn("kept", F.size("failed") == 0)


def _of_caps(caps: Sequence[Select.Cap]) -> list[str]:
    """-> the values that caps ask for, each once."""
    return sorted({cap.value for cap in caps} | {cap.per for cap in caps if cap.per is not None})


def _capped(rows: DataFrame, cap: Select.Cap, seed: int) -> DataFrame:
    """Rows with `failed` and the values of caps -> the same, where those beyond the cap of their group have failed it.

    A group's at_most-th smallest draw is its threshold, one number a group joined back. Images without a group are one group, `none`.
    """
    draw = F.xxhash64(F.lit(seed), "image_id")
    words = F.array(*[F.lit(word) for word in cap.words])
    mine = (F.size("failed") == 0) & F.coalesce(F.arrays_overlap(f"of_{cap.value}", words), F.lit(False))
    named = F.concat_ws(", ", f"of_{cap.per}") if cap.per is not None else F.lit("all")
    rows = rows.withColumns({"mine": mine, "draw": draw, "group": F.when(named == "", "none").otherwise(named)})
    last = _last(rows.where("mine"), max(cap.at_most, 1))
    rows = rows.join(F.broadcast(last) if cap.per is None else last, "group", "left")  # one group: a shuffle by it would be one task
    beyond = F.col("mine") & (F.col("draw") > F.col("last") if cap.at_most else F.lit(True))
    per = f" a {cap.per}" if cap.per is not None else ""
    bound = F.concat(
        F.lit(f"<= {cap.at_most} of {cap.value} {', '.join(cap.words)}{per} ("), "group", F.lit(": draw "), F.col("last"), F.lit(")")
    )
    over = _failed(cap.name, F.hex("draw"), bound, F.lit(f"seed {seed}"))
    rows = rows.withColumn("failed", F.when(F.coalesce(beyond, F.lit(False)), F.array(over).cast(FAILED)).otherwise(F.col("failed")))
    return rows.drop("mine", "draw", "group", "last")


def _last(rows: DataFrame, at_most: int) -> DataFrame:
    """(group, draw) -> group, `last`: its at_most-th smallest draw, of the groups that have so many. A group is counted in 65,536 ranges of
    draws first, so that no task sorts more than one range of it.
    """
    ranged = rows.select("group", "draw", F.shiftright("draw", 48).alias("range"))
    upto = F.sum("count").over(Window.partitionBy("group").orderBy("range"))
    counted = ranged.groupBy("group", "range").count().withColumn("upto", upto)
    before = F.col("upto") - F.col("count")
    holding = counted.where((F.col("upto") >= at_most) & (before < at_most)).select(
        "group", "range", (F.lit(at_most) - before).alias("nth")
    )
    inside = ranged.join(holding, ["group", "range"])
    rank = F.row_number().over(Window.partitionBy("group").orderBy("draw"))
    return inside.withColumn("rank", rank).where(F.col("rank") == F.col("nth")).select("group", F.col("draw").alias("last"))


TABLES: dict[str, Projection] = {
    "selections": lambda staged, run: staged.where("kept").withColumn("run", F.lit(run)),
    "decisions": lambda staged, run: staged.withColumn("run", F.lit(run)),
}


def failure(rule: Select.Rule) -> Column:
    """NULL when the image passes, else what `decisions.failed` says of it."""
    value = F.col(rule.value)
    if rule.value in facts.NUMBERS:
        version = facts.NUMBERS[rule.value]
        passes, bounds = F.lit(True), []
        if rule.at_least is not None:
            passes, bounds = passes & (value >= rule.at_least), [f">= {rule.at_least:g}"]
        if rule.at_most is not None:
            passes, bounds = passes & (value <= rule.at_most), [*bounds, f"<= {rule.at_most:g}"]
        shown, bound = F.regexp_replace(value.cast("string"), r"\.0$", ""), " and ".join(bounds)
    else:
        version = facts.WORDS[rule.value]
        words = F.array(*[F.lit(word) for word in rule.within or rule.none_of or ()])
        if rule.within is not None:
            passes, bound = (F.size(value) > 0) & (F.size(F.array_except(value, words)) == 0), f"only {', '.join(rule.within)}"
        else:
            passes, bound = F.coalesce(~F.arrays_overlap(value, words), F.lit(True)), f"none of {', '.join(rule.none_of or ())}"
        shown = F.when(F.size(value) > 0, F.concat_ws(", ", value))
    return F.when(~F.coalesce(passes, F.lit(False)), _failed(rule.name, shown, bound, F.col(version)))


def _failed(rule: str, value: Column, bound: str | Column, version: Column) -> Column:
    return F.struct(
        F.lit(rule).alias("rule"),
        F.coalesce(value, F.lit("no value")).alias("value"),
        (F.lit(bound) if isinstance(bound, str) else bound).alias("bound"),
        F.coalesce(version, F.lit("none")).alias("version"),
    )


if __name__ == "__main__":
    command.main(__doc__, run)
