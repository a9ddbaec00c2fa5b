"""An images export and settings -> the Task of teaching InternVL captions: what the one loop needs to know of it.

A row: its request is rendered as inference renders it (training/captioner_lesson.py), its picture tiled and its prompt tokenized by the code that
serves the model (udfs/internvl_prompt.py); behind them stand the tokens of the teacher's answer and the end mark. The row's loss is the mean
cross-entropy of these tokens alone: an image counts as another, however long its answer.

Rows of a micro-batch are padded on the right. Nothing is generated from their ends, a token sees what stands before it only, so that no row's numbers
depend on those beside it, positions begin at 0 as they do in serving, and no token of the padding is left without one to look at, which is a
softmax over nothing. (Serving pads on the left: there the ends must stand together.) Logits are made of the answers' tokens alone.

A row that is too long, or that no teacher has captioned, is left out: it weighs nothing (a step's mean is over all of its rows, these among them),
`too_long` and `no_answer` are the shares of such rows, and the images are named in the result. It stands in its batch as one blank tile, so that
every rank makes equal passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.build import Limits
from conf.loops import TrainCaptioner
from conf.section import Mistake
from training import captioner_adapters, captioner_cost, captioner_evaluation, feed, process_group
from training.answer_loss import answer_losses
from training.captioner_evaluation import Answering, Measured
from training.captioner_lesson import Course, Lesson, lesson
from training.captioner_rows import TOO_LONG, Length, Maker, Row
from training.exports import Export
from udfs import internvl, internvl_prompt
from udfs.ahead import ahead
from udfs.caption_answer import Rules
from udfs.internvl_prompt import Tiling
from udfs.token_count import Counter

if TYPE_CHECKING:
    import torch

TRAIN, HELD_OUT = "train", "held_out"
METRIC = "held_out_loss"
READ = ("image_id", "bytes", "captions")  # columns that a row is made from
NO_ANSWER = "no_answer"
LEFT_OUT = (TOO_LONG, NO_ANSWER)
NAMED = 1_000  # images of each of LEFT_OUT that a rank keeps by name


class FitCaptioner:
    """Task of the loop (training/task.py). `ranks`: where this process stands; every rank makes one."""

    name = "train captioner"
    metric = METRIC
    larger_is_better = False

    def __init__(
        self,
        settings: TrainCaptioner,
        export: Export,
        limits: Limits,
        course: Course,
        rules: Rules,
        count: Counter,
        ranks: process_group.Ranks,
    ) -> None:
        self.settings, self.export, self.course, self.ranks = settings, export, course, ranks
        self.folder = folder_of(settings)
        self.reader = internvl_prompt.load_reader(self.folder)
        self.maker = Maker(self.reader, limits.model_dump(), Tiling(max_tiles=settings.max_tiles), settings.most_tokens)
        self.plan = plan_rows(settings, export, ranks)
        self.device: torch.device | str = "cpu"
        self.answering = Answering(rules, count.count, course)
        self.measured: Measured | None = None  # by the last evaluation
        self.base: Measured | None = None  # of the model before the training
        self.left_out: dict[str, set[str]] = {code: set() for code in LEFT_OUT}
        self.held_out, self.lessons, self.lengths = self._usable()

    @property
    def mean_row(self) -> tuple[float, float, float]:
        """Tokens, tiles and answer tokens of a held-out row on average."""
        tokens, tiles, answer = np.mean(self.lengths, axis=0).tolist()
        return tokens, tiles, answer

    @property
    def train_flops(self) -> float:
        return captioner_cost.step_flops(self.folder, self.settings.lora, *self.mean_row)

    def build(self) -> torch.nn.Module:
        try:
            module: Any = internvl.load_module(self.folder, self.settings.precision)
        except ValueError as error:
            raise Mistake(f"train_captioner.pretrained: {error}") from None
        ends, taught = internvl.ends_of(internvl.Model(module, self.reader)), self.reader.processor.tokenizer.eos_token_id
        if taught not in ends:
            raise Mistake(
                f"train_captioner.pretrained: {self.folder}: its tokenizer ends a text by the token {taught}, its generation_config.json an answer by "
                f"{sorted(ends)}: it would be taught an end that does not end; mend eos_token_id there"
            )
        module = captioner_adapters.add(module, self.settings.lora)
        if self.settings.checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        built: torch.nn.Module = module
        return built

    def start(self, device: torch.device | str) -> None:
        self.device = device

    def prepare(self, rows: feed.Rows, epoch: int) -> feed.Arrays:
        """-> the arrays of Maker.arrays, and too_long and no_answer float32 [n] (0 or 1)."""
        made: list[Row | None] = []
        codes: dict[str, list[float]] = {code: [] for code in LEFT_OUT}
        for data, image_id, told in zip(rows["bytes"], rows["image_id"], rows["captions"], strict=True):
            one = lesson(self.course, told, image_id, self.settings.seed, epoch)
            row = self.maker.row(one, data, image_id) if one is not None else NO_ANSWER
            for code in LEFT_OUT:
                codes[code].append(float(row == code))
            if isinstance(row, str):
                self._name(row, image_id)
            made.append(row if isinstance(row, Row) else None)
        return self.maker.arrays(made) | {code: np.array(found, np.float32) for code, found in codes.items()}

    def losses(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        summed = answer_losses(model, inputs)
        return {
            "loss": summed / inputs["answer_tokens"].clamp(min=1.0),
            **{name: inputs[name] for name in ("answer_tokens", *LEFT_OUT)},
        }

    def evaluate(self, model: Any) -> dict[str, float]:
        if self.base is None:
            with captioner_adapters.off(model):
                self.base = captioner_evaluation.measure(self, model)
        self.measured = captioner_evaluation.measure(self, model)
        for found in process_group.collect({code: sorted(images) for code, images in self.left_out.items()}):
            for code, images in found.items():
                self.left_out[code] |= set(images)
        before = {f"base_{name}": value for name, value in self.base.metrics.items()}
        return {**self.measured.metrics, **before}

    def held_out_rows(self, places: list[int]) -> Iterator[Row]:
        """Places among the usable held-out rows -> those, prepared in threads ahead of whoever takes them."""

        def prepare(place: int) -> Row:
            row = self.maker.row(self.lessons[place], self.held_out["bytes"][place], self.held_out["image_id"][place])
            assert isinstance(row, Row)
            return row

        yield from ahead(prepare, places, self.settings.feed_threads, 2 * self.settings.feed_threads)

    def _usable(self) -> tuple[feed.Rows, list[Lesson], list[Length]]:
        """-> the held-out rows that can be measured, their lessons (the same for any seed), and tokens, tiles and answer tokens of each."""
        rows = feed.read_bucket(self.export, HELD_OUT, READ, self.settings.held_out)
        kept: list[int] = []
        lessons: list[Lesson] = []
        lengths: list[Length] = []
        lacking = dict.fromkeys(LEFT_OUT, 0)
        for place, (data, image_id, told) in enumerate(zip(*(rows[name] for name in ("bytes", "image_id", "captions")), strict=True)):
            one = lesson(self.course, told, image_id, 0, 0)
            if one is None:
                lacking[NO_ANSWER] += 1
                continue
            length = self.maker.length(one, data, image_id)
            if length.tokens > self.settings.most_tokens:
                lacking[TOO_LONG] += 1
                continue
            kept.append(place)
            lessons.append(one)
            lengths.append(length)
        if not kept:
            raise Mistake(
                f"{self.name}: of {feed.count(rows)} held-out images {lacking[NO_ANSWER]} have no caption by {list(self.course.teachers)} "
                f"(train_captioner.teachers) as captions.prompt {self.course.prompt.name} asks for it, and {lacking[TOO_LONG]} are longer than "
                f"most_tokens ({self.settings.most_tokens}): nothing to measure on"
            )
        if any(lacking.values()) and self.ranks.rank == 0:
            told = ", ".join(f"{many} {code}" for code, many in lacking.items() if many)
            print(f"{self.name}: of {feed.count(rows)} held-out images {feed.count(rows) - len(kept)} are left out: {told}", flush=True)
        return {name: column[kept] for name, column in rows.items()}, lessons, lengths

    def _name(self, code: str, image_id: bytes) -> None:
        if len(self.left_out[code]) < NAMED:
            self.left_out[code].add(image_id.hex())


def plan_rows(settings: TrainCaptioner, export: Export, ranks: process_group.Ranks) -> feed.Plan:
    """The rows of the first epoch."""
    cut = (settings.rows_per_step, settings.micro_batch, ranks.rank, ranks.world)
    return feed.Plan(export, TRAIN, settings.seed, 0, *cut, apart=HELD_OUT)


def folder_of(settings: TrainCaptioner) -> str:
    """-> the folder of the model that is taught. Raises Mistake when none is named, or it is no InternVL in the -hf layout."""
    if settings.pretrained is None:
        raise Mistake("train_captioner.pretrained: required, not given; give a local folder such as OpenGVLab/InternVL3-8B-hf")
    try:
        internvl.check(settings.pretrained)
    except ValueError as error:
        raise Mistake(f"train_captioner.pretrained: {error}") from None
    return settings.pretrained
