"""Images of one cluster -> one page (JPEG) to look at: nearest, median, farthest and margin cases, each with id, size and caption.

Runs on a worker, a page a group: reads and decodes each image by its address. One that cannot be read or decoded is a box with its code.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from udfs import addresses, decode
from udfs.opener import Opener
from udfs.reject import Reject

SHEET_VERSION = 1  # raise it when a page of the same images would look otherwise
SCHEMA = "page STRING, jpeg BINARY, drawn INT, undrawn INT"
KINDS = {
    "nearest": "the most typical: nearest to the centre",
    "median": "the middle of the cluster, by distance",
    "farthest": "the least typical: farthest from the centre",
    "margin": "the edge: another centre is almost as near",
}
COLUMNS = 6
IMAGE, CELL, TEXT, EDGE = 208, 220, 66, 16  # pixels: side of the box of an image, of a cell with its gap, text below it, border of the page
HEAD, BAND = 92, 34  # pixels: title and facts; the line over each kind
WIDTH = 2 * EDGE + COLUMNS * CELL - (CELL - IMAGE)
INK, SOFT, LINE, GROUND, BAD = "#1d2530", "#5b6675", "#d9dee5", "#f6f7f9", "#b0563f"
LETTERS = 34  # of a line of text below an image
QUALITY = 86


def draw(table: pa.Table, titles: Mapping[str, tuple[str, str]], limits: Mapping[str, Any], stores: Mapping[str, Any]) -> pa.Table:
    """Rows of one page (page, kind, place, image_id, width, height, told, caption, addresses) -> one SCHEMA row.

    titles: page -> its title and a line of facts.
    """
    rows = table.sort_by([("kind", "ascending"), ("place", "ascending")]).to_pylist()
    page, opener = rows[0]["page"], Opener(stores)
    groups = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    sheet = Image.new("RGB", (WIDTH, height_of([len(group) for group in groups.values()])), GROUND)
    pen = ImageDraw.Draw(sheet)
    title, facts = titles[page]
    pen.text((EDGE, 14), latin(title), INK, _font(26))
    for number, line in enumerate(facts.split("\n")):
        pen.text((EDGE, 48 + 18 * number), latin(line), SOFT, _font(14))
    top, lost = HEAD, 0
    for kind, group in groups.items():
        if group:
            pen.line((EDGE, top + 6, WIDTH - EDGE, top + 6), LINE)
            pen.text((EDGE, top + 11), KINDS[kind], INK, _font(16))
            top += BAND
            for number, row in enumerate(group):
                place = (EDGE + number % COLUMNS * CELL, top + number // COLUMNS * (CELL + TEXT))
                lost += not _place(sheet, pen, place, row, opener, limits)
            top += _lines(len(group)) * (CELL + TEXT)
    out = io.BytesIO()
    sheet.save(out, "JPEG", quality=QUALITY)
    return pa.table(
        {
            "page": [page],
            "jpeg": [out.getvalue()],
            "drawn": pa.array([len(rows) - lost], pa.int32()),
            "undrawn": pa.array([lost], pa.int32()),
        }
    )


def strip_of(page: bytes, images: int, places: int, side: int) -> bytes:
    """A page -> a JPEG of the first of its nearest images alone, in so many places of `side` pixels; places without an image are white."""
    strip = Image.new("RGB", (places * side, side), "white")
    with Image.open(io.BytesIO(page)) as sheet:
        for number in range(min(images, places, COLUMNS)):
            left, top = EDGE + number * CELL + 2, HEAD + BAND + 2  # inside the box's line
            one = sheet.crop((left, top, left + IMAGE - 3, top + IMAGE - 3)).resize((side - 6, side - 6), Image.Resampling.LANCZOS)
            strip.paste(one, (number * side + 3, 3))
    out = io.BytesIO()
    strip.save(out, "JPEG", quality=80)
    return out.getvalue()


def height_of(groups: list[int]) -> int:
    return HEAD + EDGE + sum(BAND + _lines(count) * (CELL + TEXT) for count in groups if count)


def latin(text: str) -> str:
    """What the font that comes with Pillow can show: a letter that it lacks becomes a question mark."""
    return " ".join(text.encode("latin-1", "replace").decode("latin-1").split(" "))


def _lines(count: int) -> int:
    return -(-count // COLUMNS)


def _place(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, place: tuple[int, int], row: dict[str, Any], opener: Opener, limits: Mapping[str, Any]
) -> bool:
    """One image with its text -> whether it could be drawn."""
    left, top = place
    pen.rectangle((left, top, left + IMAGE, top + IMAGE), "white", LINE)
    why = ""
    try:
        with decode.decoding(addresses.read_any({}, row["addresses"], opener, row["image_id"]), limits, scaled=True) as decoded:
            image = decoded.image.copy()
            image.thumbnail((IMAGE - 4, IMAGE - 4), Image.Resampling.LANCZOS)
        sheet.paste(image, (left + (IMAGE - image.width) // 2 + 1, top + (IMAGE - image.height) // 2 + 1))
    except Reject as reject:
        why = reject.code
        pen.text((left + 12, top + IMAGE // 2 - 10), f"not drawn: {why}", BAD, _font(14))
    lines = [f"{row['image_id'].hex()[:10]}   {row['width']} x {row['height']}", row["told"], *_wrap(row["caption"] or "", 2)]
    for number, line in enumerate(lines):
        pen.text((left, top + IMAGE + 4 + 14 * number), latin(line), INK if number == 0 else SOFT, _font(12))
    return not why


def _wrap(text: str, lines: int) -> list[str]:
    """Text -> lines of LETTERS letters, broken at blanks where that can be."""
    told, words = [""], text.split()
    for word in words:
        if told[-1] and len(told[-1]) + 1 + len(word) > LETTERS:
            told.append("")
        told[-1] = f"{told[-1]} {word}".strip()
    cut = [line[:LETTERS] for line in told[:lines]]
    if len(told) > lines:
        cut[-1] = cut[-1][: LETTERS - 3] + "..."
    return cut


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
