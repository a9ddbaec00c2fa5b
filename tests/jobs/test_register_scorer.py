"""A head from elsewhere in a real sqlite store; no Spark."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from conf.section import Mistake
from jobs import embedding, fitted, promote_fitted, register_scorer, registry
from tests.jobs.conftest import MakeSettings
from training import mlflow_store
from udfs import score_head


def write_head(path: Path, width: int, seed: int) -> Path:
    torch.manual_seed(seed)
    safetensors.torch.save_file(score_head.build(width).state_dict(), path)
    return path


def test_a_head_from_elsewhere_scores_once_it_is_registered_and_a_second_waits(
    tmp_path: Path, make_settings: MakeSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings()
    first, second = write_head(tmp_path / "a.safetensors", 192, 1), write_head(tmp_path / "b.safetensors", 192, 2)
    register_scorer.run(settings, first)
    register_scorer.run(settings, first)
    register_scorer.run(settings, second)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "register-scorer: aesthetic-scorer:1 is the champion"
    assert said[1] == "register-scorer: nothing to do, aesthetic-scorer:1 is this head"
    assert said[2].endswith("python -m jobs.promote_fitted aesthetic-scorer 2")
    head = registry.resolve(settings.mlflow, "aesthetic-scorer", "champion")
    assert (head.version, head.weights, head.encoder_fingerprint) == ("1", first.read_bytes(), embedding.of_scorer(settings))
    promote_fitted.run(settings, "aesthetic-scorer", "2")
    assert registry.resolve(settings.mlflow, "aesthetic-scorer", "champion").weights == second.read_bytes()
    assert fitted.load(settings.mlflow, "aesthetic-scorer", "1").tags["beats_baselines"] == "unknown"


def test_beside_a_trained_champion_a_head_from_elsewhere_is_a_candidate(
    tmp_path: Path, make_settings: MakeSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings()
    client = mlflow_store.connect(settings.mlflow)
    run = client.create_run(mlflow_store.find_experiment(client, settings.mlflow)).info.run_id
    mlflow_store.settle_alias(
        client, "aesthetic-scorer", mlflow_store.register(client, "aesthetic-scorer", run, "head", {mlflow_store.DIGEST: "d"})
    )
    register_scorer.run(settings, write_head(tmp_path / "a.safetensors", 192, 1))
    assert "aesthetic-scorer:2 is a candidate beside aesthetic-scorer:1: python -m" in capsys.readouterr().out


def test_what_is_no_head_or_reads_other_vectors_is_refused_by_name(tmp_path: Path, make_settings: MakeSettings) -> None:
    settings = make_settings()
    with pytest.raises(Mistake, match="reads vectors of 768 numbers, encoder colour-grid gives 192"):
        register_scorer.run(settings, write_head(tmp_path / "v7.safetensors", 768, 1))
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(Mistake, match="is no score head"):
        register_scorer.run(settings, tmp_path / "text")
    safetensors.torch.save_file({"0.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(Mistake, match="is no score head"):
        register_scorer.run(settings, tmp_path / "other.safetensors")
    with pytest.raises(Mistake, match="no file at"):
        register_scorer.run(settings, tmp_path / "gone")
