"""The captioner's key is a canary: after failures of every kind it is in no log, event log, table, journal, staging or exception, and no second host has it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.settings import Settings, load
from jobs import ingest
from jobs.lake import Lake
from tests.jobs import canary
from tests.proof.captioned import LOCAL, Books, start, write_config, write_images
from tests.servers.gemini_edits import MODES
from tests.servers.gemini_server import GeminiServer

SAID = ("caption_says_the_key", "403_suspended_says_the_key", "error_in_200_key")
MakeLake = Callable[[Settings], Lake]


def failed_in(
    modes: Sequence[str], make_lake: MakeLake, folder: Path, statuses: Sequence[int], by: str
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """An image a mode through the stage, all at once, since some stop the job -> its key, and what the service and the second host counted.

    statuses: of the exit, of each start. by: how the workers get the key, their environment or Spark's setting for it.
    """
    key = canary.make()
    events = folder / "events"
    events.mkdir()
    conf: dict[str, Any] = LOCAL["conf"] | {  # type: ignore[operator]
        "spark.eventLog.enabled": "true",
        "spark.eventLog.dir": events.as_uri(),
        "spark.eventLog.compress": "false",
    }
    if by == "spark":
        conf["spark.executorEnv.STUDBOOK_CANARY"] = key
    write_images(folder / "images/0.tar", len(modes))
    with GeminiServer(process=True) as elsewhere, GeminiServer({"latency": 0.3, "elsewhere": elsewhere.url}, process=True) as server:
        named = {"key": {"environment": "STUDBOOK_CANARY"}, "in_flight": len(modes)}
        config = write_config(folder, server.url, LOCAL | {"conf": conf}, len(modes), 100.0, **named)
        settings = load(config)
        lake = make_lake(settings)
        ingest.run(lake, settings)
        images = [bytes(row["image_id"]).hex() for row in lake.read("sources").orderBy("uri", "offset").collect()]
        digests = Books(lake, settings, server).digests
        server.order(by_image={digests[image]: [mode] for image, mode in zip(images, modes, strict=True)})
        for number, status in enumerate(statuses):
            with pytest.MonkeyPatch.context() as patch:
                if by == "environment":
                    patch.setenv("STUDBOOK_CANARY", key)
                job = start(config, log := folder / f"start-{number}.log")
            assert job.wait(300) == status, log.read_text()[-4000:]
        counts = server.counts()
        assert set(modes) - {""} <= counts["modes"].keys()
        return key, counts, elsewhere.counts()


def check(key: str, folder: Path, service: Mapping[str, Any], elsewhere: Mapping[str, Any]) -> None:
    assert service["headers"]["x-goog-api-key"] == [key]
    assert elsewhere["requests"] == elsewhere["others"] == 0 and elsewhere["headers"] == {}
    assert any((folder / "events").rglob("*")) and any(folder.rglob("*-answers.jsonl"))
    assert canary.hits(key, folder, (folder / "config.yaml",)) == []


def test_a_key_that_is_planted_is_found_in_every_form(tmp_path: Path) -> None:
    key = canary.make()
    raw = key.encode()
    for number in range(3):
        (tmp_path / f"{number}.log").write_bytes(b"x" + base64.b64encode(b"\xff" * number + raw + b"tail"))
    (tmp_path / "event.json").write_text(f'{{"conf": "{raw.hex()}"}}')
    pq.write_table(pa.table({"text": ["a", f"it is {key}"]}), tmp_path / "part.parquet", compression="zstd")
    pq.write_table(pa.table({"image": [b"a", b"it is " + raw]}), tmp_path / "bytes.parquet", compression="zstd")
    (tmp_path / canary.quote(key, safe="")).touch()
    found = {hit.removeprefix(f"{tmp_path}/").rpartition(": ")[0] for hit in canary.hits(key, tmp_path)}
    assert found == {path.name for path in tmp_path.iterdir()}
    assert canary.hits(canary.make(), tmp_path) == []


@pytest.mark.proof
def test_after_failures_that_tell_the_key_it_is_nowhere(make_lake: MakeLake, tmp_path: Path) -> None:
    """It is given by Spark's own setting, which Spark writes into its event log unless it is told not to."""
    modes = "503 cut_body html 400_image finish_SAFETY block_PROHIBITED_CONTENT caption_wrong_schema 302_elsewhere 307_elsewhere"
    key, service, elsewhere = failed_in((*SAID, *modes.split(), ""), make_lake, tmp_path, (2,), "spark")
    assert "stopped the job: " in (tmp_path / "start-0.log").read_text()
    check(key, tmp_path, service, elsewhere)


@pytest.mark.proof  # two minutes
def test_after_all_failures_that_the_service_knows_the_key_is_nowhere(make_lake: MakeLake, tmp_path: Path) -> None:
    key, service, elsewhere = failed_in(sorted(MODES), make_lake, tmp_path, (2, 0), "environment")
    check(key, tmp_path, service, elsewhere)
