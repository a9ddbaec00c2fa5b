"""A real sqlite store; no Spark."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.build import Mlflow
from conf.section import Mistake
from jobs import fitted, promote_fitted, registry
from tests.jobs.conftest import MakeSettings

FILES = {"centres.safetensors": b"\x00\x01", "centres.json": b"{}"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Mlflow:
    """A store that nobody has made yet, in a folder that is not there."""
    folder = tmp_path_factory.mktemp("fitted") / "deep"
    return Mlflow(tracking_uri=f"sqlite:///{folder}/mlflow.db", artifacts=str(folder / "artifacts"))


def make(store: Mlflow, model: str, digest: str, alias: str | None = None) -> fitted.Fitted:
    files = FILES | {"digest": digest.encode()}
    return fitted.register(store, model, files, digest, {"k": 2}, {"ari": 0.5}, {"encoder": "e"}, {"plots/a.txt": b"plot"}, alias)


def test_what_was_registered_is_found_by_its_digest_and_loaded_by_alias_and_number(store: Mlflow) -> None:
    with pytest.raises(Mistake, match="there is no MLflow store"):
        fitted.load(store, "a", "champion")
    assert fitted.find(store, "a", "d1") is None
    made = make(store, "a", "d1")
    assert made == fitted.find(store, "a", "d1") == fitted.load(store, "a", "champion") == fitted.load(store, "a", "1")
    assert (made.files["centres.json"], made.tags["encoder"], made.name) == (b"{}", "e", "a:1")
    assert fitted.find(store, "a", "other") is None
    told = registry.run_of(store, registry.find(store, "a/1"))
    assert told is not None and (told.status, told.metrics) == ("FINISHED", {"ari": 0.5})


def test_the_first_version_is_champion_and_later_ones_are_candidates_unless_they_are_told_otherwise(store: Mlflow) -> None:
    for number in "123":
        make(store, "b", number)
    assert fitted.load(store, "b", "champion").version == "1"
    assert fitted.load(store, "b", "candidate").version == "3"
    assert fitted.settle(store, "b", "3", "champion") == "champion"
    assert fitted.load(store, "b", "champion").version == "3"
    with pytest.raises(Mistake, match=r"no version or alias 'candidate'; it has the versions \[1, 2, 3\]"):
        fitted.load(store, "b", "candidate")


def test_a_run_that_a_kill_left_open_is_taken_up_and_records_nothing_twice(store: Mlflow, monkeypatch: pytest.MonkeyPatch) -> None:
    make(store, "c", "0")
    client = registry.connect(store)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("mlflow.MlflowClient.create_model_version", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        make(store, "c", "1")
    assert fitted.find(store, "c", "1") is None
    made = make(store, "c", "1")
    runs = client.search_runs([client.get_run(made.run).info.experiment_id], "tags.`studbook.fit` = 'c-1'")
    assert [(run.info.run_id, run.info.status) for run in runs] == [(made.run, "FINISHED")]
    assert len(client.get_metric_history(made.run, "ari")) == 1


def test_an_alias_that_a_kill_left_out_is_settled_by_the_next_look(store: Mlflow) -> None:
    make(store, "d", "1")
    registry.connect(store).delete_registered_model_alias("d", "champion")
    assert fitted.find(store, "d", "1") is not None
    assert fitted.load(store, "d", "champion").version == "1"


def test_a_file_that_is_not_the_registered_one_is_refused(store: Mlflow) -> None:
    made = make(store, "e", "1")
    next(Path(store.artifacts or "").glob(f"{made.run}/artifacts/fitted/centres.json")).write_bytes(b"[]")
    with pytest.raises(Mistake, match=r"its files \['centres.json', .* fit it anew"):
        fitted.load(store, "e", "champion")


def test_later_artifacts_join_the_run_and_leave_the_version_as_it_is(store: Mlflow) -> None:
    made, client = make(store, "f", "1"), registry.connect(store)
    fitted.replace_artifacts(store, made.run, "sheets", {"0.jpg": b"x", "1.jpg": b"x"})
    fitted.replace_artifacts(store, made.run, "sheets", {"0.jpg": b"y"})
    assert [one.path for one in client.list_artifacts(made.run, "sheets")] == ["sheets/0.jpg"]  # what is not drawn again is gone
    fitted.replace_artifacts(store, made.run, "sheets", {})
    assert fitted.load(store, "f", "1") == made
    assert {one.path for one in client.list_artifacts(made.run) if client.list_artifacts(made.run, one.path)} == {"fitted", "plots"}


def test_a_candidate_becomes_the_champion_by_a_persons_word(
    store: Mlflow, make_settings: MakeSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings().model_copy(update={"mlflow": store})
    for number in "12":
        make(store, "g", number)
    promote_fitted.run(settings, "g", "candidate", plan_only=True)
    assert fitted.load(store, "g", "champion").version == "1"
    promote_fitted.run(settings, "g", "candidate")
    promote_fitted.run(settings, "g", "2")
    assert "nothing to do, g:2 is the champion" in capsys.readouterr().out
    registry.connect(store).create_registered_model("head")
    registry.connect(store).create_model_version("head", "file:///nowhere", tags={"sha256": "x"})
    with pytest.raises(Mistake, match="'head' version 1 was not fitted by a job"):
        promote_fitted.run(settings, "head", "1")
