"""The whole main job with images and lake on S3, as a user runs it: a process, twice. `make proof`

hadoop-aws 3.4.1 and its closure (550 MB) come by Ivy into .cache/ivy at the first use.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs
import pyarrow.parquet as parquet
import pytest
import yaml

from tests.cluster.conftest import ROOT
from tests.jobs.conftest import write_image
from tests.object_store import BUCKET, KEY_ENV, REGION, SECRET_ENV, ObjectStore, object_store

pytestmark = pytest.mark.proof
FOLDER, SHARD, LISTED = 20, 6, 4
IMAGES = FOLDER + SHARD + LISTED
STAGES = ("ingest", "embed", "label", "export-labels", "train scorer", "score", "flag", "caption", "select", "export-selection", "report")


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as started:
        yield started


def put_images(store: ObjectStore, folder: Path) -> None:
    """A folder with one file that is no image, a shard, and a manifest."""

    def image(number: int) -> bytes:
        return write_image(folder / "made.png", number, (96, 64)).read_bytes()

    for number in range(FOLDER):
        store.put(f"images/part {number % 2}/{number:02d} ü.png", image(number))
    store.put("images/page.jpg", b"<html>")
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as archive:
        for number in range(SHARD):
            data = image(100 + number)
            info = tarfile.TarInfo(f"{number:03d}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    store.put("shards/000.tar", shard.getvalue())
    for number in range(LISTED):
        store.put(f"listed/{number}.png", image(200 + number))
    lines = [{"uri": f"{number}.png", "tags": ["listed"], "licence": "CC0-1.0"} for number in range(LISTED)]
    store.put("listed/list.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


def write_config(store: ObjectStore, folder: Path) -> Path:
    """conf/demo.yaml with the tower without weights, and what S3 needs: `stores` for the workers, fs.s3a for Spark."""
    told: dict[str, Any] = yaml.safe_load((ROOT / "conf/demo.yaml").read_text())
    told["lake"] = {"root": f"s3://{BUCKET}/lake"}
    told["stores"] = store.stores
    s3a = {
        "endpoint": store.endpoint,
        "endpoint.region": REGION,
        "path.style.access": "true",
        "connection.ssl.enabled": "false",
        # reads AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY
        "aws.credentials.provider": "software.amazon.awssdk.auth.credentials.EnvironmentVariableCredentialsProvider",
    }
    told["spark"]["jars"] = str(ROOT / ".cache/jars")
    told["spark"]["conf"] |= {"spark.jars.packages": "org.apache.hadoop:hadoop-aws:3.4.1", "spark.jars.ivy": str(ROOT / ".cache/ivy")}
    told["spark"]["conf"] |= {f"spark.hadoop.fs.s3a.{key}": value for key, value in s3a.items()}
    told |= {"encoder": "colour-grid", "embed": {"encoders": ["colour-grid"], "device": "cpu"}, "waves": {"rows": 12, "task_rows": 6}}
    told["ingest"]["sources"] = [
        {"name": "folder", "kind": "folder", "uri": f"s3://{BUCKET}/images", "licence": "CC0-1.0"},
        {"name": "shards", "kind": "tar", "uri": f"s3://{BUCKET}/shards"},
        {"name": "list", "kind": "manifest", "uri": f"s3a://{BUCKET}/listed/list.jsonl"},
    ]
    told["label"] = {"images": 10, "views": {"blur:1": 0.6, "noise:2": 0.2}}
    told["training"] = {"root": str(folder / "trainings")}
    told["train_scorer"] = {"epochs": 2, "rows_per_step": 16, "micro_batch": 16}
    for section in ("label_classes", "classify", "styles"):  # of the demo's images
        del told[section]
    told["select"]["rules"] = [{"name": "min_side", "value": "min_side", "at_least": 16}]
    told["export"] = {"root": str(folder / "exports"), "rows_per_file": 8}
    told["mlflow"] = {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "artifacts": str(folder / "artifacts")}
    told["report"] = {"path": str(folder / "report.html")}
    (folder / "config.yaml").write_text(yaml.safe_dump(told))
    return folder / "config.yaml"


def run(config: Path) -> str:
    secrets = {"AWS_ACCESS_KEY_ID": os.environ[KEY_ENV], "AWS_SECRET_ACCESS_KEY": os.environ[SECRET_ENV], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jobs.run_all", "--config", str(config)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | secrets, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def rows_of(store: ObjectStore, table: str) -> list[dict[str, Any]]:
    """A table's rows, read without Spark: the files that its log names (too few commits for a checkpoint)."""
    host = store.endpoint.removeprefix("http://")
    keys = {"access_key": os.environ[KEY_ENV], "secret_key": os.environ[SECRET_ENV]}
    filesystem = pyarrow.fs.S3FileSystem(**keys, endpoint_override=host, scheme="http", region=REGION)
    files: list[str] = []
    for key in sorted(key for key in store.keys(f"lake/{table}/_delta_log/") if key.endswith(".json")):
        body = store.client.get_object(Bucket=BUCKET, Key=key)["Body"].read().decode()
        actions = [json.loads(line) for line in body.splitlines()]
        assert not any("remove" in action for action in actions)
        files += [action["add"]["path"] for action in actions if "add" in action]
    return [row for file in files for row in parquet.read_table(f"{BUCKET}/lake/{table}/{file}", filesystem=filesystem).to_pylist()]


def test_the_whole_job_runs_on_s3_and_a_second_run_does_nothing(store: ObjectStore, tmp_path: Path) -> None:
    put_images(store, tmp_path)
    config = write_config(store, tmp_path)
    first = run(config)
    images = {row["image_id"] for row in rows_of(store, "images")}
    assert len(images) == len(rows_of(store, "images")) == IMAGES
    assert sorted(row["image_id"] for row in rows_of(store, "sources")) == sorted(images)
    refused = {(row["stage"], row["code"]) for row in rows_of(store, "rejects")}
    assert refused == {("ingest", "not_an_image"), ("caption", "nothing_known")}  # but of those that a manifest gives tags
    for table in ("pixels", "embeddings"):
        views = [(row["image_id"], row["view"], row["fingerprint"]) for row in rows_of(store, table)]
        assert len(views) == len(set(views)) == IMAGES + 10 * 2
        assert {image for image, view, _ in views if view == "original"} == images
    for table in ("scores", "decisions"):
        assert sorted(row["image_id"] for row in rows_of(store, table)) == sorted(images)
    assert "The funnel of selection" in first
    assert (tmp_path / "report.html").exists() and len(list((tmp_path / "exports").iterdir())) == 2
    assert_nothing_is_left(store)
    before = store.keys("lake/")
    second = run(config)
    for stage in STAGES:
        assert f"{stage}: nothing to do" in second, second
    assert {key for key in store.keys("lake/") if "/_delta_log/" in key} == {key for key in before if "/_delta_log/" in key}
    assert_nothing_is_left(store)


def assert_nothing_is_left(store: ObjectStore) -> None:
    """No staged file and no lease; folder markers may stay."""
    assert [key for area in ("_staging", "_leases") for key in store.keys(f"lake/{area}/") if not key.endswith("/")] == []
