"""YAML + `--set` -> one frozen, checked Settings. The only Python file that reads configuration.

A config file describes one corpus build: what all stages share (`lake`, `spark`, `mlflow`, ...) and a section a
stage. The whole file is checked whichever stage reads it, before Spark starts or a model is imported; a mistake
is one `ValueError` that names the key, what was given and what is allowed.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from conf.build import Export, Ingest, Label, Lake, Limits, Mlflow, Report, Select, Spark, Store, Training, Waves
from conf.captions import Captions, CompareCaptioners, Prices, PromptFile
from conf.enrichment import Calibrate, Classify, ClassLabels, Deny, Detector, Embed, Encoder, Flags, Score, Styles
from conf.loops import TrainCaptioner, TrainClassifier, TrainDiffusion, TrainScorer
from conf.section import Frozen, Mistake

HERE = Path(__file__).parent
Section = TypeVar("Section", bound=BaseModel)
Model = TypeVar("Model", Encoder, Detector)


class Settings(Frozen):
    """One corpus build, as one YAML file says it."""

    lake: Lake
    spark: Spark = Spark()
    stores: dict[str, Store] = {}  # bucket -> store
    mlflow: Mlflow
    limits: Limits = Limits()
    waves: Waves = Waves()
    encoder: str  # the encoder whose vectors the scorer reads; one of embed.encoders
    ingest: Ingest
    embed: Embed
    label: Label
    training: Training
    train_scorer: TrainScorer = TrainScorer()
    train_diffusion: TrainDiffusion = TrainDiffusion()
    score: Score = Score()
    calibrate: Calibrate = Calibrate()
    styles: Styles = Styles()
    label_classes: tuple[ClassLabels, ...] = ()
    train_classifier: TrainClassifier = TrainClassifier()
    classify: tuple[Classify, ...] = ()
    flags: Flags = Flags()
    deny: Deny = Deny()
    captions: Captions = Captions()
    compare_captioners: CompareCaptioners = CompareCaptioners()
    train_captioner: TrainCaptioner = TrainCaptioner()
    select: Select
    export: Export
    report: Report

    @property
    def store_options(self) -> dict[str, dict[str, Any]]:
        """`stores` as the kernel's opener takes them."""
        return {bucket: store.model_dump() for bucket, store in self.stores.items()}

    @model_validator(mode="after")
    def _compared_are_captioners(self) -> Settings:
        if unknown := sorted(set(self.compare_captioners.captioners) - set(self.captions.captioners)):
            raise ValueError(f"compare_captioners.captioners: given {unknown}, captions.captioners has {sorted(self.captions.captioners)}")
        return self

    @model_validator(mode="after")
    def _encoder_is_embedded(self) -> Settings:
        if self.encoder not in self.embed.encoders:
            raise ValueError(f"encoder: given {self.encoder!r}, expected one of embed.encoders {list(self.embed.encoders)}")
        if self.styles.encoder is not None and self.styles.encoder not in self.embed.encoders:
            raise ValueError(f"styles.encoder: given {self.styles.encoder!r}, expected one of embed.encoders {list(self.embed.encoders)}")
        return self


