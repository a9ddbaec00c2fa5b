"""Addresses -> vectors, perceptual hashes and pixel statistics: one decode an image, every wanted output from it.

Threads read, decode and prepare ahead of the model; only addresses come in and only small columns go out. A row says in
`want` which outputs it lacks (`pixels`, or the name of an encoder), and of which `view` (`original`, or a degradation); `tried`
names the circumstances (addresses, limits) under which it is tried, and comes back with the row.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from itertools import islice
from typing import Any, cast

import numpy as np
import pandas as pd

from udfs import decode, degrade, perceptual_hash, pixel_statistics
from udfs.ahead import ahead
from udfs.opener import Opener, Stat
from udfs.reject import Reject

PIXELS = "pixels"
ORIGINAL = "original"
ADDRESSES = "ARRAY<STRUCT<uri: STRING, offset: BIGINT, length: BIGINT, size: BIGINT, mtime_us: BIGINT>>"
SCHEMA = (
    "image_id BINARY, view STRING, want ARRAY<STRING>, tried STRING, worker STRING, "
    "pixels STRUCT<phash: BINARY, phash_mirror: BINARY, mean: FLOAT, contrast: FLOAT, saturation: FLOAT, sharpness: FLOAT, "
    "entropy: FLOAT, colour: STRING>, "
    "embeddings ARRAY<STRUCT<encoder: STRING, vector: BINARY>>, "
    "reject STRUCT<code: STRING, detail: STRING, transient: BOOLEAN, outputs: ARRAY<STRING>, uri: STRING, offset: BIGINT, length: BIGINT>"
)
_COLUMNS = ["image_id", "view", "want", "tried", "worker", "pixels", "embeddings", "reject"]

Encoder = Mapping[str, Any]  # conf.settings.Encoder as a mapping


def pixels_fingerprint() -> str:
    """What the numbers in `pixels` depend on."""
    return f"pixels:{decode.KERNEL_VERSION}.{pixel_statistics.KERNEL_VERSION}.{perceptual_hash.KERNEL_VERSION}"


def encoder_parts(encoder: Encoder) -> dict[str, Any]:
    """What a vector depends on besides precision and view: weights, preprocessing, decode, kernel."""
    tower = _tower(encoder["kernel"])
    kernel = {"kernel": encoder["kernel"], "kernel_version": tower.KERNEL_VERSION, "preprocessing": tower.PREPROCESSING}
    weights = {key: encoder[key] for key in ("model", "pretrained", "sha256", "width", "image_size")}
    return kernel | weights | {"decode": decode.KERNEL_VERSION}


def view_fingerprint(seed: int) -> str:
    """What a degraded view's pixels depend on besides the image and the view's name."""
    return f"degrade:{degrade.KERNEL_VERSION}:{seed}"


def embed(
    frames: Iterable[pd.DataFrame],
    encoders: Sequence[Encoder],
    limits: Mapping[str, Any],
    stores: Mapping[str, Any],
    device: str,
    precision: str,
    batch_size: int,
    decode_threads: int,
    window: int,
    model_threads: int | None = None,
    seed: int = 0,
    place: str = "",
    verify_hash: bool = True,
) -> Iterator[pd.DataFrame]:
    """Frames with image_id, view, want, tried, addresses -> SCHEMA frames of `batch_size` rows, in order; every row comes out once.

    device: "cpu" or "cuda:N"; precision: "fp32" or "bf16"; window: decoded images that may wait for the model; seed: of the
    degradations; place: where this runs, noted in `worker`; verify_hash: the bytes' sha256 must be the image_id. `reject` names
    the outputs that could not be made;
    the row has the others.
    """
    by_name = {encoder["name"]: encoder for encoder in encoders}
    opener = Opener(stores)
    worker = f"{socket.gethostname()}:{os.getpid()}:{place}"

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        done = {name: row[name] for name in ("image_id", "view", "tried")} | {"want": list(row["want"]), "worker": worker}
        done |= {"pixels": None, "embeddings": [], "reject": None, "tensors": {}, "at": _where(row["addresses"][0])}
        try:
            if done["want"]:
                _prepare(done, row, by_name, limits, opener, seed, verify_hash)
        except Reject as reject:
            done |= {"pixels": None, "tensors": {}}
            done["reject"] = {"code": reject.code, "detail": reject.detail, "transient": reject.transient, "outputs": done["want"]}
            done["reject"] |= done["at"]
        return done

    rows = (row for frame in frames for row in cast(list[dict[str, Any]], frame.to_dict("records")))
    prepared = ahead(prepare, rows, decode_threads, window)
    while batch := list(islice(prepared, batch_size)):
        for name, encoder in by_name.items():
            _encode(name, encoder, batch, device, precision, model_threads)
        yield pd.DataFrame(batch, columns=_COLUMNS)


def _prepare(
    done: dict[str, Any],
    row: dict[str, Any],
    encoders: Mapping[str, Encoder],
    limits: Mapping[str, Any],
    opener: Opener,
    seed: int,
    verify_hash: bool,
) -> None:
    data = read_any(done, row["addresses"], opener, row["image_id"] if verify_hash else None)
    with decode.decoding(data, limits) as decoded:  # its share of memory is held until the small outputs are made
        image = decoded.image if row["view"] == ORIGINAL else degrade.degrade(decoded.image, row["view"], seed)
        if PIXELS in done["want"]:
            luma = pixel_statistics.luma_of(image)  # the reduction is most of the work of both
            phash, mirror = perceptual_hash.phash(luma)
            done["pixels"] = {"phash": phash, "phash_mirror": mirror, "colour": decoded.colour} | pixel_statistics.measure(image, luma)
        for name in done["want"]:
            if name != PIXELS:
                done["tensors"][name] = _tower(encoders[name]["kernel"]).prepare(image, encoders[name])
        del image, decoded


def _where(address: Mapping[str, Any]) -> dict[str, Any]:
    return {key: address[key] for key in ("uri", "offset", "length")}


def read_any(done: dict[str, Any], addresses: Sequence[Mapping[str, Any]], opener: Opener, sha256: bytes | None) -> bytes:
    """The bytes from the first address that still holds what ingest saw; else a reject, a transient one before a permanent one.
    `done["at"]` says which address it was.
    """
    assert len(addresses) > 0
    failed: list[tuple[Reject, Mapping[str, Any]]] = []
    for address in addresses:
        done["at"] = _where(address)
        try:
            expected = Stat(address["size"], address["mtime_us"])
            data = opener.read(address["uri"], address["offset"], address["length"], expected)
            if sha256 is None or hashlib.sha256(data).digest() == sha256:
                return data
            raise Reject("bytes_changed", f"{address['uri']}: size and time as at ingest, but another sha256")
        except Reject as reject:
            failed.append((reject, address))
    told, where = max(failed, key=lambda one: one[0].transient)
    done["at"] = _where(where)
    raise told


def _encode(name: str, encoder: Encoder, batch: list[dict[str, Any]], device: str, precision: str, threads: int | None) -> None:
    """Adds one encoder's vectors to the rows of a batch that want it. A vector that is not finite is a reject of that output."""
    mine = [row for row in batch if name in row["tensors"]]
    if not mine:
        return
    tower = _tower(encoder["kernel"])
    vectors = tower.encode(
        _model(json.dumps(encoder, sort_keys=True), device, precision, threads), np.stack([row["tensors"].pop(name) for row in mine])
    )
    assert vectors.shape == (len(mine), encoder["width"]), (vectors.shape, encoder["width"])
    for row, vector in zip(mine, vectors, strict=True):
        if np.isfinite(vector).all():
            row["embeddings"].append({"encoder": name, "vector": vector.astype("<f2").tobytes()})
        else:
            failed = [*(row["reject"] or {"outputs": []})["outputs"], name]
            told = {"code": "not_finite", "detail": f"encoder {', '.join(failed)}", "transient": False, "outputs": failed}
            row["reject"] = told | {"uri": None, "offset": None, "length": None}


@lru_cache(maxsize=8)
def _model(encoder: str, device: str, precision: str, threads: int | None) -> Any:
    """One model a worker, encoder and device."""
    told = json.loads(encoder)
    if threads is not None and told["model"] is not None:
        import torch

        torch.set_num_threads(threads)
    return _tower(told["kernel"]).load(told, device, precision)


def _tower(kernel: str) -> Any:
    return import_module(f"udfs.tower_{kernel}")
