"""Arms x seeds of one export -> a training each, a table of how they compare, and a parent run in MLflow that holds them.

    python -m training.compare demo/exports/labels-0123456789ab --config conf/demo.yaml --trainer train_scorer --arms rates.yaml

    # rates.yaml: what differs between the arms, as --set would say it
    name: rates
    seeds: [1, 2, 3]
    metric: held_out_srcc
    arms:
      slow: {train_scorer.learning_rate: 0.0003}
      fast: {train_scorer.learning_rate: 0.003}

One training after the other, each a process of its own. Run it again after a kill, or with more arms: what is trained is not
trained again. An arm that fails is named and the others go on; exit status 1 then, 2 for a mistake.

The interval of the best arm over the next best is Student's over the seeds that both have, paired: would it win again with
other seeds on these held-out rows? (Whether a model wins on other images is what training.promote asks.)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from conf.section import Mistake, Name
from conf.settings import Settings, load, stop
from training import mlflow_store
from training.draw_comparison import draw
from training.exports import Export, open_export
from training.paired import METRICS
from training.ranking import rank

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


Key = tuple[str, int]  # arm, seed


class Training(NamedTuple):
    """One arm with one seed: the trainer's command line, and the digest that its run carries."""

    line: list[str]
    digest: str


class Arms(BaseModel):
    """The arms file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Name
    arms: dict[Name, dict[str, Any]] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    metric: str = "held_out_srcc"  # of the trainer's evaluation
    smaller_is_better: bool | None = None  # None: as known of the metric


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", help="the export that all arms are trained on")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML that describes the build")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key, for all arms")
    parser.add_argument("--trainer", required=True, help="a file of training/ and the section of its settings, e.g. train_scorer")
    parser.add_argument("--arms", required=True, metavar="FILE", help="YAML with the arms and seeds")
    parser.add_argument("--plan", action="store_true", help="say what each training would be; do nothing")
    arguments = parser.parse_args()
    try:
        failed = run(arguments)
    except Mistake as error:
        stop(str(error))
    if failed:
        raise SystemExit(1)


def run(arguments: argparse.Namespace) -> bool:
    """Train what is not trained, then rank what is; true when an arm failed."""
    settings = load(arguments.config, arguments.set)
    arms = read_arms(Path(arguments.arms))
    smaller_is_better = is_smaller_better(arms)
    trainings = plan(arms, arguments, open_export(arguments.export, None, None, (), settings))
    failed: dict[Key, str] = {}
    for number, (key, training) in enumerate(trainings.items(), 1):
        say(f"{name(key)} ({number} of {len(trainings)})" + (f": {' '.join(training.line[1:])}" if arguments.plan else ""))
        if not arguments.plan and (status := subprocess.run(training.line, check=False).returncode):
            failed[key] = f"its training ended with status {status}"
    if arguments.plan:
        return False
    mlflow_store.quiet()
    client = mlflow_store.connect(settings.mlflow)
    if why := mlflow_store.unreachable(client):
        raise Mistake(f"mlflow.tracking_uri: {settings.mlflow.tracking_uri} does not answer, run again to compare: {why}")
    metric = f"exported_{arms.metric}"  # of the weights that are exported: with patience not the last ones
    found = find_runs(client, settings, metric, trainings)
    failed |= {key: f"no finished run with {metric} in MLflow" for key in trainings if key not in found and key not in failed}
    if found:
        keep(client, settings, arms, smaller_is_better, found)
    for key, why in failed.items():
        say(f"FAILED: {name(key)}: {why}")
    return bool(failed)


def read_arms(path: Path) -> Arms:
    if not path.is_file():
        raise Mistake(f"--arms: no file at {path}; see python -m training.compare --help for its form")
    try:
        return Arms.model_validate_json(json.dumps(yaml.safe_load(path.read_text())))
    except yaml.YAMLError as error:
        raise Mistake(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise Mistake(
            "; ".join(f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}, given {e['input']!r}" for e in error.errors())
        ) from None


def plan(arms: Arms, arguments: argparse.Namespace, export: Export) -> dict[Key, Training]:
    """(arm, seed) -> its training. All settings are checked before the first is started."""
    trainer = arguments.trainer
    known = sorted(one for one in Settings.model_fields if (Path(__file__).parent / f"{one}.py").is_file())
    if trainer not in known:
        raise Mistake(f"--trainer: given {trainer!r}, expected one of {known}")
    digest_of = import_module(f"training.{trainer}").training_digest
    trainings: dict[Key, Training] = {}
    first: dict[str, Key] = {}
    for key in ((arm, seed) for arm in arms.arms for seed in arms.seeds):
        own = [f"{setting}={dump(value)}" for setting, value in arms.arms[key[0]].items()]
        sets = [*arguments.set, *own, f"{trainer}.seed={key[1]}", f"mlflow.comparison={arms.name}", f"mlflow.arm={key[0]}"]
        digest = digest_of(load(arguments.config, sets), export)
        same = first.setdefault(digest, key)
        if same != key:
            raise Mistake(f"{arguments.arms}: {name(key)} is the same training as {name(same)}; give arms that differ in what is trained")
        line = [sys.executable, "-m", f"training.{trainer}", arguments.export, "--config", arguments.config]
        trainings[key] = Training([*line, *(part for one in sets for part in ("--set", one))], digest)
    return trainings


def dump(value: Any) -> str:
    """A value of the arms file -> as --set reads it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()


