"""The plan of an export's image files, addresses and texts -> the files with the images' bytes, and their lines of the manifest.

The bytes are read by the task that writes them, file by file, and never cross Spark. A task needs twice the bytes of its file: as
an Arrow column, and as parquet. With 256 images of 1 MB that is half a GB.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow as pa

from udfs import addresses, snapshot
from udfs.ahead import ahead
from udfs.opener import Opener
from udfs.reject import Reject

LINES = "lines"  # folder in an export of images, until it is complete
THREADS = 8  # that read a file's images
_REJECT = f"image_id: BINARY, code: STRING, detail: STRING, transient: BOOLEAN, {addresses.PLACE_SCHEMA}"
SCHEMA = f"{snapshot.SCHEMA}, refused ARRAY<STRUCT<{_REJECT}>>"
_INT, _TEXT = pa.int32(), pa.string()
_BYTES = pa.binary()
_OF_IMAGE = {"image_id": _BYTES, "bytes": _BYTES, "captions": _BYTES, "score": _INT, "rating": _TEXT, "style_cluster": _INT}
COLUMNS = pa.schema(list((_OF_IMAGE | {"width": _INT, "height": _INT}).items()))
COMPRESSION = {name: "none" if name in ("image_id", "bytes") else "zstd" for name in COLUMNS.names}
_REFUSED = {"image_id": pa.binary(), "code": _TEXT, "detail": _TEXT, "transient": pa.bool_()}
_REFUSED |= {"uri": _TEXT, "offset": pa.int64(), "length": pa.int64(), "row_group": _INT, "row": _INT, "column": _TEXT}
_LINE = pa.schema(
    {"bucket": _TEXT, "file": _TEXT, "rows": pa.int64(), "bytes": pa.int64(), "sha256": _TEXT, "ids": _TEXT}
    | {"refused": pa.list_(pa.struct(list(_REFUSED.items())))}
)


def write_files(batches: Iterable[pa.RecordBatch], root: str, stores: Mapping[str, Any]) -> Iterator[pa.RecordBatch]:
    """Rows with `bucket`, `file` (a number) and `images` (structs of what `_read_image` takes, in order) -> the files, and SCHEMA rows.

    A file's line is kept beside it until the export is complete: a file that has one is not written again.
    """
    opener = Opener(stores)
    for batch in batches:
        for number in range(batch.num_rows):
            row = batch.slice(number, 1).to_pylist()[0]
            name = f"{row['bucket']}-{row['file']:05d}.parquet"
            kept = f"{root}/{LINES}/{name}.json"
            if opener.exists(kept):
                line = json.loads(opener.read(kept))
            else:
                line = _write_file(row["bucket"], name, row["images"], root, opener)
                opener.write(kept, json.dumps(line).encode())
            refused = [one | {"image_id": bytes.fromhex(one["image_id"])} for one in line["refused"]]
            yield pa.RecordBatch.from_pylist([line | {"refused": refused}], schema=_LINE)


def _write_file(bucket: str, name: str, images: list[dict[str, Any]], root: str, opener: Opener) -> dict[str, Any]:
    refused: list[dict[str, Any]] = []
    columns: dict[str, list[Any]] = {column: [] for column in COLUMNS.names}
    # read where the bytes lie side by side: a row group of a parquet file once, however its rows are spread over the file to write
    places = sorted(range(len(images)), key=lambda number: _order(images[number]))
    found = dict(zip(places, ahead(partial(_read_image, opener), [images[place] for place in places], THREADS, 2 * THREADS), strict=True))
    for image, data, reject in map(found.pop, range(len(images))):
        if reject is not None:
            refused.append({"image_id": image["image_id"].hex()} | reject)
            continue
        for column, values in columns.items():
            values.append(data if column == "bytes" else image[column])
    if not columns["image_id"]:
        return {"bucket": bucket, "file": name, "rows": 0, "bytes": 0, "sha256": "", "ids": "", "refused": refused}
    whole = {field.name: pa.chunked_array(columns[field.name]) if field.name == "bytes" else columns[field.name] for field in COLUMNS}
    table = pa.table(whole, schema=COLUMNS)
    # the bytes are compressed and of no use to a dictionary
    return snapshot.write(
        table, bucket, name, root, opener, compression=COMPRESSION, use_dictionary=["score", "rating", "style_cluster"]
    ) | {"refused": refused}


def _order(image: dict[str, Any]) -> tuple[Any, ...]:
    first = addresses.where(image["addresses"][0])
    return (first["uri"], *(-1 if first[name] is None else first[name] for name in ("offset", "row_group", "row")))


def _read_image(opener: Opener, image: dict[str, Any]) -> tuple[dict[str, Any], pa.Array | None, dict[str, Any] | None]:
    """-> the image with its bytes, as an Arrow array at once so that no second copy of all of them is ever made; or why there are none."""
    done: dict[str, Any] = {}
    try:
        return image, pa.array([addresses.read_any(done, image["addresses"], opener, image["image_id"])], pa.binary()), None
    except Reject as reject:
        return image, None, {"code": reject.code, "detail": reject.detail, "transient": reject.transient} | done["at"]
