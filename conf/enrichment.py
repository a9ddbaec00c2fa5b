"""The sections of what is measured of every image: towers, detectors, scores, styles, classes, flags, deny lists."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from conf.section import Device, Frozen, Name, Positive, Precision, Share

KERNELS = Path(__file__).parents[1] / "udfs"


class Embed(Frozen):
    encoders: tuple[str, ...] = Field(min_length=1)  # files in conf/encoders, or paths to such files
    detectors: tuple[str, ...] = ()  # files in conf/detectors, or paths to such files
    device: Device
    precision: Precision = "fp32"
    engine: Literal["torch", "onnxruntime"] | None = None  # of the towers; None: onnxruntime on a CPU in fp32, else torch
    engine_cache: str | None = None  # folder of the exported graphs; None: one of this user in the machine's temporary folder
    compile: bool = False  # torch.compile of the towers (engine torch)
    batch_size: Positive = 32
    decode_threads: Positive = 2
    ahead: Positive = 64  # decoded images that may wait for the model
    verify_hash: bool = True  # compare the bytes' sha256 with the image's id; False: size and time of the object are enough
    model_threads: Positive | None = None  # CPU threads of the model in one worker; None: the cores of its task (spark.task.cpus)

    @property
    def engine_used(self) -> Literal["torch", "onnxruntime"]:
        """What runs the towers."""
        return self.engine or ("onnxruntime" if (self.device, self.precision) == ("cpu", "fp32") else "torch")

    @model_validator(mode="after")
    def _engine_can(self) -> Embed:
        if self.engine == "onnxruntime" and self.precision != "fp32":
            raise ValueError(f"engine: onnxruntime runs the towers in fp32, given precision {self.precision}; take engine torch")
        if self.engine_used == "onnxruntime" and self.compile:
            raise ValueError("compile: given with engine onnxruntime; torch.compile is for engine torch")
        return self


class Encoder(Frozen):
    """One image tower, as conf/encoders/NAME.yaml says it."""

    name: Name
    kernel: str  # udfs/tower_<kernel>.py
    width: Positive  # length of the vector
    image_size: Positive = 224
    model: str | None = None  # the library's name of the architecture
    config: dict[str, Any] = {}  # of the architecture, where its name does not say all
    pretrained: str | None = None  # the library's tag of weights, fetched from its hub
    weights: str | None = None  # or a local safetensors file ...
    sha256: str | None = None  # ... and its hash

    @model_validator(mode="after")
    def _weights_are_pinned(self) -> Encoder:
        if self.weights is not None and self.sha256 is None:
            raise ValueError(f"encoder {self.name!r}: weights need their sha256 (`sha256sum {self.weights}`)")
        if self.weights is not None and self.pretrained is not None:
            raise ValueError(f"encoder {self.name!r}: give pretrained (hub) or weights (file), not both")
        _known_kernel("tower", self.kernel, f"encoder {self.name!r}")
        return self


class Detector(Frozen):
    """One model that names what is in a picture, as conf/detectors/NAME.yaml says it."""

    name: Name
    kernel: str  # udfs/detector_<kernel>.py
    image_size: Positive | None = None  # None: as the model says
    weights: str | None = None  # a local file; None: those of the kernel's library
    sha256: str | None = None
    vocabulary: str | None = None  # the names of the model's outputs (selected_tags.csv)
    vocabulary_sha256: str | None = None
    keep: Share = (
        0.05  # probabilities below it are not stored (but ratings' and the NSFW model's); no threshold of a later stage may be lower
    )
    resize: Literal["pad-bicubic", "lanczos-pad"] = "pad-bicubic"  # of a tagger: the models' demos, or V7 with its WD tagger

    @model_validator(mode="after")
    def _files_are_pinned(self) -> Detector:
        for file, told in ((self.weights, self.sha256), (self.vocabulary, self.vocabulary_sha256)):
            if (file is None) != (told is None):
                raise ValueError(f"detector {self.name!r}: {file or 'a sha256'}: a file and its sha256 go together (`sha256sum FILE`)")
        _known_kernel("detector", self.kernel, f"detector {self.name!r}")
        return self


def _known_kernel(kind: str, kernel: str, whose: str) -> None:
    if find_spec(f"udfs.{kind}_{kernel}") is None:
        known = sorted(path.stem.removeprefix(f"{kind}_") for path in KERNELS.glob(f"{kind}_*.py"))
        raise ValueError(f"{whose}: kernel: given {kernel!r}, allowed {known}")


class Score(Frozen):
    model: Name = "aesthetic-scorer"
    alias: str = "champion"
    bins: Name = "v7"  # raw score -> score_0..9: V7's ten fixed bins, or a registered calibration's model (jobs/calibrate_scores.py) ...
    bins_alias: str = "champion"  # ... and its version


class Calibrate(Frozen):
    """Bins of the raw score that are fitted, per domain, as a registered version."""

    model: Name = "score-bins"
    method: Literal["quantile", "isotonic"] = (
        "quantile"  # a tenth of the images a bin; or V7's bins of what the targets say that a score is worth
    )
    domain: Literal["none", "source", "class"] = "source"  # of an image: the same for all, its first source, or its class by `classify`
    label: Name = "style"  # the kind of the class, where the domain is one; also of the report's tables by class
    fewest: Positive = 200  # images of a domain that has bins of its own; smaller ones share those of all
    targets: Name = "degradation"  # the kind of the labels that isotonic fits to
    sample: Positive = 200_000  # labelled views that isotonic takes


class Styles(Frozen):
    """Clusters over stored vectors: `fit_styles`, `assign_styles`, `add_style`, `style_sheets`."""

    model: Name = "style-centres"  # in the registry
    alias: str = "champion"
    encoder: str | None = None  # one of embed.encoders; None: the build's `encoder`
    clusters: Annotated[int, Field(ge=2)] = 2048
    over_cluster: Positive | None = None  # fit so many centres first and merge the nearest until `clusters` are left
    sample: Positive = 524_288  # vectors that are clustered: 256 a centre
    iterations: Positive = 25
    seed: int = 7
    stability_runs: Positive = 3  # other seeds, and as many 80 % resamples
    none_quantile: Annotated[float, Field(gt=0.5, le=1)] = 0.999  # of the sample's distances: beyond it an image has no style
    block: str | None = None  # a file of cluster ids, one a line, that are not to be used
    policy: Literal["states", "v7"] = "states"  # v7: the nearest allowed centre, whatever the distance, and nothing said
    sheets: str | None = None  # folder of contact sheets; None: styles/ beside the report
    images_per_sheet: Annotated[int, Field(gt=0, le=24)] = 6  # of each kind: nearest, median, farthest, margin

    @model_validator(mode="after")
    def _merging_leaves_fewer(self) -> Styles:
        if self.over_cluster is not None and self.over_cluster <= self.clusters:
            raise ValueError(f"over_cluster: given {self.over_cluster}, expected more than clusters ({self.clusters}), or none")
        return self


CLASS = r"^[A-Za-z0-9_ .-]{1,60}$"  # the letters of MLflow's names
OTHER = "other"  # no class: what a classifier says of an image when it is not sure
Class = Annotated[str, Field(pattern=CLASS)]


class ClassLabels(Frozen):
    """Labels of a kind (`style`, `ai_generated`, ...) from what sources say: a word among an image's tags, its source, or a file."""

    kind: Name
    rater: Name  # who says so: goes into the table
    tags: dict[str, Class] = {}  # tag -> class
    sources: dict[str, Class] = {}  # name of a source -> class
    file: str | None = None  # .jsonl or .csv, an image a row, with
    image_field: str = "image"  # ... its id, or its key or address as a source gave it
    class_field: str = "class"
    origin_field: str | None = None  # ... the collection that it is from: what a class may be confounded with; None: its source

    @model_validator(mode="after")
    def _says_something(self) -> ClassLabels:
        if not (self.tags or self.sources or self.file):
            raise ValueError(f"label_classes {self.kind!r}: give tags, sources or file")
        if OTHER in {*self.tags.values(), *self.sources.values()}:
            raise ValueError(f"label_classes {self.kind!r}: no class may be named {OTHER!r}, which means that an image is of none")
        return self


