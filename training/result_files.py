"""A result's folder -> what its files are, so that a version says which bytes it means."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from udfs.pinned import hash_file


def hash_files(folder: Path) -> dict[str, str]:
    """-> each file below the folder and its sha256."""
    return {str(path.relative_to(folder)): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def digest_of(files: Mapping[str, str]) -> str:
    """Files and their sha256 -> one sha256 of all."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
