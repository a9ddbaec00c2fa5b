"""Pending (image, view, outputs) -> staged rows of the one GPU pass, and their projection into tables: for embed and label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, digest, load_detector, load_encoder
from jobs import deny_lists, devices, occurrences, rejects
from jobs.lake import Lake
from jobs.waves import Projection
from udfs import embed as kernel
from udfs import engine, model_runs
from udfs.addresses import COLUMNS

ORDER = ("uri", "offset", "row_group", "row")  # of the bytes: contiguous ranges of an archive, row groups one after the other
ADDRESSES = 8  # of one image that a worker may try: a placeholder picture has thousands


def outputs(settings: Settings, seed: int | None = None) -> dict[str, str]:
    """Output name (`pixels`, an encoder or a detector) -> its fingerprint. Of degraded views, when their seed is given: those that the
    scorer learns from, `pixels` and its encoder."""
    suffix = "" if seed is None else f"/{kernel.view_fingerprint(seed)}"
    told = {kernel.PIXELS: kernel.pixels_fingerprint() + suffix}
    options = settings.embed
    for encoder in map(load_encoder, options.encoders if seed is None else (settings.encoder,)):
        parts = model_runs.encoder_parts(encoder.model_dump())
        _name(
            told,
            encoder.name,
            f"{encoder.name}:{digest(parts, options.precision, engine.fingerprint(options.engine_used, options.compile))}{suffix}",
        )
    for detector in map(load_detector, options.detectors if seed is None else ()):
        _name(told, detector.name, f"{detector.name}:{digest(model_runs.detector_parts(detector.model_dump()))}")
    return told


def _name(told: dict[str, str], name: str, fingerprint: str) -> None:
    if name in told:
        raise Mistake(f"embed: two of its encoders and detectors are named {name!r}; names must be unique, and not {kernel.PIXELS}")
    told[name] = fingerprint


def of_scorer(settings: Settings, seed: int | None = None) -> str:
    """The fingerprint of the vectors that the scorer reads."""
    return outputs(settings, seed)[load_encoder(settings.encoder).name]


def outstanding(lake: Lake, wanted: DataFrame, settings: Settings, stage: str, seed: int | None = None) -> DataFrame:
    """(image_id, view) -> those that lack an output: (image_id, view, want, untried, refused, tried, addresses, ORDER).

    `want`: outputs that no table holds and that can be made; `untried`: of these, the ones that have not even failed; `refused`:
    outputs that a permanent reject has settled. A reject holds for what `tried` names, the addresses and the limits: a new
    source of the image is a new chance.
    """
    fingerprints = outputs(settings, seed)
    pairs = [F.struct(F.lit(name).alias("output"), F.lit(told).alias("fingerprint")) for name, told in fingerprints.items()]
    crossed = wanted.select("image_id", "view", F.explode(F.array(*pairs)).alias("pair")).select("image_id", "view", "pair.*")
    done = lake.read("pixels").select("image_id", "view", "fingerprint")
    for table in ("embeddings", "detections"):
        done = done.unionByName(lake.read(table).select("image_id", "view", "fingerprint"))
    lacking = crossed.join(done, ["image_id", "view", "fingerprint"], "left_anti")
    placed = lacking.join(_places(lake.read("sources"), settings), "image_id").withColumn("input_key", input_key())
    keys = ["input_key", "fingerprint"]
    failed = lake.read("rejects").where(F.col("stage") == stage).groupBy(*keys).agg(F.max("permanent").alias("settled"))
    judged = placed.withColumn("fingerprint", reject_fingerprint("fingerprint")).join(failed, keys, "left")

    def outputs_where(condition: Column) -> Column:
        return F.sort_array(F.collect_list(F.when(condition, F.col("output"))))

    told = judged.groupBy("image_id", "view").agg(
        outputs_where(~F.coalesce("settled", F.lit(False))).alias("want"),
        outputs_where(F.col("settled").isNull()).alias("untried"),
        outputs_where(F.col("settled")).alias("refused"),
        F.first("tried").alias("tried"),
        F.first("addresses").alias("addresses"),
    )
    return _first_place(told)


def placed(lake: Lake, rows: DataFrame, settings: Settings) -> DataFrame:
    """(image_id, ...) -> the same with tried, addresses, ORDER."""
    return _first_place(rows.join(_places(lake.read("sources"), settings), "image_id"))


def tried(lake: Lake, images: DataFrame, settings: Settings) -> DataFrame:
    """image_id of some images -> (image_id, tried): under what they would be tried now."""
    mine = lake.read("sources").join(images, "image_id", "left_semi")
    return _places(mine, settings).select("image_id", "tried")


def _places(sources: DataFrame, settings: Settings) -> DataFrame:
    """-> image_id, `addresses` (every source of the image, the latest state first) and `tried`, a digest of them and of the limits."""
    tried = F.hex(F.xxhash64(F.lit(digest(settings.limits)), "addresses"))
    return sources.groupBy("image_id").agg(addresses().alias("addresses")).withColumn("tried", tried)


def addresses() -> Column:
    """Aggregate over the sources of an image -> where a worker may read it, the latest state first."""
    return occurrences.newest_first(ADDRESSES, *COLUMNS)


def _first_place(rows: DataFrame) -> DataFrame:
    """Adds ORDER of the first address."""
    first = F.col("addresses")[0]
    return rows.withColumns({name: first[name] for name in ORDER})


def reject_fingerprint(output: str) -> Column:
    """Column with an output's fingerprint -> the fingerprint of its reject: what could not be made, and from what."""
    return F.concat_ws("@", output, "tried")