class Classify(Frozen):
    """A registered classifier of stored vectors, whose classes are stored for every image."""

    label: Name  # the kind of labels that it was trained on
    model: Name
    alias: str = "champion"


class Flags(Frozen):
    """What of the detectors' evidence counts. Thresholds are over stored probabilities: another one recomputes no model."""

    general: Share = 0.35  # V7: wd-swinv2-tagger-v3
    character: Share = 0.85
    thresholds: dict[str, Share] = {}  # detector -> one threshold for all of its tags (V7's e621 tagger: .5)
    ratings: dict[Literal["general", "sensitive", "questionable", "explicit"], Literal["safe", "questionable", "explicit"]] = {
        "general": "safe",
        "sensitive": "safe",
        "questionable": "questionable",
        "explicit": "explicit",
    }
    photo_classes: tuple[str, ...] = ("photo",)  # classes of `classify` with label `style` that are photographs; the rest are drawings
    # a photograph, or a picture of unknown domain, at or above it is explicit by the photo model; half of it: questionable. Yahoo's own word
    photo_nsfw: Share = 0.8
    # the model was trained on photographs. On the sample, 0 of 389 drawings reach .9 and 1 reaches half of it [make nothing of recall: the
    # sample has nothing to find]
    drawing_nsfw: Share = 0.9
    ai_detected: Share = 0.9  # probability of the class `ai` by the classifier of `ai_generated`
    text_confidence: Share = 0.5  # a text region counts from here
    edge: Annotated[float, Field(ge=0, le=0.5)] = 0.12  # text whose middle is within this share of a side from the border is at the edge
    repeated: Annotated[int, Field(ge=2)] = 5  # images that show the same string at an edge before it is taken for a watermark
    recount: Positive = 1  # raise it to count repeated strings over all images anew: rows keep what was known when they were made

    @model_validator(mode="after")
    def _every_rating_is_mapped(self) -> Flags:
        if lacking := [name for name in ("general", "sensitive", "questionable", "explicit") if name not in self.ratings]:
            raise ValueError(
                f"flags.ratings: says nothing of {lacking}; map each of a tagger's four ratings to safe, questionable or explicit"
            )
        return self


class Deny(Frozen):
    """Hashes of images that must never enter: checked before anything of an image is written. A list that is missing or old stops the job."""

    class List(Frozen):
        name: Name
        path: str
        kind: Literal["sha256", "phash"]
        sha256: str | None = None  # of the file; None: not pinned
        max_age_days: Annotated[float, Field(gt=0)] | None = None  # by the date in its first line; None: never too old

    lists: tuple[List, ...] = ()
    distance: Annotated[int, Field(ge=0, le=96)] = 46  # bits of 256 at which a perceptual hash counts as the same picture
    guess: bool = (
        True  # hash a picture also as if borders were taken off and cut edges put back (udfs/picture_frames.py); False: it and its mirror
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> Deny:
        names = [one.name for one in self.lists]
        if len(set(names)) != len(names):
            raise ValueError(f"lists: names must be unique, given {names}")
        return self
