"""Detectors through embed, flags from what they saw, and a selection over flags: rules, caps, denials. Tiny tagger, real text and NSFW models."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from jinja2 import Environment, StrictUndefined
from PIL import ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from conf.build import Select
from conf.section import Mistake
from conf.settings import Settings
from jobs import classify, embed, embedding, facts, flag, ingest, report, report_flags, score, select_images
from jobs.checks import check
from jobs.lake import Lake
from jobs.registry import Head
from tests.jobs.conftest import MakeSettings
from tests.udfs.test_detectors import picture, write_tagger
from udfs import class_head, score_head

MARKED, DECLARED, PLAIN = 5, 2, 3


def paint(folder: Path) -> None:
    """Pictures with the same string at the lower edge, pictures that a generator signed, and pictures with neither."""
    folder.mkdir()
    for number in range(MARKED + DECLARED + PLAIN):
        image, info = picture(number, (320, 240)).point(lambda level: 150 + level // 3), PngInfo()
        if number < MARKED:
            ImageDraw.Draw(image).text((180, 205), "STUDIO X", fill="black", font=ImageFont.load_default(24))
        elif number < MARKED + DECLARED:
            info.add_text("parameters", "a horse\nSteps: 20, Sampler: Euler")
        image.save(folder / f"{number:02d}.png", pnginfo=info)


class Build:
    def __init__(self, spark: SparkSession, settings: Settings) -> None:
        self.settings, self.lake = settings, Lake(spark, settings)

    def with_flags(self, **flags: Any) -> Settings:
        return self.settings.model_copy(update={"flags": self.settings.flags.model_copy(update=flags)})

    def rows(self, settings: Settings | None = None) -> dict[str, dict[str, Any]]:
        """File name -> its flags under these settings."""
        known = flag.evidence(settings or self.settings)
        rows = self.lake.read("flags").where(F.col("fingerprint") == known.fingerprint)
        return {
            row["key"][:2]: row.asDict(True) for row in rows.join(self.lake.read("sources").select("image_id", "key"), "image_id").collect()
        }

    def known(self, made: bool = True) -> DataFrame:
        """What facts.gather gives, as rows that are there: it is asked often."""
        told = {"flags": flag.evidence(self.settings).fingerprint if made else "of no row"}
        values = ["text_share", "ai_generated", "rating", "tags", "min_side", "score", "opt_out", "denied"]
        rows = facts.gather(self.lake, self.settings, values, "", None, told)
        return self.lake.spark.createDataFrame(rows.collect(), rows.schema)


@pytest.fixture(scope="module")
def build(spark: SparkSession, empty_lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Ingested, embedded and flagged."""
    folder = tmp_path_factory.mktemp("flags")
    paint(folder / "images")
    tagger = write_tagger(folder)
    (folder / "tagger.yaml").write_text(yaml.safe_dump({key: value for key, value in tagger.items() if value is not None}))
    settings = Settings.model_validate(
        {
            "lake": {"root": str(folder / "lake")},
            "spark": {"master": "local[2,4]"},
            "mlflow": {"tracking_uri": f"sqlite:///{folder}/mlflow.db"},
            "encoder": "colour-grid",
            "ingest": {"sources": [{"name": "folder", "kind": "folder", "uri": str(folder / "images")}]},
            "embed": {"encoders": ["colour-grid"], "detectors": [str(folder / "tagger.yaml"), "open-nsfw", "rapidocr"], "device": "cpu"},
            "label": {"views": {"blur:1": 0.6}},
            "select": {"name": "test", "seed": 1, "rules": []},
            "export": {"root": str(folder / "exports")},
            "training": {"root": str(folder / "trainings")},
            "report": {"path": str(folder / "report.html"), "images_per_group": 3},
        },
        strict=False,
    )
    shutil.copytree(empty_lake, settings.lake.root)
    made = Build(spark, settings)
    ingest.run(made.lake, settings)
    flag.run(made.lake, settings)  # nothing can be said before the detectors have run
    assert made.rows() == {}
    embed.run(made.lake, settings)
    flag.run(made.lake, settings)
    return made


