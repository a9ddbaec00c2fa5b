"""An export directory -> a checked Export: what a frozen row set says of itself, and whether its files are still that.

An export is `manifest.json` and parquet files of one row group each, written by the Spark side. The manifest is the
contract: what a file holds (rows, bytes, sha256) and what a row holds (columns). Its own sha256 names the whole export.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from conf.settings import Mistake


class File(BaseModel):
    """One parquet file as the manifest states it."""

    model_config = ConfigDict(frozen=True, strict=True)

    file: str = Field(pattern=r"^[\w.-]+$")  # a name in the export's own folder
    bucket: str
    rows: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """What an export says of itself: `columns` name -> Arrow type, `made_from` table -> Delta version."""

    model_config = ConfigDict(frozen=True, strict=True)

    export: str
    kind: str
    rows: int
    columns: dict[str, str]
    made_from: dict[str, int]
    lake: str
    encoder: dict[str, Any] = {}
    files: tuple[File, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Export:
    """An opened export: `sha256` is that of manifest.json, and so of all that lies in the folder."""

    root: Path
    manifest: Manifest
    sha256: str

    def files(self, bucket: str) -> list[File]:
        return [f for f in self.manifest.files if f.bucket == bucket]

    def rows(self, bucket: str) -> int:
        return sum(f.rows for f in self.files(bucket))


def open_export(root: Path, kind: str, columns: dict[str, str], buckets: tuple[str, ...]) -> Export:
    """Folder -> Export, by its manifest alone. Raises Mistake naming what is missing or differs from what the trainer needs."""
    path = root / "manifest.json"
    if set("#?;") & set(str(root.resolve())):
        raise Mistake(f"export {root.resolve()}: the feed reads by url and cannot name a path with # ? or ;, move the folder")
    if not path.is_file():
        raise Mistake(f"export {root}: no manifest.json there; give the folder of a complete export")
    text = path.read_bytes()
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:3])
        raise Mistake(f"{path}: not a manifest: {found}") from None
    export = Export(root, manifest, hashlib.sha256(text).hexdigest())
    if manifest.kind != kind:
        raise Mistake(f"export {root}: given an export of kind {manifest.kind!r}, expected {kind!r}")
    wrong = {c: (manifest.columns.get(c), columns.get(c)) for c in manifest.columns | columns if manifest.columns.get(c) != columns.get(c)}
    if wrong:
        raise Mistake(f"export {root}: columns: " + ", ".join(f"{c}: given {g}, expected {e}" for c, (g, e) in sorted(wrong.items())))
    for bucket in buckets:
        if not export.files(bucket):
            raise Mistake(f"export {root}: no rows in bucket {bucket!r}; export more images or change export.held_out")
    if manifest.rows != sum(f.rows for f in manifest.files):
        raise Mistake(f"export {root}: the manifest says {manifest.rows} rows, its files have {sum(f.rows for f in manifest.files)}")
    return export


def verify(export: Export) -> None:
    """Compare every file with the manifest: presence, bytes, sha256, one row group, rows, columns. Raises Mistake naming the file."""
    import pyarrow.parquet as pq

    for file in export.manifest.files:
        path, where = export.root / file.file, f"export {export.root}: {file.file}"
        if not path.is_file():
            raise Mistake(f"{where} is missing; export again")
        if path.stat().st_size != file.bytes:
            raise Mistake(f"{where} has {path.stat().st_size} bytes, the manifest says {file.bytes}; export again")
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != file.sha256:
            raise Mistake(f"{where} was changed: its sha256 is {found}, the manifest says {file.sha256}; export again")
        footer = pq.read_metadata(path)
        columns = {field.name: str(field.type) for field in footer.schema.to_arrow_schema()}
        shape, expected = (footer.num_row_groups, footer.num_rows, columns), (1, file.rows, export.manifest.columns)
        if shape != expected:
            raise Mistake(f"{where}: row groups, rows and columns are {shape}, the manifest says {expected}")
