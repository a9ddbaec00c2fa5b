"""Trainings by the real command, killed and disturbed at every place: the same command goes on, to the same bits and one record. `make proof`

How long it took from a disturbance to the end is printed: `pytest -m proof -s tests/proof/test_training.py`.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import safetensors.torch

from tests.proof.trainings import Server, Start, Training, free_port, free_store, until
from tests.training.conftest import ROOT, write_export
from tests.training.test_resume import CUT, launch, weights
from tests.training.test_train_diffusion import write_images
from training import tracker

pytestmark = pytest.mark.proof
EPOCHS, EVERY = 25, 15  # of 384 rows, 12 steps an epoch: most checkpoints are in the middle of one
SCORER = ("rows_per_step=32", f"epochs={EPOCHS}", f"checkpoint_every={EVERY}", "say_every=1.0")
TWO, ONE = (*SCORER, "ranks=2", "micro_batch=16"), (*SCORER, "ranks=1", "micro_batch=32")
IMAGES = ("image_size=64", "text_length=24", "rows_per_step=8", "micro_batch=4", "ranks=2", "zero_stage=2", "learning_rate=0.002")
PICTURES = (*IMAGES, "ema_decay=0.9", "no_text=0.3", "epochs=20", "checkpoint_every=4", "say_every=1.0")
BOUND = 45.0  # seconds from a kill to the end of the command and all its processes; measured: 1 to 5 on two busy cores
HANGS = 20  # training.patience_seconds
STOPPED = HANGS + 30 + 25.0  # torch.distributed.run leaves a rank 30 s to end; measured: 51 to 55
UNREACHABLE = 60.0  # from the end of its steps to that of a training whose server is gone; measured: 2 to 5
KINDS = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16") if (stage, precision) != (0, "bf16")]
WORLDS = [1, 4]

New = Callable[..., Training]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tracker.quiet()
    return write_export(tmp_path_factory.mktemp("data") / "export", train=64, rows_per_file=80)


@pytest.fixture
def new(export: Path, tmp_path: Path) -> Iterator[New]:
    """A training with a root and a store of its own; what is left of it is killed at the end."""
    made: list[Training] = []

    def one(*section: str, **more: Any) -> Training:
        folder = tmp_path / f"training-{len(made)}"
        made.append(Training(more.pop("export", export), folder, section, more.pop("store_at", free_store(folder)), **more))
        return made[-1]

    yield one
    for training in made:
        training.end()


@pytest.fixture(scope="module")
def straight(export: Path, tmp_path_factory: pytest.TempPathFactory) -> New:
    """The same training, never disturbed: made once for each way to run it."""
    made: dict[tuple[str, ...], Training] = {}

    def one(*section: str) -> Training:
        if section not in made:
            folder = tmp_path_factory.mktemp("straight")
            made[section] = Training(export, folder, section, free_store(folder))
            made[section].finish()
        return made[section]

    return one


def check(training: Training, straight: Training) -> None:
    """One version of the same bits, one finished run without a step twice, every row once an epoch, and nothing more to do."""
    mine, other = training.store(), straight.store()
    assert mine.version().tags["sha256"] == other.version().tags["sha256"]
    steps = mine.steps()
    assert steps.keys() == other.steps().keys()
    assert all(len(found) == len(set(found)) for found in steps.values()), steps
    assert mine.losses() == other.losses()
    assert set(training.rows_seen()) == set(range(int(mine.run().data.params["epochs"])))
    check_rows(training)
    assert training.finished() is not None


def check_rows(training: Training) -> None:
    files = training.export.glob("train-*.parquet")
    expected = Counter(image_id for path in files for image_id in pq.read_table(path)["image_id"].to_pylist())
    for epoch, seen in training.rows_seen().items():
        assert seen == expected, epoch


def tell(line: str) -> None:
    print(f"\nmeasured: {line}", flush=True)


def kill_ranks(*ranks: int) -> Callable[[Start], None]:
    def kill(start: Start) -> None:
        found = start.ranks()
        assert len(found) == 2, found
        for rank in ranks:
            found[rank].kill()

    return kill


def disturb(start: Start, seed: int, how: Callable[[Start], None], bound: float, what: str) -> int:
    """Lets it write one more checkpoint, waits a little, disturbs it; all of it must end in time -> exit status of the command."""
    start.after(start.from_step, random.Random(seed).uniform(0.0, 1.2))
    how(start)
    began = time.monotonic()
    status = start.wait(bound)
    ended = time.monotonic() - began
    start.gone(bound - ended)
    tell(f"{what}: the command ended with {status} after {ended:.1f} s, the last of its processes after {time.monotonic() - began:.1f} s")
    return status


def test_a_lost_rank_ends_the_command_in_time_and_it_goes_on_to_the_same_bits(new: New, straight: New) -> None:
    """kill -9 of each rank and of both, and a rank that hangs: one training that is disturbed four times."""
    training = new(*TWO)
    for seed, (what, how, bound) in enumerate(
        [
            ("kill -9 of rank 1", kill_ranks(1), BOUND),
            ("kill -9 of rank 0", kill_ranks(0), BOUND),
            ("kill -9 of both ranks", kill_ranks(1, 0), BOUND),
            ("SIGSTOP of rank 1", lambda start: start.ranks()[1].suspend(), STOPPED),
        ]
    ):
        start = training.start(f"training.patience_seconds={HANGS}")
        assert disturb(start, seed, how, bound, what) == 2, start.said()
        said = "studbook: train scorer: a rank ended early; what it said stands above. If that is a mistake, mend it. Run again: it goes on from "
        assert f"{said}step-{training.step():08d}\n" in start.said()
        assert start.goes_on_after() == start.from_step
    assert "train scorer: another rank is gone (" in start.said()  # said by rank 0, of the one that hangs
    last = training.finish()
    assert last.goes_on_after() == last.from_step
    check(training, straight(*TWO))


def test_ranks_without_their_command_end_and_two_commands_never_train_in_one_folder(new: New, straight: New) -> None:
    training = new(*TWO)
    first = training.start()
    first.after(0)
    held = first.all()
    for one in held:
        one.suspend()
    second = training.start()
    assert second.wait(200) == 2
    assert "journal.jsonl: another process writes this journal; wait for it, or end it first" in second.said()
    second.gone(BOUND)
    assert len(first.all()) == len(held)
    for one in held:
        one.resume()
    assert disturb(first, 1, lambda start: start.process.kill(), BOUND, "kill -9 of the command") == -9
    third = training.start()
    assert disturb(third, 2, lambda start: start.launcher().kill(), BOUND, "kill -9 of torch.distributed.run") == 2
    assert third.goes_on_after() == third.from_step > 0
    last = training.finish()
    assert last.goes_on_after() == last.from_step
    check(training, straight(*TWO))


def test_one_process_killed_at_random_and_while_it_writes_a_checkpoint_goes_on_to_the_same_bits(new: New, straight: New) -> None:
    training = new(*ONE)
    torn = 0
    for seed in range(4):
        start = training.start()
        start.after(start.from_step, random.Random(seed).uniform(0.0, 0.4))
        if seed % 2 == 0:
            until(training.half_written, "checkpoint that is being written", every=0.0005)
        start.process.kill()
        start.gone(BOUND)
        torn += training.half_written()
        assert start.goes_on_after() == start.from_step
    tell(f"{torn} of 4 kills hit a checkpoint that was being written")
    assert torn
    assert training.finish().goes_on_after() == training.started[-1].from_step
    assert not training.half_written()
    check(training, straight(*ONE))


def with_a_result(training: Training) -> bool:
    return any((training.folder / "trainings").glob("*/result/head"))


def registered_in_the_journal(training: Training) -> bool:
    return "register" in training.journal()


def registered_in_mlflow(training: Training) -> bool:
    """Its delivery has been noted: the run may still be open."""
    return any("version" in json.loads(path.read_text())["facts"] for path in (training.folder / "trainings").glob("*/journal.sent"))


def reached(start: Start, moment: Callable[[Training], bool]) -> bool:
    """Or the command has ended, which the test will tell."""
    return start.process.poll() is not None or moment(start.training)


def test_kills_between_the_last_step_and_the_end_leave_nothing_open(new: New, straight: New) -> None:
    """One training, killed at each of these moments; the last kill leaves a registered version whose run is open."""
    training = new(*ONE)
    for moment in (with_a_result, registered_in_the_journal, registered_in_mlflow):
        start = training.start()
        until(partial(reached, start, moment), moment.__name__, every=0.001)
        start.process.kill()
        assert start.wait(BOUND) == -signal.SIGKILL, "it had ended before the kill"
        when = "before" if training.finished() is None else "after"
        tell(f"killed {moment.__name__}, {when} finished.json, {training.undelivered()} events to deliver")
    training.finish()
    check(training, straight(*ONE))
    assert "nothing to do, version 1 was made from this export (champion)" in training.finish().said()


def test_a_killed_server_costs_nothing_but_one_more_start(new: New, straight: New, tmp_path: Path) -> None:
    server = Server(tmp_path / "server")
    training = new(*ONE, store_at=server.settings)
    server.start()
    try:
        start = training.start()
        start.after(EVERY)
        until(lambda: training.delivered() > 5, "delivery")
        server.kill()
        refuse(training, start, "mlflow: http://127.0.0.1:")
        server.start()
        training.finish()
        assert training.started[-1].goes_on_after() == 0
        check(training, straight(*ONE))
    finally:
        server.kill()


def test_a_server_that_comes_later_gets_the_whole_record(new: New, straight: New, tmp_path: Path) -> None:
    server = Server(tmp_path / "server")
    training = new(*ONE, store_at=server.settings)
    refuse(training, training.start(), "does not answer (")
    refuse(training, training.start(), "nothing to train; its record is not delivered yet: start again when MLflow answers")
    server.start()
    try:
        training.finish()
        check(training, straight(*ONE))
    finally:
        server.kill()


def refuse(training: Training, start: Start, said: str) -> None:
    """It trains to its end, ends with status 4 and says what to do."""
    until(lambda: training.finished() is not None or start.process.poll() is not None, "end of the steps")
    began = time.monotonic()
    assert start.wait(UNREACHABLE) == 4, start.said()
    tell(f"without its server the training ended {time.monotonic() - began:.1f} s after it was through")
    assert said in start.said() and training.finished() is not None
    if "nothing to train" not in said:
        assert f"nothing is lost: run again, or\ntrain scorer:     python -m training.deliver {training.root} --config FILE" in start.said()


def by_torchrun() -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def by_deepspeed() -> list[str]:
    return [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]


@pytest.mark.parametrize("launcher", [by_torchrun, by_deepspeed])
def test_the_file_started_by_another_launcher_trains_the_same_weights(launcher: Callable[[], list[str]], new: New, straight: New) -> None:
    training = new(*TWO)
    training.finish(before=[*launcher(), str(ROOT / "training/train_scorer.py")])
    check(training, straight(*TWO))


def test_an_image_model_goes_on_after_a_lost_rank_to_the_same_bits(new: New, tmp_path: Path) -> None:
    """The noise and times of each row, the texts that are left out, the moving average: all as if nothing had happened."""
    export = write_images(tmp_path / "export")
    straight, training = (new(*PICTURES, export=export, trainer="train_diffusion") for _ in range(2))
    straight.finish()
    start = training.start()
    assert disturb(start, 3, kill_ranks(1), BOUND, "train diffusion: kill -9 of rank 1") == 2
    assert f"Run again: it goes on from step-{training.step():08d}\n" in start.said()
    assert training.finish().goes_on_after() == training.started[-1].from_step > 0
    check(training, straight)


def test_one_epoch_by_two_ranks_then_one_then_four(new: New, tmp_path: Path) -> None:
    """The same command with another number of ranks goes on in the same epoch, wherever it was killed."""
    export = write_export(tmp_path / "export", train=256, held_out=range(1000, 1006), rows_per_file=200)  # 48 steps an epoch
    section = ("rows_per_step=32", "epochs=2", "micro_batch=8", "checkpoint_every=5", "say_every=1.0", "keep=9", "ema_decay=0.95")
    straight, training = (new(*section, "ranks=2", export=export) for _ in range(2))
    straight.finish()
    for ranks in (2, 1):
        start = training.start(f"train_scorer.ranks={ranks}")
        start.after(start.from_step)
        start.kill_all()
    last = training.finish("train_scorer.ranks=4")
    assert 0 < training.started[1].from_step < last.from_step < 48
    assert last.goes_on_after() == last.from_step
    tell(f"2 ranks to step {training.started[1].from_step}, 1 rank to step {last.from_step}, 4 ranks to the end")
    check_rows(training)
    assert set(training.rows_seen()) == {0, 1}
    mine, other = (one.store().weights("head/head.safetensors") for one in (training, straight))
    assert max(float((mine[name] - other[name]).abs().max()) for name in other) < 1e-5


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each kind fitted straight by 2 ranks, and once more from its checkpoint of step CUT; then from there by each of WORLDS."""
    out = tmp_path_factory.mktemp("resume")
    export = write_export(out / "export")
    for precision in ("fp32", "bf16"):
        launch(2, export, out, *(f"{stage}:{kind}:{stage}-{kind}:{CUT}" for stage, kind in KINDS if kind == precision))
    for world in WORLDS:
        names = [f"{stage}-{precision}-world-{world}" for stage, precision in KINDS]
        for (stage, precision), name in zip(KINDS, names, strict=True):
            for part in (f"checkpoints/step-{CUT:08d}", "row_losses"):
                shutil.copytree(out / f"{stage}-{precision}" / part, out / name / part)
        launch(world, export, out, *(f"{stage}:{precision}:{name}" for (stage, precision), name in zip(KINDS, names, strict=True)))
    return out