def output_of_reject(fingerprint: str) -> Column:
    """The other way: a reject's fingerprint -> that of the output."""
    return F.regexp_replace(fingerprint, "@[0-9A-F]+$", "")


def compute(inputs: DataFrame, settings: Settings, fingerprints: Mapping[str, str], seed: int = 0) -> DataFrame:
    """(image_id, view, want, tried, addresses) -> staged rows (udfs.embed.SCHEMA and `fingerprints`), by the GPU pandas UDF."""
    options = settings.embed
    worker = partial(
        on_worker,
        device=options.device,
        encoders=[one.model_dump() for one in map(load_encoder, options.encoders) if one.name in fingerprints],
        detectors=[one.model_dump() for one in map(load_detector, options.detectors) if one.name in fingerprints],
        limits=settings.limits.model_dump(),
        stores=settings.store_options,
        precision=options.precision,
        batch_size=options.batch_size,
        decode_threads=options.decode_threads,
        window=options.ahead,
        engine=options.engine_used,
        compile=options.compile,
        engine_cache=options.engine_cache,
        model_threads=options.model_threads,
        seed=seed,
        verify_hash=options.verify_hash,
        deny=deny_lists.for_workers(settings),
    )
    told = F.create_map(*[F.lit(part) for pair in fingerprints.items() for part in pair])
    return (
        inputs.select("image_id", "view", "want", "tried", "addresses").mapInPandas(worker, kernel.SCHEMA).withColumn("fingerprints", told)
    )


def on_worker(frames: Iterator[pd.DataFrame], device: str, **options: Any) -> Iterator[pd.DataFrame]:
    """Runs the kernel on the device that Spark assigned to this task."""
    mine = devices.of_task(device, "embed.device")
    return kernel.embed(frames, device=mine.name, place=mine.place, **options)


def tables(lake: Lake, settings: Settings, stage: str) -> dict[str, Projection]:
    """What of the staged rows lands where. Fingerprints come from the rows: they may be an earlier run's, under other settings."""

    def rejects_of(staged: DataFrame, run: str) -> DataFrame | None:
        refused = (
            staged.where(F.col("reject").isNotNull())
            .select("image_id", "view", "tried", "fingerprints", F.explode("reject.outputs").alias("output"), "reject.*")
            .drop("outputs")
        )
        refused = refused.withColumns({"input_key": input_key(), "fingerprint": F.col("fingerprints")[F.col("output")]})
        refused = refused.withColumn("fingerprint", reject_fingerprint("fingerprint"))
        return rejects.rows(lake, refused, stage, run, settings.waves.attempts)

    def pixels_of(staged: DataFrame, run: str) -> DataFrame:
        mine = staged.where(F.col("pixels").isNotNull())
        told = F.col("fingerprints")[kernel.PIXELS].alias("fingerprint")
        return mine.select("image_id", "view", told, "pixels.*").withColumn("run", F.lit(run))

    def embeddings_of(staged: DataFrame, run: str) -> DataFrame:
        mine = staged.select("image_id", "view", "fingerprints", F.explode("embeddings").alias("one"))
        mine = mine.select("image_id", "view", "fingerprints", "one.*")
        told = {"fingerprint": F.col("fingerprints")[F.col("encoder")], "run": F.lit(run)}
        return mine.withColumns(told | {"width": (F.octet_length("vector") / 2).cast("int")})

    def detections_of(staged: DataFrame, run: str) -> DataFrame | None:
        if "detections" not in staged.columns:  # a wave that an older version had staged
            return None
        mine = staged.select("image_id", "view", "fingerprints", F.explode("detections").alias("one"))
        mine = mine.select("image_id", "view", "fingerprints", "one.*")
        return mine.withColumns({"fingerprint": F.col("fingerprints")[F.col("detector")], "run": F.lit(run)})

    return {"rejects": rejects_of, "pixels": pixels_of, "embeddings": embeddings_of, "detections": detections_of}


def input_key() -> Column:
    """How an image's view is named in `rejects`."""
    return F.concat_ws("/", F.lower(F.hex("image_id")), F.col("view"))
