"""What is paid for what: decodes and images through each model are counted on Spark's workers, while a lake of 100 images gets one more
tower, tagger, image, head, set of centres and threshold. The tests go in order and change the lake.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from conf.settings import Settings
from jobs import assign_styles, classify, embed, embedding, fit_styles, flag, ingest, registry, runs, score
from jobs.lake import Lake
from jobs.tables import TABLES
from tests.jobs import spies
from tests.jobs.conftest import write_image
from tests.udfs.test_detectors import write_tagger
from udfs import class_head, score_head
from udfs.class_head import About

IMAGES, WIDTH = 100, 192
Said = Callable[[], str]


class Build:
    def __init__(self, folder: Path, spark: SparkSession, empty: Path) -> None:
        self.folder, self.log = folder, folder / "counts.log"
        for number in range(IMAGES):
            write_image(folder / f"images/{number:03d}.png", number)
        shutil.copytree(empty, folder / "lake")
        self.encoders, self.detectors, self.keys = ["colour-grid"], [self.tagger("tiny", keep=0.05)], {}
        self.lake = Lake(spark, self.settings)
        ingest.run(self.lake, self.settings)
        runs.connect(self.settings.mlflow)

    @property
    def settings(self) -> Settings:
        """The build as it is now."""
        folder = self.folder
        told: dict[str, Any] = {
            "lake": {"root": str(folder / "lake")},
            "spark": {"master": "local[2,4]"},
            "mlflow": {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "artifacts": str(folder / "artifacts")},
            "waves": {"rows": 200, "task_rows": 60},
            "encoder": "colour-grid",
            "ingest": {"sources": [{"name": "folder", "kind": "folder", "uri": str(folder / "images")}]},
            "embed": {"encoders": self.encoders, "detectors": self.detectors, "device": "cpu", "batch_size": 16, "model_threads": 1},
            "label": {"views": {"blur:1": 0.6}},
            "styles": {"clusters": 4, "stability_runs": 1, "iterations": 5},
            "select": {"name": "test", "seed": 1, "rules": []},
            "export": {"root": str(folder / "exports")},
            "training": {"root": str(folder / "trainings")},
            "report": {"path": str(folder / "report.html")},
        }
        return Settings.model_validate(told | self.keys, strict=False)

    def tagger(self, name: str, **keys: Any) -> str:
        place = self.folder / name
        place.mkdir()
        return self.file(name, {**write_tagger(place), "name": name, **keys})

    def file(self, name: str, told: dict[str, Any]) -> str:
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump({key: value for key, value in told.items() if value is not None}))
        return str(self.folder / f"{name}.yaml")

    def register(self, model: str, weights: bytes) -> None:
        """The next version and champion, as a trainer registers it."""
        place = self.folder / hashlib.sha256(weights).hexdigest()[:8]
        place.mkdir()
        (place / "head.safetensors").write_bytes(weights)
        client = registry.connect(self.settings.mlflow)
        if not client.search_registered_models(f"name = '{model}'"):
            client.create_registered_model(model)
        tags = dict.fromkeys(registry.TAGS, "{}") | {"sha256": hashlib.sha256(weights).hexdigest()}
        version = client.create_model_version(
            model, place.as_uri(), tags=tags | {"encoder_fingerprint": embedding.of_scorer(self.settings)}
        )
        client.set_registered_model_alias(model, "champion", version.version)

    def changed(self, *runs: Callable[[Lake, Settings], Any]) -> set[str]:
        """Tables that the stages add rows to."""
        before = self.versions()
        for run in runs:
            run(self.lake, self.settings)
        return {name for name, version in self.versions().items() if version != before[name]}

    def versions(self) -> dict[str, str]:
        """The last commit of each table, from its log: Delta's own answer costs seconds for all of them."""
        return {name: max(path.name for path in (self.folder / f"lake/{name}/_delta_log").glob("*.json")) for name in TABLES}


