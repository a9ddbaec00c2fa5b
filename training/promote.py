"""A registered version -> the champion, if it is better on the same held-out rows beyond the bootstrap interval.

    python -m training.promote aesthetic-scorer --config conf/demo.yaml         # the candidate
    python -m training.promote aesthetic-scorer 3 --config conf/demo.yaml       # a version by number
    python -m training.promote aesthetic-scorer --config conf/demo.yaml --plan  # only the figures

Both versions' runs hold what they gave for each held-out row; rows that both have are compared, in pairs: whole images (of a classifier: groups of
near-duplicates) are drawn, the same for both, and the rule is that the interval of the difference lies above 0. The metrics are

    held_out_srcc               Spearman's correlation with the target, from held_out.parquet (image_id, view, value, prediction)
    held_out_balanced_accuracy  mean recall of the classes, from held_out_classes.parquet (image_id, near_group, class, prediction)
    held_out_loss               the mean loss of an image, from held_out_losses.parquet (image_id, loss); smaller is better

and the first of them that the version has is taken when none is named. Where there is no champion the version becomes it.
Exit status 1 when the rule refuses, with the figures; 2 for a mistake, such as too few common images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from conf.section import Mistake
from conf.settings import load, stop
from training import mlflow_store
from training.mlflow_store import CANDIDATE, CHAMPION
from training.paired import COLUMNS, FEWEST, METRICS, Figures

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of the registered model")
    parser.add_argument("version", nargs="?", help="number of the version; none: the candidate")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML that names the MLflow store")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")
    parser.add_argument("--metric", choices=list(METRICS), help="what is compared")
    parser.add_argument("--fewest", type=int, default=FEWEST, help="common held-out images that are enough for an interval (default 30)")
    parser.add_argument("--plan", action="store_true", help="say the figures; do nothing")
    arguments = parser.parse_args()
    try:
        settings = load(arguments.config, arguments.set)
        mlflow_store.quiet()
        client = mlflow_store.connect(settings.mlflow)
        if why := mlflow_store.unreachable(client):
            raise Mistake(f"mlflow.tracking_uri: {settings.mlflow.tracking_uri} does not answer: {why}")
        done = promote(client, arguments.model, arguments.version, arguments.metric, arguments.fewest, arguments.plan)
    except Mistake as error:
        stop(str(error))
    if not done:
        raise SystemExit(1)


def promote(client: MlflowClient, model: str, number: str | None, metric: str | None, fewest: int, plan: bool) -> bool:
    """Whether the version is the champion now (or would be, in a plan); says why and with which figures."""
    aliases = mlflow_store.find_aliases(client, model)
    version = find(client, model, number, aliases)
    if int(version.version) == aliases.get(CHAMPION):
        say(f"nothing to do, {model} version {version.version} is the champion")
        if not plan:
            clear_candidate(client, model, version, aliases)
        return True
    if CHAMPION not in aliases:
        say(f"{model} has no champion: version {version.version} becomes it without a comparison")
        figures = None
    else:
        champion = client.get_model_version(model, str(aliases[CHAMPION]))
        figures = compare(client, version, champion, metric, fewest)
        say(f"{model} version {version.version}: {figures}")
        if not figures.better:
            say(f"refused: the interval is not above 0; version {champion.version} stays the champion")
            return False
    if not plan:
        settle(client, model, version, aliases, figures)
        say(f"{model} version {version.version} is the champion")
    return True


def find(client: MlflowClient, model: str, number: str | None, aliases: dict[str, int]) -> ModelVersion:
    """The version of that number, or the candidate."""
    number = number or (str(aliases[CANDIDATE]) if CANDIDATE in aliases else None)
    if number is None:
        raise Mistake(
            f"{model} has no candidate (aliases: {aliases or 'none'}); name a version: python -m training.promote {model} VERSION"
        )
    known = {str(one.version): one for one in client.search_model_versions(f"name = '{model}'")}
    if number not in known:
        raise Mistake(f"version: given {number!r}, {model} has {sorted(known, key=int)}")
    return known[number]


def settle(client: MlflowClient, model: str, version: ModelVersion, aliases: dict[str, int], figures: Figures | None) -> None:
    """Tags, then the alias: a champion always says since when, over which version, and why."""
    tags = {"promoted_at": datetime.now(UTC).isoformat(timespec="seconds"), "promoted_over": str(aliases.get(CHAMPION, ""))}
    tags["promotion"] = json.dumps(asdict(figures)) if figures else "no champion before"
    for key, value in tags.items():
        client.set_model_version_tag(model, str(version.version), key, value)
    client.set_registered_model_alias(model, CHAMPION, str(version.version))
    clear_candidate(client, model, version, aliases)


def clear_candidate(client: MlflowClient, model: str, version: ModelVersion, aliases: dict[str, int]) -> None:
    if aliases.get(CANDIDATE) == int(version.version):
        client.delete_registered_model_alias(model, CANDIDATE)


def compare(client: MlflowClient, version: ModelVersion, champion: ModelVersion, metric: str | None, fewest: int) -> Figures:
    """Two versions -> the figures on the held-out rows that both runs have."""
    chosen = metric or next((name for name, one in METRICS.items() if has(client, version, one.file)), next(iter(METRICS)))
    file, measure, _, same = METRICS[chosen]
    for one in (version, champion):
        if not has(client, one, file):
            raise Mistake(
                f"{one.name} version {one.version} has no {file} in its run {one.run_id}, so {chosen} cannot be compared; "
                f"train it again, or set the alias {CHAMPION} in MLflow by hand"
            )
    differ = {tag: (version.tags.get(tag), champion.tags.get(tag)) for tag in same if version.tags.get(tag) != champion.tags.get(tag)}
    if differ:
        told = ", ".join(f"{tag}: {mine} and the champion's {its}" for tag, (mine, its) in differ.items())
        raise Mistake(
            f"{version.name} version {version.version} and the champion are measured on different tasks ({told}); their {chosen} does not compare. "
            f"Train the champion's data under the new settings first, or set the alias {CHAMPION} in MLflow by hand"
        )
    return measure(chosen, download(client, version, file), download(client, champion, file), fewest)


def has(client: MlflowClient, version: ModelVersion, file: str) -> bool:
    return version.run_id is not None and file in {artifact.path for artifact in client.list_artifacts(version.run_id)}


def download(client: MlflowClient, version: ModelVersion, file: str) -> pd.DataFrame:
    import pandas as pd

    assert version.run_id is not None
    with tempfile.TemporaryDirectory() as folder:
        table = pd.read_parquet(Path(client.download_artifacts(version.run_id, file, folder)))
    if wanting := COLUMNS[file] - set(table.columns):
        raise Mistake(f"{version.name} version {version.version}: {file} lacks the columns {sorted(wanting)}; train it again")
    return table


def say(line: str) -> None:
    print(f"promote: {line}", flush=True)


if __name__ == "__main__":
    main()
