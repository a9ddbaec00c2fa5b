"""Where a training stands -> a folder `checkpoints/step-00000120`, all of it or nothing, and back.

It holds DeepSpeed's files of every rank, the moving average (one file), and `state.json`: the cursor in the plan, what the audit has
counted, and under which stage and number of ranks it was written. The random state needs no file: it is a function of (seed, step,
micro-batch), see training/loop.py. The folder is written under another name and renamed when it is complete; a failed save leaves nothing and
the earlier ones stand.

Read back under the same number of ranks it is bit-equal; under another, DeepSpeed's files are first converted to its universal form.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from conf.loops import Loop
from conf.section import Mistake
from training import engine, process_group
from training.average import Average

FOLDER = "checkpoints"


@dataclass
class State:
    """Where a training stands. Equal on every rank."""

    step: int = 0  # optimizer steps made
    epoch: int = 0  # from 0
    start: int = 0  # rows of this epoch's global order that were trained on
    seen_rows: int = 0  # of this epoch, all ranks, as counted ...
    seen_ids: int = 0  # ... and the checksum of their ids
    best: float | None = None  # value of the task's metric
    worse: int = 0  # evaluations since then
    stopped: bool = False  # by patience
    recent: list[float] = field(default_factory=list)  # mean losses of the last windows: an explosion is told by them


class Found(NamedTuple):
    """A complete checkpoint. `world`: the number of ranks that wrote it."""

    folder: Path
    state: State
    world: int


def latest(root: Path, settings: Loop) -> Found | None:
    """Folder of a training -> its newest complete checkpoint. Raises Mistake when it is damaged or of other settings."""
    folders = complete(root)
    if not folders:
        return None
    folder = folders[-1]
    told = json.loads((folder / "state.json").read_text())
    for name, size in told["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "nothing"
            raise Mistake(
                f"checkpoint {folder}: {name} has {found}, was written with {size} bytes; remove that folder to go on from an earlier one"
            )
    if told["zero_stage"] != settings.zero_stage:
        raise Mistake(
            f"checkpoint {folder}: written with zero_stage {told['zero_stage']}, given {settings.zero_stage}. The optimizer's files are cut as the stage "
            f"does it and not read by another: set zero_stage back to {told['zero_stage']}, or remove {root} to train from the start"
        )
    return Found(folder, State(**told["state"]), told["world"])


def complete(root: Path) -> list[Path]:
    """The complete checkpoints of a training, oldest first."""
    return sorted(path for path in (root / FOLDER).glob("step-????????") if (path / "state.json").is_file())


def load(model: Any, average: Average, found: Found, ranks: process_group.Ranks) -> None:
    """A checkpoint -> into the engine and its average. Every rank must call it."""
    universal = needs_universal(found, ranks, model.zero_optimization_stage())
    if universal and ranks.rank == 0:
        engine.make_universal(found.folder)
    elif universal:
        engine.await_universal(found.folder)
    process_group.barrier()
    engine.load(model, found.folder, universal)
    average.load(found.folder, ranks)


def needs_universal(found: Found | None, ranks: process_group.Ranks, stage: int) -> bool:
    return found is not None and stage > 0 and found.world != ranks.world


def save(model: Any, average: Average, state: State, root: Path, settings: Loop, ranks: process_group.Ranks) -> str:
    """Writes a checkpoint and lets old ones go -> "" or why there is none, the same on every rank. Every rank must call it."""
    folder = root / FOLDER / f"step-{state.step:08d}"
    part = folder.with_suffix(".part")
    failed = _agree(_make(part) if ranks.rank == 0 else "")
    if not failed:
        failed = _agree(engine.save(model, part))
    if not failed:
        failed = _agree(average.save(part, ranks.rank))
    if not failed:
        told = {"state": asdict(state), "world": ranks.world, "zero_stage": settings.zero_stage}
        failed = _agree(_close(part, folder, told) if ranks.rank == 0 else "")
    if ranks.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        if not failed:
            prune(root, settings)
    return failed


def prune(root: Path, settings: Loop) -> None:
    """Keeps the newest `keep` checkpoints and those at a multiple of `keep_every` steps."""
    for folder in complete(root)[: -settings.keep]:
        if settings.keep_every is None or int(folder.name.removeprefix("step-")) % settings.keep_every:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Under another name first: what is half removed is no checkpoint. What cannot be removed now goes with the next start."""
    part = folder.with_suffix(".part")
    folder.rename(part)
    shutil.rmtree(part, ignore_errors=True)


def sweep(root: Path) -> None:
    """Removes what a killed save left. One rank calls it, before any saves."""
    for part in (root / FOLDER).glob("*.part"):
        shutil.rmtree(part, ignore_errors=True)


def _make(part: Path) -> str:
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as error:
        return str(error)
    return ""


def _close(part: Path, folder: Path, told: dict[str, Any]) -> str:
    """The last file, everything on the disk, then the name."""
    try:
        files = [path for path in part.rglob("*") if path.is_file()]
        sizes = {str(path.relative_to(part)): path.stat().st_size for path in sorted(files)}
        (part / "state.json").write_text(json.dumps(told | {"files": sizes}, indent=1))
        for path in [*files, part / "state.json"]:
            with path.open("rb") as written:
                os.fsync(written.fileno())
        if folder.exists():  # a run that went on from an earlier one passes here again
            shutil.rmtree(folder)
        part.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        return str(error)
    return ""


def _sync(folder: Path) -> None:
    """A folder's names -> the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _agree(failure: str) -> str:
    """What failed on any rank, known to all of them."""
    return "; ".join(f"rank {rank}: {one}" for rank, one in enumerate(process_group.collect(failure)) if one)
