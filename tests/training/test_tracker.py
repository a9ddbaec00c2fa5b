"""A training's record in a real MLflow server: delivered, interrupted at every moment, replayed, never doubled."""

from __future__ import annotations

import json
import math
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from conf.build import Mlflow
from tests.training.conftest import ROOT, write_export
from training import deliver, tracker
from training.exports import Export, open_export

if TYPE_CHECKING:
    from tests.training.mlflow_server import Gate

pytest_plugins = ["tests.training.mlflow_server"]
DIGEST = "0123456789ab"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return open_export(write_export(tmp_path_factory.mktemp("export") / "export", train=2), "labels", None, ())


@pytest.fixture
def settings(gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mlflow:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # time
    return Mlflow(tracking_uri=gate.uri, experiment=tmp_path.name)


def begin(folder: Path, settings: Mlflow, export: Export, digest: str = DIGEST, **params: Any) -> tracker.Record:
    record = tracker.Record(folder, settings)
    record.open("train something", {"seed": 7, "ranks": 2, **params}, export, {tracker.TRAINING: digest})
    return record


def record_all(folder: Path, settings: Mlflow, export: Export, model: str) -> tracker.Record:
    """Everything a trainer records, but its end."""
    record = begin(folder, settings, export, long="x" * 7000)
    for step in range(1, 1201):
        record.metrics(step, {"loss": 1 / step, "rate": math.nan if step == 3 else 0.1})
    record.metrics(1200, {"held_out_srcc": 0.5})
    for step in (600, 1200):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(f'{{"step": {step}}}')
        record.checkpoint(step, checkpoint, {"held_out_srcc": 0.5})
    (folder / "result/head").mkdir(parents=True)
    (folder / "result/head/head.safetensors").write_text("weights")
    (folder / "result/config.yaml").write_text("a: b")
    record.artifacts(folder / "result")
    record.register(model, "head", {tracker.DIGEST: DIGEST})
    record.note("verdict", "fine")
    return record


def look(settings: Mlflow, model: str = "") -> dict[str, Any]:
    """What the store has of the one training of this experiment, in plain values."""
    client = tracker.connect(settings)
    experiment = client.get_experiment_by_name(settings.experiment).experiment_id
    (run,) = client.search_runs([experiment])
    histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics if not key.startswith("system/")}
    checkpoints = client.search_logged_models([experiment])
    return {
        "run": run.info.run_id,
        "status": run.info.status,
        "params": run.data.params,
        "tags": run.data.tags,
        "inputs": sorted((one.dataset.name, one.dataset.source, one.dataset.digest) for one in run.inputs.dataset_inputs),
        "outputs": sorted(one.step for one in run.outputs.model_outputs),
        "metrics": {key: [(one.step, str(one.value)) for one in history] for key, history in histories.items()},
        "system": sorted(key for key in run.data.metrics if key.startswith("system/")),
        "files": sorted(one.path for one in client.list_artifacts(run.info.run_id)),
        "checkpoints": sorted((one.name, str(one.status), one.params["path"], len(one.metrics)) for one in checkpoints),
        "versions": [(one.version, one.run_id) for one in client.search_model_versions(f"name = '{model}'")],
    }


