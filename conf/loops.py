"""The sections that say how a model is fitted, one a trainer."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from conf.captions import Part
from conf.section import Device, Frozen, Name, Positive, Precision, Share


class Loop(Frozen):
    """How one model is fitted. What stands in RUN_ONLY says how it is run, on what and how safely, the rest what is trained (`identity`)."""

    RUN_ONLY: ClassVar[frozenset[str]] = frozenset(
        {"ranks", "checkpointing", "device", "zero_stage", "micro_batch", "feed_threads", "checkpoint_every", "keep", "keep_every"}
        | {"explosion", "say_every"}
    )

    model: Name  # in the registry
    seed: int = 7
    epochs: Positive
    rows_per_step: Positive  # of one optimizer step, over all ranks and micro-batches: the same at any world size
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    clip_norm: Annotated[float, Field(gt=0)] = 1.0  # largest norm of a step's gradient
    warm_up: Share = 0.05  # share of the steps over which the learning rate rises
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # what it does after that; cosine and linear end at 0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None  # of the weights that are evaluated and exported; None: the last ones
    evaluations: Positive = 4  # over the whole training, evenly spread, the end among them
    patience: Positive | None = None  # stop after so many evaluations without a better one
    explosion: Annotated[float, Field(gt=1)] = 20.0  # stop when the loss is so many times its median of before
    precision: Precision = "fp32"
    ranks: Positive = 1
    device: Device = "cpu"
    zero_stage: Literal[0, 1, 2, 3] = 1
    micro_batch: Positive  # rows that a rank takes through the model at once
    feed_threads: Positive = 2
    checkpoint_every: Positive = 1_000  # steps
    keep: Positive = 2  # newest checkpoints that stay ...
    keep_every: Positive | None = None  # ... and those at a multiple of so many steps
    say_every: Annotated[float, Field(gt=0)] = 3.0  # seconds between two lines of progress

    def identity(self) -> dict[str, Any]:
        """What is trained, as plain JSON: a training may go on under other settings of RUN_ONLY, and is another one under others of these."""
        return self.model_dump(mode="json", exclude=set(self.RUN_ONLY))

    @model_validator(mode="after")
    def _can_be_run(self) -> Loop:
        if self.rows_per_step % (self.micro_batch * self.ranks):
            raise ValueError(
                f"rows_per_step: given {self.rows_per_step}, expected a multiple of micro_batch x ranks = {self.micro_batch} x {self.ranks}"
            )
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError(
                "zero_stage 0 with bf16: DeepSpeed keeps no fp32 weights there that can be averaged and exported; set zero_stage 1, which does the same work"
            )
        return self


class TrainScorer(Loop):
    RUN_ONLY: ClassVar[frozenset[str]] = Loop.RUN_ONLY - {"micro_batch"}  # a row is ranked against the others of its micro-batch

    model: Name = "aesthetic-scorer"
    epochs: Positive = 40
    rows_per_step: Positive = 64
    micro_batch: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    ranking_weight: Annotated[float, Field(ge=0)] = 1.0  # of the pairwise hinge beside the squared error


class TrainClassifier(Loop):
    """A classifier of stored vectors: style, AI-generated or not, or whatever the labels of a kind say."""

    model: Name = "style-classifier"
    label: Name = "style"  # the kind of labels
    encoder: str | None = None  # whose vectors; one of embed.encoders; None: the build's `encoder`
    epochs: Positive = 30
    rows_per_step: Positive = 64
    micro_batch: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    hidden: Positive | None = None  # units of a hidden layer; None: a linear classifier
    balance: bool = True  # weigh rows so that every class counts the same
    calibration: Annotated[float, Field(gt=0, lt=1)] = (
        0.2  # share of the images that are not held out which fit the temperature, not the weights
    )
    other_below: Share = 0.5  # a calibrated probability below it is no class: `other`


class TrainDiffusion(Loop):
    """An image model of the AuraFlow class. `pretrained` is a local folder in diffusers' layout."""

    class Lora(Frozen):
        rank: Positive = 16
        alpha: Positive = 16
        layers: tuple[str, ...] = Field(default=("to_q", "to_k", "to_v", "to_out.0"), min_length=1)  # linear layers whose names end so

    model: Name = "image-model"
    epochs: Positive = 1
    rows_per_step: Positive = 256
    micro_batch: Positive = 4
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = 0.9999
    pretrained: str | None = None  # transformer/, vae/, text_encoder/, tokenizer/; None: the tiny random model, for tests
    lora: Lora | None = None  # None: all weights of the transformer
    checkpointing: bool = False  # compute activations twice instead of keeping them: less memory, a third more FLOPs
    image_size: Positive = 512  # pixels of a side; a multiple of 16, at most 1536
    text_length: Positive = 768  # tokens, padded to it in training and sampling: padding is attended
    no_text: Share = 0.1  # share of the rows that are trained without a caption, for guidance
    captions: dict[
        str, Annotated[float, Field(gt=0)]
    ] = {}  # kind of caption -> how often it is taken beside the others; {}: all texts alike
    # v7: one prompt in V7's order; varied: another length, order and choice of tags, score, rating and style in each epoch
    # (udfs/compose_prompt.py); None: one of the texts as it is, by `captions`
    mix: Literal["v7", "varied"] | None = None
    times: Literal["uniform", "logit_normal"] = "logit_normal"  # how t is drawn (0 the image, 1 the noise); logit_normal as for AuraFlow
    time_shift: Annotated[float, Field(gt=0)] = 1.0  # of the t that are drawn; AuraFlow samples with 1.73
    held_out: Positive = 64  # rows of the bucket held_out for the loss by t

    @model_validator(mode="after")
    def _picture_is_on_the_grid(self) -> TrainDiffusion:
        if self.image_size % 16 or self.image_size > 1536:
            raise ValueError(f"image_size: given {self.image_size}, expected a multiple of 16 up to 1536 (96 x 96 patches of 16 pixels)")
        if self.mix is not None and self.captions:
            raise ValueError(f"captions: given {dict(self.captions)} beside mix {self.mix}, which says itself how often each kind is taken")
        return self


