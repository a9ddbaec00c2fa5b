"""A real S3 server (moto) on loopback, for the tests of the opener, of images on S3 and of a lake on S3."""

from __future__ import annotations

import logging
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "studbook-test"
REGION = "eu-west-1"
KEY_ENV, SECRET_ENV = "STUDBOOK_TEST_S3_KEY", "STUDBOOK_TEST_S3_SECRET"
# when the tests are collected: Spark's workers have the environment of a JVM that an earlier test may have started
os.environ |= {KEY_ENV: "studbook", SECRET_ENV: "not-a-secret"}


class ObjectStore(NamedTuple):
    """`client` is boto3's S3 client; `stores` is the config section that reaches BUCKET."""

    endpoint: str
    client: Any

    @property
    def stores(self) -> dict[str, dict[str, str]]:
        return {BUCKET: {"endpoint": self.endpoint, "region": REGION, "access_key_env": KEY_ENV, "secret_key_env": SECRET_ENV}}

    def put(self, key: str, data: bytes) -> str:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)
        return f"s3://{BUCKET}/{key}"

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A server with an empty BUCKET; its credentials stand in KEY_ENV and SECRET_ENV, for the processes started from here too."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line a request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name=REGION,
            aws_access_key_id=os.environ[KEY_ENV],
            aws_secret_access_key=os.environ[SECRET_ENV],
        )
        # moto keeps its buckets for the life of the process: an earlier server's go first
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST"), timeout=10).close()
        client.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
        yield ObjectStore(endpoint, client)
        client.close()
    finally:
        server.stop()
