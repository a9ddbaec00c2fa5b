"""The embed stage against Daft, Ray Data and the bare loop: the same files, kernel, engine and model. `make bench-peers`

    python -m benchmarks.run_peers [--parts decode,model,read] [--repeats 3] [--workers 2] [--quick]

Three kinds of work: `decode` (2 MP JPEGs, no model), `model` (the real CLIP tower on the sample images), `read` (many small JPEGs, no model). Each
measurement is a process tree of its own; pipelines take turns; all must write the same vectors. Told apart: the cost of one more image
(the slope between two sizes) and start-up (the rest). The peers run in .cache/peers (benchmarks/peers.lock). Prints Markdown and
writes benchmarks/results/DATE-peers.md and .json; on 2 quiet cores about 25 minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from benchmarks import pictures, results
from benchmarks.bench import PEERS, Bench, Part, keep, machine, work_folder
from benchmarks.results import Run

PARTS = {
    "decode": Part("decode", "colour-grid", (200, 2000), pictures.TWO_MEGAPIXELS),
    "model": Part("model", "clip-vit-b-16-demo", (32, 128)),
    "read": Part("read", "colour-grid", (300, 6000), pictures.SMALL),
}
QUICK = {"decode": (4, 8), "model": (2, 4), "read": (8, 16)}
PIPELINES = ("bare", "spark", "daft", "ray")
ABOUT = (
    "The same files, decode, statistics, tower and engine in all four (benchmarks/image_work.py). Slope: CPU time of the whole process tree for one "
    "more image, between two sizes; start-up: what is left at no image. Studbook also checks each file's hash against the lake and lands in Delta "
    "tables. Studbook is jobs.embed on an ingested lake: its ingest is not in these figures. The tower's graph is exported beforehand."
)


def head_to_head(runs: Sequence[Run]) -> list[list[str]]:
    """Studbook's slope over each other pipeline's, by part."""
    parts = dict.fromkeys(run.part for run in runs)
    others = [kind for kind in PIPELINES if kind != "spark"]
    return [[part, *(results.spread(results.ratios(runs, part, "spark", other)) for other in others)] for part in parts]


HEAD = ["part", "of the bare loop's", "of Daft's", "of Ray Data's"]


def versions() -> str:
    told = {name: version(name) for name in ("pyspark", "delta-spark", "onnxruntime", "pillow")}
    asked = "import json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in ('daft', 'ray', 'onnxruntime', 'pillow')}))"
    peers = json.loads(subprocess.run([PEERS, "-c", asked], check=True, capture_output=True, text=True).stdout)
    lists = [", ".join(f"{name} {number}" for name, number in one.items()) for one in (told, peers)]
    return f"Here: {lists[0]}. Peers: {lists[1]}."


def measure(bench: Bench, parts: Sequence[Part], repeats: int, quick: bool) -> tuple[str, dict[str, Any]]:
    """-> (Markdown, raw figures)."""
    about = machine()
    bench.prepare(parts)
    runs = [run for part in parts for run in bench.compare(part, PIPELINES, repeats)]
    texts = [f"# Peers, measured on {time.strftime('%Y-%m-%d')}", about, versions(), ABOUT]
    texts.append(f"Medians and ranges of {repeats}; {bench.workers} workers, 1 model thread each.")
    if quick:
        texts.append("A quick run shows that everything runs; its figures mean nothing.")
    texts += [results.markdown(results.COST_HEAD, results.cost_rows(runs)), "## CPU of one more image: Studbook's share of the others'"]
    texts += [results.markdown(HEAD, head_to_head(runs)), "## Peak memory (RSS)"]
    texts.append(results.markdown(results.MEMORY_HEAD, results.memory_rows(runs)))
    return "\n\n".join(texts) + "\n", {"machine": about, "versions": versions(), "runs": [run._asdict() for run in runs]}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help=f"comma-separated, of {', '.join(PARTS)}; all, or model in a quick run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="slots, processes, actors")
    parser.add_argument("--quick", action="store_true", help="a few images, once, two minutes: whether it runs, not what it costs")
    told = parser.parse_args()
    told.parts = told.parts.split(",") if told.parts else ["model"] if told.quick else list(PARTS)
    if unknown := set(told.parts) - set(PARTS):
        parser.error(f"--parts: given {sorted(unknown)}, allowed {list(PARTS)}")
    if not PEERS.exists():
        parser.error(f"no {PEERS}: the peers' environment is made by `make bench-peers`")
    return told


def main() -> None:
    told = arguments()
    parts = [PARTS[name]._replace(sizes=QUICK[name]) if told.quick else PARTS[name] for name in told.parts]
    with work_folder() as work:
        text, raw = measure(Bench(work, told.workers), parts, 1 if told.quick else told.repeats, told.quick)
    print(text)
    if not told.quick:
        keep(text, raw, "peers", *(told.parts if set(told.parts) != set(PARTS) else []))


if __name__ == "__main__":
    main()
