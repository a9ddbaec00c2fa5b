"""The sections of a corpus build: where it lies, what is taken into it, what is chosen from it and how that is handed on."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from conf.section import Frozen, Name, Positive, Share


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
