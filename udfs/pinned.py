"""A file and the sha256 that it must have."""

from __future__ import annotations

import hashlib
from pathlib import Path


def pinned(path: str | Path, sha256: str | None, whose: str) -> Path:
    """(file, its sha256, `encoder 'x': weights`) -> the path. Raises ValueError when there is no such file, or naming both hashes."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{whose}: no file at {path} (looked from {Path.cwd()}); the demo's come from `make weights`")
    if (found := hash_file(path)) != sha256:
        raise ValueError(f"{whose} {path}: sha256: expected {sha256}, found {found}; fetch the file again or pin its hash")
    return path


def hash_file(path: Path) -> str:
    """A file -> the sha256 of its bytes, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
