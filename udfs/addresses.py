"""Where an image's bytes lie -> the bytes.

An address is a file (offset 0), a range of one (a member of a tar), or a cell of a parquet file: row group, row in it (both from 0)
and the name of the column; a cell has no offset, and `length` is the number of its bytes. With each goes the state in which
ingest saw the file: bytes of another state are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from udfs.handles import Stat
from udfs.opener import Opener
from udfs.reject import Reject

PLACE = ("uri", "offset", "length", "row_group", "row", "column")
NOWHERE = dict.fromkeys(PLACE)
PLACE_SCHEMA = "uri: STRING, offset: BIGINT, length: BIGINT, row_group: INT, row: INT, column: STRING"
# What is told of an address; what came later stands last, since Spark's hash passes over a NULL: `tried` of older rejects still holds
COLUMNS = ("uri", "offset", "length", "size", "mtime_us", "row_group", "row", "column")

Address = Mapping[str, Any]  # COLUMNS, or PLACE alone where the state does not matter; what is lacking is None


def where(address: Address) -> dict[str, Any]:
    """Address -> PLACE of it, as it stands in a reject."""
    return {name: address[name] if name in address else None for name in PLACE}  # noqa: SIM401  (a Spark Row has no get)


def read(address: Address, opener: Opener) -> bytes:
    """Address -> bytes. Raises Reject missing, unreadable, bytes_changed when the file is not in the state that it names."""
    place = where(address)
    expected = Stat(address["size"], address["mtime_us"]) if "size" in address else None
    if place["row_group"] is None:
        return opener.read(place["uri"], place["offset"], place["length"], expected)
    return opener.cell(place["uri"], place["row_group"], place["row"], place["column"], expected)


def read_any(done: dict[str, Any], addresses: Sequence[Address], opener: Opener, sha256: bytes | None) -> bytes:
    """The bytes from the first address that still holds what ingest saw; else a reject, a transient one before a permanent one.
    `done["at"]` says which address it was.
    """
    assert len(addresses) > 0
    failed: list[tuple[Reject, Address]] = []
    for address in addresses:
        done["at"] = where(address)
        try:
            data = read(address, opener)
            if sha256 is None or hashlib.sha256(data).digest() == sha256:
                return data
            raise Reject("bytes_changed", f"{address['uri']}: size and time as at ingest, but another sha256")
        except Reject as reject:
            failed.append((reject, address))
    told, place = max(failed, key=lambda one: one[0].transient)
    done["at"] = where(place)
    raise told
