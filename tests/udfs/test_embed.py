"""One row of addresses through the kernel: which bytes it takes, and what it says when it can take none."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pandas as pd

from conf.settings import load_encoder
from tests.odd_images import LIMITS, encoded, picture
from udfs import embed
from udfs.opener import Opener, to_uri

GRID = load_encoder("colour-grid").model_dump()
PNG = encoded(picture(40, 30), "PNG")


def address(path: Path, **other: int) -> dict[str, Any]:
    """Where a file lies and the state in which ingest saw it."""
    uri = to_uri(str(path))
    stat = Opener().stat(uri) if path.exists() else None
    seen = {"size": stat.size, "mtime_us": stat.mtime_us} if stat else {"size": len(PNG), "mtime_us": 1}
    return {"uri": uri, "offset": 0, "length": seen["size"]} | seen | other


def embed_one(*addresses: dict[str, Any], image_id: bytes = hashlib.sha256(PNG).digest(), **options: Any) -> dict[str, Any]:
    row = {"image_id": image_id, "view": "original", "want": ["pixels", "colour-grid"], "tried": "T", "addresses": list(addresses)}
    told = {"encoders": [GRID], "detectors": [], "limits": LIMITS, "stores": {}, "device": "cpu", "precision": "fp32", "batch_size": 4}
    (frame,) = embed.embed([pd.DataFrame([row])], **told, decode_threads=1, window=2, **options)
    (done,) = frame.to_dict("records")
    assert done["tried"] == "T"
    assert (done["reject"] is None) == (done["pixels"] is not None) == bool(done["embeddings"])
    return done


def test_the_first_address_that_still_holds_the_bytes_serves(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").write_bytes(PNG)
    changed = address(tmp_path / "a.png", mtime_us=1)
    assert embed_one(changed, address(tmp_path / "gone.png"), address(tmp_path / "b.png"))["reject"] is None


def test_a_failure_that_may_pass_is_told_before_one_that_will_not(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    changed, gone = address(tmp_path / "a.png", mtime_us=1), address(tmp_path / "gone.png")
    for both in ([changed, gone], [gone, changed]):
        reject = embed_one(*both)["reject"]
        assert (reject["code"], reject["transient"], reject["outputs"]) == ("missing", True, ["pixels", "colour-grid"])
        assert reject["uri"] == gone["uri"]
    assert embed_one(changed)["reject"]["code"] == "bytes_changed"


def test_other_bytes_of_the_same_size_and_time_never_get_the_id(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    seen = address(path)
    other = bytearray(PNG)
    other[-1] ^= 1
    path.write_bytes(other)
    os.utime(path, ns=(seen["mtime_us"] * 1000, seen["mtime_us"] * 1000))
    reject = embed_one(seen)["reject"]
    assert (reject["code"], "another sha256" in reject["detail"]) == ("bytes_changed", True)
    assert embed_one(seen, verify_hash=False)["reject"] is None  # as configured: size and time are enough
