"""Addresses -> vectors, detections, perceptual hashes and pixel statistics: one decode an image, every wanted output from it.

Threads read, decode and prepare ahead of the model; only addresses come in and only small columns go out. A row says in
`want` which outputs it lacks (`pixels`, or the name of an encoder or detector), and of which `view` (`original`, or a degradation);
`tried` names the circumstances (addresses, limits) under which it is tried, and comes back with the row.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, cast

import numpy as np
import pandas as pd
from PIL import Image

from udfs import addresses, decode, degrade, deny_list, model_runs, perceptual_hash, pixel_statistics
from udfs.ahead import ahead
from udfs.engine import How
from udfs.model_runs import Model, kernel_of
from udfs.opener import Opener
from udfs.reject import Reject

PIXELS = "pixels"
ORIGINAL = "original"
SCHEMA = (
    "image_id BINARY, view STRING, want ARRAY<STRING>, tried STRING, worker STRING, "
    "pixels STRUCT<phash: BINARY, phash_mirror: BINARY, mean: FLOAT, contrast: FLOAT, saturation: FLOAT, sharpness: FLOAT, "
    "entropy: FLOAT, colour: STRING>, "
    "embeddings ARRAY<STRUCT<encoder: STRING, vector: BINARY>>, "
    "detections ARRAY<STRUCT<detector: STRING, labels: ARRAY<STRUCT<name: STRING, kind: STRING, p: FLOAT>>, "
    "regions: ARRAY<STRUCT<text: STRING, p: FLOAT, box: ARRAY<FLOAT>>>>>, "
    "reject STRUCT<code: STRING, detail: STRING, transient: BOOLEAN, outputs: ARRAY<STRING>, "
    f"{addresses.PLACE_SCHEMA}>"
)
_COLUMNS = ["image_id", "view", "want", "tried", "worker", "pixels", "embeddings", "detections", "reject"]

Prepare = Callable[[Image.Image], np.ndarray]


def pixels_fingerprint() -> str:
    """What the numbers in `pixels` depend on."""
    return f"pixels:{decode.SCALED}.{pixel_statistics.KERNEL_VERSION}.{perceptual_hash.KERNEL_VERSION}"


def view_fingerprint(seed: int) -> str:
    """What a degraded view's pixels depend on besides the image and the view's name."""
    return f"degrade:{degrade.KERNEL_VERSION}:{seed}"


def embed(
    frames: Iterable[pd.DataFrame],
    encoders: Sequence[Model],
    detectors: Sequence[Model],
    limits: Mapping[str, Any],
    stores: Mapping[str, Any],
    device: str,
    precision: str,
    batch_size: int,
    decode_threads: int,
    window: int,
    engine: str = "torch",
    compile: bool = False,
    engine_cache: str | None = None,
    model_threads: int | None = None,
    seed: int = 0,
    place: str = "",
    verify_hash: bool = True,
    deny: str | None = None,
) -> Iterator[pd.DataFrame]:
    """Frames with image_id, view, want, tried, addresses -> SCHEMA frames of `batch_size` rows, in order; every row comes out once.

    device, precision, engine, compile, engine_cache, model_threads: udfs.engine.How; window: decoded images that may wait for the models;
    seed: of the degradations; place: where this runs, noted in `worker`; verify_hash: the bytes' sha256 must be the image_id;
    deny: what udfs.deny_list.screen takes: a picture that a list names is a reject of all outputs, and nothing else of it comes out. `reject`
    names the outputs that could not be made; the row has the others.
    """
    prepares = {one["name"]: partial(kernel_of("tower", one).prepare, encoder=one) for one in encoders}
    prepares |= {one["name"]: partial(kernel_of("detector", one).prepare, detector=one) for one in detectors}
    screen = None if deny is None else deny_list.screen(deny)
    how = How(device, precision, engine, compile, engine_cache, model_threads)
    opener = Opener(stores)
    worker = f"{socket.gethostname()}:{os.getpid()}:{place}"

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        done = {name: row[name] for name in ("image_id", "view", "tried")} | {"want": list(row["want"]), "worker": worker}
        done |= {
            "pixels": None,
            "embeddings": [],
            "detections": [],
            "reject": None,
            "tensors": {},
            "at": addresses.where(row["addresses"][0]),
        }
        try:
            if done["want"]:
                _prepare(done, row, prepares, limits, opener, seed, verify_hash, screen)
        except Reject as reject:
            done |= {"pixels": None, "tensors": {}}
            done["reject"] = {"code": reject.code, "detail": reject.detail, "transient": reject.transient, "outputs": done["want"]}
            done["reject"] |= addresses.NOWHERE if reject.code == "denied" else done["at"]
        return done

    rows = (row for frame in frames for row in cast(list[dict[str, Any]], frame.to_dict("records")))
    prepared = ahead(prepare, rows, decode_threads, window)
    while batch := list(islice(prepared, batch_size)):
        for encoder in encoders:
            model_runs.encode(encoder, batch, how)
        for detector in detectors:
            model_runs.detect(detector, batch, how)
        yield pd.DataFrame(batch, columns=_COLUMNS)


def _prepare(
    done: dict[str, Any],
    row: dict[str, Any],
    prepares: Mapping[str, Prepare],
    limits: Mapping[str, Any],
    opener: Opener,
    seed: int,
    verify_hash: bool,
    screen: deny_list.Screen | None,
) -> None:
    data = addresses.read_any(done, row["addresses"], opener, row["image_id"] if verify_hash else None)
    with decode.decoding(data, limits, scaled=True) as decoded:  # its share of memory is held until the small outputs are made
        luma = None
        if screen is not None:
            luma = pixel_statistics.luma_of(decoded.image)
            screen.check(luma)
        image = decoded.image if row["view"] == ORIGINAL else degrade.degrade(decoded.image, row["view"], seed)
        if PIXELS in done["want"]:
            if luma is None or image is not decoded.image:
                luma = pixel_statistics.luma_of(image)  # the reduction is most of the work of both
            phash, mirror = perceptual_hash.phash(luma)
            done["pixels"] = {"phash": phash, "phash_mirror": mirror, "colour": decoded.colour} | pixel_statistics.measure(image, luma)
        for name in done["want"]:
            if name != PIXELS:
                done["tensors"][name] = prepares[name](image)
        del image, decoded
