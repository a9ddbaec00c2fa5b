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
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from conf.enrichment import Calibrate, Classify, ClassLabels, Deny, Detector, Embed, Encoder, Flags, Score, Styles
from conf.loops import TrainClassifier, TrainDiffusion, TrainScorer
from conf.section import Frozen, Mistake, Name, Positive, Share

HERE = Path(__file__).parent
Section = TypeVar("Section", bound=BaseModel)
Model = TypeVar("Model", Encoder, Detector)


class Lake(Frozen):
    root: str  # a folder or s3://bucket/prefix: holds staging and leases, and the tables when there is no catalog
    catalog: str | None = None  # Unity Catalog: tables are catalog.schema.name
    schema_name: str | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> Lake:
        if (self.catalog is None) != (self.schema_name is None):
            raise ValueError("catalog and schema_name go together: give both (Unity Catalog) or neither (tables under root)")
        return self


class Spark(Frozen):
    master: str | None = None  # None: spark-submit or the notebook decides
    jars: str | None = None  # folder of the Delta jars (`make jars`); None: they are on the cluster's classpath
    conf: dict[str, str] = {}


class Store(Frozen):
    """An S3-compatible object store. Secrets are named here and read where the bytes are read."""

    endpoint: str | None = None  # None: AWS
    region: str = "us-east-1"
    access_key_env: str | None = None  # None: the default credential chain
    secret_key_env: str | None = None


