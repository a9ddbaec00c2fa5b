"""A captioner on held-out images -> its loss an answer token, and what its own whole answers are worth.

    held_out_loss      cross-entropy a token of the teachers' answers, over all of them
    answers_parsed     share of the generated answers that are a whole JSON object
    answers_whole      share of them of which every part passes (udfs/caption_answer.py)
    tag_recall         share of an image's tags by its teacher that the answer has, the mean over images
    tokens_short, ...  mean tokens of that part in the answers where it passed, by the build's tokenizer

Answers are generated as inference does it, greedily, by the same function. What is measured is the same for any seed and number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from training import process_group
from training.answer_loss import answer_losses
from training.captioner_lesson import Course, Lesson
from udfs import caption_answer, internvl
from udfs.caption_answer import TEXTS, Rules

if TYPE_CHECKING:
    from training.fit_captioner import FitCaptioner


class Answering(NamedTuple):
    """What answers are checked by. count: tokens of a text."""

    rules: Rules
    count: Callable[[str], int]
    course: Course


class Answered(NamedTuple):
    """A generated answer to the held-out row at `place`. code: of the reply; faults: part and code; tokens: of each text that passed."""

    place: int
    code: str
    text: str
    faults: list[tuple[str, str]]
    tokens: dict[str, int]
    recall: float | None


class Measured(NamedTuple):
    """Held-out rows: ids, summed loss and tokens of the teachers' answers [n], and the generated answers in the order of their places."""

    image_id: npt.NDArray[Any]
    loss: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.float64]
    answers: list[Answered]
    metrics: dict[str, float]


def measure(task: FitCaptioner, model: Any) -> Measured:
    """On every rank, without gradients -> the same on each."""
    share = losses_share(task, model)
    table = np.array(process_group.total(share.ravel().tolist(), task.device)).reshape(share.shape)
    answers = sorted({one.place: one for rank in process_group.collect(generated_share(task, model)) for one in rank}.items())
    loss, tokens = table.T
    found = [one for _, one in answers]
    metrics = {"held_out_loss": float(loss.sum() / tokens.sum()), **tell(found)}
    return Measured(task.held_out["image_id"], loss, tokens, found, metrics)


def losses_share(task: FitCaptioner, model: Any) -> npt.NDArray[np.float64]:
    """-> summed loss and tokens [n, 2] of the held-out rows that fall to this rank, 0 for the others'.

    All batches are of one size and every rank has as many (the last ones with rows that are another's too, which do not count): with ZeRO 3 a
    forward pass is a collective.
    """
    import torch

    count, size, table = len(task.lessons), task.settings.micro_batch, np.zeros((len(task.lessons), 2))
    firsts = [(one * task.ranks.world + task.ranks.rank) * size for one in range(-(-count // (size * task.ranks.world)))]
    rows = task.held_out_rows([place % count for first in firsts for place in range(first, first + size)])
    for first in firsts:
        arrays = task.maker.arrays([next(rows) for _ in range(size)])
        inputs = {name: torch.from_numpy(array).to(task.device) for name, array in arrays.items()}
        with torch.no_grad():
            losses = answer_losses(model, inputs)
        places = np.arange(first, first + size)
        both = np.stack([losses.double().cpu().numpy(), arrays["answer_tokens"]], 1)
        table[places[places < count]] = both[places < count]
    return table


def generated_share(task: FitCaptioner, model: Any) -> list[Answered]:
    """-> the answers of this rank, as many passes on every rank."""
    count, size = min(task.settings.generated, len(task.lessons)), task.settings.micro_batch
    told = internvl.Model(getattr(model, "module", model), task.reader)  # DeepSpeed's engine does not generate
    together = task.settings.zero_stage == 3 and task.ranks.world > 1
    answers: list[Answered] = []
    for one in range(-(-count // (size * task.ranks.world))):
        first = (one * task.ranks.world + task.ranks.rank) * size
        places = [place % count for place in range(first, first + size)]
        prepared = [row.prompt for row in task.held_out_rows(places)]
        replies = internvl.generate(told, prepared, task.settings.most_output, together)
        answers += [
            look_at(task.answering, place, task.lessons[place], reply.code, reply.text)
            for place, reply in zip(places, replies, strict=True)
        ]
    return answers


def look_at(answering: Answering, place: int, lesson: Lesson, code: str, text: str) -> Answered:
    """An answer's text beside the teacher's."""
    prompt = answering.course.prompt
    said = "\n".join((prompt.system, prompt.content, prompt.style, prompt.rest))
    checked = caption_answer.check(text, answering.rules, answering.count, said, lesson.tags, tuple(lesson.parts))
    tokens = {part: answering.count(checked.parts[part]) for part in TEXTS if part in checked.parts}
    taught = {tag.lower() for tag in lesson.parts.get("tags", ())}
    recall = len(taught & {tag.lower() for tag in checked.parts.get("tags", ())}) / len(taught) if taught else None
    return Answered(place, code, text, [(fault.part, fault.code) for fault in checked.faults], tokens, recall)


def tell(answers: list[Answered]) -> dict[str, float]:
    """Answers -> their metrics; one that none of them has a value for is not there."""
    told = {
        "answers_parsed": [float(all(part != "answer" for part, _ in one.faults)) for one in answers],
        "answers_whole": [float(not one.faults) for one in answers],
        "tag_recall": [one.recall for one in answers if one.recall is not None],
        **{f"tokens_{part}": [float(one.tokens[part]) for one in answers if part in one.tokens] for part in TEXTS},
    }
    return {name: float(np.mean(values)) for name, values in told.items() if values}


def teachers_tokens(lessons: Iterable[Lesson], count: Callable[[str], int]) -> Mapping[str, float]:
    """-> mean tokens of each text of the teachers' answers, to hold beside those of the generated ones."""
    found: dict[str, list[int]] = {}
    for one in lessons:
        for part in TEXTS:
            if part in one.parts:
                found.setdefault(part, []).append(count(one.parts[part]))
    return {part: float(np.mean(values)) for part, values in found.items()}