def load(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """(YAML file, ["embed.batch_size=16", ...]) -> Settings. Raises Mistake naming key, value and what is allowed."""
    tree = _read(Path(path))
    for override in overrides:
        _apply(tree, override)
    return _check(Settings, tree, str(path))


def load_encoder(name: str) -> Encoder:
    """Name of a file in conf/encoders, or a path -> Encoder. Raises Mistake when there is none."""
    return _load_model(Encoder, "encoder", name)


def load_detector(name: str) -> Detector:
    """Name of a file in conf/detectors, or a path -> Detector. Raises Mistake when there is none."""
    return _load_model(Detector, "detector", name)


def load_prompt(name: str) -> PromptFile:
    """Name of a file in conf/prompts, or a path -> PromptFile. Raises Mistake when there is none."""
    return _check(PromptFile, *_find("captions.prompt", HERE / "prompts", name))


def load_prices(name: str) -> Prices:
    """Name of a file in conf/, or a path -> Prices. Raises Mistake when there is none."""
    return _check(Prices, *_find("captions.prices", HERE, name))


def _find(key: str, folder: Path, name: str) -> tuple[dict[str, Any], str]:
    path = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not path.is_file():
        raise Mistake(
            f"{key}: given {name!r}, and there is no file at {path}; allowed {sorted(p.stem for p in folder.glob('*.yaml'))} or a path"
        )
    return _read(path), str(path)


def _load_model(kind: type[Model], what: str, name: str) -> Model:
    folder = HERE / f"{what}s"
    path = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise Mistake(f"{what}: given {name!r}, allowed {known} or the path of a .yaml file")
    model = _check(kind, _read(path), str(path))
    # a worker's current folder is its own
    files = {key: str(Path(file).absolute()) for key in ("weights", "vocabulary") if (file := getattr(model, key, None)) is not None}
    return model.model_copy(update=files)


def digest(*parts: object) -> str:
    """Settings sections, strings, numbers, dicts -> 12 hex digits that change when any of them does."""
    plain = [p.model_dump(mode="json") if isinstance(p, BaseModel) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:12]


def command_line(
    doc: str, positional: Mapping[str, str] | None = None, options: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[Settings, argparse.Namespace]:
    """sys.argv -> (Settings, the arguments). A mistake prints one line and exits with 2: the whole command line of a stage.

    options: flag -> argparse's keywords, for the few commands that are not a stage.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in (positional or {}).items():
        parser.add_argument(name, help=text)
    for name, keywords in (options or {}).items():
        parser.add_argument(name, **keywords)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML that describes the build, e.g. conf/demo.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key, e.g. embed.batch_size=16")
    parser.add_argument("--plan", action="store_true", help="say what is pending and about how long it takes; do nothing")
    arguments = parser.parse_args()
    try:
        settings = load(arguments.config, arguments.set)
        for name in settings.embed.encoders:
            load_encoder(name)
        for name in settings.embed.detectors:
            load_detector(name)
    except Mistake as error:
        stop(str(error))
    return settings, arguments


def stop(message: str) -> NoReturn:
    """One line for the user's mistake, exit status 2."""
    print(f"studbook: {message}", file=sys.stderr)
    raise SystemExit(2)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise Mistake(f"config: no file at {path} (looked from {Path.cwd()}); give the path of a YAML file, e.g. conf/demo.yaml")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise Mistake(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise Mistake(f"{path}: expected a mapping of sections, given {type(tree).__name__}")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise Mistake(f"--set: given {override!r}, expected KEY=VALUE, e.g. embed.batch_size=16")
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise Mistake(f"--set {key}: {parent} is not a section")
    try:
        tree[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise Mistake(f"--set {key}: not YAML: {text!r}") from None


def _check(kind: type[Section], tree: dict[str, Any], where: str) -> Section:
    try:
        # JSON mode keeps strictness but lets YAML's lists be tuples
        return kind.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise Mistake("; ".join(_explain(kind, where, e) for e in error.errors())) from None


def _explain(kind: type[BaseModel], where: str, error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "(whole file)"
    if error["type"] == "extra_forbidden":
        section = _section(kind, error["loc"][:-1])
        allowed = sorted(section.model_fields) if section else []
        near = difflib.get_close_matches(str(error["loc"][-1]), allowed, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{where}: {key}: unknown key, given {error['input']!r}, allowed {allowed}{hint}"
    if error["type"] == "missing":
        return f"{where}: {key}: required, not given"
    given = "" if error["type"] == "value_error" else f", given {error['input']!r}"
    return f"{where}: {key}: {error['msg'].removeprefix('Value error, ')}{given}"


def _section(kind: type[BaseModel], loc: Sequence[str | int]) -> type[BaseModel] | None:
    """Walk the annotations to the section that refused a key."""
    here: Any = kind
    for part in loc:
        if isinstance(part, str) and isinstance(here, type) and issubclass(here, BaseModel):
            here = here.model_fields[part].annotation
        if isinstance(part, int) or get_origin(here) in (tuple, dict, UnionType):
            models = [a for a in get_args(here) if isinstance(a, type) and issubclass(a, BaseModel)]
            here = models[0] if models else here
    return here if isinstance(here, type) and issubclass(here, BaseModel) else None
