"""The published figures: embed and training against bare loops, where the time goes, memory, cost an image, the empty run.

    python -m benchmarks.run [--parts tower,pipeline,scale,linear,decode,phases,empty,feed,step,caption] [--repeats 3] [--workers 2] [--quick]

Prints Markdown and writes benchmarks/results/DATE.md, or DATE-PARTS.md (and .json, every single measurement). Each measurement is a process of its
own (benchmarks/measure.py); the pipelines take turns. Embed's ratio is of slopes between two sizes, so that start-up stands apart; the
spread over the repeats says how far to trust a ratio (larger sizes narrow it). On 2 quiet cores about half an hour for embed, half an
hour for feed and step. Parts:

    tower      the real CLIP tower on the sample images     pipeline   no model (colour-grid) on 2 MP JPEGs
    scale      no model on small JPEGs, 300 and 6,000       phases     where the stage's time goes, on the pipeline part's images
    linear     the same from 3,000 to 30,000: cost and memory
    decode     ways to decode a JPEG: CPU, and how far vectors and scores move
    empty      the second run of the whole main job on the demo's lake (`make demo` first)
    feed       training.feed against raw pyarrow, petastorm's thread pool and torch's DataLoader
    step       training.loop, ZeRO 0 to 3, against bare DistributedDataParallel, 2 ranks
    caption    a task of paid captioning against the bare SDK, its pace, its memory, and a server's hidden limit (ten minutes)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from benchmarks import caption_part, decode_part, feed_part, linear_part, pictures, results, step_part
from benchmarks.bench import CACHE, ROOT, Bench, Part, keep, machine, work_folder

TOWER = Part("tower", "clip-vit-b-16-demo", (32, 128))
PIPELINE = Part("pipeline", "colour-grid", (200, 2000), pictures.TWO_MEGAPIXELS)
SCALE = Part("scale", "colour-grid", (300, 6000), pictures.SMALL)
QUICK = {"tower": (4, 8), "pipeline": (4, 8), "scale": (8, 16)}
PARTS = ("tower", "pipeline", "scale", "linear", "decode", "phases", "empty", "feed", "step", "caption")
OTHERS = {"feed": feed_part.measure, "step": step_part.measure, "caption": caption_part.measure}
CONFIG = "conf/demo.yaml"  # of the empty run


def phases(bench: Bench, part: Part) -> dict[str, tuple[float, float]]:
    out = bench.work / "phases.json"
    command = [sys.executable, "-m", "benchmarks.phases", str(out), *bench.settings(part, part.sizes[-1])]
    bench.measured(command)
    return json.loads(out.read_text())


def empty(bench: Bench) -> dict[str, Any] | str:
    """The main job on the demo's lake, or why there is no figure."""
    if not (ROOT / "demo/report.html").exists():
        return "not measured: there is no demo/report.html; run `make demo` first"
    told = bench.measured([sys.executable, "-m", "jobs.run_all", "--config", CONFIG])
    said = (bench.work / "measured.log").read_text()
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


def of_embed(bench: Bench, told: argparse.Namespace, repeats: int) -> tuple[list[str], dict[str, Any]]:
    """The parts of the embed stage -> (paragraphs of Markdown, raw figures)."""
    parts = chosen(told)
    if parts:
        bench.prepare(parts)
    runs = [run for part in parts if part.name in told.parts for run in bench.compare(part, ["bare", "spark"], repeats)]
    texts: list[str] = []
    raw: dict[str, Any] = {"runs": [run._asdict() for run in runs]}
    if runs:
        texts += ["## The embed stage against a bare loop", results.markdown(results.COST_HEAD, results.cost_rows(runs))]
        texts += ["## Peak memory (RSS)", results.markdown(results.MEMORY_HEAD, results.memory_rows(runs))]
    if "linear" in told.parts:
        more, raw["linear"] = linear_part.measure(bench, repeats, told.quick)
        texts += more
    if "decode" in told.parts:
        more, raw["decode"] = decode_part.measure(4 if told.quick else 24, None)
        texts += ["## Ways to decode a JPEG", *more]
    if "phases" in told.parts:
        part = next(part for part in parts if part.name == PIPELINE.name)
        raw["phases"] = steps = phases(bench, part)
        rows = [[name, f"{wall:.1f}", f"{cpu:.1f}"] for name, (wall, cpu) in steps.items()]
        title = f"## Where the stage's time goes ({part.sizes[-1]} images of 2 MP, no model)"
        texts += [title, results.markdown(["step", "wall s", "CPU-s"], rows)]
    return texts, raw


def of_empty(bench: Bench) -> tuple[list[str], dict[str, Any]]:
    title, told = "## The second, empty run of the main job", empty(bench)
    if isinstance(told, str):
        return [title, told], {"empty": told}
    cost = f"{told['wall']:.1f} s wall, {told['cpu']:.1f} CPU-s, of which by stage:"
    return [title, cost, results.markdown(["stage", "wall s", "said"], told["stages"])], {"empty": told}


def measure(bench: Bench, told: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """-> (Markdown, raw figures)."""
    repeats = 1 if told.quick else told.repeats
    raw: dict[str, Any] = {"machine": (about := machine())}
    texts = [f"# Measured on {time.strftime('%Y-%m-%d')}", about, f"Medians of {repeats}; {bench.workers} workers, 1 thread each."]
    if told.quick:
        texts.append("A quick run shows that everything runs; its figures mean nothing.")
    more, figures = of_embed(bench, told, repeats)
    texts, raw = texts + more, raw | figures
    if "empty" in told.parts:
        more, figures = of_empty(bench)
        texts, raw = texts + more, raw | figures
    for name, part_of in OTHERS.items():
        if name in told.parts:
            more, raw[name] = part_of(bench.measured, bench.work, CACHE, repeats, told.quick)
            texts += more
    return "\n\n".join(texts) + "\n", raw


def main() -> None:
    told = arguments()
    with work_folder() as work:
        text, raw = measure(Bench(work, told.workers), told)
    print(text)
    if not told.quick:
        keep(text, raw, *(told.parts if set(told.parts) != set(PARTS) else []))


if __name__ == "__main__":
    main()
