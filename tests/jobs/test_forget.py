"""What a deny list names never enters, or leaves again: after `forget` no file of the lake, exports, trainings or MLflow tells of it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from conf.section import Mistake
from conf.settings import Settings
from jobs import deny, deny_lists, embed, export_labels, forget, ingest, label, land_train_stats, registry, report
from jobs.lake import STATISTICS_OF, Lake
from jobs.lease import Lease, LeaseHeld
from tests.jobs.conftest import keys, write_image
from tests.jobs.test_land_train_stats import write_training
from udfs import deny_list, picture_frames
from udfs.pixel_statistics import luma_of

MakeSettings = Callable[..., Settings]
MakeLake = Callable[[Settings], Lake]
WAVES = {"rows": 50, "task_rows": 20}
VICTIM = "part-1/the-denied-picture.png"


def write_list(path: Path, kind: str, hashes: list[bytes], made: date | None = None) -> dict[str, Any]:
    """A list file -> its lines of the config."""
    rows = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
    path.write_text(deny_list.text_of(kind, rows, made or date.today(), "test"))
    return {"name": path.stem, "path": str(path), "kind": kind, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def phashes(path: Path) -> list[bytes]:
    return [row.tobytes() for row in picture_frames.mirrored(luma_of(Image.open(path).convert("RGB")))[:1]]


def sha256(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def test_what_a_list_names_by_sha256_is_an_id_and_a_code_and_never_read_again(
    images: Path, tmp_path: Path, make_settings: MakeSettings, make_lake: MakeLake, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/shard.tar", "w") as archive:  # nothing but a denied member
        archive.add(write_image(tmp_path / "member.png", 77), "secret-member.png")
    (images / "broken-one.jpg").write_bytes(b"\xff\xd8 no picture, and denied all the same")
    victims = [write_image(images / "part-0/never-to-be-told.png", 76), tmp_path / "member.png", images / "broken-one.jpg"]
    listed = write_list(tmp_path / "ours.txt", "sha256", [sha256(path) for path in victims])
    places = {"folder": images, "tar": tmp_path / "tars"}
    sources = [{"name": kind, "kind": kind, "uri": str(place)} for kind, place in places.items()]
    settings = make_settings(waves=WAVES, deny={"lists": [listed]}, ingest={"sources": sources})
    lake = make_lake(settings)
    ingest.run(lake, settings)
    assert lake.read("images").count() == 12
    denied = lake.read("rejects").where("code = 'denied'").collect()
    assert sorted(bytes(row["image_id"]) for row in denied) == sorted(map(sha256, victims))
    for row in denied:
        told = {name: value for name, value in row.asDict().items() if value not in (None, "")}
        assert set(told) <= {"stage", "input_key", "fingerprint", "image_id", "offset", "code", "detail", "permanent", "attempts", "run"}
        assert (row["detail"], row["fingerprint"], row["permanent"]) == ("ours", "denied", True)
    assert [found_in(Path(settings.lake.root), victim, settings) for victim in victims] == [["rejects"]] * 3
    capsys.readouterr()
    ingest.run(lake, settings)
    assert "ingest: nothing to do" in capsys.readouterr().out


@pytest.mark.proof
def test_a_listed_picture_and_its_altered_copy_give_no_output_and_a_later_list_is_applied_to_what_is_there(
    images: Path, tmp_path: Path, make_settings: MakeSettings, make_lake: MakeLake, capsys: pytest.CaptureFixture[str]
) -> None:
    ImageOps.expand(ImageOps.mirror(Image.open(images / "part-0/02.png").resize((96, 64))), 9, "black").save(images / "copy.png")
    first = write_list(tmp_path / "first.txt", "phash", phashes(images / "part-0/02.png"))
    settings = make_settings(waves=WAVES, deny={"lists": [first]})
    lake = make_lake(settings)
    ingest.run(lake, settings)
    embed.run(lake, settings)
    denied = {sha256(images / name) for name in ("part-0/02.png", "copy.png")}
    rows = lake.read("rejects").collect()
    assert {bytes(row["image_id"]) for row in rows} == denied
    assert {(row["code"], row["detail"], row["uri"], row["stage"]) for row in rows} == {("denied", "first", None, "embed")}
    assert lake.read("pixels").count() == lake.read("embeddings").count() == 11
    assert embed.pending(lake, settings).isEmpty()

    by_bytes = write_list(tmp_path / "bytes.txt", "sha256", [sha256(images / "part-1/03.png")])
    second = write_list(
        tmp_path / "second.txt", "phash", [picture_frames.mirrored(luma_of(Image.open(images / "part-0/04.png")))[1].tobytes()]
    )
    later = make_settings(waves=WAVES, deny={"lists": [first, by_bytes, second]})
    for _ in range(2):
        deny.run(lake, later)
    assert "4 denied images have left rows" in (out := capsys.readouterr().out) and "deny: nothing to do" in out
    told = lake.read("rejects").where("stage = 'deny'").select("image_id", "detail").collect()
    assert {(bytes(row["image_id"]), row["detail"]) for row in told} == {
        (sha256(images / "part-1/03.png"), "bytes"),
        (sha256(images / "part-0/04.png"), "second"),
    }
    write_image(images / "came-under-fewer-lists.png", 79)
    ingest.run(lake, settings)
    assert not deny_lists.is_applied(lake, deny_lists.identity_of(later, deny_lists.read(later)))
    assert label.chosen(lake, later).join(deny_lists.ids(lake), "image_id", "left_semi").isEmpty()
    forget.run(lake, later)
    assert (lake.read("images").count(), lake.read("pixels").count()) == (10, 9)


def test_a_list_that_is_old_or_gone_stops_the_job(tmp_path: Path, make_settings: MakeSettings) -> None:
    listed = write_list(tmp_path / "ours.txt", "sha256", [b"a" * 32], date.today() - timedelta(days=10))
    assert len(deny_lists.read(make_settings(deny={"lists": [listed | {"max_age_days": 11}]}))) == 1
    with pytest.raises(Mistake, match="10 days ago, more than max_age_days=9"):
        deny_lists.read(make_settings(deny={"lists": [listed | {"max_age_days": 9}]}))
    (tmp_path / "plain.txt").write_text("ab" * 32)
    with pytest.raises(Mistake, match="max_age_days is given, and its first line has no date"):
        deny_lists.read(
            make_settings(deny={"lists": [{"name": "p", "path": str(tmp_path / "plain.txt"), "kind": "sha256", "max_age_days": 1}]})
        )
    os.unlink(tmp_path / "ours.txt")
    for reads in (deny_lists.read, deny_lists.for_workers):
        with pytest.raises(Mistake, match="missing; nothing is done without the list"):
            reads(make_settings(deny={"lists": [listed]}))


@pytest.fixture
def build(images: Path, tmp_path: Path, make_settings: MakeSettings, make_lake: MakeLake) -> tuple[Lake, Settings, Path]:
    """A build in which the victim has been everywhere: tables, staging, exports, a training, MLflow, the report, style sheets."""
    victim = write_image(images / VICTIM, 500)
    settings = make_settings(waves=WAVES, label={"images": 13, "views": {"blur:1": 0.6}})
    lake = make_lake(settings)
    older = lake._name("sources")  # a table as older code made it: its log tells least and largest names
    lake.spark.sql(f"ALTER TABLE {older} UNSET TBLPROPERTIES ('{STATISTICS_OF}')")
    for stage in (ingest, embed, label, export_labels):
        stage.run(lake, settings)
    log = Path(settings.lake.root) / "sources/_delta_log"
    jvm, session = lake.spark._jvm, lake.spark._jsparkSession  # type: ignore[attr-defined]
    jvm.org.apache.spark.sql.delta.DeltaLog.forTable(session, str(log.parent)).checkpoint()  # type: ignore[union-attr]
    assert any(VICTIM.encode() in path.read_bytes() for path in log.glob("*.json")) and list(log.glob("*.checkpoint*.parquet"))
    ids = [bytes(row["image_id"]) for row in lake.read("images").collect()]
    assert sha256(victim) in ids
    folder = write_training(tmp_path / "trainings", "d1", [[(one, 0, 1, 0.5) for one in ids], [(ids[0], 1, 2, 0.25)]])
    land_train_stats.run(lake, settings)
    pq.write_table(held_out(ids), folder / "held_out.parquet")
    (folder / "journal.jsonl").write_text(json.dumps({"kind": "note", "value": f"not finite: {sha256(victim).hex()} (inf)"}) + "\n")
    picture = report.thumbnail(victim.read_bytes(), settings.limits.model_dump())
    for page in (Path(settings.report.path), tmp_path / "styles/index.html", tmp_path / "styles/style_cluster_1.jpg"):
        page.parent.mkdir(exist_ok=True)
        page.write_text(f"<img src='{picture}'> {VICTIM}")
    (tmp_path / "styles/of-the-user.html").write_text("no page of ours")
    _record(settings, ids, sha256(victim), picture)
    dead = lake.area("_staging/embed/20200101T000000-dead")
    lake.stage(lake.read("images"), f"{dead}/wave-000000/rows")
    lake.stage(lake.read("sources"), f"{dead}/plan")
    return lake, settings, victim


def held_out(ids: list[bytes]) -> pa.Table:
    return pa.table({"image_id": pa.array(ids, pa.binary(32)), "prediction": pa.array([0.5] * len(ids), pa.float32())})


def _record(settings: Settings, ids: list[bytes], victim: bytes, picture: str) -> None:
    import mlflow

    client = registry.connect(settings.mlflow)
    place = Path(settings.mlflow.artifacts or "").resolve()
    experiment = client.create_experiment(settings.mlflow.experiment, place.as_uri())
    run = client.create_run(experiment).info.run_id
    client.set_tag(run, "last_failure", f"loss not finite, worst {victim.hex()}")
    scratch = Path(settings.lake.root).parent / "scratch"
    (scratch / "sheets").mkdir(parents=True)
    pq.write_table(held_out(ids), scratch / "held_out.parquet")
    (scratch / "sheets/cluster-1.html").write_text(picture)
    client.log_artifacts(run, str(scratch))
    assert isinstance(client, mlflow.MlflowClient)
    for path in (scratch / "held_out.parquet", scratch / "sheets/cluster-1.html"):
        path.unlink()


def test_a_forgotten_image_is_nowhere_but_in_its_reject_also_after_kills(
    build: tuple[Lake, Settings, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    lake, settings, victim = build
    before = {table: lake.read(table).count() for table in forget.IMAGES}
    assert hits(tmp_path, victim, settings) > 10
    forget.run(lake, settings, plan_only=True, images=[VICTIM])
    plan = capsys.readouterr().out
    for told in (
        "images: 1 rows",
        "pixels: 2 rows",
        "export: ",
        "training: ",
        "staging: ",
        "page: ",
        "MLflow: ",
        "scorer was trained on 1 of them",
    ):
        assert told in plan, plan
    assert {table: lake.read(table).count() for table in forget.IMAGES} == before
    with Lease(lake, "embed", "another", 60), pytest.raises(LeaseHeld, match="stage embed is held"):
        forget.run(lake, settings, images=[VICTIM])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Lake, "conceal", killed)  # no source tells the names any more
        forget.run(lake, settings, images=[VICTIM])
    assert hits(tmp_path, victim, settings) > 1
    forget.run(lake, settings)
    assert found_in(tmp_path, victim, settings) == ["lake/rejects"]
    assert [page.name for page in (tmp_path / "styles").iterdir()] == ["of-the-user.html"]
    row = lake.read("rejects").collect()
    assert [(bytes(one["image_id"]), one["code"], one["permanent"], one["uri"], one["detail"]) for one in row] == [
        (sha256(victim), "denied", True, None, "")
    ]
    # the others are as they were, and what is left fits together
    assert {table: lake.read(table).count() for table in ("images", "sources")} == {"images": 12, "sources": 12}
    assert lake.read("pixels").count() == before["pixels"] - 2
    assert len(keys(lake, "images", "image_id")) == 12
    (training,) = (tmp_path / "trainings").iterdir()
    assert land_train_stats.check(lake, settings, land_train_stats.read(lake, training.as_uri())) == ""
    from training.exports import open_export

    (export,) = (tmp_path / "exports").iterdir()
    assert [path.name for path in export.iterdir()] == ["withdrawn.json"]
    with pytest.raises(Mistake, match="was withdrawn on"):
        open_export(export, "labels", None, ())
    capsys.readouterr()
    forget.run(lake, settings)
    assert "forget: nothing to do" in capsys.readouterr().out
    write_image(victim.with_name("another.png"), 501)
    ingest.run(lake, settings)  # the file is still there, and is not taken again
    assert lake.read("images").count() == lake.read("sources").count() == 13
    assert found_in(tmp_path, victim, settings) == ["lake/rejects", "lake/rejects"]  # that of its file, by a digest, and its own


def hits(root: Path, victim: Path, settings: Settings) -> int:
    return len(found_in(root, victim, settings))


def found_in(root: Path, victim: Path, settings: Settings) -> list[str]:
    """Every file below `root`, but the originals, read as what it is -> the folders (two levels) of those that tell of the victim, a file each.

    Parquet is decoded, and every value in it looked at, at any depth; all else is searched as bytes.
    """
    data, originals = victim.read_bytes(), settings.ingest.sources[0].uri
    words = [sha256(victim).hex().encode(), sha256(victim).hex().upper().encode(), victim.name.encode(), victim.stem.encode()]
    if victim.suffix == ".png":
        words.append(report.thumbnail(data, settings.limits.model_dump()).encode())
    found = []
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        if path.is_relative_to(originals) or path.suffix == ".txt" or path.name == "member.png":
            continue
        raw = path.read_bytes()
        values = _values(pq.read_table(io.BytesIO(raw)).to_pylist()) if path.suffix == ".parquet" and b"PAR1" in raw[:4] else iter([raw])
        if any(word in value for value in values for word in (*words, sha256(victim), data)):
            found.append("/".join(path.relative_to(root).parts[:2][: -1 if len(path.relative_to(root).parts) < 3 else 2]))
    return found


def _values(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict):
        for one in value.values():
            yield from _values(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _values(one)
    elif isinstance(value, bytes):
        yield value
    elif isinstance(value, str):
        yield value.encode()
