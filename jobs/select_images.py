"""images and what is known of them -> decisions (one row for EVERY image, all rules it failed) and a frozen selection.

    spark-submit jobs/select_images.py --config conf/demo.yaml

The rules are YAML (`select`): floors, maxima, allowed and excluded words, and a seeded limit. Same tables, same rules, same
selection: its id is their digest, and one that is there is not made again. An image without a value fails the rules over
that value, named. Cost: a join of narrow tables, no model.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.settings import Mistake, Select, Settings, digest
from jobs import command, embedding, facts, score, waves
from jobs.lake import Lake
from jobs.waves import Projection

NAME = "select"


def run(lake: Lake, settings: Settings, plan_only: bool = False) -> None:
    check(settings.select)
    scores = score.fingerprint(score.champion(settings))
    versions = lake.versions(facts.TABLES)
    selection = identity(settings, scores, versions)
    if plan_only:
        told = "is there, nothing to do" if is_made(lake, selection) else f"is to be made: a join of {', '.join(facts.TABLES)}, no model"
        print(f"{NAME}: selection {selection} {told}")
        return
    with waves.stage(lake, NAME, settings, TABLES) as stage:
        if is_made(lake, selection):
            print(f"{NAME}: nothing to do, selection {selection} is there")
            return
        decided = decide(facts.gather(lake, settings, scores, versions), settings.select)
        stage.run_whole(decided.withColumns({"selection": F.lit(selection), "name": F.lit(settings.select.name)}))
    kept = lake.read("selections").where(F.col("selection") == selection).count()
    print(f"{NAME}: selection {selection} keeps {kept} of {lake.read('images', versions['images']).count()} images")


def identity(settings: Settings, scores: str, versions: dict[str, int]) -> str:
    return digest(settings.select, scores, embedding.outputs(settings), versions)


def is_made(lake: Lake, selection: str) -> bool:
    return not lake.read("decisions").where(F.col("selection") == selection).isEmpty()


def check(settings: Select) -> None:
    """Raises Mistake when a rule asks for a value that there is not, or asks it the wrong question."""
    for rule in settings.rules:
        if rule.value not in facts.NUMBERS and rule.value not in facts.WORDS:
            known = sorted(facts.NUMBERS | facts.WORDS)
            raise Mistake(f"select.rules.{rule.name}: value: given {rule.value!r}, allowed {known}")
        numeric = rule.at_least is not None or rule.at_most is not None
        if numeric != (rule.value in facts.NUMBERS):
            fitting = "at_least and at_most" if rule.value in facts.NUMBERS else "any_of or none_of"
            raise Mistake(f"select.rules.{rule.name}: {rule.value} takes {fitting}")


def decide(known: DataFrame, settings: Select) -> DataFrame:
    """facts.gather rows -> (image_id, kept, failed, score), deterministic in the seed."""
    failures = F.filter(F.array(*[_failure(rule) for rule in settings.rules]), lambda failed: failed.isNotNull())
    rows = known.select("image_id", failures.alias("failed"), F.col("score").cast("int").alias("score"))
    if settings.limit is not None:
        draw = F.xxhash64(F.lit(settings.seed), "image_id")
        passing = rows.where(F.size("failed") == 0).select(draw.alias("draw"))
        last = passing.orderBy("draw").offset(settings.limit - 1).limit(1).first()
        if last is not None:
            over = _failed("limit", F.hex(draw), f"<= {settings.limit} images (draw {last['draw']})", F.lit(f"seed {settings.seed}"))
            beyond = (F.size("failed") == 0) & (draw > F.lit(last["draw"]))
            rows = rows.withColumn("failed", F.when(beyond, F.array(over)).otherwise(F.col("failed")))
    return rows.withColumn("kept", F.size("failed") == 0)


TABLES: dict[str, Projection] = {
    "selections": lambda staged, run: staged.where("kept").withColumn("run", F.lit(run)),
    "decisions": lambda staged, run: staged.withColumn("run", F.lit(run)),
}


def _failure(rule: Select.Rule) -> Column:
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
        words = F.array(*[F.lit(word) for word in rule.any_of or rule.none_of or ()])
        if rule.any_of is not None:
            passes, bound = (F.size(value) > 0) & (F.size(F.array_except(value, words)) == 0), f"any of {', '.join(rule.any_of)}"
        else:
            passes, bound = F.coalesce(~F.arrays_overlap(value, words), F.lit(True)), f"none of {', '.join(rule.none_of or ())}"
        shown = F.when(F.size(value) > 0, F.concat_ws(", ", value))
    return F.when(~F.coalesce(passes, F.lit(False)), _failed(rule.name, shown, bound, F.col(version)))


def _failed(rule: str, value: Column, bound: str, version: Column) -> Column:
    return F.struct(
        F.lit(rule).alias("rule"),
        F.coalesce(value, F.lit("no value")).alias("value"),
        F.lit(bound).alias("bound"),
        F.coalesce(version, F.lit("none")).alias("version"),
    )


if __name__ == "__main__":
    command.main(__doc__, run)
