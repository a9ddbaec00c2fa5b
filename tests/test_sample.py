"""The images that the repository ships: whose they are, and that the shards can be made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import make_shards

SAMPLE = Path(__file__).parent / "data" / "sample"


def test_every_image_may_be_shipped_and_its_author_licence_and_package_stand_in_the_notice() -> None:
    rows = [json.loads(line) for line in (SAMPLE / "metadata.jsonl").read_text().splitlines()]
    assert {row["file"] for row in rows} == {f"images/{path.name}" for path in (SAMPLE / "images").iterdir()}
    assert len(rows) == 249
    notice = (SAMPLE / "NOTICE").read_text()
    packages = {row["package"]: notice.split(f"\n{row['package']} (Debian package")[1].split("(Debian package")[0] for row in rows}
    for row in rows:
        assert row["redistributable"]
        entry = packages[row["package"]].split(Path(row["file"]).name)[1].splitlines()[1]
        assert row["licence"] in entry
        assert (row["author"] or "an author whom the package does not name") in entry


def test_the_shards_are_what_their_maker_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_shards, "SHARDS", tmp_path)
    make_shards.main()
    shipped = SAMPLE.parent / "shards"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {path.name: path.read_bytes() for path in shipped.iterdir()}
