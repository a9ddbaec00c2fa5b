"""The deny lists of the config, and who is denied: what the stages ask before anything of an image is written.

Of a file that is denied at ingest nothing stands that could tell its name: its `input_key` in `rejects` is `denied|` and a sha256 of its
source, entry and state, by which a listing finds it again, so that it is never read twice. (Who guesses all three can confirm the guess.)
"""

from __future__ import annotations

import json
from datetime import date
from functools import lru_cache
from typing import Any

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, digest
from jobs.lake import Lake
from udfs import deny_list, perceptual_hash, picture_frames
from udfs.deny_list import DenyList
from udfs.opener import Opener, Stat, to_uri
from udfs.reject import Reject

CODE = "denied"
NONE = "no lists"


def read(settings: Settings, today: date | None = None) -> list[DenyList]:
    """The lists of the config. Raises Mistake: a job without its lists does not run."""
    today = today or date.today()
    opener, stores = Opener(settings.store_options), json.dumps(settings.store_options, sort_keys=True)
    found = []
    for listed in settings.deny.lists:
        try:
            one = _read(listed.model_dump_json(), stores, _state(opener, listed.path))
        except ValueError as error:
            raise Mistake(str(error)) from None
        where = f"deny.lists {listed.name}: {listed.path}"
        if listed.max_age_days is not None:
            if one.made is None:
                raise Mistake(f"{where}: max_age_days is given, and its first line has no date=YYYY-MM-DD")
            if (today - one.made).days > listed.max_age_days:
                raise Mistake(
                    f"{where}: made {one.made}, {(today - one.made).days} days ago, more than max_age_days={listed.max_age_days:g}; get a newer one"
                )
        found.append(one)
    return found


@lru_cache(maxsize=32)
def _read(listed: str, stores: str, state: Stat | None) -> DenyList:
    """A list as its file is in this state: parsed once a session, however often its stages ask."""
    return deny_list.read(json.loads(listed), Opener(json.loads(stores)))


def _state(opener: Opener, path: str) -> Stat | None:
    try:
        return opener.stat(to_uri(path))
    except Reject:
        return None  # deny_list.read says what is wrong with it


def identity_of(settings: Settings, lists: list[DenyList]) -> str:
    """What a denial depends on, and whether the lake is up to it."""
    if not lists:
        return NONE
    how = (settings.deny.distance, settings.deny.guess, perceptual_hash.KERNEL_VERSION, picture_frames.KERNEL_VERSION)
    return digest(sorted((one.kind, one.name, one.sha256) for one in lists), how)


def is_applied(lake: Lake, identity: str) -> bool:
    """Whether the images of the lake have been compared with the lists of this identity; no lists have always been applied."""
    try:
        return json.loads(lake.opener.read(applied(lake)))["lists"] == identity
    except Reject as reject:
        if reject.code != "missing":
            raise
        return identity == NONE


def unapply_others(lake: Lake, settings: Settings) -> None:
    """Before images come in under the lists of this config: where others were applied last, those are to be applied again to what comes."""
    if not is_applied(lake, identity_of(settings, read(settings))):
        lake.opener.delete(applied(lake))


def require_applied(lake: Lake, settings: Settings, who: str) -> None:
    """Raises Mistake when the images of the lake have not been compared with the lists of this config."""
    if settings.deny.lists and not is_applied(lake, identity_of(settings, read(settings))):
        raise Mistake(f"{who}: the deny lists of this config have not been applied to the images of the lake yet; run the stage deny first")


def applied(lake: Lake) -> str:
    """URI of the note which lists were applied last."""
    return lake.area("_deny", "applied.json")


def for_workers(settings: Settings) -> str | None:
    """-> what `deny_list.screen` takes; None when no list is of perceptual hashes. A worker reads a list itself, and takes only the bytes
    that the driver has checked.
    """
    lists = [{"name": one.name, "kind": one.kind, "sha256": one.sha256} for one in read(settings) if one.kind == deny_list.PHASH]
    if not lists:
        return None
    paths = {listed.name: to_uri(listed.path) for listed in settings.deny.lists}  # a worker's current folder is its own
    told: dict[str, Any] = {"lists": [one | {"path": paths[one["name"]]} for one in lists]}
    return json.dumps(told | {"distance": settings.deny.distance, "guess": settings.deny.guess, "stores": settings.store_options})


