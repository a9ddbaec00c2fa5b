"""Images on S3, lake on the local disk: ingested and embedded through the opener, every image once."""

from __future__ import annotations

import io
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from conf.settings import Settings
from jobs import embed, ingest
from jobs.lake import Lake
from jobs.lease import landing
from tests.jobs.conftest import keys, write_image
from tests.object_store import BUCKET, ObjectStore, object_store

MakeSettings = Callable[..., Settings]
MakeLake = Callable[[Settings], Lake]
NAMES = ["plain.png", "with space.png", "katze üñ 猫.png", "100%41 #?&+=.png", "deep/er/plain.png"]


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as started:
        yield started


def settings_of(make_settings: MakeSettings, store: ObjectStore, prefix: str, *kinds: str) -> Settings:
    sources: list[dict[str, Any]] = [{"name": kind, "kind": kind, "uri": f"s3://{BUCKET}/{prefix}/{kind}"} for kind in kinds]
    return make_settings(ingest={"sources": sources}, stores=store.stores, waves={"rows": 8, "task_rows": 4})


def put_images(store: ObjectStore, tmp_path: Path, prefix: str) -> None:
    """Five objects with odd names, and a shard with six images."""
    for number, name in enumerate(NAMES):
        store.put(f"{prefix}/folder/{name}", write_image(tmp_path / "made.png", number).read_bytes())
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as archive:
        for number in range(6):
            archive.add(write_image(tmp_path / "made.png", 100 + number), f"{number:03d}.png")
    store.put(f"{prefix}/tar/shard-000.tar", shard.getvalue())


def test_images_on_s3_in_folders_and_shards_are_ingested_and_embedded_once(
    store: ObjectStore, tmp_path: Path, make_settings: MakeSettings, make_lake: MakeLake, capsys: pytest.CaptureFixture[str]
) -> None:
    put_images(store, tmp_path, "once")
    settings = settings_of(make_settings, store, "once", "folder", "tar")
    lake = make_lake(settings)
    ingest.run(lake, settings)
    embed.run(lake, settings)
    images = keys(lake, "images", "image_id")
    assert len(images) == len(set(images)) == 11
    for table in ("sources", "pixels", "embeddings"):
        assert keys(lake, table, "image_id") == images
    assert keys(lake, "rejects", "code") == []
    offsets = [row["offset"] for row in lake.read("sources").where("source = 'tar'").collect()]
    assert len(set(offsets)) == 6 and all(offset > 0 for offset in offsets)
    capsys.readouterr()
    before = lake.versions(["images", "sources", "rejects", "pixels", "embeddings"])
    ingest.run(lake, settings)
    embed.run(lake, settings)
    told = capsys.readouterr().out
    assert "ingest: nothing to do" in told and "embed: nothing to do" in told
    assert lake.versions(before) == before


def test_on_s3_a_landing_waits_for_another_drivers(
    store: ObjectStore, spark: SparkSession, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.lease.SETTLE_REMOTE", 0.2)
    lake = Lake(spark, make_settings(lake={"root": f"s3://{BUCKET}/lake"}, stores=store.stores))
    order: list[str] = []

    def land_second() -> None:
        with landing(lake, "second", 60):
            order.append("second")

    other = threading.Thread(target=land_second)
    with landing(lake, "first", 60):
        other.start()
        time.sleep(1)
        order.append("first")
    other.join(30)
    assert order == ["first", "second"]
    assert [key for key in store.keys("lake/_leases/") if not key.endswith("/")] == []


@pytest.mark.proof
def test_an_object_overwritten_after_ingest_is_bytes_changed_and_its_new_bytes_a_new_image(
    store: ObjectStore, tmp_path: Path, make_settings: MakeSettings, make_lake: MakeLake
) -> None:
    for number in range(3):
        store.put(f"changed/folder/{number}.png", write_image(tmp_path / "made.png", number).read_bytes())
    settings = settings_of(make_settings, store, "changed", "folder")
    lake = make_lake(settings)
    ingest.run(lake, settings)
    old = lake.read("sources").where("key = '1.png'").select("image_id").first()
    assert old is not None
    store.put("changed/folder/1.png", write_image(tmp_path / "made.png", 7, (64, 48)).read_bytes())
    embed.run(lake, settings)
    key = bytes(old["image_id"]).hex()
    refused = {(row["input_key"], row["code"]) for row in lake.read("rejects").collect()}
    assert refused == {(f"{key}/original", "bytes_changed")}
    assert (key,) not in keys(lake, "embeddings", "image_id")
    ingest.run(lake, settings)
    embed.run(lake, settings)
    assert len(keys(lake, "images", "image_id")) == 4
    assert len(keys(lake, "embeddings", "image_id")) == 3
