"""tests/data/sample -> tests/data/shards: `python tests/make_shards.py` writes the same bytes again (checked by tests/test_sample.py).

Three archives in webdataset layout (the files of one key stand together: picture, .json, .txt):

- artists-000000.tar, artists-000001.tar: 8 keys each. Of every 4, three are pictures of the sample, byte for byte, under
  another key (one image, two sources); the fourth is the left half of one, new bytes. One key has opted out, one has
  no .txt, one no .json, and one holds no picture at all.
- cut.tar: the same layout, ended in the middle of its third picture, as a lost download leaves it.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

SAMPLE = Path(__file__).parent / "data" / "sample"
SHARDS = Path(__file__).parent / "data" / "shards"
LARGEST = 40_000  # bytes: the shards stay small


def main() -> None:
    SHARDS.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in (SAMPLE / "metadata.jsonl").read_text().splitlines()]
    free = [row for row in rows if row["licence"] == "CC0-1.0" and (SAMPLE / row["file"]).stat().st_size < LARGEST]
    for number in (0, 1):
        keys = [record(row, f"work-{number}{place}", place) for place, row in enumerate(free[8 * number : 8 * number + 8])]
        (SHARDS / f"artists-00000{number}.tar").write_bytes(archive(keys))
    third = [record(row, f"lost-{place}", 0) for place, row in enumerate(free[16:19])]
    whole = archive(third)
    picture = dict(third[2])["lost-2.png"]
    (SHARDS / "cut.tar").write_bytes(whole[: whole.index(picture[:512]) + len(picture) // 2])


def record(row: dict[str, Any], key: str, place: int) -> list[tuple[str, bytes]]:
    """A row of the sample -> the files of one key; `place` says which of the odd cases it is."""
    path = SAMPLE / row["file"]
    said = {"tags": [row["style"], *row["tags"]], "licence": row["licence"], "author": row["author"], "opt_out": place == 5}
    files = [
        (f"{key}{path.suffix}", left_half(path) if place % 4 == 3 else path.read_bytes()),
        (f"{key}.json", json.dumps(said, sort_keys=True).encode()),
        (f"{key}.txt", row["caption"].encode()),
    ]
    absent = {2: f"{key}.txt", 4: f"{key}.json", 6: f"{key}{path.suffix}"}.get(place)
    return [file for file in files if file[0] != absent]


def left_half(path: Path) -> bytes:
    with Image.open(path) as image:
        buffer = io.BytesIO()
        image.crop((0, 0, image.width // 2, image.height)).save(buffer, image.format)
        return buffer.getvalue()


def archive(records: list[list[tuple[str, bytes]]]) -> bytes:
    """Files -> an uncompressed tar with no owner and time 0, so that the bytes depend on nothing else."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (file for files in records for file in files):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


if __name__ == "__main__":
    main()
