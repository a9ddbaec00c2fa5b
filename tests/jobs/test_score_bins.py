"""score -> calibrate -> score by the fitted bins -> bias, on a small lake of colour-grid vectors with a random head; tests go in order."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from jinja2 import Environment, StrictUndefined
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, load
from jobs import calibrate_scores, domains, embed, ingest, label, registry, report_scores, runs, score, score_bias
from jobs.lake import Lake
from tests.jobs.conftest import REPOSITORY, write_image
from udfs import score_bins, score_head

FIRST, SECOND = 36, 24  # images of the two sources
VIEWS = {"contrast:1": 0.5, "blur:2": 0.2}
Said = Callable[[], str]


def register_head(settings: Settings, folder: Path, seed: int) -> None:
    """A random head whose scores spread over V7's bins, registered as a training would."""
    torch.manual_seed(seed)
    head = score_head.build(192)
    with torch.no_grad():
        head[6].weight.mul_(25)
        head[6].bias.fill_(0.6)
    weights = safetensors.torch.save(head.state_dict())
    (folder / "head.safetensors").write_bytes(weights)
    client = registry.connect(settings.mlflow)
    if not client.search_registered_models("name = 'aesthetic-scorer'"):
        client.create_registered_model("aesthetic-scorer")
    tags = dict.fromkeys(registry.TAGS, "{}") | {"sha256": hashlib.sha256(weights).hexdigest()}
    tags["encoder_fingerprint"] = score.embedding.of_scorer(settings)
    version = client.create_model_version("aesthetic-scorer", folder.as_uri(), tags=tags)
    client.set_registered_model_alias("aesthetic-scorer", "champion", version.version)


class Build:
    def __init__(self, folder: Path, spark: SparkSession, empty: Path) -> None:
        self.folder = folder
        for number in range(FIRST + SECOND):
            write_image(folder / ("first" if number < FIRST else "second") / f"{number:02d}.png", number)
        shutil.copy(folder / "first/00.png", folder / "second/again.png")  # its first source stays the first
        shutil.copytree(empty, folder / "lake")
        (folder / "head").mkdir()
        self.settings = self.configure()
        self.lake = Lake(spark, self.settings)
        ingest.run(self.lake, self.settings)
        embed.run(self.lake, self.settings)
        label.run(self.lake, self.settings)
        runs.connect(self.settings.mlflow)
        register_head(self.settings, folder / "head", 5)

    def configure(self, **keys: Any) -> Settings:
        told = [f"{{name: {name}, kind: folder, uri: {self.folder}/{name}}}" for name in ("first", "second")]
        sections = {
            "lake.root": self.folder / "lake",
            "mlflow.tracking_uri": f"sqlite:///{self.folder}/mlflow.db",
            "mlflow.artifacts": self.folder / "artifacts",
            "ingest.sources": f"[{', '.join(told)}]",
            "encoder": "colour-grid",
            "embed": "{encoders: [colour-grid], device: cpu}",
            "waves": "{rows: 200, task_rows: 60}",
            "label.images": 40,
            "label.views": str(VIEWS),
            "label.probes": "[smooth:1]",
            "calibrate.fewest": 30,
            "classify": "[]",
        } | {key.replace("__", "."): value for key, value in keys.items()}
        return load(REPOSITORY / "conf/demo.yaml", [f"{key}={value}" for key, value in sections.items()])

    def scores(self, fingerprint: str) -> dict[bytes, tuple[float, int, str]]:
        rows = self.lake.read("scores").where(F.col("fingerprint") == fingerprint).collect()
        return {bytes(row["image_id"]): (row["raw"], row["bin"], row["bins"]) for row in rows}


