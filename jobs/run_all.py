"""The whole main job, in order, in one Spark session; the trainers as processes of their own.

    python -m jobs.run_all --config conf/demo.yaml

Stages whose section a config leaves out (`deny.lists`, `label_classes`, `classify`, `styles`, `captions`) are left out too. Every stage starts from
what is pending, so a second run finds nothing to do. At the end: the funnel, where the report lies, and how to open MLflow.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache

from conf.section import Mistake
from conf.settings import Settings
from jobs import (
    assign_styles,
    caption,
    classify,
    command,
    deny,
    embed,
    export_classes,
    export_labels,
    export_selection,
    facts,
    fit_styles,
    flag,
    funnel,
    ingest,
    label,
    label_classes,
    land_train_stats,
    report,
    score,
    select_images,
    style_sheets,
)
from jobs.lake import Lake
from jobs.registry import Head
from udfs.opener import to_path

Stages = list[tuple[str, Callable[[], object]]]


def run(lake: Lake, settings: Settings, plan_only: bool = False, arguments: Sequence[str] | None = None) -> None:
    """`arguments`: the command line's, handed to the trainers as they are (None: sys.argv)."""
    start = time.monotonic()
    if plan_only:
        if not ingest.run(lake, settings, True):
            embed.run(lake, settings, True)
            label.run(lake, settings, True)
        print("the later stages are planned from what these land: run `--plan` of each once it has its inputs")
        return

    @cache
    def head() -> Head:
        """The champion, resolved once: a promotion in the middle of a run must not split it."""
        return score.champion(settings)

    @cache
    def classifiers() -> list[Head]:
        return classify.champions(settings)

    given = sys.argv[1:] if arguments is None else arguments
    stages: Stages = [
        ("ingest", lambda: ingest.run(lake, settings)),
        ("embed", lambda: embed.run(lake, settings)),
        *([("deny", lambda: deny.run(lake, settings))] if settings.deny.lists else []),
        ("label", lambda: label.run(lake, settings)),
        ("export labels", lambda: export_labels.run(lake, settings)),
        ("train scorer", lambda: train("training.train_scorer", export_labels.folder(lake, settings), given)),
        *(_of_classes(lake, settings, given) if settings.label_classes else []),
        ("land train stats", lambda: land_train_stats.run(lake, settings)),
        ("score", lambda: score.run(lake, settings, head=head())),
        *([("classify", lambda: classify.run(lake, settings, heads=classifiers()))] if settings.classify else []),
        *(_of_styles(lake, settings) if has_styles(settings) else []),
        ("flag", lambda: flag.run(lake, settings, heads=classifiers())),
        *([("caption", lambda: caption.run(lake, settings))] if "captions" in settings.model_fields_set else []),
        ("select", lambda: select_images.run(lake, settings, head=head())),
        ("export selection", lambda: export_selection.run(lake, settings, head=head())),
        ("report", lambda: report.run(lake, settings, head=head())),
    ]
    for number, (name, work) in enumerate(stages, 1):
        began = time.monotonic()
        print(f"== {number}/{len(stages)} {name}", flush=True)
        work()
        print(f"   {name}: {time.monotonic() - began:.1f} s", flush=True)
    tell(lake, settings, head(), time.monotonic() - start)


def has_styles(settings: Settings) -> bool:
    """Whether the build asks for style clusters: it has the section."""
    return "styles" in settings.model_fields_set


def _of_classes(lake: Lake, settings: Settings, given: Sequence[str]) -> Stages:
    @cache
    def export() -> str:
        return export_classes.run(lake, settings)

    return [
        ("label classes", lambda: label_classes.run(lake, settings)),
        ("export classes", export),
        ("train classifier", lambda: train("training.train_classifier", export(), given)),
    ]


def _of_styles(lake: Lake, settings: Settings) -> Stages:
    return [
        ("fit styles", lambda: fit_styles.ensure(lake, settings)),
        ("assign styles", lambda: assign_styles.run(lake, settings)),
        ("style sheets", lambda: style_sheets.run(lake, settings)),
    ]


def train(trainer: str, export: str, arguments: Sequence[str]) -> None:
    """A trainer as a process: the two rooms meet in the export and in the registry. Its messages are its own."""
    export = os.fsdecode(to_path(export)) if export.startswith("file://") else export
    done = subprocess.run([sys.executable, "-m", trainer, export, *arguments])
    if done.returncode != 0:
        raise Mistake(
            f"{trainer} ended with status {done.returncode}; what it said stands above. Run again: what is done is not done twice"
        )


def tell(lake: Lake, settings: Settings, head: Head, seconds: float) -> None:
    scores = score.fingerprint(head)
    selection = select_images.identity(lake, settings, scores, lake.versions(facts.TABLES))
    counted = funnel.measure(lake, settings, selection, scores)
    print(f"\nThe funnel of selection {settings.select.name} ({selection}):")
    print("\n".join(funnel.lines(counted)))
    print(f"\nreport   {settings.report.path} (open it in a browser)")
    print(f"MLflow   make mlflow, or: mlflow server --backend-store-uri {settings.mlflow.tracking_uri} --host 127.0.0.1 --port 5000")
    print(f"an image python -m jobs.why IMAGE --config {_config()}")
    print(f"a model  python -m jobs.lineage {head.model} --config {_config()}")
    print(f"done in {seconds:.0f} s", flush=True)


def _config() -> str:
    return sys.argv[sys.argv.index("--config") + 1] if "--config" in sys.argv else "FILE"


if __name__ == "__main__":
    command.main(__doc__, run)
