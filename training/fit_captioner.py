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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from conf.build import Limits
from conf.loops import TrainCaptioner
from conf.section import Mistake
from training import captioner_adapters, captioner_cost, captioner_evaluation, feed, process_group
from training.answer_loss import IGNORED, answer_losses
from training.captioner_evaluation import Answering, Measured
from training.captioner_lesson import Course, Lesson, lesson
from training.exports import Export
from udfs import header, internvl, internvl_prompt
from udfs.ahead import ahead
from udfs.caption_answer import Rules
from udfs.internvl_prompt import Prepared, Tiling
from udfs.reject import Reject
from udfs.token_count import Counter

if TYPE_CHECKING:
    import torch

TRAIN, HELD_OUT = "train", "held_out"
METRIC = "held_out_loss"
READ = ("image_id", "bytes", "captions")  # columns that a row is made from

TOO_LONG, NO_ANSWER = LEFT_OUT = ("too_long", "no_answer")
NAMED = 1_000  # images of each of LEFT_OUT that a rank keeps by name


class Row(NamedTuple):
    """prompt: with its picture; answer: its tokens, the end mark among them."""

    prompt: Prepared
    answer: list[int]


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
        self.limits, self.tiling = limits.model_dump(), Tiling(max_tiles=settings.max_tiles)
        self.folder = folder_of(settings)
        self.reader = internvl_prompt.load_reader(self.folder)
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
        module: Any = internvl.load_module(self.folder, self.settings.precision)
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
        """-> tokens, mask and labels int64 [n, longest], pixels float32 [tiles of all, 3, side, side]; weight, too_long, no_answer and answer_tokens
        float32 [n].
        """
        made: list[Row | None] = []
        codes: dict[str, list[float]] = {code: [] for code in LEFT_OUT}
        for data, image_id, told in zip(rows["bytes"], rows["image_id"], rows["captions"], strict=True):
            one = lesson(self.course, told, image_id, self.settings.seed, epoch)
            row = self.row(one, data, image_id) if one is not None else NO_ANSWER
            for code in LEFT_OUT:
                codes[code].append(float(row == code))
            if isinstance(row, str):
                self._name(row, image_id)
            made.append(row if isinstance(row, Row) else None)
        return self.arrays(made) | {code: np.array(found, np.float32) for code, found in codes.items()}

    def row(self, one: Lesson, data: bytes, image_id: bytes) -> Row | str:
        """A lesson and the picture's file -> the row, or TOO_LONG: known before the picture is decoded."""
        tokens, answer, _ = self._measure(one, data, image_id)
        if tokens > self.settings.most_tokens:
            return TOO_LONG
        try:
            chat = internvl_prompt.write_chat(self.reader, one.request)
            return Row(internvl_prompt.prepare(self.reader, 0, chat, data, self.limits, self.tiling), answer)
        except Reject as reject:
            raise self._broken(image_id, reject) from None

    def arrays(self, rows: list[Row | None]) -> feed.Arrays:
        """Rows (None: left out) -> arrays of `prepare`."""
        blank = self._blank()
        whole = [blank if row is None else row for row in rows]
        width = max(len(row.prompt.tokens) + len(row.answer) for row in whole)
        tokens = np.full((len(whole), width), self.reader.processor.tokenizer.pad_token_id or 0, np.int64)
        mask, labels = np.zeros_like(tokens), np.full_like(tokens, IGNORED)
        for number, row in enumerate(whole):
            begin = len(row.prompt.tokens)
            end = begin + len(row.answer)
            tokens[number, :begin], tokens[number, begin:end] = row.prompt.tokens.numpy(), row.answer
            labels[number, begin:end] = row.answer
            mask[number, :end] = 1
        weight = np.array([row is not None for row in rows], np.float32)
        pixels = np.concatenate([row.prompt.pixels.numpy() for row in whole]).astype(np.float32)
        counts = (labels != IGNORED).sum(1).astype(np.float32)
        return {"tokens": tokens, "mask": mask, "labels": labels, "pixels": pixels, "weight": weight, "answer_tokens": counts}

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
            row = self.row(self.lessons[place], self.held_out["bytes"][place], self.held_out["image_id"][place])
            assert isinstance(row, Row)
            return row

        yield from ahead(prepare, places, self.settings.feed_threads, 2 * self.settings.feed_threads)

    def _usable(self) -> tuple[feed.Rows, list[Lesson], list[tuple[int, int, int]]]:
        """-> the held-out rows that can be measured, their lessons (the same for any seed), and tokens, tiles and answer tokens of each."""
        rows = feed.read_bucket(self.export, HELD_OUT, READ, self.settings.held_out)
        kept: list[int] = []
        lessons: list[Lesson] = []
        lengths: list[tuple[int, int, int]] = []
        lacking = dict.fromkeys(LEFT_OUT, 0)
        for place, (data, image_id, told) in enumerate(zip(*(rows[name] for name in ("bytes", "image_id", "captions")), strict=True)):
            one = lesson(self.course, told, image_id, 0, 0)
            if one is None:
                lacking[NO_ANSWER] += 1
                continue
            tokens, answer, tiles = self._measure(one, data, image_id)
            if tokens > self.settings.most_tokens:
                lacking[TOO_LONG] += 1
                continue
            kept.append(place)
            lessons.append(one)
            lengths.append((tokens, tiles, len(answer)))
        if not kept:
            raise Mistake(
                f"{self.name}: of {feed.count(rows)} held-out images {lacking[NO_ANSWER]} have no caption by {list(self.course.teachers)} "
                f"(train_captioner.teachers) and {lacking[TOO_LONG]} are longer than most_tokens ({self.settings.most_tokens}): nothing to measure on"
            )
        if any(lacking.values()) and self.ranks.rank == 0:
            told = ", ".join(f"{many} {code}" for code, many in lacking.items() if many)
            print(f"{self.name}: of {feed.count(rows)} held-out images {feed.count(rows) - len(kept)} are left out: {told}", flush=True)
        return {name: column[kept] for name, column in rows.items()}, lessons, lengths

    def _measure(self, one: Lesson, data: bytes, image_id: bytes) -> tuple[int, list[int], int]:
        """-> tokens of the whole row, the answer's, and the picture's tiles."""
        try:
            size = header.upright_size(header.layout_of(data, self.limits))
        except Reject as reject:
            raise self._broken(image_id, reject) from None
        tiles = internvl_prompt.count_tiles(self.reader.processor, size, self.tiling)
        answer = internvl_prompt.answer_tokens(self.reader, internvl_prompt.write_answer(self.reader, one.parts))
        chat = internvl_prompt.write_chat(self.reader, one.request)
        return internvl_prompt.count_tokens(self.reader, chat, tiles) + len(answer), answer, tiles

    def _blank(self) -> Row:
        import torch

        processor = self.reader.processor
        size = processor.image_processor.size
        tokens = torch.full((processor.image_seq_length,), processor.image_token_id)
        return Row(Prepared(0, tokens, torch.zeros(1, 3, size["height"], size["width"])), [])

    def _name(self, code: str, image_id: bytes) -> None:
        if len(self.left_out[code]) < NAMED:
            self.left_out[code].add(image_id.hex())

    def _broken(self, image_id: bytes, reject: Reject) -> Mistake:
        return Mistake(
            f"image {image_id.hex()}: {reject.code}: {reject.detail}; it was exported, so it decoded once: look at limits, or select and export again"
        )


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
