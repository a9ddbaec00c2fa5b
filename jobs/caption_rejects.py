"""What captioners have refused -> which of it still holds: a reject names what it depends on, and holds until that changes.

The captioner's own answer (refused, prohibited, ...) depends on nothing but the captioner; a service that failed in as many runs as `waves.attempts`
has answered too. A picture that could not be read or decoded depends on its addresses and the limits, as in embed: a new source of the image is a new
chance. What `tags` found too little to compose a caption of depends on all that it would be told. A reject that an older version wrote without a name
for these holds no more: its image is tried once again.
"""

from __future__ import annotations

from functools import reduce

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.settings import Settings
from jobs import caption_rows, embedding
from jobs.lake import Lake
from udfs import caption_tags

# codes of rejects that are the captioner's answer to an image; others (missing, decode_failed, out_of_memory, ...) say that it was not asked
ANSWERS = ("answer_refused", "prohibited", "not_captioned", "nothing_known", "not_finite")
TOLD, PLACED = "told", "placed"  # what a reject may depend on


def standing(lake: Lake, settings: Settings, of: Column, images: DataFrame | None = None) -> DataFrame:
    """-> (image_id, fingerprint of the captioner, code, detail, attempts) of the rejects for good that hold now. of: which are asked for, by the
    captioner's fingerprint and code; images: of these (image_id) alone.
    """
    rows = lake.read("rejects").where((F.col("stage") == caption_rows.NAME) & F.col("permanent"))
    if images is not None:
        rows = rows.join(images, "image_id", "left_semi")
    rows = rows.withColumns({"whole": F.col("fingerprint"), "fingerprint": embedding.output_of_reject("fingerprint")}).where(of)
    rows = rows.withColumn("on", _on(F.col("code")))
    # often nothing is refused that depends on anything: a look instead of joins with tables that have a row an image
    kinds = sorted({row["on"] for row in rows.select("on").distinct().collect()} - {None})
    held = [rows.where(F.col("on").isNull())]
    for kind in kinds:
        mine = rows.where(F.col("on") == kind)
        now = _tried_now(lake, settings, kind, mine.select("image_id").distinct())
        mine = mine.join(now, "image_id").where(F.col("whole") == embedding.reject_fingerprint("fingerprint"))
        held.append(mine.drop("tried"))
    return reduce(DataFrame.unionByName, held).select("image_id", "fingerprint", "code", "detail", "attempts")


def fingerprint(code: Column) -> Column:
    """Of rows with the captioner's fingerprint and `tried`, and the code of a reject -> the reject's fingerprint."""
    return F.when(_on(code).isNull(), F.col("fingerprint")).otherwise(embedding.reject_fingerprint("fingerprint"))


def told() -> Column:
    """Of rows of caption_rows.about -> `tried` of what `tags` refuses: a digest of what is told."""
    return F.hex(F.xxhash64(F.to_json(F.struct(*caption_rows.ABOUT))))


def _on(code: Column) -> Column:
    """Of rows with the captioner's fingerprint -> what a reject of this code depends on; NULL: on the captioner alone."""
    by_tags = F.col("fingerprint").startswith(f"{caption_tags.NAME}:")
    return F.when(by_tags, TOLD).when(~code.isin(*ANSWERS), PLACED)


def _tried_now(lake: Lake, settings: Settings, kind: str, images: DataFrame) -> DataFrame:
    """image_id of images with rejects of a kind -> (image_id, tried): what a run would try them with now."""
    if kind == PLACED:
        return embedding.tried(lake, images, settings)
    return caption_rows.about(lake, settings, images).select("image_id", told().alias("tried"))