def test_what_a_training_records_is_in_mlflow_and_a_replay_of_all_of_it_changes_nothing(
    settings: Mlflow, export: Export, tmp_path: Path
) -> None:
    delivery = record_all(tmp_path, settings, export, "whole").close("FINISHED")
    seen = look(settings, "whole")
    assert delivery == tracker.Delivery(True, 0, "", seen["run"], "1", "champion")
    assert seen["status"] == "FINISHED"
    assert seen["params"]["seed"] == "7"
    assert len(seen["params"]["long"]) == 6000
    assert seen["params"]["long"].endswith("x ... (cut)")
    assert seen["metrics"]["loss"] == [(step, str(1 / step)) for step in range(1, 1201)]
    assert seen["metrics"]["rate"][2] == (3, "nan")
    assert sorted(seen["metrics"]["held_out_srcc"]) == [(600, "0.5"), (1200, "0.5")]
    assert seen["checkpoints"] == [(f"step-{step:08d}", "READY", f"{tmp_path}/checkpoints/step-{step:08d}", 1) for step in (600, 1200)]
    assert seen["outputs"] == [600, 1200]
    assert [name.partition(":")[2] for name, _, _ in seen["inputs"]] == ["embeddings", "held_out", "labels", "pixels"]
    assert '"delta_table_version": 4' in seen["inputs"][0][1]
    assert {digest for _, _, digest in seen["inputs"]} == {export.sha256[:36]}
    assert seen["files"] == ["config.yaml", "environment.txt", "head"]
    assert "system/cpu_utilization_percentage" in seen["system"]
    assert (seen["tags"]["manifest_sha256"], seen["tags"]["verdict"]) == (export.sha256, "fine")
    assert {"mlflow.source.git.commit", "studbook.version"} & set(seen["tags"])
    environment = Path(tracker.connect(settings).download_artifacts(seen["run"], "environment.txt", str(tmp_path))).read_text()
    assert environment.startswith("python 3.")
    assert "\nnumpy==1.26.4\n" in environment
    (tmp_path / "journal.sent").unlink()  # as if a kill had come before each note of what was sent
    assert tracker.Record(tmp_path, settings).settle() == delivery
    assert look(settings, "whole") == seen
    elsewhere = settings.model_copy(update={"experiment": f"{settings.experiment}-moved"})
    assert tracker.Record(tmp_path, elsewhere).settle().delivered
    copy = look(elsewhere, "whole")
    assert (copy["metrics"], copy["files"], copy["versions"]) == (seen["metrics"], seen["files"], seen["versions"])
    assert copy["run"] != seen["run"]


