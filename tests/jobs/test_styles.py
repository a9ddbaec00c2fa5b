"""fit -> assign -> add -> assign -> block on a small lake of colour-grid vectors; the tests go in order and change it."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from jinja2 import Environment, StrictUndefined
from PIL import Image
from pyspark.sql import Row, SparkSession
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, load, load_encoder
from jobs import (
    add_style,
    assign_styles,
    block_styles,
    centres,
    facts,
    fit_styles,
    fitted,
    registry,
    report_styles,
    select_images,
    style_sample,
    style_sheets,
)
from jobs.lake import Lake
from tests.jobs.conftest import REPOSITORY, write_image
from udfs import style_centres, tower_colour_grid

IMAGES, CLUSTERS = 24, 4


class Build:
    def __init__(self, folder: Path, spark: SparkSession, empty: Path) -> None:
        self.folder = folder
        for number in range(IMAGES + 1):
            write_image(folder / f"images/{number:02d}.png", number)
        shutil.copytree(empty, folder / "lake")
        self.settings = self.configure()
        self.lake = Lake(spark, self.settings)
        self.fill()

    def fill(self) -> None:
        """What ingest and embed would have written, without their waves: vectors by the real tower, of all images but the last."""
        encoder = load_encoder("colour-grid").model_dump()
        images, sources, vectors = [], [], []
        for path in sorted((self.folder / "images").glob("*.png")):
            data, stat = path.read_bytes(), path.stat()
            image_id = bytearray(hashlib.sha256(data).digest())
            with Image.open(path) as picture:
                batch = tower_colour_grid.prepare(picture.convert("RGB"), encoder)[None]
            vector = tower_colour_grid.encode(tower_colour_grid.load(encoder, "cpu", "fp32"), batch)[0].astype("<f2")
            place = {"uri": path.as_uri(), "offset": 0, "length": len(data), "size": len(data), "mtime_us": stat.st_mtime_ns // 1000}
            told = {
                "source": "folder",
                "key": path.name,
                "entry": path.as_uri(),
                "seen": "1",
                "opt_out": False,
                "alt_text": f"number {path.stem}",
            }
            sources.append({"image_id": image_id, "tags": ["even" if int(path.stem) % 2 == 0 else "odd"], **place, **told})
            images.append(
                {"image_id": image_id, "format": "PNG", "width": 48, "height": 32, "bytes": len(data), "frames": 1, "ai_marks": []}
            )
            row = {"image_id": image_id, "view": "original", "fingerprint": centres.vectors_fingerprint(self.settings)}
            vectors.append(row | {"encoder": "colour-grid", "width": len(vector), "vector": bytearray(vector.tobytes())})
        for table, rows in {"images": images, "sources": sources, "embeddings": vectors[:-1]}.items():
            schema = self.lake.read(table).schema
            whole = [{field: row.get(field) for field in schema.names} | {"run": "test"} for row in rows]
            self.lake.append(table, self.lake.spark.createDataFrame(whole, schema), "test", 0)

    def configure(self, **styles: Any) -> Settings:
        told = {"clusters": CLUSTERS, "over_cluster": "null", "stability_runs": 1, "iterations": 5} | styles
        sections = {
            "lake.root": self.folder / "lake",
            "mlflow.tracking_uri": f"sqlite:///{self.folder}/mlflow.db",
            "mlflow.artifacts": self.folder / "artifacts",
            "ingest.sources": f"[{{name: folder, kind: folder, uri: {self.folder}/images}}]",
            "encoder": "colour-grid",
            "embed": "{encoders: [colour-grid], device: cpu}",
            "report.path": self.folder / "report.html",
        } | {f"styles.{key}": value for key, value in told.items()}
        return load(REPOSITORY / "conf/demo.yaml", [f"{key}={value}" for key, value in sections.items()])

    def rows(self) -> dict[str, Row]:
        """Rows by the centre set that counts now, by id."""
        told = centres.fingerprint(centres.current(self.settings), self.settings)
        return {bytes(row["image_id"]).hex(): row for row in self.lake.read("styles").where(F.col("fingerprint") == told).collect()}


@pytest.fixture(scope="module")
def build(spark: SparkSession, empty_lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    yield Build(tmp_path_factory.mktemp("styles"), spark, empty_lake)


Said = Callable[[], str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return lambda: capsys.readouterr().out


def test_too_few_vectors_for_the_clusters_are_named_with_their_number(build: Build) -> None:
    with pytest.raises(Mistake, match=f"{IMAGES} images have a vector of colour-grid; 2048 clusters need at least 2560"):
        fit_styles.run(build.lake, build.configure(clusters=2048))
    with pytest.raises(Mistake, match="no version of 'style-centres': there is no MLflow store"):
        assign_styles.run(build.lake, build.settings)


def test_a_fit_is_registered_with_its_measures_and_a_second_run_has_nothing_to_do(build: Build, said: Said) -> None:
    fit_styles.run(build.lake, build.settings)
    assert "fit-styles: style-centres:1 is the champion" in said()
    chosen = centres.current(build.settings)
    assert chosen.centres.ids.tolist() == list(range(CLUSTERS)) and chosen.centres.encoder.startswith("colour-grid:")
    told = registry.run_of(build.settings.mlflow, registry.find(build.settings.mlflow, "style-centres"))
    assert told is not None and told.metrics["images"] == IMAGES and told.metrics["none_above"] == chosen.centres.none_above > 0
    assert {"stability_seeds_mean", "stability_resamples_mean", "size_largest", "size_entropy", "unseen_none"} <= told.metrics.keys()
    fit_styles.run(build.lake, build.settings)
    assert said() == f"fit-styles: nothing to do, style-centres:1 was fitted on these {IMAGES} vectors\n"
    fit_styles.ensure(build.lake, build.settings)
    assert "nothing to do" in said()


def test_a_smaller_sample_is_drawn_by_the_seed_and_no_more_than_wanted(build: Build) -> None:
    drawn = style_sample.draw(build.lake, build.settings).select("image_id", "draw").collect()
    assert len(drawn) == IMAGES and len({row["draw"] for row in drawn}) == IMAGES
    vectors = np.random.default_rng(0).normal(size=(IMAGES, 3)).astype("<f2")
    vectors[0] = np.inf
    columns = {
        "image_id": [bytes(row["image_id"]) for row in drawn],
        "draw": [row["draw"] for row in drawn],
        "vector": [one.tobytes() for one in vectors],
        "source": ["a"] * IMAGES,
        "has": [[0] if place % 2 else None for place in range(IMAGES)],
    }
    batch = pa.RecordBatch.from_pydict({name: pa.array(values) for name, values in columns.items()})
    sample = style_sample.order(iter([batch.slice(5), batch.slice(0, 5)]), 3, ["ink"])
    places = [place for place in np.argsort(columns["draw"]) if place != 0]
    assert np.array_equal(sample.vectors, vectors[places].astype(np.float32)) and sample.not_finite == 1
    assert sample.tags["ink"].tolist() == [place % 2 == 1 for place in places]


def test_every_image_gets_its_cluster_and_a_second_run_has_nothing_to_do(build: Build, said: Said) -> None:
    assign_styles.run(build.lake, build.settings)
    rows = build.rows()
    assert len(rows) == IMAGES and {row["centres"] for row in rows.values()} == {"style-centres:1"}
    for row in rows.values():
        assert row["state"] in ("ok", "none") and [one["distance"] for one in row["top"]] == sorted(one["distance"] for one in row["top"])
        assert row["tag"] == (f"style_cluster_{row['nearest']}" if row["state"] == "ok" else None)
    said()
    assign_styles.run(build.lake, build.settings)
    assert said() == "assign-styles: nothing to do\n"


def test_the_policy_v7_has_rows_of_its_own_and_only_ok_ones(build: Build) -> None:
    released = build.configure(policy="v7")
    assign_styles.run(build.lake, released)
    told = centres.fingerprint(centres.current(released), released)
    states = build.lake.read("styles").where(F.col("fingerprint") == told).groupBy("state").count().collect()
    assert [tuple(row) for row in states] == [("ok", IMAGES)]


def test_rules_may_ask_how_many_images_have_a_style(build: Build) -> None:
    rows = {image: row["cluster"] for image, row in build.rows().items() if row["cluster"] is not None}
    sizes = Counter(rows.values())
    values = ["style_size", "style_share"]
    known = facts.gather(build.lake, build.settings, values, "", None, select_images.made_by(build.settings, values))
    found = {
        bytes(row["image_id"]).hex(): (row["style_size"], row["style_share"]) for row in known.collect() if row["style_size"] is not None
    }
    assert found == {image: (sizes[cluster], sizes[cluster] / len(rows)) for image, cluster in rows.items()}
    assert known.count() == IMAGES + 1 and len(rows) < IMAGES + 1  # of no cluster, or without a vector: no size


def test_the_sheets_show_each_cluster_and_are_made_again_only_when_assignments_or_denials_changed(build: Build, said: Said) -> None:
    style_sheets.run(build.lake, build.settings)
    rows = build.rows()
    pages = {f"style_cluster_{row['nearest']}.jpg" if row["state"] != "none" else "none.jpg" for row in rows.values()}
    folder = build.folder / "styles"
    assert {path.name for path in folder.iterdir()} == pages | {"index.html"}
    assert "http" not in (folder / "index.html").read_text() and f"{len(pages)} pages, {folder}/index.html" in said()
    run = centres.current(build.settings).fitted.run
    stored = registry.connect(build.settings.mlflow).list_artifacts(run, "sheets")
    assert {Path(one.path).name for one in stored} == pages | {"index.html"}
    style_sheets.run(build.lake, build.settings)
    assert said() == f"style-sheets: nothing to do, {folder}/index.html is up to date\n"
    shown = {
        bytes(row["image_id"]).hex() for row in style_sheets.assigned(build.lake, build.settings, centres.current(build.settings)).collect()
    }
    assert shown == rows.keys()
    denied = sorted(rows)[0]
    fields = {
        "stage": "embed",
        "input_key": denied,
        "fingerprint": "f",
        "code": "denied",
        "detail": "",
        "permanent": True,
        "attempts": 1,
        "run": "t",
    }
    schema = build.lake.read("rejects").schema
    refusal = {name: fields.get(name) for name in schema.names} | {"image_id": bytearray.fromhex(denied)}
    build.lake.append("rejects", build.lake.spark.createDataFrame([refusal], schema), "denial", 0)
    assert denied not in {
        bytes(row["image_id"]).hex() for row in style_sheets.assigned(build.lake, build.settings, centres.current(build.settings)).collect()
    }
    style_sheets.run(build.lake, build.settings, plan_only=True)
    assert "is to be made anew" in said()


def test_cases_are_the_nearest_median_and_farthest_once_each_and_the_smallest_margins(build: Build) -> None:
    rows = [(bytearray([n] * 32), "7", "ok", n / 10, (20 - n) / 10, 3) for n in range(20)]
    known = build.lake.spark.createDataFrame(rows, "image_id BINARY, page STRING, state STRING, distance DOUBLE, margin DOUBLE, next INT")
    for many, count in ((3, 20), (6, 10)):
        cases = style_sheets.choose(known.where(F.col("distance") < count / 10), many).orderBy("kind", "place").collect()
        told = {kind: [row["image_id"][0] for row in cases if row["kind"] == kind] for kind in ("nearest", "median", "farthest", "margin")}
        assert told["nearest"] == list(range(many)) and told["margin"] == list(range(count - 1, count - 1 - many, -1))
        assert (told["median"], told["farthest"]) == (([8, 9, 10], [17, 18, 19]) if many == 3 else ([], [6, 7, 8, 9]))
    assert cases[0]["told"] == "distance 0.600, margin 1.400 to 3"


def test_the_reports_section_tells_states_and_measures_and_shows_pages_that_are_up_to_date_only(build: Build) -> None:
    told = report_styles.section(build.lake, build.settings)  # an image was denied since the pages were drawn
    assert told["index"] == "" and not any(one["picture"] for one in told["largest"])
    style_sheets.run(build.lake, build.settings)
    told = report_styles.section(build.lake, build.settings)
    assert (told["name"], told["images"], told["clusters"], told["index"]) == ("style-centres:1", IMAGES, CLUSTERS, "styles/index.html")
    assert sum(state["n"] for state in told["states"]) == IMAGES and sum(one["n"] for one in told["largest"]) <= IMAGES
    assert told["largest"][0]["picture"].startswith("data:image/jpeg;base64,")
    assert {"stability_seeds_mean", "leakage_tags"} <= {measure["name"] for measure in told["measures"]}
    page = Environment(autoescape=True, undefined=StrictUndefined)
    text = page.from_string((REPOSITORY / "jobs/report_styles.html").read_text()).render(styles=told)
    assert 'href="styles/style_cluster_' in text
    other = build.configure(model="nothing-fitted")
    text = page.from_string((REPOSITORY / "jobs/report_styles.html").read_text()).render(styles=report_styles.section(build.lake, other))
    assert "has no version or alias" in text


def test_a_style_added_from_images_takes_the_next_id_and_leaves_the_others_as_they_were(build: Build, said: Said) -> None:
    before, parent = build.rows(), centres.current(build.settings)
    names = ["00.png", str(build.folder / "images/01.png"), sorted(before)[1]]
    add_style.run(build.lake, build.settings, names, note="mine")
    assert "style-centres:2 is the champion" in said()
    child = centres.current(build.settings)
    assert child.centres.ids.tolist() == [*parent.centres.ids.tolist(), CLUSTERS]
    assert child.centres.centres[:CLUSTERS].tobytes() == parent.centres.centres.tobytes()
    assert child.centres.none_above == parent.centres.none_above and child.centres.history[-1]["note"] == "mine"
    add_style.run(build.lake, build.settings, names)
    assert "nothing to do, cluster 4 of style-centres:2 was made from these" in said()
    assign_styles.run(build.lake, build.settings)
    after = build.rows()
    assert len(after) == IMAGES
    for image, row in after.items():
        assert row["nearest"] in (before[image]["nearest"], CLUSTERS)  # the old centres and their ids stayed
        if row["nearest"] != CLUSTERS:
            assert (row["distance"], row["state"]) == (before[image]["distance"], before[image]["state"])


def test_an_image_without_a_vector_is_named_and_makes_no_style(build: Build) -> None:
    with pytest.raises(Mistake, match=rf"1 images have no vector of colour-grid, or are denied: {IMAGES}.png; run the stage embed first"):
        add_style.run(build.lake, build.settings, ["00.png", f"{IMAGES}.png"])
    with pytest.raises(Mistake, match="'nobody' should name one image, and names none"):
        add_style.run(build.lake, build.settings, ["nobody"])


def test_a_blocked_cluster_is_told_as_blocked_and_can_be_unblocked(build: Build, said: Said) -> None:
    most = max(row["nearest"] for row in build.rows().values())
    block_styles.run(build.settings, {most})
    assert "style-centres:3 is the champion" in said()
    block_styles.run(build.settings, {most})
    assert "nothing to do" in said()
    assign_styles.run(build.lake, build.settings)
    for row in build.rows().values():
        assert (row["state"] == "blocked") == (row["nearest"] == most) and (row["cluster"] is None) == (row["state"] != "ok")
    with pytest.raises(Mistake, match=r"given the clusters \[77\], which this set of 5 centres has not; its ids are 0 to 4"):
        block_styles.run(build.settings, {77})
    block_styles.run(build.settings, {most}, unblock=True)
    assert centres.current(build.settings).centres.block == ()


def test_what_derives_from_no_champion_is_a_candidate(build: Build, said: Said) -> None:
    other = build.settings.model_copy(update={"styles": build.settings.styles.model_copy(update={"alias": "1"})})
    block_styles.run(other, {0})
    champion = fitted.load(build.settings.mlflow, "style-centres", "champion")
    assert f"style-centres:5 is a candidate beside {champion.name}" in said()
    assert fitted.load(build.settings.mlflow, "style-centres", "candidate").version == "5"


def test_centres_of_other_vectors_are_refused(build: Build) -> None:
    (build.folder / "finer.yaml").write_text("{name: finer, kernel: colour_grid, width: 192, image_size: 448}")
    finer = str(build.folder / "finer.yaml")
    changes = {"encoder": finer, "embed": build.settings.embed.model_copy(update={"encoders": (finer,)})}
    with pytest.raises(Mistake, match=r"was fitted on vectors colour-grid:\w+, this config embeds finer:\w+; fit centres on these vectors"):
        assign_styles.run(build.lake, build.settings.model_copy(update=changes))


def test_a_stored_vector_that_is_not_finite_is_a_reject_of_this_stage(build: Build) -> None:
    chosen = centres.current(build.settings)
    broken = np.full(chosen.centres.centres.shape[1], np.nan, "<f2").tobytes()
    vectors = build.lake.spark.createDataFrame([(bytearray(32), bytearray(broken))], "image_id BINARY, vector BINARY")
    staged = assign_styles.compute(vectors, build.settings, chosen)
    land = assign_styles.tables(build.lake, build.settings)
    assert land["styles"](staged, "r").count() == 0  # type: ignore[union-attr]
    row = land["rejects"](staged, "r").first()  # type: ignore[union-attr]
    assert row is not None and (row["code"], row["stage"], row["input_key"]) == ("not_finite", "assign-styles", "00" * 32)
    assert style_centres.KERNEL_VERSION == 1
