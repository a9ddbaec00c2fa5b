"""An export's address -> a checked Export: what a frozen row set says of itself, and whether its files are still that.

An export is `manifest.json` and parquet files of one row group each, written by the Spark side to a folder or an object
store. The manifest is the contract: what a file holds (rows, bytes, sha256, checksum of ids) and what a row holds (columns).
Its own sha256 names the whole export. Opening reads the manifest and the list of files; a file's bytes are hashed when a
process first reads it (`held`), from where they are then read: its own place, or the spool.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from conf.section import Mistake
from conf.settings import Settings
from training.spool import Spool
from udfs.opener import Opener, to_path, to_uri
from udfs.pinned import hash_file
from udfs.reject import Reject


class File(BaseModel):
    """One parquet file as the manifest states it; `ids` is udfs.snapshot.id_sum of its image_ids in hex."""

    model_config = ConfigDict(frozen=True, strict=True)

    file: str = Field(pattern=r"^[\w.-]+$")  # a name in the export's own folder
    bucket: str
    rows: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    ids: str = Field(pattern=r"^[0-9a-f]{16}$")


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
    label: str = ""  # of an export of classes: their kind ...
    classes: dict[str, dict[str, int]] = {}  # ... and class -> bucket -> its images
    files: tuple[File, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Export:
    """An opened export: `sha256` is that of manifest.json (`text`), and so of all that lies in the folder."""

    root: str  # uri
    manifest: Manifest
    sha256: str
    text: bytes
    opener: Opener
    spool: Spool
    images: dict[str, frozenset[bytes]] = field(default_factory=dict)  # bucket -> its image_ids, where the feed has read them
    _seen: dict[str, tuple[int, ...]] = field(default_factory=dict)  # file -> its state when it was hashed

    def files(self, bucket: str) -> list[File]:
        return [f for f in self.manifest.files if f.bucket == bucket]

    def rows(self, bucket: str) -> int:
        return sum(f.rows for f in self.files(bucket))

    def ids(self, bucket: str) -> int:
        """The checksum of all image_ids of a bucket."""
        return sum(int(f.ids, 16) for f in self.files(bucket)) % 2**64

    @contextmanager
    def held(self, file: File) -> Iterator[Path]:
        """A path with the file's bytes as the manifest states them, for the length of the block. Raises Mistake naming the file."""
        if self.root.startswith("file://"):
            path = Path(os.fsdecode(to_path(self.root))) / file.file
            self._check(file, path)
            yield path
            return
        try:
            with self.spool.held(self.opener, f"{self.root}/{file.file}", file.sha256, file.bytes) as path:
                self._check(file, path, hashed=file.sha256 in self.spool.fresh)
                yield path
        except Reject as reject:
            raise Mistake(f"{self._name(file)}: {reject.code}: {reject.detail}; export again") from None

    def _check(self, file: File, path: Path, hashed: bool = False) -> None:
        """Size and sha256, and one row group of the stated rows and columns; once, and again when the file's state has changed."""
        import pyarrow.parquet as pq

        where = self._name(file)
        if not path.is_file():
            raise Mistake(f"{where} is missing; export again")
        found = path.stat()
        state = (found.st_size, found.st_ino) if path == self.spool.path(file.sha256) else (found.st_size, found.st_ino, found.st_mtime_ns)
        if self._seen.get(file.file) == state:
            return
        if found.st_size != file.bytes:
            raise Mistake(f"{where} has {found.st_size} bytes, the manifest says {file.bytes}; export again")
        if not hashed and (digest := hash_file(path)) != file.sha256:
            raise Mistake(f"{where} was changed: its sha256 is {digest}, the manifest says {file.sha256}; export again")
        footer = pq.read_metadata(path)
        columns = {field.name: str(field.type) for field in footer.schema.to_arrow_schema()}
        shape, expected = (footer.num_row_groups, footer.num_rows, columns), (1, file.rows, self.manifest.columns)
        if shape != expected:
            raise Mistake(f"{where}: row groups, rows and columns are {shape}, the manifest says {expected}")
        self._seen[file.file] = state

    def _name(self, file: File) -> str:
        return f"export {self.root}: {file.file}"


def open_export(
    root: str | Path, kind: str | None, columns: dict[str, str] | None, buckets: tuple[str, ...], settings: Settings | None = None
) -> Export:
    """Folder or uri -> Export, by its manifest and the list of its files. Raises Mistake naming what is missing or differs.

    kind, columns: what the trainer needs; None: whatever it is. settings: of the object stores and the spool; None: a folder of this machine.
    """
    uri = to_uri(str(root)).rstrip("/")
    opener = Opener(settings.store_options if settings else None)
    spool = Spool(Path(settings.training.spool), settings.training.spool_bytes) if settings else Spool(Path(), 0)
    place = Path(os.fsdecode(to_path(uri))).resolve() if uri.startswith("file://") else spool.folder.resolve()
    if set("#?;") & set(str(place)):
        raise Mistake(f"export {place}: the feed reads by url and cannot name a path with # ? or ;, move the folder")
    try:
        text = opener.read(f"{uri}/manifest.json")
    except Reject as reject:
        if opener.exists(note := f"{uri}/withdrawn.json"):  # jobs/forget.py
            told = json.loads(opener.read(note))
            raise Mistake(f"export {root} was withdrawn on {told['on']}: {told['why']}; export again") from None
        raise Mistake(f"export {root}: no manifest.json there ({reject.code}); give the place of a complete export") from None
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:3])
        raise Mistake(f"{root}/manifest.json: not a manifest of this version: {found}; export again") from None
    export = Export(uri, manifest, hashlib.sha256(text).hexdigest(), text, opener, spool)
    _check_manifest(export, kind, columns, buckets)
    _check_listing(export)
    return export


def _check_manifest(export: Export, kind: str | None, columns: dict[str, str] | None, buckets: tuple[str, ...]) -> None:
    """The manifest against what the trainer needs."""
    manifest, where = export.manifest, f"export {export.root}"
    if kind is not None and manifest.kind != kind:
        raise Mistake(f"{where}: given an export of kind {manifest.kind!r}, expected {kind!r}")
    given, expected = manifest.columns, manifest.columns if columns is None else columns
    wrong = {c: (given.get(c), expected.get(c)) for c in given | expected if given.get(c) != expected.get(c)}
    if wrong:
        raise Mistake(f"{where}: columns: " + ", ".join(f"{c}: given {g}, expected {e}" for c, (g, e) in sorted(wrong.items())))
    for bucket in buckets:
        if not export.files(bucket):
            raise Mistake(f"{where}: no rows in bucket {bucket!r}; export more images or change export.held_out")
    if manifest.rows != sum(f.rows for f in manifest.files):
        raise Mistake(f"{where}: the manifest says {manifest.rows} rows, its files have {sum(f.rows for f in manifest.files)}")


def _check_listing(export: Export) -> None:
    """Every file is there with its size: seen in one listing, before a training is hours under way."""
    sizes = {entry.uri.rpartition("/")[2]: entry.stat.size for entry in export.opener.entries(export.root) if not entry.is_folder}
    for file in export.manifest.files:
        if file.file not in sizes:
            raise Mistake(f"export {export.root}: {file.file} is missing; export again")
        if sizes[file.file] != file.bytes:
            raise Mistake(f"export {export.root}: {file.file} has {sizes[file.file]} bytes, the manifest says {file.bytes}; export again")
