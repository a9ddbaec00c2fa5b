from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from conf.section import Mistake
from jobs import fetch_jars


def test_the_coordinates_of_every_pinned_jar_come_from_its_name() -> None:
    found = [fetch_jars.coordinates(jar) for jar in sorted(fetch_jars.pins(fetch_jars.PINS))]
    names = ["delta-kernel-api", "delta-kernel-defaults", "delta-spark_4.0_2.13", "delta-storage"]
    assert found == [f"io.delta:{name}:4.4.0" for name in names]


def test_jars_that_are_there_with_their_hashes_are_not_asked_for_again(tmp_path: Path) -> None:
    (tmp_path / "a_b-1.jar").write_bytes(b"jar")
    fetch_jars.fetch({"a_b-1.jar": hashlib.sha256(b"jar").hexdigest()}, tmp_path, tmp_path / "ivy")
    assert not (tmp_path / "ivy").exists()


def test_a_download_that_fails_is_one_line_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFAULT_ARTIFACT_REPOSITORY", "http://127.0.0.1:9/")  # nothing listens there
    (tmp_path / "org.example_absent-1.0.jar").write_bytes(b"half a download")
    with pytest.raises(
        Mistake, match=r"could not be fetched \(.*fetch.log says why\); check the network, or set DEFAULT_ARTIFACT_REPOSITORY"
    ) as refused:
        fetch_jars.fetch({"org.example_absent-1.0.jar": "0" * 64}, tmp_path, tmp_path / "ivy")
    assert "\n" not in str(refused.value)
    assert "org.example:absent:1.0" in (tmp_path / "ivy" / "fetch.log").read_text().replace("#", ":").replace(";", ":")
