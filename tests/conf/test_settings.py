"""A wrong config is one line that names the key, what was given and what is allowed; before Spark or a model is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conf.section import Mistake
from conf.settings import digest, load, load_encoder, load_prices, load_prompt

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "conf/demo.yaml"


CONFIGS = [path for path in sorted((REPOSITORY / "conf").glob("*.yaml")) if path.name != "prices.yaml"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_that_we_ship_is_valid(path: Path) -> None:
    settings = load(path)
    assert {load_encoder(name).name for name in settings.embed.encoders} == set(settings.embed.encoders)


def test_the_prices_and_prompts_that_we_ship_are_valid() -> None:
    assert load_prices("prices").models
    assert all(load_prompt(path.stem).name == path.stem for path in (REPOSITORY / "conf/prompts").glob("*.yaml"))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "conf/encoders").glob("*.yaml")), ids=lambda path: path.name)
def test_every_encoder_that_we_ship_is_valid(path: Path) -> None:
    assert load_encoder(path.stem).name == path.stem


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("embed.batchsize=3", ["embed.batchsize", "unknown key", "given 3", "did you mean batch_size"]),
        ("nonsense=1", ["nonsense", "unknown key", "allowed", "ingest"]),
        ("embed.batch_size=many", ["embed.batch_size", "valid integer", "given 'many'"]),
        ("embed.batch_size=-1", ["embed.batch_size", "greater than 0", "given -1"]),
        ("embed.device=gpu", ["embed.device", "'cpu' or 'cuda'", "given 'gpu'"]),
        ("encoder=other", ["encoder", "given 'other'", "embed.encoders"]),
        ("select.rules=[{name: a, value: score, at_least: 8, at_most: 2}]", ["floor at_least=8.0 is above the maximum at_most=2.0"]),
        ("select.rules=[{name: a, value: score}]", ["needs at_least and/or at_most"]),
        ("select.rules=[{name: a, value: b, at_least: 1}, {name: a, value: c, at_least: 1}]", ["names must be unique"]),
        (
            "ingest.sources=[{name: a, kind: zip, uri: x}]",
            ["ingest.sources.0.kind", "'folder', 'tar', 'manifest' or 'parquet'", "given 'zip'"],
        ),
        ("ingest.sources=[{name: a, kind: tar, uri: x, columns: {uri: y}}]", ["columns were given for a tar"]),
        ("ingest.sources=[{name: a, kind: parquet, uri: x, columns: {uri: y}}]", ["columns of a parquet", "['uri']"]),
        ("ingest.sources=[{name: a, kind: manifest, uri: x, columns: {image: y}}]", ["columns of a manifest", "['image']"]),
        ("compare_captioners.captioners=[tags, pro]", ["compare_captioners.captioners: given ['pro']", "captions.captioners has ['tags']"]),
        ("captions.tiers=[{name: compare.x, captioner: tags}]", ["given ['compare.x']", "compare_captioners adds"]),
        ("captions.tiers=[]", ["captions.tiers", "at least 1 item"]),
        ("captions.budget_usd=0.0000000001", ["captions.budget_usd", "given 1e-10", "at most 9 decimals"]),
        ("lake.catalog=main", ["catalog and schema_name go together"]),
        ("embed", ["--set", "expected KEY=VALUE"]),
    ],
)
def test_a_wrong_value_is_named_with_what_was_given_and_what_is_allowed(override: str, words: list[str]) -> None:
    with pytest.raises(Mistake) as refused:
        load(DEMO, [override])
    for word in words:
        assert word in str(refused.value)


def test_a_missing_file_and_a_missing_key_are_named(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match=r"no file at .*absent\.yaml"):
        load(tmp_path / "absent.yaml")
    (tmp_path / "short.yaml").write_text("lake: {root: x}\n")
    with pytest.raises(Mistake, match="mlflow: required, not given"):
        load(tmp_path / "short.yaml")
    (tmp_path / "broken.yaml").write_text("lake: {root: [\n")
    with pytest.raises(Mistake, match="not YAML"):
        load(tmp_path / "broken.yaml")


def test_an_encoder_that_is_not_there_and_weights_without_a_hash_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match=r"given 'nope', allowed \['clip-vit-b-16-demo'"):
        load_encoder("nope")
    (tmp_path / "e.yaml").write_text("{name: e, kernel: clip, width: 8, weights: w.safetensors}")
    with pytest.raises(Mistake, match="weights need their sha256"):
        load_encoder(str(tmp_path / "e.yaml"))
    (tmp_path / "e.yaml").write_text("{name: e, kernel: magic, width: 8}")
    with pytest.raises(Mistake, match=r"kernel: given 'magic', allowed \['clip', 'colour_grid', 'csd', 'vit'\]"):
        load_encoder(str(tmp_path / "e.yaml"))


def test_settings_cannot_be_changed_and_a_digest_follows_their_values() -> None:
    settings = load(DEMO)
    with pytest.raises(ValueError, match="frozen"):
        settings.select.seed = 3  # type: ignore[misc]
    assert digest(settings.select) == digest(load(DEMO).select)
    assert digest(settings.select) != digest(load(DEMO, ["select.seed=99"]).select)


@pytest.mark.parametrize("module", ["jobs.ingest", "jobs.run_all", "jobs.why", "training.train_scorer"])
def test_an_entry_point_refuses_before_spark_starts_or_a_model_is_imported(module: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", module, "--config", str(DEMO), "--set", "embed.batch_size=0"]
    command += ["x"] if module in ("jobs.why", "training.train_scorer") else []
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == 2, done.stderr[-500:]
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert said == [f"studbook: {DEMO}: embed.batch_size: Input should be greater than 0, given 0"]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "open_clip", "mlflow", "deepspeed", "petastorm"}


def test_a_tracking_uri_with_a_password_is_refused_without_printing_it() -> None:
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        load(DEMO, ["mlflow.tracking_uri=https://bob:hunter2@mlflow.example.org"])
    assert "hunter2" not in str(refused.value)


def test_what_is_trained_does_not_change_with_how_it_is_run() -> None:
    scorer, image = load(DEMO).train_scorer, load(DEMO).train_diffusion
    run = {"ranks": 2, "zero_stage": 3, "checkpoint_every": 5, "explosion": 99.0}
    assert scorer.model_copy(update=run).identity() == scorer.identity()
    assert image.model_copy(update=run | {"micro_batch": 2}).identity() == image.identity()
    assert scorer.model_copy(update={"micro_batch": 16}).identity() != scorer.identity()
    assert scorer.model_copy(update={"ema_decay": 0.9}).identity() != scorer.identity()