class Mlflow(Frozen):
    tracking_uri: str
    artifacts: str | None = None  # where a sqlite tracking store keeps its files; None with a tracking server
    experiment: str = "studbook"
    comparison: Name | None = None  # the comparison that a training is part of ...
    arm: Name | None = None  # ... and as which of its arms; training.compare sets both

    @model_validator(mode="after")
    def _no_secret(self) -> Mlflow:
        if "@" in urlsplit(self.tracking_uri).netloc:
            raise ValueError(
                "tracking_uri holds a user or password, and it is printed and recorded; give them to MLflow by the environment variables "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return self

    @model_validator(mode="after")
    def _an_arm_is_of_a_comparison(self) -> Mlflow:
        if (self.comparison is None) != (self.arm is None):
            raise ValueError("comparison and arm go together: give both (training.compare does) or neither")
        return self


class Limits(Frozen):
    """What a file may cost, checked from the header before any decode."""

    formats: tuple[Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"], ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
    max_bytes: Positive = 64 * 2**20
    max_pixels: Positive = 50_000_000
    max_frames: Positive = 1_000
    min_side: Positive = 8


class Waves(Frozen):
    rows: Positive = 200_000  # images a wave: about ten minutes at 330 images/s
    task_rows: Positive = 2_000  # images a Spark task: what one lost worker costs
    attempts: Positive = 3  # a transient reject is permanent after so many
    lease_seconds: Positive = 60


class Source(Frozen):
    name: str
    kind: Literal["folder", "tar", "manifest", "parquet"]
    uri: str  # a folder (folder, tar, parquet), one manifest file (.jsonl, .csv, .parquet), or one .parquet file with an image column
    columns: dict[Literal["image", "uri", "offset", "length", "key", "tags", "alt_text", "licence", "opt_out"], str] = {}
    licence: str | None = None  # for inputs that state none themselves

    @property
    def column_names(self) -> dict[str, str]:
        """`columns` as the kernel takes them."""
        return {str(name): column for name, column in self.columns.items()}

    @model_validator(mode="after")
    def _columns_are_of_the_kind(self) -> Source:
        if self.columns and self.kind not in ("manifest", "parquet"):
            raise ValueError(f"columns were given for a {self.kind}; they name the fields of a manifest or the columns of parquet files")
        wrong = {"manifest": {"image"}, "parquet": {"uri", "offset", "length"}}.get(self.kind, set()) & set(self.columns)
        if wrong:
            raise ValueError(
                f"columns of a {self.kind}: given {sorted(wrong)}; a manifest names addresses, a parquet file has an image column"
            )
        return self


class Ingest(Frozen):
    sources: tuple[Source, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_unique(self) -> Ingest:
        names = [s.name for s in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names must be unique, given {names}")
        return self


class Label(Frozen):
    rule: Literal["rankiqa"] = "rankiqa"
    images: Positive = 2_000
    seed: int = 7
    views: dict[str, Share] = Field(min_length=1)  # view -> target; the original's is 1.0
    probes: tuple[str, ...] = ()  # views that get a vector and no label: no head is fitted to them, score_bias asks what it makes of them

    @model_validator(mode="after")
    def _a_probe_is_not_trained_on(self) -> Label:
        if both := sorted(set(self.views) & set(self.probes)):
            raise ValueError(f"probes: given {both}, which are among views: what a head is fitted to is no probe of it")
        return self


class Select(Frozen):
    class Rule(Frozen):
        """One condition that an image must pass; a missing value fails every rule but `none_of`."""

        name: str
        value: str  # a name from jobs/facts.py
        at_least: float | None = None
        at_most: float | None = None
        within: tuple[str, ...] | None = None  # every word that the image has is in the list, and it has one
        none_of: tuple[str, ...] | None = None

        @model_validator(mode="after")
        def _one_condition(self) -> Select.Rule:
            given = [k for k in ("at_least", "at_most", "within", "none_of") if getattr(self, k) is not None]
            lists = {"within", "none_of"} & set(given)
            if not given or (lists and len(given) > 1):
                raise ValueError(f"rule {self.name!r} needs at_least and/or at_most, or one of within, none_of; given {given or 'none'}")
            if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
                raise ValueError(f"rule {self.name!r}: the floor at_least={self.at_least} is above the maximum at_most={self.at_most}")
            return self

    class Cap(Frozen):
        """Of the images that pass every rule and have one of `words`, at most so many of each group are kept, by a seeded hash."""

        name: str
        value: str  # words from jobs/facts.py, e.g. ai_generated
        words: tuple[str, ...] = Field(min_length=1)  # e.g. declared, detected
        per: str | None = None  # words from jobs/facts.py that make the group, e.g. style_cluster; None: all of them together
        at_most: Annotated[int, Field(ge=0)]

    name: str
    seed: int
    limit: Positive | None = None  # keep at most so many, by a seeded hash of the image id
    rules: tuple[Rule, ...]
    caps: tuple[Cap, ...] = ()  # after the rules, one after the other, before the limit

    @model_validator(mode="after")
    def _rule_names_are_unique(self) -> Select:
        names = [rule.name for rule in self.rules] + [cap.name for cap in self.caps]
        if len(set(names)) != len(names) or {"limit", "opted_out", "denied"} & set(names):
            raise ValueError(
                f"rule and cap names must be unique and not 'limit', 'opted_out' or 'denied' (these two stand always), given {names}"
            )
        return self


class Export(Frozen):
    root: str
    rows_per_file: Positive = 8_192
    image_rows_per_file: Positive = 256  # of an export of images, whose rows hold the bytes
    image_attempt: Positive = 1  # raise it to export images anew, after some could not be read
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2  # share of *images* whose rows are in the split `held_out`
    seed: int = 7


class Training(Frozen):
    """What all trainers share."""

    root: str  # a folder a training: checkpoints, journal, results; on a file system that all ranks see
    spool: str = ".cache/spool"  # files of exports in an object store, kept on this machine for its ranks
    spool_bytes: Positive = 64 * 2**30
    patience_seconds: Positive = 600  # how long a rank waits for the others before it takes them for lost


class Report(Frozen):
    path: str
    images_per_group: Positive = 8


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
    select: Select
    export: Export
    report: Report

    @property
    def store_options(self) -> dict[str, dict[str, Any]]:
        """`stores` as the kernel's opener takes them."""
        return {bucket: store.model_dump() for bucket, store in self.stores.items()}

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