def test_every_image_has_one_row_of_flags_that_says_what_was_seen_and_by_whom(build: Build) -> None:
    rows = build.rows()
    assert len(rows) == MARKED + DECLARED + PLAIN == build.lake.read("flags").count()
    outputs = embedding.outputs(build.settings)
    for number, (name, row) in enumerate(sorted(rows.items())):
        assert int(name) == number
        assert row["rating"] in ("safe", "questionable", "explicit") and row["nsfw"] < 0.2
        assert row["rating_by"] == "tiny" or row["rating"] == "safe"
        assert all(outputs[detector] in row["versions"] for detector in ("tiny", "open-nsfw", "rapidocr"))
        assert row["has_text"] == (number < MARKED) and (row["text_share"] > 0.005) == (number < MARKED)
        declared = MARKED <= number < MARKED + DECLARED
        assert row["ai_generated"] == ("declared" if declared else "unknown")
        assert row["ai_evidence"][-1] == "no detector"
        assert ("declared by png:parameters: a horse" in row["ai_evidence"][0]) == declared
    assert {row["text"].replace(" ", "") for row in rows.values() if row["text"]} == {"STUDIOX"}
    assert all(row["watermark"] > 0.8 for name, row in rows.items() if int(name) < MARKED)  # five pictures show the same
    assert all(row["watermark"] == 0 for name, row in rows.items() if int(name) >= MARKED)


