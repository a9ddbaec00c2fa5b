"""What becomes of one row of captioning: which question comes second, and its answers or failure -> the staged row."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

from udfs.caption_answer import LISTS, PARTS, TEXTS, Checked, Fault
from udfs.caption_call import ANSWER, QUARANTINE, RETRY, Reply
from udfs.caption_record import Record
from udfs.caption_request import WHY, Request

Row = Mapping[str, Any]

# tried: as the row has it, of what its reject depends on
# state: whole: every part passed | partial: some did | failed: none | unasked: it is pending as before, and `code` says why
SCHEMA = (
    "image_id BINARY, key STRING, state STRING, code STRING, detail STRING, transient BOOLEAN, language STRING, "
    "texts ARRAY<STRUCT<kind: STRING, part: INT, text: STRING, tokens: INT, key: STRING>>, "
    "faults ARRAY<STRUCT<part: STRING, code: STRING, detail: STRING>>, calls INT, stop STRING, tried STRING"
)
COLUMNS = ["image_id", "key", "state", "code", "detail", "transient", "language", "texts", "faults", "calls", "stop", "tried"]
WHOLE, PARTIAL, FAILED, UNASKED = "whole", "partial", "failed", "unasked"
REFUSED = "answer_refused"  # the code of a row whose answers passed in no part
STOPPED = "stopped"  # the code of a row that was not asked because the job is to end; else udfs.caption_asking says why
# faults of a caption that may have obeyed its notes
SUSPECT = frozenset({"echo", "markup", "address", "banned", "contradiction", "not_json", "not_an_object"})


class Work(NamedTuple):
    """What the caller knows of its rows. prepare runs in threads and may raise Reject; the others are quick, and raise nothing.

    render: the request; prepare: (image, mime); check: an answer to a request of the row; repair: (row, request, why its answer was refused);
    plain: the request without tags and alt text; known: calls of earlier runs for any of its requests.
    """

    render: Callable[[Row], Request]
    prepare: Callable[[Row], tuple[bytes, str]]
    check: Callable[[Row, Request, str], Checked]
    repair: Callable[[Row, Request, str], Request]
    plain: Callable[[Row], Request]
    known: Callable[[Row], Sequence[Record]] = lambda row: ()


class Answer(NamedTuple):
    """An answer to `request` and what is good in it; suspect: nothing in it is to be trusted."""

    request: Request
    checked: Checked
    suspect: bool

    @property
    def useful(self) -> bool:
        return not self.suspect and bool(self.checked.parts)


def looked_at(work: Work, row: Row, request: Request, text: str) -> Answer:
    """A text -> Answer. Where there were notes, faults like theirs make the whole of it suspect."""
    checked = work.check(row, request, text)
    return Answer(request, checked, request.noted and any(fault.code in SUSPECT for fault in checked.faults))


def second(work: Work, row: Row, answer: Answer) -> Request:
    """An answer that is not whole -> the one more request: without the notes, where it may have obeyed them."""
    return work.plain(row) if answer.suspect else work.repair(row, answer.request, why(answer.checked.faults))


def conversation(work: Work, row: Row, repairs: int) -> Generator[Request, Reply, dict[str, Any]]:
    """The requests of a row, each after the reply to the one before it: the first, and with repairs 1 one more after an answer that is refused.
    -> its staged row, whose `calls` the caller knows. A reply is the last of its request: no RETRY that would be tried again.
    """
    request = work.render(row)
    reply = yield request
    if reply.outcome != ANSWER:
        return not_answered(row, request, reply)
    answers = [looked_at(work, row, request, reply.text)]
    if not answers[0].checked.whole and repairs:
        request = second(work, row, answers[0])
        reply = yield request
        if reply.outcome == ANSWER:
            answers.append(looked_at(work, row, request, reply.text))
        elif reply.outcome == QUARANTINE or not answers[0].useful:
            return not_answered(row, request, reply)
    return answered(row, answers)


def answered(row: Row, answers: Sequence[Answer], calls: int = 0) -> dict[str, Any]:
    """One answer or two -> whole, partial or failed: of a part the last that passed; a suspect answer gives none."""
    good = [answer for answer in answers if not answer.suspect]
    parts = {part: (answer.checked.parts[part], answer.request.key) for answer in good for part in PARTS if part in answer.checked.parts}
    faults = [fault for fault in answers[-1].checked.faults if fault.part not in parts]
    texts = []
    for kind in (*TEXTS, *LISTS):
        if kind in parts:
            value, key = parts[kind]
            # of a picture without text one empty row of OCR: that it was looked for, and none is there
            found = [", ".join(value)] if kind == "tags" else value or [""] if kind == "ocr" else [value]
            texts += [{"kind": kind, "part": number, "text": text, "key": key} for number, text in enumerate(found)]
    state = WHOLE if all(part in parts for part in PARTS) else PARTIAL if texts else FAILED
    told = _row(row, answers[-1].request.key, state, calls)
    told |= {"texts": texts, "language": parts["language"][0] if "language" in parts else None}
    told["faults"] = [fault._asdict() for fault in faults] if state != WHOLE else []
    return told | ({"code": REFUSED, "detail": why(answers[-1].checked.faults)} if state == FAILED else {})


def failed(row: Row, key: str | None, code: str, detail: str, transient: bool, calls: int) -> dict[str, Any]:
    return _row(row, key, FAILED, calls) | {"code": code, "detail": detail, "transient": transient}


def not_answered(row: Row, request: Request, reply: Reply, calls: int = 0) -> dict[str, Any]:
    """The last reply to a row that has no answer -> failed; of a quarantined image only ids and code."""
    detail = "" if reply.outcome == QUARANTINE else reply.detail
    return failed(row, request.key, reply.code, detail, reply.outcome == RETRY, calls)


def counted(rows: list[dict[str, Any]], count: Callable[[str], int]) -> list[dict[str, Any]]:
    """Rows -> the same with the tokens of each text."""
    for row in rows:
        row["texts"] = [text | {"tokens": count(text["text"])} for text in row["texts"]]
    return rows


def unasked(row: Row, key: str | None, code: str, detail: str, calls: int) -> dict[str, Any]:
    return _row(row, key, UNASKED, calls) | {"code": code, "detail": detail, "transient": True}


def why(faults: Sequence[Fault]) -> str:
    """Faults -> one line for a prompt or a person."""
    return "; ".join(f"{fault.part}: {fault.code} ({fault.detail})" for fault in faults)[:WHY]


def _row(row: Row, key: str | None, state: str, calls: int) -> dict[str, Any]:
    told: dict[str, Any] = dict.fromkeys(COLUMNS)
    told |= {"image_id": row["image_id"], "tried": row.get("tried"), "key": key, "state": state, "calls": calls}
    return told | {"transient": False, "texts": [], "faults": []}
