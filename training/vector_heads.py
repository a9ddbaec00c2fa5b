"""Exports of stored vectors and the heads that are fitted to them: what the scorer and the classifier share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from conf.section import Mistake
from conf.settings import Settings
from training import exports
from training.exports import Export
from udfs import score_head

TRAIN, HELD_OUT = "train", "held_out"


def open_export(place: str, kind: str, columns: dict[str, str], buckets: tuple[str, ...], settings: Settings) -> Export:
    """-> the export, whose manifest says of which encoder its vectors are. Raises Mistake."""
    export = exports.open_export(place, kind, columns, buckets, settings)
    if lacking := {"name", "fingerprint", "width"} - set(export.manifest.encoder):
        raise Mistake(f"export {place}: the manifest's encoder has no {', '.join(sorted(lacking))}; export again")
    return export


def read_vectors(packed: npt.NDArray[Any], width: int) -> score_head.Vectors:
    """Little-endian fp16 bytes of each row -> float32 [n, width] of length 1. Raises Mistake on another length of bytes."""
    wrong = {len(vector) for vector in packed} - {2 * width}
    if wrong:
        raise Mistake(f"vectors of {sorted(wrong)} bytes, the manifest's encoder width {width} needs {2 * width}; export again")
    return score_head.normalise(np.frombuffer(b"".join(packed), dtype="<f2").reshape(-1, width))


def describe(export: Export, head: bytes, architecture: str, kernel_version: int) -> dict[str, Any]:
    """What a head is, for whom it is, what it was made from: the file beside it."""
    return {
        "architecture": architecture,
        "kernel_version": kernel_version,
        "sha256": hashlib.sha256(head).hexdigest(),
        "encoder": export.manifest.encoder,
        "export": export.manifest.export,
        "manifest_sha256": export.sha256,
        "made_from": export.manifest.made_from,
    }


def tags(export: Export, head: bytes, evaluation: Mapping[str, Any], shortened: Mapping[str, Any]) -> dict[str, str]:
    """What the registered version of a head says of itself, all as text: jobs/registry.py reads it. `shortened`: the evaluation for a report."""
    manifest = export.manifest
    return {
        "sha256": hashlib.sha256(head).hexdigest(),
        "encoder": str(manifest.encoder["name"]),
        "encoder_fingerprint": str(manifest.encoder["fingerprint"]),
        "width": str(manifest.encoder["width"]),
        "export": manifest.export,
        "manifest_sha256": export.sha256,
        "made_from": json.dumps(manifest.made_from, sort_keys=True),
        "beats_baselines": str(evaluation["beats_baselines"]).lower(),
        "evaluation": json.dumps(shortened, separators=(",", ":")),
    }
