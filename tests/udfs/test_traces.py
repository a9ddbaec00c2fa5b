"""Traces of an image are found in parquet at any depth, and taken out of rows and texts."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from udfs.opener import to_uri
from udfs.traces import Traces, blanked, holding, without

IDS = [hashlib.sha256(bytes([number])).digest() for number in range(6)]
VICTIM = Traces(frozenset({IDS[3].hex()}), frozenset({"folder|file:///a/secret.png"}), frozenset({"secret-ä.png"}))
NESTED = pa.list_(pa.struct([("image_id", pa.binary()), ("uri", pa.string())]))


def counted(path: Path) -> int:
    told = list(holding([pa.RecordBatch.from_pydict({"uri": [to_uri(str(path))]})], VICTIM.to_json(), {}))
    return sum(batch.column("rows")[0].as_py() for batch in told)


def test_an_id_is_found_at_any_depth_and_in_any_row_group(tmp_path: Path) -> None:
    images = [[{"image_id": IDS[0], "uri": "a"}], None, [], [{"image_id": IDS[1], "uri": "b"}, {"image_id": IDS[3], "uri": "c"}]]
    cases = {
        "flat": (pa.table({"image_id": pa.array(IDS, pa.binary(32)), "loss": pa.array(range(6))}), 1),
        "other name": (pa.table({"vector": pa.array(IDS, pa.binary())}), 0),
        "parent": (pa.table({"derived_from": pa.array([None, IDS[3]], pa.binary())}), 1),
        "nested": (pa.table({"images": pa.array(images, NESTED)}), 1),
        "key": (pa.table({"input_key": ["other", "folder|file:///a/secret.png"], "image_id": pa.array([None, None], pa.binary())}), 1),
        "empty": (pa.table({"image_id": pa.array([], pa.binary())}), 0),
    }
    for name, (table, rows) in cases.items():
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
        assert counted(tmp_path / "x.parquet") == rows, name
    assert counted(tmp_path / "gone.parquet") == 0


def test_rows_with_a_trace_go_and_the_others_stay_as_they_were() -> None:
    table = pa.table({"image_id": pa.array(IDS * 2, pa.binary(32)), "loss": pa.array(range(12), pa.float32())})
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    changed = without(out.getvalue(), VICTIM)
    assert changed is not None
    found = pq.read_table(io.BytesIO(changed))
    assert found.schema == table.schema
    assert found["loss"].to_pylist() == [loss for loss in range(12) if loss % 6 != 3]
    assert without(changed, VICTIM) is None
    assert pq.ParquetFile(io.BytesIO(changed)).metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_text_keeps_its_length_and_loses_the_trace() -> None:
    text = f'{{"worst": "{IDS[3].hex()} (inf), {IDS[4].hex()}", "name": "secret-\\u00e4.png", "plain": "secret-ä.png"}}\n'.encode()
    found = blanked(text, VICTIM)
    assert found is not None and len(found) == len(text)
    assert IDS[4].hex().encode() in found
    assert not any(word in found for word in (IDS[3].hex().encode(), b"secret"))
    assert blanked(found, VICTIM) is None


def test_traces_come_back_from_json() -> None:
    assert Traces.from_json(VICTIM.to_json()) == VICTIM
