"""deny lists x what the lake holds -> rejects with the code `denied`.

    spark-submit --jars '.cache/jars/*.jar' jobs/deny.py --config conf/demo.yaml

A picture is denied by its sha256 at ingest, before anything of it is written, and by its perceptual hash at embed, on the decoded pixels. This
stage applies lists that came later, or changed, to the images that are there: their sha256, and their stored hashes (as they are and mirrored:
guesses at crops and borders need the pixels, and only embed has those). Under the same lists it does nothing. A denial is for good, also
when a later list no longer names the picture: it is a row in `rejects` with the id, the code and the list's name. What a denied image had
left goes by `python -m jobs.forget`. Cost: 1 CPU-s for 10^9 comparisons of stored hashes with listed ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings
from jobs import command, deny_lists, waves
from jobs.lake import Lake
from jobs.waves import Projection
from udfs import deny_list
from udfs.deny_list import DenyList
from udfs.embed import ORIGINAL

NAME = "deny"
BEFORE = ("ingest", "embed")  # what their staged waves hold is compared here, once it has landed


def run(lake: Lake, settings: Settings, plan_only: bool = False) -> None:
    lists = deny_lists.read(settings)
    identity = deny_lists.identity_of(settings, lists)
    if deny_lists.is_applied(lake, identity):
        print(f"{NAME}: nothing to do")
        tell(lake)  # of what ingest and embed have denied since
        return
    if plan_only:
        print(f"{NAME}: {sum(len(one.hashes) for one in lists)} hashes of {len(lists)} lists are to be compared with all images")
        return
    for stage in BEFORE:
        if lake.folders(lake.area("_staging", stage)):
            raise Mistake(f"deny: the stage {stage} was stopped under other lists, perhaps, and has waves to land; run it first")
    with waves.stage(lake, NAME, settings, TABLES) as stage_:
        found = stage_.freeze(matches(lake, settings, lists, identity), "matches")
        stage_.run_whole(found)
        lake.opener.write(deny_lists.applied(lake), json.dumps({"lists": identity}).encode())
    print(f"{NAME}: {len(lists)} lists applied")
    tell(lake)


def matches(lake: Lake, settings: Settings, lists: list[DenyList], identity: str) -> DataFrame:
    """Images that the lists name and no reject yet -> rows of `rejects`, without `run`."""
    images = deny_lists.allowed(lake, lake.read("images").select("image_id"))
    exact = deny_lists.refused(lake, settings).where(F.col("list") != "")
    found = images.join(F.broadcast(exact), "image_id")
    if any(one.kind == deny_list.PHASH for one in lists):
        pixels = deny_lists.allowed(lake, lake.read("pixels").where(F.col("view") == ORIGINAL).select("image_id", "phash", "phash_mirror"))
        worker = partial(compare, told=deny_lists.for_workers(settings))
        near = pixels.mapInPandas(worker, "image_id BINARY, list STRING")
        found = found.unionByName(near)
    found = found.groupBy("image_id").agg(F.max("list").alias("detail"))
    hexed = F.lower(F.hex("image_id"))
    return deny_lists.as_rejects(found.withColumns({"stage": F.lit(NAME), "input_key": hexed, "fingerprint": F.lit(f"{NAME}:{identity}")}))


def compare(frames: Iterator[pd.DataFrame], told: str | None) -> Iterator[pd.DataFrame]:
    """(image_id, phash, phash_mirror) -> (image_id, list) of those that a list names."""
    assert told is not None
    screen = deny_list.screen(told)
    for frame in frames:
        hashes = np.frombuffer(b"".join(b"".join(pair) for pair in zip(frame["phash"], frame["phash_mirror"], strict=True)), np.uint8)
        named = screen.names(hashes.reshape(len(frame), 2, deny_list.BYTES))
        yield frame[["image_id"]].assign(list=pd.Series(named, frame.index, dtype=object)).dropna()


TABLES: dict[str, Projection] = {"rejects": lambda staged, run: staged.withColumn("run", F.lit(run))}


def tell(lake: Lake) -> None:
    """Says how many denied images have left something."""
    many = lake.read("images").select("image_id").join(deny_lists.ids(lake), "image_id", "left_semi").count()
    if many:
        print(
            f"{NAME}: {many} denied images have left rows; no selection, export or report takes them, and python -m jobs.forget removes all of it"
        )


if __name__ == "__main__":
    command.main(__doc__, run)