def test_a_server_that_is_down_at_the_start_gets_all_when_it_is_up(
    gate: Gate, settings: Mlflow, export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate.shut()
    record = begin(tmp_path, settings, export)
    record.metrics(1, {"loss": 1.0})
    wait_for(lambda: "does not answer, training goes on" in capsys.readouterr().out)
    gate.open()
    record.metrics(2, {"loss": 0.5})
    assert record.close("FINISHED").delivered
    assert look(settings)["metrics"]["loss"] == [(1, "1.0"), (2, "0.5")]
    assert "answers again" in capsys.readouterr().out


def test_a_server_that_goes_down_in_the_middle_misses_nothing(
    gate: Gate, settings: Mlflow, export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = begin(tmp_path, settings, export)
    record.metrics(1, {"loss": 1.0})
    wait_for(lambda: "run" in sent(tmp_path) and sent(tmp_path)["metrics"])
    gate.shut()
    record.metrics(2, {"loss": 0.5})
    wait_for(lambda: "does not answer" in capsys.readouterr().out)
    gate.open()
    record.metrics(3, {"loss": 0.25})
    wait_for(lambda: "answers again" in capsys.readouterr().out)
    assert record.close("FINISHED").delivered
    assert look(settings)["metrics"]["loss"] == [(1, "1.0"), (2, "0.5"), (3, "0.25")]


def test_a_server_that_is_down_at_the_end_gets_the_rest_by_deliver(
    gate: Gate, settings: Mlflow, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_all(tmp_path, settings, export, "late")
    gate.shut()
    started = time.monotonic()
    delivery = record.close("FINISHED")
    assert time.monotonic() - started < 20
    assert (delivery.delivered, delivery.version) == (False, None)
    assert "Connection refused" in delivery.error
    overrides = ["--set", f"mlflow.tracking_uri={gate.uri}", "--set", f"mlflow.experiment={settings.experiment}"]
    monkeypatch.setattr("sys.argv", ["deliver", str(tmp_path), "--config", str(ROOT / "conf/demo.yaml"), *overrides])
    with pytest.raises(SystemExit) as end:
        deliver.main()
    assert end.value.code == 1
    assert f"deliver: {delivery.pending} events still wait: " in capsys.readouterr().out
    gate.open()
    deliver.main()
    seen = look(settings, "late")
    assert capsys.readouterr().out.endswith(f"deliver: all is in run {seen['run']}\n")
    assert (seen["status"], seen["versions"]) == ("FINISHED", [("1", seen["run"])])


def test_a_server_that_takes_requests_and_never_answers_does_not_hold_the_end_up(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        record = begin(tmp_path, Mlflow(tracking_uri=f"http://127.0.0.1:{silent.getsockname()[1]}"), export)
        started = time.monotonic()
        delivery = record.close("FINISHED")
    assert time.monotonic() - started < 30
    assert not delivery.delivered
    assert "Read timed out" in delivery.error


CHILD = """
import sys, time
from pathlib import Path
from conf.build import Mlflow
from tests.training.test_tracker import begin, open_export
record = begin(Path(sys.argv[1]), Mlflow(tracking_uri=sys.argv[2], experiment=sys.argv[3]), open_export(sys.argv[4], "labels", None, ()))
for step in range(1, 10**9):
    record.metrics(step, {"loss": 1 / step})
    time.sleep(0.002)
"""


def test_a_training_that_was_killed_goes_on_in_the_same_run_without_a_step_twice(
    gate: Gate, settings: Mlflow, export: Export, tmp_path: Path
) -> None:
    arguments = [str(tmp_path / "training"), gate.uri, settings.experiment, export.root]
    child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], cwd=ROOT)
    try:
        wait_for(lambda: sent(tmp_path / "training")["metrics"], 60)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(20)
    record = begin(tmp_path / "training", settings, export, ranks=4)
    killed = record.step
    assert killed > 100
    for step in range(killed - 50, killed + 11):  # from the last checkpoint: equal steps again
        record.metrics(step, {"loss": 1 / step})
    assert record.step == killed + 10
    assert record.close("FINISHED").delivered
    seen = look(settings)
    assert (seen["status"], seen["params"]["ranks"], seen["tags"]["resumed.ranks"]) == ("FINISHED", "2", "4")
    assert [step for step, _ in seen["metrics"]["loss"]] == list(range(1, killed + 11))


def test_an_event_that_mlflow_refuses_is_named_and_the_others_are_delivered(
    settings: Mlflow, export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = begin(tmp_path, settings, export)
    record.metrics(1, {"loss": 1.0})
    record.metrics(2, {"loss%$": 1.0})
    record.metrics(3, {"loss": 0.5})
    record.artifacts(tmp_path / "gone")
    delivery = record.close("FAILED")
    assert delivery.delivered
    assert delivery.error == f"MLflow refused artifacts: {tmp_path}/gone is not there any more"
    assert "MLflow refused and does not have: metrics: " in capsys.readouterr().out
    seen = look(settings)
    assert (seen["status"], seen["metrics"]) == ("FAILED", {"loss": [(1, "1.0"), (3, "0.5")]})


def test_the_arms_of_a_comparison_have_one_parent_and_a_run_of_before_can_join_another(
    settings: Mlflow, export: Export, tmp_path: Path
) -> None:
    runs = {}
    for arm in ("low", "high"):
        of_arm = settings.model_copy(update={"comparison": "rates", "arm": arm})
        runs[arm] = begin(tmp_path / arm, of_arm, export, digest=arm).close("FINISHED").run
    client = tracker.connect(settings)
    tracker.join(client, settings.model_copy(update={"comparison": "later", "arm": "base"}), str(runs["low"]))
    low, high = (client.get_run(runs[arm]).data.tags for arm in ("low", "high"))
    assert low["mlflow.parentRunId"] == high["mlflow.parentRunId"]
    assert client.get_run(low["mlflow.parentRunId"]).info.run_name == "rates"
    assert (low["studbook.arm"], low["studbook.comparison.rates"], low["studbook.comparison.later"]) == ("low", "low", "base")


def sent(folder: Path) -> dict[str, Any]:
    """How far a journal was delivered: its facts, and under `metrics` whether metrics are among it."""
    path = folder / "journal.sent"
    told = json.loads(path.read_text()) if path.is_file() else {"end": 0, "facts": {}}
    done = (folder / "journal.jsonl").read_bytes()[: told["end"]] if told["end"] else b""
    return {**told["facts"], "metrics": b'"kind":"metrics"' in done}


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
