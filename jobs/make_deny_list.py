"""A folder of pictures -> a deny list of them (udfs/deny_list.py says its format), ready to be named in a config.

    python -m jobs.make_deny_list FOLDER LIST --kind phash --date 2026-11-25 --name of-whom

A list of kind phash holds each picture's hash and those of its crops (picture_frames.crops), so that a part of it is found too:
46 hashes a picture, or one with `--no-crops`. What cannot be decoded, and a flat picture, is named and left out, and the exit status is then 1.
Cost: one decode and 4 CPU-ms a picture.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import numpy as np

from conf.build import Limits
from udfs import decode, deny_list, picture_frames
from udfs.pixel_statistics import luma_of
from udfs.reject import Reject


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("list", type=Path)
    parser.add_argument("--kind", choices=(deny_list.SHA256, deny_list.PHASH), required=True)
    parser.add_argument("--date", type=date.fromisoformat, required=True, help="YYYY-MM-DD: from which its age counts")
    parser.add_argument("--name", required=True)
    parser.add_argument("--no-crops", action="store_true")
    told = parser.parse_args()
    if " " in told.name or not told.folder.is_dir():
        parser.error(f"expected a folder and a name without spaces, given {told.folder} and {told.name!r}")
    hashes, left_out = collect(sorted(path for path in told.folder.rglob("*") if path.is_file()), told.kind, not told.no_crops)
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    if not len(hashes):
        parser.error(f"no picture in {told.folder} could be listed")
    told.list.write_text(deny_list.text_of(told.kind, hashes, told.date, told.name))
    print(f"{told.list}: {len(hashes)} hashes, sha256 {hashlib.sha256(told.list.read_bytes()).hexdigest()}")
    return 1 if left_out else 0


def collect(paths: Iterable[Path], kind: str, crops: bool) -> tuple[np.ndarray, list[str]]:
    """Files -> (uint8[n, 32], which were left out and why)."""
    found, left_out = [np.empty((0, deny_list.BYTES), np.uint8)], []
    for path in paths:
        data = path.read_bytes()
        if kind == deny_list.SHA256:
            found.append(np.frombuffer(hashlib.sha256(data).digest(), np.uint8)[None])
            continue
        try:
            luma = luma_of(decode.decode(data, Limits().model_dump(), scaled=True).image)
        except Reject as reject:
            left_out.append(f"{path}: {reject}")
            continue
        of_one = picture_frames.crops(luma) if crops else picture_frames.mirrored(luma)[:1]
        if not deny_list.tells(of_one[:1]).all():
            left_out.append(f"{path}: a flat picture, whose hash every flat picture has")
            continue
        found.append(of_one[deny_list.tells(of_one)])  # a crop may be flat
    return np.concatenate(found), left_out


if __name__ == "__main__":
    sys.exit(main())
