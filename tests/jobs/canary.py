"""A secret that must be nowhere: its forms, and a search for them in every file of a folder, packed parquet too."""

from __future__ import annotations

import base64
import gzip
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pyarrow.parquet as pq


def make() -> str:
    """-> a key as none was ever given, of characters that are written otherwise in an address and in JSON."""
    return f"canary+/{secrets.token_urlsafe(24)}=&{secrets.token_hex(4)}"


def forms(key: str) -> dict[str, bytes]:
    """Name -> how the key may be written; base64 of it in the middle of other bytes has three forms."""
    raw = key.encode()
    told = {
        "plain": raw,
        "quoted": quote(key, safe="").encode(),
        "quoted path": quote(key).encode(),
        "json": json.dumps(key)[1:-1].encode(),
    }
    told |= {"hex": raw.hex().encode(), "HEX": raw.hex().upper().encode(), "reversed": raw[::-1]}
    for shift in range(3):
        whole = base64.b64encode(b"\0" * shift + raw)
        inner = whole[4 if shift else 0 : -4]  # without the groups that hold other bytes too
        told |= {f"base64 {shift}": inner, f"base64url {shift}": inner.replace(b"+", b"-").replace(b"/", b"_")}
    return told


def hits(key: str, folder: Path, but: tuple[Path, ...] = ()) -> list[str]:
    """-> "file: form" of every place where the key stands, in a file or in its name."""
    wanted = forms(key)
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in but:
            contents = [path.name.encode(), *_contents(path)]
            found += [f"{path}: {name}" for name, form in wanted.items() if any(form in content for content in contents)]
    return found


def _contents(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    yield data
    if data[:4] == b"PAR1":
        table = pq.read_table(path)
        yield repr(table.to_pydict()).encode()
        yield b"".join(bytes(value) for column in table.to_pydict().values() for value in column if isinstance(value, bytes))
    elif data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)