@pytest.fixture(scope="module")
def build(spark: SparkSession, empty_lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    yield Build(tmp_path_factory.mktemp("bins"), spark, empty_lake)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return lambda: capsys.readouterr().out


def test_a_probe_gets_a_vector_and_no_label(build: Build, said: Said) -> None:
    views = {row["view"]: row["count"] for row in build.lake.read("embeddings").groupBy("view").count().collect()}
    assert views == {"original": FIRST + SECOND, "contrast:1": 40, "blur:2": 40, "smooth:1": 40}
    labels = {row["view"]: row["count"] for row in build.lake.read("labels").groupBy("view").count().collect()}
    assert labels == {"original": 40, "contrast:1": 40, "blur:2": 40}
    label.run(build.lake, build.settings)
    assert "label: nothing to do" in said()
    with pytest.raises(Mistake, match=r"probes: given \['contrast:1'\], which are among views"):
        build.configure(label__probes="[contrast:1]")


def test_bins_need_scores_and_a_rule_that_is_registered(build: Build) -> None:
    with pytest.raises(Mistake, match=r"0 images have scores by this head, calibrate\.fewest is 30"):
        calibrate_scores.run(build.lake, build.settings)
    with pytest.raises(Mistake, match=r"'score-bins' .*has no version or alias 'champion'"):
        score.champion(build.configure(score__bins="score-bins"))


def test_v7s_bins_are_the_default_under_the_fingerprint_that_they_always_had(build: Build) -> None:
    score.run(build.lake, build.settings)
    head = score.champion(build.settings)
    rows = build.scores(f"aesthetic-scorer:{head.sha256[:12]}:1/{head.encoder_fingerprint}")
    assert len(rows) == FIRST + SECOND and len({number for _, number, _ in rows.values()}) > 3
    assert {bins for _, _, bins in rows.values()} == {"v7"}
    assert all(number == score_head.score_bin(raw) for raw, number, _ in rows.values())


def test_quantile_bins_are_fitted_for_each_source_once_and_scored_without_a_model(build: Build, said: Said) -> None:
    calibrate_scores.run(build.lake, build.settings)
    assert "score-bins:1 is the champion" in said()
    calibrate_scores.run(build.lake, build.settings)
    assert said() == f"calibrate-scores: nothing to do, score-bins:1 was fitted on these {FIRST + SECOND} images\n"
    wanted = build.configure(score__bins="score-bins")
    head = score.champion(wanted)
    assert head.bins.edges.keys() == {"first"}, "the second source has too few images"
    score.run(build.lake, wanted, head=head._replace(weights=b"no head, and none is asked"))
    plain, other = build.scores(score.fingerprint(score.raw_champion(wanted))), build.scores(score.fingerprint(head))
    assert {key: raw for key, (raw, _, _) in plain.items()} == {key: raw for key, (raw, _, _) in other.items()}
    assert {bins for _, _, bins in other.values()} == {"score-bins:1"}
    first = {hashlib.sha256((build.folder / f"first/{number:02d}.png").read_bytes()).digest() for number in range(FIRST)}
    raws = {key: raw for key, (raw, _, _) in plain.items()}
    own, every = (np.sort([raws[key] for key in keys]) for keys in (first, raws))
    for key, (raw, number, _) in other.items():
        below = (own if key in first else every) <= np.float32(raw)
        assert abs(below.mean() * 10 - number) <= 1.01, "a bin is a tenth of the domain"
    counts = np.bincount([number for key, (_, number, _) in other.items() if key in first], minlength=10)
    assert counts.max() - counts.min() <= 2
    said()
    score.run(build.lake, wanted)
    assert said() == "score: nothing to do\n"
    calibrate_scores.run(build.lake, build.settings)  # rows under another rule are no new scores
    assert "nothing to do" in said()


def test_a_new_image_is_scored_by_the_head_under_the_fitted_rule(build: Build, said: Said) -> None:
    wanted, new = build.configure(score__bins="score-bins"), b"n" * 32
    head = score.champion(wanted)
    one = build.lake.read("embeddings").where(F.col("view") == "original").limit(1)
    build.lake.append("embeddings", one.withColumn("image_id", F.lit(new)), "test", 0)
    score.run(build.lake, wanted, head=head)
    rows = build.scores(score.fingerprint(head))
    assert rows[new][1] == score_bins.bin_of(rows[new][0], None, head.bins), "no source: the bins of all"
    said()
    score.run(build.lake, build.settings)  # V7's bin of it, from the raw score that is there
    assert build.scores(score.fingerprint(score.raw_champion(wanted)))[new][0] == rows[new][0]


def test_isotonic_bins_come_from_labelled_views(build: Build, said: Said) -> None:
    wanted = build.configure(calibrate__method="isotonic", calibrate__model="worth", calibrate__domain="none", score__bins="worth")
    calibrate_scores.run(build.lake, wanted)
    assert "mse_calibrated" in said()
    head = score.champion(wanted)
    version = registry.run_of(wanted.mlflow, registry.find(wanted.mlflow, "worth"))
    assert version is not None and version.metrics["images"] == 40
    assert version.metrics["mse_calibrated"] < version.metrics["mse_raw"]
    calibrate_scores.run(build.lake, wanted)
    assert "nothing to do, worth:1" in said()
    score.run(build.lake, wanted)
    rows = build.scores(score.fingerprint(head))
    assert len(rows) == FIRST + SECOND + 1 and all(number == score_bins.bin_of(raw, None, head.bins) for raw, number, _ in rows.values())


def test_what_the_score_follows_is_told_by_group_and_the_probe_by_view(build: Build, said: Said) -> None:
    wanted = build.configure()
    score_bias.run(build.lake, wanted)
    printed = said()
    told = score_bias.measure(build.lake, wanted, score.champion(wanted))
    groups = {(one["group"], one["value"]): one for one in told["groups"]}
    counts = {key: one["images"] for key, one in groups.items()}
    assert counts == {("all", ""): FIRST + SECOND, ("source", "first"): FIRST, ("source", "second"): SECOND}
    assert all(sum(one["bins"]) == one["images"] for one in told["groups"])
    head = score.champion(wanted)
    rows = score_bias.facts(build.lake, wanted, head).toPandas()
    x, y = rows[["contrast", "saturation", "sharpness"]].to_numpy(float), rows.raw.to_numpy(float)
    x = np.column_stack([x, np.ones(len(x))])
    left = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    assert groups["all", ""]["together"] == pytest.approx(1 - left.var() / y.var(), abs=1e-6)
    assert groups["all", ""]["alone"]["resolution"] == 0.0, "all pictures are of one size"
    assert groups["source", "first"]["alone"] is None
    probe = {one["view"]: one for one in told["probe"]}
    assert {view: (one["images"], one["target"]) for view, one in probe.items()} == {"contrast:1": (40, 0.5), "smooth:1": (40, None)}
    for one in probe.values():
        mean, low, high = one["change"]
        assert low <= mean <= high and 0 <= one["rises"] + one["falls"] <= 1
    assert "smooth:1" in printed and "no label" in printed and "target 0.50" in printed and "2 groups of fewer than 50 images" in printed


def test_the_reports_part_renders(build: Build) -> None:
    told = report_scores.section(build.lake, build.settings, score.champion(build.configure(score__bins="score-bins")))
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string((REPOSITORY / "jobs/report_scores.html").read_text())
    html = page.render(bias=told)
    assert "smooth:1" in html and "score-bins:1" in html and "What the score follows" in html


def test_a_class_is_a_domain_once_every_image_has_been_through_the_classifier(build: Build) -> None:
    rows = domains.first_sources(build.lake).withColumnRenamed("domain", "class")
    told = {name: F.lit("c") for name in ("fingerprint", "label", "model", "model_version", "embedding_fingerprint", "run")}
    nothing = F.array().cast("array<struct<class: string, p: float>>")
    classes = rows.withColumns(told | {"p": F.lit(1.0).cast("float"), "probabilities": nothing})
    build.lake.append("classes", classes.where(F.col("class") == "first"), "test", 0)
    with pytest.raises(Mistake, match="score: images have no class by c yet; run the stage classify first"):
        domains.check_classified(build.lake, rows, "c", "score")
    build.lake.append("classes", classes.where(F.col("class") == "second"), "test", 1)
    domains.check_classified(build.lake, rows, "c", "score")
    found = domains.add(build.lake, rows, domains.CLASS, "c").groupBy("domain").count().collect()
    assert {row["domain"]: row["count"] for row in found} == {"first": FIRST, "second": SECOND}


def test_bins_of_another_head_are_refused(build: Build) -> None:
    (build.folder / "other").mkdir()
    register_head(build.settings, build.folder / "other", 6)
    with pytest.raises(Mistake, match=r"score-bins:1 was fitted on the raw scores .*fit bins for this head"):
        score.champion(build.configure(score__bins="score-bins"))
    with pytest.raises(Mistake, match="no entry of `classify` has the label 'style'"):
        calibrate_scores.run(build.lake, build.configure(calibrate__domain="class"))