@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_every_stage_goes_on_to_the_same_bits(fitted: Path, stage: int, precision: str) -> None:
    straight, cut = weights(fitted / f"{stage}-{precision}"), weights(fitted / f"{stage}-{precision}-{CUT}")
    assert safetensors.torch.save(straight) == safetensors.torch.save(cut)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_every_stage_goes_on_at_other_numbers_of_ranks(fitted: Path, stage: int, precision: str, world: int) -> None:
    straight, other = weights(fitted / f"{stage}-{precision}"), weights(fitted / f"{stage}-{precision}-world-{world}")
    assert straight.keys() == other.keys()
    worst = max(float((straight[name] - other[name]).abs().max()) for name in straight)
    tell(f"ZeRO {stage} {precision}, 2 ranks and then {world}: weights differ by {worst:.1e} at most")
    assert worst < (1e-5 if precision == "fp32" else 2e-3)
    expected = Counter(image_id for path in (fitted / "export").glob("train-*") for image_id in pq.read_table(path)["image_id"].to_pylist())
    seen: dict[int, Counter[bytes]] = {}
    for path in (fitted / f"{stage}-{precision}-world-{world}/row_losses").iterdir():
        for row in pq.read_table(path, columns=["image_id", "epoch"]).to_pylist():
            seen.setdefault(row["epoch"], Counter())[row["image_id"]] += 1
    assert seen == dict.fromkeys(range(16), expected)