def ids(lake: Lake) -> DataFrame:
    """-> image_id of every image that was ever denied or forgotten."""
    return denied_by(lake.read("rejects")).distinct()


def denied_by(rejects: DataFrame) -> DataFrame:
    """Rows of `rejects` -> image_id of those that deny one, perhaps more than once."""
    return rejects.where((F.col("code") == CODE) & F.col("image_id").isNotNull()).select("image_id")


def allowed(lake: Lake, rows: DataFrame) -> DataFrame:
    """Rows with image_id -> those that are not denied."""
    denied = denied_by(lake.read("rejects"))
    return rows if denied.isEmpty() else rows.join(denied, "image_id", "left_anti")  # mostly there is none: a look instead of a join


def refused(lake: Lake, settings: Settings) -> DataFrame:
    """-> image_id, list (empty: no list of this config names it): what ingest must not take: listed by sha256, denied before, forgotten."""
    whole = ids(lake).withColumn("list", F.lit(""))
    for one in read(settings):
        if one.kind == deny_list.SHA256:
            hashes = pd.DataFrame({"image_id": [row.tobytes() for row in one.hashes]})
            listed = lake.spark.createDataFrame(hashes, "image_id BINARY").withColumn("list", F.lit(one.name))
            whole = whole.unionByName(listed)
    return whole.groupBy("image_id").agg(F.max("list").alias("list"))


def screened(rows: DataFrame, refused: DataFrame) -> DataFrame:
    """What ingest read (udfs.ingest.SCHEMA and fingerprint) -> the same, of `refused` ones nothing but id, place in an archive, and code."""
    told = rows.join(F.broadcast(refused), "image_id", "left")
    denied = F.col("list").isNotNull()
    reject = F.struct(F.lit(CODE).alias("code"), F.col("list").alias("detail"), F.lit(False).alias("transient"))
    kept: dict[str, Column] = {
        "source": F.lit(CODE),
        "entry": input_digest(),
        "fingerprint": F.lit(CODE),
        "seen": F.lit(CODE),
        "key": F.lit(""),
        "reject": reject.cast(rows.schema["reject"].dataType),
        "tags": F.array().cast("array<string>"),
        "opt_out": F.lit(False),
    }
    place = ("image_id", "offset", "row_group", "row")
    blank = {name: F.lit(None).cast(rows.schema[name].dataType) for name in rows.columns if name not in (*kept, *place)}
    return told.select(
        *[F.when(denied, (kept | blank)[name]).otherwise(F.col(name)).alias(name) if name not in place else name for name in rows.columns]
    )


def input_digest() -> Column:
    """Of the columns source, entry and seen: how a denied input is known again, and not named."""
    return F.sha2(F.concat_ws("|", "source", "entry", "seen"), 256)


def settled(lake: Lake, entries: DataFrame) -> DataFrame:
    """Entries of a listing -> source, entry, seen of those of which something was denied when they were read."""
    mine = lake.read("rejects").where(F.col("code") == CODE).select(F.col("input_key").alias("digest")).distinct()
    state = entries.select("source", "entry", "seen").withColumn("digest", F.concat_ws("|", F.lit(CODE), input_digest()))
    return state.join(mine, "digest", "left_semi").drop("digest")


def as_rejects(rows: DataFrame) -> DataFrame:
    """stage, input_key, fingerprint, image_id, detail -> rows of `rejects` that deny, without `run`."""
    kinds = {"uri": "string", "offset": "bigint", "length": "bigint", "row_group": "int", "row": "int", "column": "string"}
    told = {name: F.lit(None).cast(kind) for name, kind in kinds.items()}
    return rows.withColumns(told | {"code": F.lit(CODE), "permanent": F.lit(True), "attempts": F.lit(1)})
