"""The published figures: embed and training against bare loops, where the time goes, memory, cost an image, the empty run.

    python -m benchmarks.run [--parts tower,pipeline,scale,phases,empty,feed,step] [--repeats 3] [--workers 2] [--quick]

Prints Markdown and writes benchmarks/results/DATE.md, or DATE-PARTS.md (and .json, every single measurement). Each measurement is a process of its
own (benchmarks/measure.py); the pipelines take turns. Embed's ratio is of slopes between two sizes, so that start-up stands apart; the
spread over the repeats says how far to trust a ratio (larger sizes narrow it). On 2 quiet cores about 20 minutes for embed, half an
hour for feed and step. Parts:

    tower      the real CLIP tower on the sample images     pipeline   no model (colour-grid) on 2 MP JPEGs
    scale      no model on small JPEGs, 300 and 3,000       phases     where the stage's time goes, on the pipeline part's images
    empty      the second run of the whole main job on the demo's lake (`make demo` first)
    feed       training.feed against raw pyarrow, petastorm's thread pool and torch's DataLoader
    step       training.loop, ZeRO 0 to 3, against bare DistributedDataParallel, 2 ranks
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import feed_part, lakes, pictures, results, step_part
from benchmarks.results import Run

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache/benchmarks"
SAMPLE = ROOT / "tests/data/sample/images"
CLOSE = 0.01  # of a unit vector's element in fp16: other batches, other rounding


class Part(NamedTuple):
    """Images of one kind, an encoder, and two sizes."""

    name: str
    encoder: str
    sizes: tuple[int, int]
    megapixels: tuple[int, int] | None = None  # of generated photographs; None: the sample

    def folder(self, images: int) -> Path:
        """The images, written on first use and kept."""
        kind = "sample" if self.megapixels is None else "x".join(map(str, self.megapixels))
        folder = CACHE / f"{kind}-{images}"
        if self.megapixels is None:
            pictures.write_sample(folder, images, sorted(SAMPLE.iterdir()))
        else:
            pictures.write_photographs(folder, images, self.megapixels)
        return folder


TOWER = Part("tower", "clip-vit-b-16-demo", (48, 144))
PIPELINE = Part("pipeline", "colour-grid", (100, 1500), pictures.TWO_MEGAPIXELS)
SCALE = Part("scale", "colour-grid", (300, 3000), pictures.SMALL)
QUICK = {"tower": (4, 8), "pipeline": (4, 8), "scale": (8, 16)}
PARTS = ("tower", "pipeline", "scale", "phases", "empty", "feed", "step")
TRAINING = {"feed": feed_part.measure, "step": step_part.measure}


class Bench:
    """The work folder of one run of the benchmark, with an ingested lake for each part and size."""

    def __init__(self, work: Path, workers: int) -> None:
        self.work, self.workers = work, workers

    def prepare(self, parts: list[Part]) -> None:
        """Writes images and ingests them, unmeasured."""
        command = [sys.executable, "-m", "benchmarks.lakes"]
        for part in parts:
            for images in part.sizes:
                command += [str(self.work / f"{part.name}-{images}"), str(part.folder(images))]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    def compare(self, part: Part, repeats: int) -> list[Run]:
        """Both pipelines at both sizes, `repeats` times, the first place taken in turns."""
        runs = []
        for repeat in range(repeats):
            for images in part.sizes:
                for pipeline in [self.bare, self.spark] if repeat % 2 else [self.spark, self.bare]:
                    runs.append(run := pipeline(part, images, repeat))
                    print(f"{part.name} {run.kind} {images}: {run.wall:.1f} s, {run.cpu:.1f} CPU-s", file=sys.stderr, flush=True)
                self.check_same(part, images)
        return runs

    def spark(self, part: Part, images: int, repeat: int) -> Run:
        command = [sys.executable, "-m", "jobs.embed", *self.settings(part, images)]
        return Run(part.name, "spark", images, repeat, **self.measured(command))

    def bare(self, part: Part, images: int, repeat: int) -> Run:
        command = [sys.executable, "-m", "benchmarks.bare_loop", str(part.folder(images)), str(self.work / "bare")]
        command += ["--encoder", part.encoder, "--processes", str(self.workers)]  # its other defaults are the demo's settings
        return Run(part.name, "bare", images, repeat, **self.measured(command))

    def settings(self, part: Part, images: int) -> list[str]:
        """A fresh copy of the ingested lake -> the arguments of a stage on it."""
        shutil.rmtree(self.work / "lake", ignore_errors=True)
        shutil.copytree(self.work / f"{part.name}-{images}", self.work / "lake")
        told = lakes.overrides(self.work / "lake", part.folder(images), part.encoder, images, self.workers, 2 * self.workers)
        return ["--config", lakes.CONFIG, *told]

    def measured(self, command: list[str]) -> dict[str, Any]:
        """Raises RuntimeError with the end of what the command said when it failed."""
        out = self.work / "measured.json"
        subprocess.run([sys.executable, "-m", "benchmarks.measure", str(out), *command], cwd=ROOT, check=True)
        told = json.loads(out.read_text())
        if told.pop("status") != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{out.with_suffix('.log').read_text()[-3000:]}")
        return told

    def check_same(self, part: Part, images: int) -> None:
        """Both did the same work: the same images, the same vectors. Raises RuntimeError when not."""
        expected: dict[bytes, np.ndarray] = {}
        for number in range(self.workers):
            with np.load(self.work / f"bare.{number}.npz") as made:
                for path, vector in zip(made["path"], made["vector"], strict=True):
                    expected[hashlib.sha256(Path(path).read_bytes()).digest()] = vector
        found = {image: np.frombuffer(vector, "<f2") for image, vector in lakes.vectors(self.work / "lake")}
        if found.keys() != expected.keys() or len(found) != images:
            raise RuntimeError(f"{part.name}: {images} images, the stage embedded {len(found)}, the bare loop {len(expected)}")
        worst = max(float(np.abs(found[image].astype("f4") - expected[image]).max()) for image in found)
        if worst > CLOSE:
            raise RuntimeError(f"{part.name}: the vectors of the two pipelines differ by {worst}")

    def phases(self, part: Part, images: int) -> dict[str, tuple[float, float]]:
        out = self.work / "phases.json"
        command = [sys.executable, "-m", "benchmarks.phases", str(out), *self.settings(part, images)]
        self.measured(command)
        return json.loads(out.read_text())

    def empty(self) -> dict[str, Any] | str:
        """The main job on the demo's lake, or why there is no figure."""
        if not (ROOT / "demo/report.html").exists():
            return "not measured: there is no demo/report.html; run `make demo` first"
        told = self.measured([sys.executable, "-m", "jobs.run_all", "--config", lakes.CONFIG])
        said = (self.work / "measured.log").read_text()
        if "embed: nothing to do" not in said:
            return "not measured: the demo's lake was not complete (this run embedded images); run again"
        return told | {"stages": results.stage_rows(said)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, of " + ", ".join(PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="Spark's slots, and the bare loop's processes")
    for part in (TOWER, PIPELINE, SCALE):
        parser.add_argument(f"--{part.name}-sizes", type=int, nargs=2, default=part.sizes, metavar=("SMALL", "LARGE"))
    parser.add_argument("--quick", action="store_true", help="a few images, once: whether it runs, not what it costs")
    told = parser.parse_args()
    told.parts = told.parts.split(",")
    if unknown := set(told.parts) - set(PARTS):
        parser.error(f"--parts: given {sorted(unknown)}, allowed {list(PARTS)}")
    return told


def chosen(told: argparse.Namespace) -> list[Part]:
    """The parts that compare, with the sizes of the command line."""
    parts = []
    for part in (TOWER, PIPELINE, SCALE):
        sizes = QUICK[part.name] if told.quick else tuple(sorted(getattr(told, f"{part.name}_sizes")))
        if part.name in told.parts or (part is PIPELINE and "phases" in told.parts):
            parts.append(part._replace(sizes=sizes))
    return parts


def measure(bench: Bench, told: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """-> (Markdown, raw figures)."""
    parts = chosen(told)
    if parts:
        bench.prepare(parts)
    repeats = 1 if told.quick else told.repeats
    runs = [run for part in parts if part.name in told.parts for run in bench.compare(part, repeats)]
    raw: dict[str, Any] = {"machine": machine(), "runs": [run._asdict() for run in runs]}
    texts = [f"# Measured on {time.strftime('%Y-%m-%d')}", machine(), f"Medians of {repeats}; {bench.workers} workers, 1 thread each."]
    if told.quick:
        texts.append("A quick run shows that everything runs; its figures mean nothing.")
    if runs:
        texts += ["## The embed stage against a bare loop", results.markdown(results.COST_HEAD, results.cost_rows(runs))]
        texts += ["## Peak memory (RSS)", results.markdown(results.MEMORY_HEAD, results.memory_rows(runs))]
    if "phases" in told.parts:
        part = next(part for part in parts if part.name == PIPELINE.name)
        raw["phases"] = bench.phases(part, part.sizes[1])
        rows = [[name, f"{wall:.1f}", f"{cpu:.1f}"] for name, (wall, cpu) in raw["phases"].items()]
        head = ["step", "wall s", "CPU-s"]
        texts += [f"## Where the stage's time goes ({part.sizes[1]} images of 2 MP, no model)", results.markdown(head, rows)]
    if "empty" in told.parts:
        raw["empty"] = empty = bench.empty()
        texts.append("## The second, empty run of the main job")
        if isinstance(empty, str):
            texts.append(empty)
        else:
            texts.append(f"{empty['wall']:.1f} s wall, {empty['cpu']:.1f} CPU-s, of which by stage:")
            texts.append(results.markdown(["stage", "wall s", "said"], empty["stages"]))
    for name, part_of_training in TRAINING.items():
        if name in told.parts:
            more, raw[name] = part_of_training(bench.measured, bench.work, CACHE, repeats, told.quick)
            texts += more
    return "\n\n".join(texts) + "\n", raw


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores ({model}), Python {platform.python_version()}, load {os.getloadavg()[0]:.1f} at the start"


def main() -> None:
    told = arguments()
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        text, raw = measure(Bench(Path(work), told.workers), told)
    print(text)
    if not told.quick:
        out = ROOT / "benchmarks/results"
        out.mkdir(exist_ok=True)
        name = "-".join([time.strftime("%Y-%m-%d"), *(told.parts if set(told.parts) != set(PARTS) else [])])
        (out / f"{name}.md").write_text(text)
        (out / f"{name}.json").write_text(json.dumps(raw, indent=1))


if __name__ == "__main__":
    main()