def test_a_second_run_does_nothing_and_a_plan_says_so(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    version = build.lake.version("flags")
    flag.run(build.lake, build.settings)
    flag.run(build.lake, build.settings, plan_only=True)
    assert capsys.readouterr().out == "flag: nothing to do\nflag: nothing to do\n"
    assert build.lake.version("flags") == version


def test_another_threshold_makes_new_rows_and_runs_no_model(build: Build) -> None:
    other = build.with_flags(repeated=MARKED + 1, general=0.99)
    versions = build.lake.versions(("detections", "embeddings", "pixels"))
    flag.run(build.lake, other)
    assert build.lake.versions(versions) == versions
    before, after = build.rows(), build.rows(other)
    assert len(after) == len(before)
    assert all(after[name]["watermark"] < before[name]["watermark"] for name in before if int(name) < MARKED)
    assert {tag for row in after.values() for tag in row["tags"]} < {tag for row in before.values() for tag in row["tags"]}
    assert embed.pending(build.lake, other).isEmpty()


def test_a_threshold_that_no_stored_number_can_answer_is_refused(build: Build) -> None:
    with pytest.raises(Mistake, match=r"the threshold 0.01 is below what detector tiny stores \(keep: 0.05\)"):
        flag.evidence(build.with_flags(general=0.01))
    with pytest.raises(Mistake, match=r"flags.thresholds: given \['nobody'\]"):
        flag.evidence(build.with_flags(thresholds={"nobody": 0.5}))


def head(label: str, classes: tuple[str, ...]) -> Head:
    """A real, untrained classifier of colour-grid vectors."""
    torch.manual_seed(0)
    weights = class_head.build(48, len(classes), None).state_dict()
    packed = class_head.pack(weights, class_head.About(label, classes, 1.0, 0.0))
    return Head(f"{label}-classifier", "3", "0" * 64, "colour-grid:x", {"beats_baselines": "true", "confounded": "false"}, packed)


def test_classifiers_tell_the_domain_and_the_origin_once_they_have_seen_the_image(
    build: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = [head("style", ("photo", "anime")), head("ai_generated", ("ai", "people"))]
    known = flag.evidence(build.settings, heads)
    assert flag.pending(build.lake, known).isEmpty()  # no class of any image is stored
    classes = build.lake.read("images").orderBy("image_id").select("image_id").limit(4)
    for one in heads:
        about = class_head.read_about(one.weights)
        p = F.when(F.hex("image_id") > "8", 0.97).otherwise(0.03).cast("float")
        names = [
            F.struct(F.lit(name).alias("class"), chance.cast("float").alias("p"))
            for name, chance in zip(about.classes, (p, 1 - p), strict=True)
        ]
        told = classes.withColumns(
            {"class": F.when(p > 0.5, about.classes[0]).otherwise(about.classes[1]), "p": p, "probabilities": F.array(*names)}
        )
        told = told.withColumns({"label": F.lit(about.label), "model": F.lit(one.model), "model_version": F.lit(one.version)})
        told = told.withColumns({"fingerprint": F.lit(classify.fingerprint(one)), "embedding_fingerprint": F.lit("x"), "run": F.lit("r")})
        build.lake.append("classes", told, f"test-{about.label}", 0)
    flag.run(build.lake, build.settings, heads=heads)
    assert "flag: 6 images wait" in capsys.readouterr().out
    rows = [row.asDict() for row in build.lake.read("flags").where(F.col("fingerprint") == known.fingerprint).collect()]
    assert len(rows) == 4
    for row in rows:
        high = row["image_id"].hex() > "8"
        assert row["domain"] == ("photo" if high else "drawing")
        assert row["ai_generated"] in (("declared", "detected") if high else ("declared", "unknown"))
        assert row["ai_evidence"][-1] == ("detected, 0.970" if high else "not detected, 0.030") + " by ai_generated-classifier:3"
    doubted = known._replace(
        heads=known.heads | {"ai_generated": heads[1]._replace(tags={"beats_baselines": "true", "confounded": "true"})}
    )
    images = build.lake.read("images").select("image_id", "ai_marks").join(classes, "image_id")
    for row in flag.compute(build.lake, images, build.settings, doubted).collect():
        assert row["ai_generated"] != "detected" and row["ai_evidence"][-1].startswith("no trustworthy detector: ai_generated-classifier:3")


def decided(known: DataFrame, **select: Any) -> dict[str, list[str]]:
    """-> id -> the rules that it failed."""
    settings = Select.model_validate({"name": "t", "seed": 5, "rules": []} | select, strict=False)
    rows = select_images.decide(known, settings).collect()
    return {row["image_id"].hex(): [failed["rule"] for failed in row["failed"]] for row in rows}


def test_rules_are_written_over_flags_and_an_image_without_any_passes_only_none_of(build: Build) -> None:
    rules = [
        {"name": "text", "value": "text_share", "at_most": 0.001},
        {"name": "origin", "value": "ai_generated", "none_of": ["declared", "detected"]},
        {"name": "rated", "value": "rating", "within": ["safe", "questionable", "explicit"]},
        {"name": "tagged", "value": "tags", "none_of": ["no such tag"]},
    ]
    known = build.known()
    assert {(row["denied"][0], row["denied_version"]) for row in known.collect()} == {("false", "rejects@now")}
    failed = decided(known, rules=rules).values()
    assert sorted(failed) == [[]] * PLAIN + [["origin"]] * DECLARED + [["text"]] * MARKED
    assert list(decided(build.known(made=False), rules=rules).values()) == [["text", "rated"]] * (MARKED + DECLARED + PLAIN)


def test_a_cap_keeps_at_most_so_many_of_a_group_and_says_why(build: Build) -> None:
    group = F.when(F.col("min_side") > 0, F.array(F.when(F.hex("image_id") > "8", "high").otherwise("low")))
    known = build.known().withColumn("style_cluster", group)
    sizes = {name: len(rows) for name, rows in _by_group(known).items()}
    cap = {"name": "few", "value": "ai_generated", "words": ["unknown", "declared"], "per": "style_cluster", "at_most": 2}
    failed = decided(known, caps=[cap])
    for name, ids in _by_group(known).items():
        kept = [one for one in ids if not failed[one]]
        assert len(kept) == min(2, sizes[name]) and all(failed[one] in ([], ["few"]) for one in ids)
    assert failed == decided(known.repartition(3), caps=[cap])
    assert sum(not rules for rules in decided(known, caps=[cap | {"at_most": 0}]).values()) == 0
    assert sum(not rules for rules in decided(known, caps=[cap | {"per": None}]).values()) == 2
    some = decided(known, caps=[cap | {"words": ["declared"], "per": None, "at_most": 1}])
    assert sorted(some.values()) == [[]] * (MARKED + PLAIN + 1) + [["few"]] * (DECLARED - 1)
    both = decided(known, caps=[cap], limit=3)
    assert sorted(rules for rules in both.values()).count([]) == min(3, sum(min(2, size) for size in sizes.values()))
    settings = Select.model_validate({"name": "t", "seed": 5, "rules": [], "caps": [cap | {"per": None}]}, strict=False)
    dropped = select_images.decide(known, settings).where(~F.col("kept")).first()
    assert dropped is not None and dropped["failed"][0]["bound"].startswith("<= 2 of ai_generated unknown, declared (all: draw ")


def _by_group(known: DataFrame) -> dict[str, list[str]]:
    rows = known.select("image_id", F.col("style_cluster")[0].alias("group")).collect()
    return {name: [row["image_id"].hex() for row in rows if row["group"] == name] for name in {row["group"] for row in rows}}


def test_a_selection_over_flags_waits_for_them_and_is_made_once(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    rules = [{"name": "text", "value": "has_text", "none_of": ["true"]}]
    asked = Select.model_validate({"name": "t", "seed": 5, "rules": rules}, strict=False)
    settings = build.with_flags(repeated=7).model_copy(update={"select": asked})
    torch.manual_seed(0)
    weights = safetensors.torch.save(score_head.build(192).state_dict())
    scorer = Head("aesthetic-scorer", "1", "0" * 64, embedding.of_scorer(settings), {}, weights)
    score.run(build.lake, settings, head=scorer)
    with pytest.raises(Mistake, match="select: rules or caps ask for flags, and images have none yet; run the stages flag first"):
        select_images.run(build.lake, settings, head=scorer)
    flag.run(build.lake, settings)
    capsys.readouterr()
    select_images.run(build.lake, settings, head=scorer)
    select_images.run(build.lake, settings, head=scorer)
    told = capsys.readouterr().out
    assert f"keeps {DECLARED + PLAIN} of {MARKED + DECLARED + PLAIN} images" in told and "select: nothing to do" in told
    failed = build.lake.read("decisions").select(F.explode("failed").alias("failed")).select("failed.*").distinct().collect()
    assert [tuple(row) for row in failed] == [("text", "true", "none of true", flag.evidence(settings).fingerprint)]


def test_a_denied_image_is_dropped_for_that_alone(build: Build) -> None:
    known = build.known().withColumn("denied", F.when(F.hex("image_id") > "8", F.array(F.lit("true"))).otherwise(F.col("denied")))
    impossible = [{"name": "never", "value": "min_side", "at_least": 1e9}]
    for image, failed in decided(known, rules=impossible).items():
        assert failed == (["denied"] if image > "8" else ["never"])


@pytest.mark.parametrize(
    ("select", "words"),
    [
        (
            {"rules": [{"name": "a", "value": "style_class", "within": ["photo"]}]},
            "style_class is told by a classifier of the labels 'style'",
        ),
        ({"caps": [{"name": "a", "value": "score", "words": ["1"], "at_most": 1}]}, "select.caps.a: value: given 'score', allowed"),
    ],
)
def test_a_value_that_nothing_in_the_build_tells_is_refused_before_spark_starts(build: Build, select: dict[str, Any], words: str) -> None:
    asked = Select.model_validate({"name": "t", "seed": 5, "rules": []} | select, strict=False)
    with pytest.raises(Mistake, match=words):
        check(build.settings.model_copy(update={"select": asked}))


def test_without_a_detector_a_rule_over_its_word_is_refused(make_settings: MakeSettings) -> None:
    settings = make_settings(select={"name": "t", "seed": 1, "rules": [{"name": "a", "value": "rating", "none_of": ["explicit"]}]})
    with pytest.raises(Mistake, match=r"rating is told by a detector of kernel nsfw or tagger; embed.detectors has none"):
        check(settings)


def test_with_nothing_configured_the_bytes_still_declare(build: Build) -> None:
    bare = build.settings.model_copy(update={"embed": build.settings.embed.model_copy(update={"detectors": ()})})
    flag.run(build.lake, bare)
    rows = build.rows(bare).values()
    assert sorted(row["ai_generated"] for row in rows) == ["declared"] * DECLARED + ["unknown"] * (MARKED + PLAIN)
    assert {(row["rating"], row["has_text"], row["nsfw"], row["versions"]) for row in rows} == {(None, None, None, "the bytes alone")}


def test_the_reports_section_counts_everything_and_draws_a_bounded_number(build: Build) -> None:
    lake, settings = build.lake, build.settings

    draw = partial(report.pictures, lake, settings)
    told = report_flags.section(lake, settings, draw)
    assert told["images"] == MARKED + DECLARED + PLAIN == sum(sum(row["counts"]) for row in told["ratings"]["table"])
    assert {one["name"]: one["n"] for one in told["origin"]["counts"]} == {"declared": DECLARED, "unknown": MARKED + PLAIN}
    evidence = {one["name"]: one["n"] for one in told["origin"]["evidence"]}
    assert evidence == {"no detector": MARKED + DECLARED + PLAIN, "declared by png:parameters": DECLARED}
    assert told["text"][0]["with_text"] == pytest.approx(MARKED / (MARKED + DECLARED + PLAIN))
    assert told["strings"] == [{"name": "studiox", "n": MARKED}] and told["steps"][0]["n"] == MARKED
    groups = {group["name"]: group for group in told["groups"]}
    assert groups["likely watermarked"]["n"] == MARKED and len(groups["likely watermarked"]["images"]) == 3
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    macro = "{% macro strip(images) %}{% for one in images %}<img src='{{ one.picture }}'>{{ one.caption }}{% endfor %}{% endmacro %}"
    html = page.from_string(macro + Path("jobs/report_flags.html").read_text()).render(flags=told)
    assert html.count("data:image/jpeg") == sum(len(group["images"]) for group in told["groups"]) and "studiox" in html
    assert "run the stage flag" in report_flags.section(lake, build.with_flags(edge=0.3), draw)["absent"]