@pytest.fixture(scope="module")
def build(spark: SparkSession, empty_lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    made = Build(tmp_path_factory.mktemp("recompute"), spark, empty_lake)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(embedding, "on_worker", partial(spies.on_worker, log=str(made.log)))
        yield made


def paid(build: Build) -> dict[str, int]:
    """Decodes and images through each model since the last call; models are loaded at most once a worker."""
    told = spies.counts(build.log)
    loads = {name: told.pop(name) for name in list(told) if name.startswith("load:")}
    assert all(count <= 2 for count in loads.values()), loads  # local[2]
    assert {name.removeprefix("load:") for name in loads} <= told.keys()  # what is loaded is used
    return told


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return lambda: capsys.readouterr().out


def test_an_image_is_decoded_once_for_all_of_its_outputs_and_a_second_run_pays_nothing(build: Build, said: Said) -> None:
    assert build.changed(embed.run) == {"pixels", "embeddings", "detections"}
    assert paid(build) == {"decode": IMAGES, "colour-grid": IMAGES, "tiny": IMAGES}
    said()
    assert build.changed(ingest.run, embed.run) == set()
    assert "ingest: nothing to do" in (told := said()) and "embed: nothing to do" in told
    assert spies.counts(build.log) == {}  # no decode, no model run, none loaded


def test_a_new_tower_pays_one_decode_an_image_and_itself(build: Build) -> None:
    build.encoders.append(build.file("finer", {"name": "finer", "kernel": "colour_grid", "width": WIDTH, "image_size": 448}))
    assert build.changed(embed.run) == {"embeddings"}
    assert paid(build) == {"decode": IMAGES, "finer": IMAGES}


def test_a_new_tagger_pays_one_decode_an_image_and_itself(build: Build) -> None:
    build.detectors.append(build.tagger("second", keep=0.1))
    assert build.changed(embed.run) == {"detections"}
    assert paid(build) == {"decode": IMAGES, "second": IMAGES}


def test_one_image_more_pays_for_one_image(build: Build) -> None:
    write_image(build.folder / "images/new.png", IMAGES)
    assert build.changed(ingest.run) == {"images", "sources"}
    assert build.changed(embed.run) == {"pixels", "embeddings", "detections"}
    assert paid(build) == {"decode": 1, "colour-grid": 1, "finer": 1, "tiny": 1, "second": 1}
    assert build.lake.read("detections").count() == 2 * (IMAGES + 1)


def test_what_is_told_from_stored_vectors_and_detections_needs_no_bytes_and_changes_its_own_table_only(build: Build) -> None:
    """A head, a classifier, a set of centres, a threshold: the first of each, and another one. The images are away."""
    shutil.move(build.folder / "images", build.folder / "elsewhere")
    build.keys["classify"] = [{"label": "style", "model": "style-classifier"}]
    steps: dict[str, tuple[Callable[[Lake, Settings], Any], Callable[[int], None]]] = {
        "scores": (score.run, lambda number: build.register("aesthetic-scorer", head(number))),
        "classes": (classify.run, lambda number: build.register("style-classifier", classifier(number))),
        "styles": (assign_styles.run, lambda number: centres(build, number)),
        "flags": (flag.run, lambda number: build.keys.update(flags={"general": 0.3 + 0.1 * number})),
    }
    for table, (run, change) in steps.items():
        for number in range(2):
            change(number)
            assert build.changed(run) == {table}
        if table == "scores":  # of the others the demo's second run asks it
            assert build.changed(run) == set()
        counts = build.lake.read(table).groupBy("fingerprint").count().collect()
        assert [row["count"] for row in counts] == [IMAGES + 1] * 2, table
    assert build.changed(embed.run) == set()
    assert spies.counts(build.log) == {}


def test_a_new_classifier_of_style_makes_new_flags_and_nothing_else(build: Build) -> None:
    build.register("style-classifier", classifier(2))
    assert build.changed(classify.run) == {"classes"}
    assert build.changed(flag.run) == {"flags"}
    assert build.lake.read("flags").where(F.col("versions").contains("style-classifier:3")).count() == IMAGES + 1
    assert spies.counts(build.log) == {}


def head(seed: int) -> bytes:
    import safetensors.torch

    torch.manual_seed(seed)
    return safetensors.torch.save(score_head.build(WIDTH).state_dict())


def classifier(seed: int) -> bytes:
    weights = {"0.weight": torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed)), "0.bias": torch.zeros(2)}
    return class_head.pack(weights, About("style", ("anime", "photo"), 1.0, 0.0))


def centres(build: Build, number: int) -> None:
    """The centres of another seed count from here."""
    build.keys["styles"] = build.settings.styles.model_dump() | {"seed": number, "alias": "candidate" if number else "champion"}
    assert build.changed(fit_styles.run) == set()  # a model, no table