def find_runs(client: MlflowClient, settings: Settings, metric: str, trainings: dict[Key, Training]) -> dict[Key, Run]:
    """(arm, seed) -> its newest finished run, where it has the metric."""
    experiment, found = mlflow_store.find_experiment(client, settings.mlflow), {}
    for key, training in trainings.items():
        where = f"tags.`{mlflow_store.TRAINING}` = '{training.digest}' and attributes.status = 'FINISHED'"
        for run in client.search_runs([experiment], where, order_by=["attributes.start_time DESC"]):
            if metric in run.data.metrics:
                found[key] = run
                break
    return found


def is_smaller_better(arms: Arms) -> bool:
    """The direction of the metric, given or known."""
    if arms.smaller_is_better is not None:
        return arms.smaller_is_better
    if arms.metric not in METRICS:
        raise Mistake(
            f"metric: {arms.metric!r} is not one of {sorted(METRICS)}, whose direction is known; give smaller_is_better: true or false"
        )
    return METRICS[arms.metric].smaller_is_better


def keep(client: MlflowClient, settings: Settings, arms: Arms, smaller_is_better: bool, found: dict[Key, Run]) -> None:
    """Runs -> the table on the screen; the table, its figures and the plot as artifacts of the comparison's parent run."""
    ranking = rank({key: run.data.metrics[f"exported_{arms.metric}"] for key, run in found.items()}, arms.metric, smaller_is_better)
    say(str(ranking))
    parent = mlflow_store.find_parent(client, settings.mlflow, arms.name)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "comparison.png").write_bytes(draw(ranking))
        (Path(folder) / "comparison.txt").write_text(f"{ranking}\n")
        (Path(folder) / "comparison.json").write_text(json.dumps({"comparison": arms.model_dump(), "ranking": asdict(ranking)}, indent=1))
        client.log_artifacts(parent, folder)
    client.set_tag(parent, "studbook.best_arm", ranking.arms[0].name)
    best = ranking.arms[0]
    seed = (min if smaller_is_better else max)(best.values, key=lambda one: best.values[one])
    for version in client.search_model_versions(f"run_id = '{found[best.name, seed].info.run_id}'"):
        command = mlflow_store.promotion_command(version.name, str(version.version))
        say(f"its best seed is {seed}; to make that the champion if it is better: {command}")


def name(key: Key) -> str:
    return f"{key[0]}, seed {key[1]}"


def say(lines: str) -> None:
    for line in lines.splitlines():
        print(f"compare: {line}", flush=True)


if __name__ == "__main__":
    main()