class TrainCaptioner(Loop):
    """InternVL on the captions that others gave, by adapters. `pretrained` is a local folder of transformers' layout, such as InternVL3-8B-hf."""

    class Lora(Frozen):
        rank: Positive = 16
        alpha: Positive = 32
        layers: tuple[str, ...] = Field(  # linear layers whose names end so ...
            default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
        )
        within: tuple[Literal["language_model", "vision_tower", "multi_modal_projector"], ...] = Field(  # ... in these parts of the model
            default=("language_model",), min_length=1
        )

    model: Name = "captioner"
    epochs: Positive = 1
    rows_per_step: Positive = 64
    micro_batch: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    pretrained: str | None = None
    lora: Lora = Lora()
    checkpointing: bool = False  # compute activations twice instead of keeping them: less memory, a third more FLOPs
    # whose captions: how their fingerprint (engine:model:prompt:digest) begins, the first preferred. openai:MODEL by name: it may be this model, served
    teachers: tuple[str, ...] = Field(default=("gemini",), min_length=1)
    parts: tuple[Part, ...] = Field(default=("short", "medium", "long", "style", "tags", "ocr"), min_length=1)  # of an answer
    notes: Share = 0.5  # share of the rows whose request tells tags and alt text, where there are any
    max_tiles: Positive = 12  # of a picture, each 256 tokens; and a small one of the whole beside more than one
    most_tokens: Positive = 8_192  # of prompt, picture and answer; a longer row is left out and counted
    held_out: Positive = 64  # rows of the bucket held_out for the loss ...
    generated: Annotated[int, Field(ge=0)] = 16  # ... and of them for whole answers
    most_output: Positive = 1_024  # tokens of such an answer
