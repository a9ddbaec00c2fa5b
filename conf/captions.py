"""The section `captions`: who captions which images, at which length and price; and its data, prompts and prices."""

from __future__ import annotations

import re
from datetime import date
from decimal import Decimal
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from conf.build import Select
from conf.section import Device, Frozen, Name, Positive, Precision, Share

Tokens = Annotated[int, Field(ge=0)]
Usd = Annotated[float, Field(ge=0)]
Part = Literal["short", "medium", "long", "style", "tags", "ocr"]
STAND_IN = "utf8-bytes/4"
COMPARED = "compare."  # begins the names of the tiers that a comparison adds


class Key(Frozen):
    """Where a worker finds a secret; the secret itself never stands in a config. On Databricks the cluster sets the variable from its secret scope:
    `{{secrets/SCOPE/KEY}}`.
    """

    environment: Name


class Local(Frozen):
    """A model that workers run themselves: a folder in transformers' `-hf` layout (OpenGVLab/InternVL3-8B-hf) that every worker sees."""

    folder: str
    sha256: str  # `python -m udfs.internvl FOLDER` prints it
    device: Device = "cuda"
    precision: Precision = "bf16"
    min_tiles: Positive = 1
    max_tiles: Positive = 12  # of an image; 256 tokens each in InternVL's own models
    batch_tiles: Positive = 52  # of a batch of images
    threads: Positive = 2  # that read and cut images ahead of the model
    chunk: Positive = 128  # images that are sorted by their tiles, and whose bytes a worker holds


class Batch(Frozen):
    """How Batch mode is used: a wave is up to `jobs` files of up to `rows` requests, and ends when the service has ended all of them."""

    rows: Positive = 10_000
    megabytes: Annotated[int, Field(ge=1, le=2_000)] = 256
    jobs: Positive = 32
    poll_seconds: Annotated[float, Field(gt=0)] = 60.0
    rounds: Positive = 3  # that an image may be asked in, the first among them: what a job did not answer, or was refused, is asked again


class Captioner(Frozen):
    """One engine and how it is asked."""

    engine: Literal["gemini", "gemini-batch", "openai", "internvl", "tags"]
    model: str | None = None  # the service's name of it; internvl: the last part of its folder
    local: Local | None = None  # internvl
    batch: Batch = Batch()  # gemini-batch
    key: Key | None = None
    # openai: of the server, which may move; gemini: None is the service's own, any other is another captioner, whose answers are its own
    base_url: str | None = None
    api_version: str = "v1"
    media_resolution: Literal["low", "medium", "high"] | None = None  # gemini: tokens of an image; None: the model's own
    thinking: Literal["minimal", "low", "medium", "high"] | Annotated[int, Field(ge=0)] | None = (
        None  # gemini: a level, or tokens; None: its own
    )
    safety: Literal["off", "none", "default"] = "off"  # gemini: thresholds of the adjustable filters
    max_output_tokens: Positive = 4_096  # thoughts among them
    timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    tries: Positive = 5  # of one request that may succeed later
    repairs: Annotated[int, Field(ge=0, le=1)] = 1  # more requests after an answer that was refused
    in_flight: Positive = 64  # requests of one task
    requests_per_minute: Positive | None = None  # of the whole job; None: no limit of ours
    max_side: Positive = 1_536  # pixels of the longer side that are sent

    @model_validator(mode="after")
    def _says_what_it_needs(self) -> Captioner:
        if (self.engine == "internvl") != (self.local is not None):
            raise ValueError(
                f"engine {self.engine}: local: {'required, not given' if self.local is None else 'given, only internvl has it'}"
            )
        if self.engine not in ("tags", "internvl") and self.model is None:
            raise ValueError(f"engine {self.engine}: model: required, not given")
        if self.engine in ("gemini", "gemini-batch") and self.key is None:
            raise ValueError(f"engine {self.engine}: key: required, not given; e.g. {{environment: GEMINI_API_KEY}}")
        named = re.fullmatch(r"[\w.@/-]+", self.model or "") and ".." not in str(self.model)  # it stands in an address
        if self.engine in ("gemini", "gemini-batch") and not named:
            raise ValueError(f"model: given {self.model!r}, expected a name as the service writes it, e.g. gemini-3.8-flash")
        parts = urlsplit(self.base_url or "http://")
        if parts.scheme not in ("http", "https") or "@" in parts.netloc:  # what was given is not said: it may hold a password
            raise ValueError("base_url: expected http(s)://host[:port] and a path, without a user or password: key names where the key is")
        if self.engine == "openai" and self.base_url is None:
            raise ValueError("engine openai: base_url: required, not given; e.g. http://127.0.0.1:8000/v1")
        return self


