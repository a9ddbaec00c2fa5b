"""Pipelines over the same images, each measured as a process of its own: what benchmarks/run.py and benchmarks/run_peers.py share."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np

from benchmarks import lakes, pictures
from benchmarks.results import Run
from conf.settings import load_encoder
from udfs import engine

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache/benchmarks"
PEERS = ROOT / ".cache/peers/bin/python"
SAMPLE = ROOT / "tests/data/sample/images"
CLOSE = 0.01  # of a unit vector's element in fp16: other batches, other rounding


class Part(NamedTuple):
    """Images of one kind, an encoder, and two sizes. `waves`: rows a wave and a task; None: one wave, two tasks a worker."""

    name: str
    encoder: str
    sizes: tuple[int, ...]
    size: tuple[int, int] | None = None  # width and height of generated photographs; None: the sample
    waves: tuple[int, int] | None = None

    def folder(self, images: int) -> Path:
        """The images, written on first use and kept."""
        kind = "sample" if self.size is None else "x".join(map(str, self.size))
        folder = CACHE / f"{kind}-{images}"
        if self.size is None:
            pictures.write_sample(folder, images, sorted(SAMPLE.iterdir()))
        else:
            pictures.write_photographs(folder, images, self.size)
        return folder


class Bench:
    """The work folder of one run of the benchmark, with an ingested lake for each part and size."""

    def __init__(self, work: Path, workers: int) -> None:
        self.work, self.workers = work, workers

    def prepare(self, parts: Sequence[Part]) -> None:
        """Writes images, ingests them and exports the towers' graphs, unmeasured."""
        command = [sys.executable, "-m", "benchmarks.lakes"]
        for part in parts:
            self.graph(part)
            for images in part.sizes:
                command += [str(self.work / f"{part.name}-{images}"), str(part.folder(images))]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    def graph(self, part: Part) -> list[str]:
        """What tells a loop the exported tower that the stage's workers run too; nothing where the tower has no weights."""
        from udfs.export_tower import exported

        encoder = load_encoder(part.encoder).model_dump()
        return ["--graph", str(exported(encoder, None))] if engine.has_weights(encoder) else []

    def compare(self, part: Part, kinds: Sequence[str], repeats: int) -> list[Run]:
        """All pipelines at all sizes, `repeats` times, the first place taken in turns. All must have made the same vectors."""
        pipelines: Mapping[str, Callable[[Part, int, str], list[str]]] = {
            "bare": self.bare,
            "spark": self.spark,
            "daft": self.peer,
            "ray": self.peer,
        }
        runs = []
        for repeat in range(repeats):
            for images in part.sizes:
                made = {}
                for kind in [*kinds[repeat % len(kinds) :], *kinds[: repeat % len(kinds)]]:
                    cost = self.persistently(partial(pipelines[kind], part, images, kind))
                    runs.append(run := Run(part.name, kind, images, repeat, **cost))
                    print(f"{part.name} {kind} {images}: {run.wall:.1f} s, {run.cpu:.1f} CPU-s", file=sys.stderr, flush=True)
                    made[kind] = dict(self.vectors(kind))
                check_same(part.name, images, made)
        return runs

    def spark(self, part: Part, images: int, kind: str) -> list[str]:
        return [sys.executable, "-m", "jobs.embed", *self.settings(part, images)]

    def bare(self, part: Part, images: int, kind: str) -> list[str]:
        command = [sys.executable, "-m", "benchmarks.bare_loop", *self._loop(part, images, kind)]
        return [*command, "--processes", str(self.workers)]  # its other defaults are those of benchmarks/embed.yaml

    def peer(self, part: Part, images: int, kind: str) -> list[str]:
        command = ["env", f"PYTHONPATH={ROOT}", str(PEERS), "-m", "benchmarks.peer_loops", kind, *self._loop(part, images, kind)]
        return [*command, "--workers", str(self.workers)]

    def _loop(self, part: Part, images: int, kind: str) -> list[str]:
        out = self.work / kind
        shutil.rmtree(out, ignore_errors=True)
        return [str(part.folder(images)), str(out), "--encoder", part.encoder, *self.graph(part)]

    def settings(self, part: Part, images: int) -> list[str]:
        """A fresh copy of the ingested lake -> the arguments of a stage on it."""
        shutil.rmtree(self.work / "lake", ignore_errors=True)
        shutil.copytree(self.work / f"{part.name}-{images}", self.work / "lake")
        waves = part.waves or (images, -(-images // (2 * self.workers)))
        told = lakes.overrides(self.work / "lake", part.folder(images), part.encoder, waves, self.workers)
        return ["--config", lakes.CONFIG, *told]

    def persistently(self, command: Callable[[], list[str]]) -> dict[str, Any]:
        """As `measured`; a command that fails is said to have, and measured once more: half an hour of others' figures hangs on it."""
        try:
            return self.measured(command())
        except RuntimeError as error:
            print(f"measured once more: {error}", file=sys.stderr, flush=True)
            return self.measured(command())

    def measured(self, command: list[str]) -> dict[str, Any]:
        """Raises RuntimeError with the end of what the command said when it failed."""
        out = self.work / "measured.json"
        subprocess.run([sys.executable, "-m", "benchmarks.measure", str(out), *command], cwd=ROOT, check=True)
        told = json.loads(out.read_text())
        if (status := told.pop("status")) != 0:
            raise RuntimeError(f"{' '.join(command)} failed with status {status}:\n{out.with_suffix('.log').read_text()[-3000:]}")
        return told

    def vectors(self, kind: str) -> Iterator[tuple[bytes, bytes]]:
        """(image_id, fp16 vector) of all that the last run of a pipeline wrote."""
        if kind == "spark":
            yield from lakes.vectors(self.work / "lake")
            return
        from pyarrow import parquet

        for file in sorted((self.work / kind).rglob("*.parquet")):
            table = parquet.read_table(file, columns=["path", "vector"])
            for path, vector in zip(table["path"].to_pylist(), table["vector"].to_pylist(), strict=True):
                yield hashlib.sha256(Path(unquote(urlsplit(path).path)).read_bytes()).digest(), vector


def check_same(part: str, images: int, made: Mapping[str, Mapping[bytes, bytes]]) -> None:
    """All did the same work: the same images, the same vectors. Raises RuntimeError when not."""
    first = next(iter(made))
    for kind, found in made.items():
        if found.keys() != made[first].keys() or len(found) != images:
            raise RuntimeError(f"{part}: {images} images; {kind} embedded {len(found)}, {first} {len(made[first])}")
        worst = max(float(np.abs(_numbers(found[image]) - _numbers(made[first][image])).max()) for image in found)
        if not worst <= CLOSE:
            raise RuntimeError(f"{part}: the vectors of {kind} and {first} differ by {worst}")


def _numbers(vector: bytes) -> np.ndarray:
    return np.frombuffer(vector, "<f2").astype(np.float32)


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores ({model}), Python {platform.python_version()}, load {os.getloadavg()[0]:.1f} at the start"


@contextmanager
def work_folder() -> Iterator[Path]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        yield Path(work)


def keep(text: str, raw: Mapping[str, Any], *names: str) -> None:
    """Writes benchmarks/results/DATE-NAMES.md and .json."""
    out = ROOT / "benchmarks/results"
    out.mkdir(exist_ok=True)
    name = "-".join([time.strftime("%Y-%m-%d"), *names])
    (out / f"{name}.md").write_text(text)
    (out / f"{name}.json").write_text(json.dumps(raw, indent=1))
