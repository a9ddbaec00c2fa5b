"""One pass over the bytes; each image in exactly one place an output; nothing twice; a second tower costs itself only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from pyspark.sql import functions as F

from conf.settings import Settings, load_encoder
from jobs import embed, embedding, funnel, ingest
from jobs.lake import Lake
from tests.jobs.conftest import keys, write_image
from udfs import decode, perceptual_hash, pixel_statistics, tower_colour_grid
from udfs.embed import ORIGINAL

MakeSettings = Callable[..., Settings]
MakeLake = Callable[[Settings], Lake]


def test_every_image_is_embedded_once_with_the_kernels_own_numbers(
    images: Path, make_settings: MakeSettings, make_lake: MakeLake, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings(waves={"rows": 5, "task_rows": 2})
    lake = make_lake(settings)
    ingest.run(lake, settings)
    embed.run(lake, settings)
    assert lake.version("embeddings") == 3  # three waves of five
    assert keys(lake, "embeddings", "image_id") == keys(lake, "pixels", "image_id") == keys(lake, "images", "image_id")
    source = lake.read("sources").where(F.col("key") == "part-1/07.png").select("image_id")
    vector = lake.read("embeddings").join(source, "image_id").first()
    pixels = lake.read("pixels").join(source, "image_id").first()
    assert vector is not None and pixels is not None
    image = decode.decode((images / "part-1/07.png").read_bytes(), settings.limits.model_dump()).image
    encoder = load_encoder("colour-grid").model_dump()
    expected = tower_colour_grid.encode(None, tower_colour_grid.prepare(image, encoder)[None])[0]
    assert bytes(vector["vector"]) == expected.astype("<f2").tobytes()
    assert vector["width"] == 192
    assert (bytes(pixels["phash"]), bytes(pixels["phash_mirror"])) == perceptual_hash.phash(image)
    assert {name: pixels[name] for name in ("mean", "entropy")} == {
        name: float(np.float32(value)) for name, value in pixel_statistics.measure(image).items() if name in ("mean", "entropy")
    }
    capsys.readouterr()
    embed.run(lake, settings)
    assert "embed: nothing to do" in capsys.readouterr().out
    assert lake.version("embeddings") == 3


@pytest.mark.proof  # the gate counts decodes and model runs of the same: test_recompute
def test_a_second_tower_added_later_runs_that_tower_only(
    images: Path, tmp_path: Path, make_settings: MakeSettings, make_lake: MakeLake
) -> None:
    settings = make_settings(waves={"rows": 50, "task_rows": 20})
    lake = make_lake(settings)
    ingest.run(lake, settings)
    embed.run(lake, settings)
    (tmp_path / "finer.yaml").write_text("{name: finer, kernel: colour_grid, width: 192, image_size: 448}")
    both = make_settings(
        waves={"rows": 50, "task_rows": 20}, embed={"encoders": ["colour-grid", str(tmp_path / "finer.yaml")], "device": "cpu"}
    )
    wanted = embed.pending(lake, both)
    assert {tuple(row["want"]) for row in wanted.collect()} == {("finer",)}
    before = lake.version("pixels")
    embed.run(lake, both)
    assert lake.version("pixels") == before
    counts = {row["encoder"]: row["count"] for row in lake.read("embeddings").groupBy("encoder").count().collect()}
    assert counts == {"colour-grid": 12, "finer": 12}


def test_a_detector_added_later_runs_alone_and_every_image_has_its_row_also_where_it_saw_nothing(
    images: Path, make_settings: MakeSettings, make_lake: MakeLake, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings(waves={"rows": 50, "task_rows": 20})
    sign = Image.new("RGB", (320, 120), "white")
    ImageDraw.Draw(sign).text((20, 30), "HELLO", fill="black", font=ImageFont.load_default(60))
    sign.save(images / "sign.png")
    lake = make_lake(settings)
    ingest.run(lake, settings)
    embed.run(lake, settings)
    before = lake.versions(["pixels", "embeddings"])
    with_text = make_settings(
        waves={"rows": 50, "task_rows": 20}, embed={"encoders": ["colour-grid"], "detectors": ["rapidocr"], "device": "cpu"}
    )
    assert {tuple(row["want"]) for row in embed.pending(lake, with_text).collect()} == {("rapidocr",)}
    embed.run(lake, with_text)
    assert lake.versions(["pixels", "embeddings"]) == before
    rows = lake.read("detections").collect()
    assert len(rows) == 13
    assert {row["fingerprint"] for row in rows} == {embedding.outputs(with_text)["rapidocr"]}
    (seen,) = [row for row in rows if row["regions"]]
    assert [region["text"] for region in seen["regions"]] == ["HELLO"]
    assert all(0 <= share <= 1 for share in seen["regions"][0]["box"])
    source = lake.read("sources").where(F.col("key") == "sign.png").first()
    assert source is not None and source["image_id"] == seen["image_id"]
    capsys.readouterr()
    embed.run(lake, with_text)
    assert "embed: nothing to do" in capsys.readouterr().out


def test_bytes_that_changed_after_ingest_never_get_the_old_id(images: Path, make_settings: MakeSettings, make_lake: MakeLake) -> None:
    settings = make_settings(waves={"rows": 50, "task_rows": 20})
    write_image(images / "part-0/twin.png", 1)  # the bytes of part-1/01.png
    lake = make_lake(settings)
    ingest.run(lake, settings)
    write_image(images / "part-0/00.png", 200)  # the only source of its image
    write_image(images / "part-1/01.png", 201)  # its image has another source
    os.unlink(images / "part-1/03.png")
    embed.run(lake, settings)
    refused = {row["uri"].rpartition("/")[2]: (row["code"], row["permanent"]) for row in lake.read("rejects").collect()}
    assert refused == {"00.png": ("bytes_changed", True), "03.png": ("missing", False)}
    by_key = {row["key"]: bytes(row["image_id"]) for row in lake.read("sources").collect()}
    embedded = {bytes(row["image_id"]) for row in lake.read("embeddings").collect()}
    assert by_key["part-0/00.png"] not in embedded
    assert by_key["part-1/01.png"] in embedded
    assert lake.read("embeddings").count() + 2 == lake.read("images").count()
    ingest.run(lake, settings)
    embed.run(lake, settings)  # the changed files are new images now
    assert lake.read("embeddings").count() == 12


def test_pixels_that_cannot_be_decoded_are_a_reject_for_every_output(
    images: Path, make_settings: MakeSettings, make_lake: MakeLake
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "cut.png")
    (images / "cut.png").write_bytes((images / "cut.png").read_bytes()[:30_000])
    settings = make_settings(waves={"rows": 50, "task_rows": 20})
    lake = make_lake(settings)
    ingest.run(lake, settings)
    for _ in range(2):
        embed.run(lake, settings)
    refused = lake.read("rejects").select("code", "fingerprint").collect()
    assert {row["code"] for row in refused} == {"decode_failed"}
    assert sorted(row["fingerprint"].rpartition("@")[0] for row in refused) == sorted(embedding.outputs(settings).values())
    assert lake.read("embeddings").count() == 12
    # a new source of the image is a new chance, and only that
    shutil.copy(images / "cut.png", images / "again.png")
    ingest.run(lake, settings)
    assert [tuple(row["want"]) for row in embed.pending(lake, settings).collect()] == [("colour-grid", "pixels")]
    embed.run(lake, settings)
    assert embed.pending(lake, settings).isEmpty()
    assert lake.read("rejects").where("permanent AND attempts = 1").count() == 4
    assert [tuple(row) for row in funnel.standing(lake, settings, "no head").select("stage", "code").collect()] == [
        ("embed", "decode_failed")
    ]


@pytest.mark.proof
def test_a_wave_staged_under_other_settings_lands_under_its_own_fingerprint(
    images: Path, tmp_path: Path, make_settings: MakeSettings, make_lake: MakeLake
) -> None:
    from jobs import waves

    settings = make_settings(waves={"rows": 8, "task_rows": 4})
    lake = make_lake(settings)
    ingest.run(lake, settings)
    first = embedding.outputs(settings)
    with pytest.raises(KeyboardInterrupt), waves.stage(lake, "embed", settings, embedding.tables(lake, settings, "embed")) as stage:
        plan = stage.plan(embed.pending(lake, settings), ["uri", "offset"])
        stage._stage_wave(0, embedding.compute(stage._inputs(plan, 0), settings, first))
        raise KeyboardInterrupt
    other = make_settings(waves={"rows": 8, "task_rows": 4}, embed={"encoders": ["colour-grid"], "device": "cpu", "precision": "bf16"})
    assert embedding.outputs(other)["colour-grid"] != first["colour-grid"]
    embed.run(lake, other)
    counts = {row["fingerprint"]: row["count"] for row in lake.read("embeddings").groupBy("fingerprint").count().collect()}
    assert counts == {first["colour-grid"]: 8, embedding.outputs(other)["colour-grid"]: 12}


def test_degraded_views_have_a_fingerprint_of_their_own(make_settings: MakeSettings) -> None:
    settings = make_settings()
    assert (
        embedding.outputs(settings)["colour-grid"]
        != embedding.outputs(settings, 7)["colour-grid"]
        != embedding.outputs(settings, 8)["colour-grid"]
    )
    assert ORIGINAL not in settings.label.views
