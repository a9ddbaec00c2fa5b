"""A lesson and its picture's file -> a row of tokens and pixels, by the code that serves the model; and rows -> the arrays of a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from conf.section import Mistake
from training import feed
from training.answer_loss import IGNORED
from training.captioner_lesson import Lesson
from udfs import header, internvl_prompt
from udfs.internvl_prompt import Prepared, Reader, Tiling
from udfs.reject import Reject

TOO_LONG = "too_long"  # the code of a row that is left out


class Row(NamedTuple):
    """prompt: with its picture; answer: its tokens, the end mark among them."""

    prompt: Prepared
    answer: list[int]


class Length(NamedTuple):
    """tokens: of the whole row; tiles: of its picture; answer: tokens of that."""

    tokens: int
    tiles: int
    answer: int


class Maker(NamedTuple):
    """limits: conf.build.Limits as a dict; most: tokens of a row."""

    reader: Reader
    limits: Mapping[str, Any]
    tiling: Tiling
    most: int

    def length(self, one: Lesson, data: bytes, image_id: bytes) -> Length:
        """Without decoding the picture. Raises Mistake as `row`."""
        return self._look(one, data, image_id)[0]

    def row(self, one: Lesson, data: bytes, image_id: bytes) -> Row | str:
        """-> the row, or TOO_LONG. Raises Mistake with the image and the reject's code: a frozen export holds what decoded."""
        length, chat, answer = self._look(one, data, image_id)
        if length.tokens > self.most:
            return TOO_LONG
        try:
            return Row(internvl_prompt.prepare(self.reader, 0, chat, data, self.limits, self.tiling), answer)
        except Reject as reject:
            raise _broken(image_id, reject) from None

    def arrays(self, rows: Sequence[Row | None]) -> feed.Arrays:
        """Rows (None: one that is left out) -> tokens, mask and labels int64 [n, longest], pixels float32 [tiles of all, 3, side, side], and float32 [n]:
        weight (0 for None) and answer_tokens.
        """
        whole = [self._blank() if row is None else row for row in rows]
        width = max(len(row.prompt.tokens) + len(row.answer) for row in whole)
        tokens = np.full((len(whole), width), self.reader.processor.tokenizer.pad_token_id or 0, np.int64)
        mask, labels = np.zeros_like(tokens), np.full_like(tokens, IGNORED)
        for number, row in enumerate(whole):
            begin = len(row.prompt.tokens)
            end = begin + len(row.answer)
            tokens[number, :begin], tokens[number, begin:end] = row.prompt.tokens.numpy(), row.answer
            labels[number, begin:end] = row.answer
            mask[number, :end] = 1
        pixels = np.concatenate([row.prompt.pixels.numpy() for row in whole]).astype(np.float32)
        weight = np.array([row is not None for row in rows], np.float32)
        counts = (labels != IGNORED).sum(1).astype(np.float32)
        return {"tokens": tokens, "mask": mask, "labels": labels, "pixels": pixels, "weight": weight, "answer_tokens": counts}

    def _look(self, one: Lesson, data: bytes, image_id: bytes) -> tuple[Length, str, list[int]]:
        """-> its length, the chat before the answer, and the answer's tokens."""
        try:
            size = header.upright_size(header.layout_of(data, self.limits))
        except Reject as reject:
            raise _broken(image_id, reject) from None
        tiles = internvl_prompt.count_tiles(self.reader.processor, size, self.tiling)
        chat = internvl_prompt.write_chat(self.reader, one.request)
        answer = internvl_prompt.answer_tokens(self.reader, internvl_prompt.write_answer(self.reader, one.parts))
        return Length(internvl_prompt.count_tokens(self.reader, chat, tiles) + len(answer), tiles, len(answer)), chat, answer

    def _blank(self) -> Row:
        """One empty tile and nothing else."""
        import torch

        processor = self.reader.processor
        size = processor.image_processor.size
        tokens = torch.full((processor.image_seq_length,), processor.image_token_id)
        return Row(Prepared(0, tokens, torch.zeros(1, 3, size["height"], size["width"])), [])


def _broken(image_id: bytes, reject: Reject) -> Mistake:
    return Mistake(
        f"image {image_id.hex()}: {reject.code}: {reject.detail}; it was exported, so it decoded once: look at limits, or select and export again"
    )
