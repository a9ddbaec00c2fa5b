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
    model_threads: Positive | None = None  # CPU threads of the model in one worker; None: the library's own choice


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
    keep: Share = 0.05  # probabilities below it are not stored; no threshold of a later stage may be lower

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
    method: Literal["quantile", "isotonic"] = "quantile"
    domain: Literal["none", "source", "class"] = "source"  # of an image: the same for all, its first source, or its class by `classify`
    label: Name = "style"  # of the class, where the domain is one
    fewest: Positive = 200  # images of a domain that has bins of its own; smaller ones share those of all


class Styles(Frozen):
    """Clusters over stored vectors: `fit_styles`, `assign_styles`, `add_style`."""

    model: Name = "style-centres"  # in the registry
    alias: str = "champion"
    encoder: str | None = None  # one of embed.encoders; None: the build's `encoder`
    clusters: Positive = 2048
    over_cluster: Positive | None = None  # fit so many centres first and merge the nearest until `clusters` are left
    sample: Positive = 524_288  # vectors that are clustered: 256 a centre
    iterations: Positive = 25
    seed: int = 7
    stability_runs: Positive = 3  # other seeds, and as many 80 % resamples
    none_quantile: Annotated[float, Field(gt=0.5, le=1)] = 0.999  # of the sample's distances: beyond it an image has no style
    block: str | None = None  # a file of cluster ids, one a line, that are not to be used
    policy: Literal["states", "v7"] = "states"  # v7: the nearest allowed centre, whatever the distance, and nothing said
    sheets: str | None = None  # folder of contact sheets; None: styles/ beside the report
    images_per_sheet: Positive = 6  # of each kind: nearest, median, farthest, margin


class ClassLabels(Frozen):
    """Labels of a kind (`style`, `ai_generated`, ...) from what sources say: a word among an image's tags, or a file."""

    kind: Name
    rater: Name  # who says so: goes into the table
    tags: dict[str, str] = {}  # tag -> class
    sources: dict[str, str] = {}  # name of a source -> class
    file: str | None = None  # .jsonl or .csv with `image` (id, key or address) and `class`

    @model_validator(mode="after")
    def _says_something(self) -> ClassLabels:
        if not (self.tags or self.sources or self.file):
            raise ValueError(f"label_classes {self.kind!r}: give tags, sources or file")
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
    photo_nsfw: Share = 0.8  # a photograph at or above it is explicit by the photo model; half of it: questionable
    drawing_nsfw: Share = 0.98  # models trained on photographs misfire on drawings
    ai_detected: Share = 0.9  # probability of the class `ai` by the classifier of `ai_generated`
    text_confidence: Share = 0.5  # a text region counts from here
    edge: Share = 0.12  # a text region within this share of a side from the border is at the edge
    repeated: Positive = 5  # images that show the same string at an edge before it is taken for a watermark


class Deny(Frozen):
    """Hashes of images that must never enter: checked before anything of an image is written. A list that is missing or old stops the job."""

    class List(Frozen):
        name: Name
        path: str
        kind: Literal["sha256", "phash"]
        sha256: str | None = None  # of the file; None: not pinned
        max_age_days: Annotated[float, Field(gt=0)] | None = None  # by the date in its first line; None: never too old

    lists: tuple[List, ...] = ()
    distance: Annotated[int, Field(ge=0, le=128)] = 26  # bits of 256 at which a perceptual hash counts as the same picture
