"""images and what is known of them -> decisions (one row for EVERY image, all rules it failed) and a frozen selection.

    spark-submit --jars '.cache/jars/*.jar' jobs/select_images.py --config conf/demo.yaml

The rules are YAML (`select`): floors, maxima, allowed and excluded words, and a seeded limit; one rule stands always: an image
that any of its sources has opted out is dropped (`opted_out`). Same tables, same rules, same selection: its id is their digest,
and one that is there is not made again. An image without a value fails the rules over that value, named. Cost: a join of narrow tables, no model.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Select, Settings, digest, load_encoder
from jobs import command, embed, embedding, facts, score, snapshot, waves
from jobs.lake import Lake
from jobs.registry import Head
from jobs.waves import Projection
from udfs.embed import PIXELS

NAME = "select"
OPTED_OUT = Select.Rule(name="opted_out", value="opt_out", none_of=("true",))
FAILED = "array<struct<rule:string,value:string,bound:string,version:string>>"


def run(lake: Lake, settings: Settings, plan_only: bool = False, head: Head | None = None) -> None:
    """`head`: the champion where the caller has resolved it."""
    head = head or score.champion(settings)
    needed = F.array(F.lit(PIXELS), F.lit(load_encoder(settings.encoder).name))
    if not embed.pending(lake, settings).where(F.arrays_overlap("untried", needed)).isEmpty():
        raise Mistake("select: images have no vector or pixel statistics by this config yet; run the stages embed and score first")
    if not score.pending(lake, settings, head).isEmpty():
        raise Mistake(f"select: images have no score by {head.model} version {head.version} yet; run the stage score first")
    scores = score.fingerprint(head)
    versions = lake.versions(facts.TABLES)
    selection = identity(lake, settings, scores, versions)
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


def identity(lake: Lake, settings: Settings, scores: str, versions: dict[str, int]) -> str:
    """The digest of the rules and of the facts they are over: commits that change no fact make no new selection."""
    asked = digest(lake.root, settings.lake, OPTED_OUT, settings.select, scores, embedding.outputs(settings)[PIXELS], versions)
    if asked not in _identities:  # a pass over the facts: several stages of one session ask the same
        _identities[asked] = _summed(facts.gather(lake, settings, scores, versions), settings, scores)
    return _identities[asked]


_identities: dict[str, str] = {}


def _summed(known: DataFrame, settings: Settings, scores: str) -> str:
    content = snapshot.content(["image_id", *facts.NUMBERS, *facts.WORDS])
    summed = known.agg(F.count("*").alias("images"), content.alias("content")).first()
    assert summed is not None
    return digest(OPTED_OUT, settings.select, scores, embedding.outputs(settings)[PIXELS], summed["images"], str(summed["content"]))


def is_made(lake: Lake, selection: str) -> bool:
    return not lake.read("decisions").where(F.col("selection") == selection).isEmpty()


def decide(known: DataFrame, settings: Select) -> DataFrame:
    """facts.gather rows -> (image_id, kept, failed, score), deterministic in the seed."""
    rules = (OPTED_OUT, *settings.rules)
    failures = F.filter(F.array(*[_failure(rule) for rule in rules]).cast(FAILED), lambda failed: failed.isNotNull())
    rows = known.select("image_id", failures.alias("failed"), F.col("score").cast("int").alias("score"))
    if settings.limit is not None:
        draw = F.xxhash64(F.lit(settings.seed), "image_id")
        last = _threshold(rows.where(F.size("failed") == 0).select(draw.alias("draw")), settings.limit)
        if last is not None:
            over = _failed("limit", F.hex(draw), f"<= {settings.limit} images (draw {last})", F.lit(f"seed {settings.seed}"))
            beyond = (F.size("failed") == 0) & (draw > F.lit(last))
            rows = rows.withColumn("failed", F.when(beyond, F.array(over)).otherwise(F.col("failed")))
    return rows.withColumn("kept", F.size("failed") == 0)


def _threshold(draws: DataFrame, limit: int) -> int | None:
    """The limit-th smallest draw, or None when there are not so many. At most 65,536 counts and one of their groups reach the driver."""
    group = F.shiftright("draw", 48)
    left = limit
    for row in draws.groupBy(group.alias("group")).count().orderBy("group").collect():
        if left <= row["count"]:
            inside = draws.where(group == row["group"]).orderBy("draw").limit(left).collect()
            return int(inside[-1]["draw"])
        left -= row["count"]
    return None


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
        words = F.array(*[F.lit(word) for word in rule.within or rule.none_of or ()])
        if rule.within is not None:
            passes, bound = (F.size(value) > 0) & (F.size(F.array_except(value, words)) == 0), f"only {', '.join(rule.within)}"
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