class Tier(Frozen):
    """Images that pass all `rules` (as in `select`) and are in no earlier tier -> who captions them, and with which parts."""

    name: Name
    captioner: Name
    rules: tuple[Select.Rule, ...] = ()
    parts: tuple[Part, ...] = Field(default=("short", "medium", "long", "style", "tags", "ocr"), min_length=1)


class Captions(Frozen):
    prompt: str = "studbook-1"  # a file in conf/prompts, or the path of one
    prices: str = "prices"  # a file in conf/, or the path of one
    budget_usd: Usd = 0.0  # of all paid calls of this lake, ever; 0: no paid call is made
    # seconds: a task whose journal could not be written for so long asks no more; for one that was killed a start waits half as long again
    lease_seconds: Annotated[int, Field(ge=2)] = 60
    share: Literal["none", "near"] = "none"  # near: near-duplicates of one tier get the captions of one of them (jobs/shared_captions.py)
    tokenizer: str = STAND_IN  # a folder with a tokenizer.json (the text encoder's own), or the stand-in
    tokenizer_sha256: str | None = None
    captioners: dict[Name, Captioner] = {"tags": Captioner(engine="tags")}
    tiers: tuple[Tier, ...] = Field(default=(Tier(name="all", captioner="tags", parts=("short", "medium", "tags", "ocr")),), min_length=1)

    @field_validator("budget_usd")
    @classmethod
    def _is_of_nano_dollars(cls, usd: float) -> float:
        if (exact := Decimal(str(usd)) * 1_000_000_000) != exact.to_integral_value():
            raise ValueError(f"given {usd!r}, expected US dollars with at most 9 decimals")
        return usd

    @model_validator(mode="after")
    def _tiers_name_captioners(self) -> Captions:
        if unknown := sorted({tier.captioner for tier in self.tiers} - set(self.captioners)):
            raise ValueError(f"tiers: given the captioners {unknown}, captioners has {sorted(self.captioners)}")
        names = [tier.name for tier in self.tiers]
        if len(set(names)) != len(names):
            raise ValueError(f"tiers: names must be unique, given {names}")
        if taken := [name for name in names if name.startswith(COMPARED)]:
            raise ValueError(f"tiers: given {taken}; {COMPARED!r} begins the names of the tiers that compare_captioners adds, take others")
        if self.tokenizer != STAND_IN and self.tokenizer_sha256 is None:
            raise ValueError(f"tokenizer: needs tokenizer_sha256 (`sha256sum {self.tokenizer}/tokenizer.json`)")
        return self


class CompareCaptioners(Frozen):
    """The same images by several captioners: of those in `captioners` each captions the whole sample, beside what the tiers say."""

    captioners: tuple[
        Name, ...
    ] = ()  # of captions.captioners; each is asked for the parts of its first tier, one that is in no tier for all
    # of the sample, at most a driver's hold; None: every image, e.g. for two captioners that cost little, and a tier for what they disagree about
    images: Annotated[int, Field(gt=0, le=100_000)] | None = 500
    seed: int = 7  # the sample is a function of it and of the images' ids
    covers: Share = 0.9  # a captioner that was asked about less of the sample is not compared

    @model_validator(mode="after")
    def _each_once(self) -> CompareCaptioners:
        if len(set(self.captioners)) != len(self.captioners):
            raise ValueError(f"captioners: each once, given {list(self.captioners)}")
        return self


class PromptFile(Frozen):
    """One version of the words that captioners are asked with, as conf/prompts/NAME.yaml says it."""

    name: Name
    system: str
    content: str
    style: str
    rest: str
    notes: str
    repair: str
    banned: tuple[str, ...]
    bands: dict[Literal["short", "medium", "long", "style"], tuple[Tokens, Tokens]]
    most_composed: Positive
    most_tags: Positive
    most_ocr: Positive
    language: str = "en"
    contradictions: dict[str, tuple[str, ...]] = {}  # tag -> words that deny it

    @model_validator(mode="after")
    def _has_its_places(self) -> PromptFile:
        if "{notes}" not in self.notes or "{why}" not in self.repair:
            raise ValueError("notes needs {notes} and repair {why}: where what is known, and what was wrong, is put")
        if lacking := [name for name in ("short", "medium", "long", "style") if name not in self.bands]:
            raise ValueError(f"bands: says nothing of {lacking}")
        return self


class Price(Frozen):
    """USD for a million tokens. batch: the share of it that Batch mode costs."""

    input: Usd
    output: Usd
    batch: Annotated[float, Field(gt=0, le=1)] = 1.0


class Prices(Frozen):
    date: date
    source: str
    models: dict[str, Price]
    image_tokens: dict[str, dict[Literal["low", "medium", "high"], Tokens]]  # prefix of a model's name -> tokens of an image
