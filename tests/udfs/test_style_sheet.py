from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from conf.build import Limits
from udfs import style_sheet
from udfs.style_sheet import COLUMNS, EDGE, HEAD, IMAGE

RED, BLUE = (200, 30, 30), (30, 30, 200)


def make_row(path: Path, colour: tuple[int, int, int], kind: str, place: int, caption: str = "a picture") -> dict[str, object]:
    Image.new("RGB", (64, 64), colour).save(path)
    data, stat = path.read_bytes(), path.stat()
    address = {"uri": path.as_uri(), "offset": 0, "length": len(data), "size": len(data), "mtime_us": stat.st_mtime_ns // 1000}
    told = {"page": "3", "kind": kind, "place": place, "width": 64, "height": 64, "told": "distance 1", "caption": caption}
    return {"image_id": hashlib.sha256(data).digest(), "addresses": [address]} | told


def draw(rows: list[dict[str, object]]) -> dict[str, object]:
    titles = {"3": ("style_cluster_3", "facts\nmore facts")}
    return style_sheet.draw(pa.Table.from_pylist(rows), titles, Limits().model_dump(), {}).to_pylist()[0]


def test_a_page_shows_every_kind_in_its_own_row_and_a_strip_is_its_nearest_images(tmp_path: Path) -> None:
    rows = [make_row(tmp_path / "a.png", RED, "nearest", 1), make_row(tmp_path / "b.png", BLUE, "margin", 1, caption="жук " * 40)]
    page = draw(rows)
    assert (page["page"], page["drawn"], page["undrawn"]) == ("3", 2, 0)
    sheet = np.asarray(Image.open(io.BytesIO(page["jpeg"])))  # type: ignore[arg-type]
    assert sheet.shape == (style_sheet.height_of([1, 0, 0, 1]), style_sheet.WIDTH, 3)
    middle = EDGE + IMAGE // 2
    found = [np.abs(sheet[:, middle].astype(int) - colour).max(axis=1) < 40 for colour in (RED, BLUE)]
    assert found[0].any() and found[1].any() and np.flatnonzero(found[0]).max() < np.flatnonzero(found[1]).min()
    strip = np.asarray(Image.open(io.BytesIO(style_sheet.strip_of(page["jpeg"], 1, 4, 50))))  # type: ignore[arg-type]
    assert strip.shape == (50, 200, 3) and (np.abs(strip[25, 25].astype(int) - RED) < 40).all() and strip[25, 75].min() > 240


def test_an_image_that_cannot_be_had_is_a_box_and_the_page_is_made(tmp_path: Path) -> None:
    rows = [make_row(tmp_path / f"{place}.png", (place, 0, 0), "nearest", place) for place in range(COLUMNS + 2)]
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_bytes(b"not what it was")
    page = draw(rows)
    assert (page["drawn"], page["undrawn"]) == (COLUMNS, 2)
    assert Image.open(io.BytesIO(page["jpeg"])).height == style_sheet.height_of([COLUMNS + 2]) > HEAD + 2 * IMAGE  # type: ignore[arg-type]
