"""What was asked is found again, from a disk and from a real S3 server: whole parts count, all others are named, and nothing crashes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.object_store import BUCKET, ObjectStore, object_store
from udfs import caption_record, caption_wave
from udfs.caption_budget import Seen
from udfs.caption_call import Reply, Usage
from udfs.caption_journal import Journal, Place, close
from udfs.caption_record import Record, Strange, Terms, parse
from udfs.caption_request import Request
from udfs.caption_wave import read_records, read_wave
from udfs.opener import Opener, to_path, to_uri
from udfs.reject import Reject

TERMS = Terms(share=5_000, worst=100, in_flight=8, flush=3, lease=60.0)


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as started:
        yield started


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Opener, str]:
    """-> (an opener, the URI of a wave's folder, not there yet)."""
    if request.param == "disk":
        return Opener(), to_uri(str(tmp_path / "a run" / "wave-000003"))
    started: ObjectStore = request.getfixturevalue("store")
    return Opener(started.stores), f"s3://{BUCKET}/{tmp_path.name}/run/wave-000003"


@pytest.fixture
def wave(tmp_path: Path) -> str:
    return to_uri(str(tmp_path / "run" / "wave-000000"))


def asked(number: int) -> Request:
    return Request(f"{number:064x}", bytes([number]) * 32, "", "", {}, {}, False)


def answered(number: int, text: str = "a text", nano: int = 70) -> Record:
    return caption_record.record(asked(number), 1, False, Reply("ok", "", text, Usage(10, 280, 20, 0)), nano, 0.25)


def begun(opener: Opener, wave: str, partition: int = 0, attempt: int = 0) -> Journal:
    journal = Journal(opener, Place(wave, partition, attempt), TERMS)
    journal.open()
    return journal


def part_of(wave: str, name: str) -> Path:
    return Path(to_path(wave).decode()) / name


def test_records_are_read_back_as_they_were_written(place: tuple[Opener, str]) -> None:
    opener, wave = place
    odd = answered(1, 'NUL \x00, half \ud83d, line\u2028end\n"quoted"')
    failed = caption_record.record(asked(2), 3, True, Reply("dropped", "connection reset"), 0, 1.5)
    journal = begun(opener, wave)
    journal.answers([odd, failed])
    journal.answers([answered(3)])
    journal.end("done")
    strange: list[Strange] = []
    found = list(read_records(opener, wave, strange))
    assert [one for _, one in found] == [odd, failed, answered(3)]
    assert [part.number for part, _ in found] == [1, 1, 2]
    assert failed.usage is None and failed.tried == 3 and failed.repair
    assert strange == []


def test_the_state_of_every_attempt_is_read_from_its_last_part(place: tuple[Opener, str]) -> None:
    opener, wave = place
    assert read_wave(opener, wave).attempts == {}
    first, second, third = (begun(opener, wave, partition, attempt) for partition, attempt in ((0, 0), (0, 1), (7, 0)))
    first.answers([answered(1), answered(2)])
    second.answers([answered(3)])
    second.answers([])  # a sign of life
    second.end("done")
    told = Seen(5_000, 100, 8 + 2 * 3, 60.0, number=1, calls=2, spent=140, ended=False)
    assert read_wave(opener, wave).attempts == {
        (0, 0): told,
        (0, 1): told._replace(number=3, calls=1, spent=70, ended=True),
        (7, 0): told._replace(number=0, calls=0, spent=0),
    }
    assert third.earlier() == ([], True)


def test_a_later_attempt_is_given_what_earlier_ones_have_bought_once(place: tuple[Opener, str]) -> None:
    opener, wave = place
    first, other = begun(opener, wave), begun(opener, wave, partition=1)
    other.answers([answered(9)])
    first.answers([answered(1)])
    second = begun(opener, wave, attempt=1)
    assert second.earlier() == ([answered(1)], False)
    first.answers([answered(2)])  # it was only taken for dead
    assert second.earlier() == ([answered(2)], False)
    first.end("a later attempt has begun")
    assert second.earlier() == ([], True)


def test_a_closed_wave_a_closed_run_and_a_later_attempt_fence_an_attempt(place: tuple[Opener, str]) -> None:
    opener, wave = place
    journal = begun(opener, wave)
    assert journal.fenced() is None
    begun(opener, wave, attempt=1)
    assert journal.fenced() == "a later attempt has begun"
    close(opener, wave.rpartition("/")[0])
    assert journal.fenced() == "its run is closed"
    close(opener, wave)
    assert journal.fenced() == "its wave is closed"
    assert len(read_wave(opener, wave).attempts) == 2 and read_wave(opener, wave).strange == ()


def test_two_tasks_under_one_name_do_not_spend_one_share_twice(wave: str) -> None:
    begun(Opener(), wave)
    with pytest.raises(RuntimeError, match="has been begun by another task"):
        begun(Opener(), wave)


def test_a_prohibited_image_leaves_its_ids_its_code_and_its_bill(wave: str) -> None:
    reply = Reply("prohibited", "PROHIBITED_CONTENT: words of the server", "a text that came all the same", Usage(10, 280, 5, 0))
    journal = begun(Opener(), wave)
    journal.answers([caption_record.record(asked(1), 1, False, reply, 70, 0.5)])
    ((_, kept),) = read_records(Opener(), wave, [])
    assert (kept.image_id, kept.code, kept.outcome, kept.detail, kept.text, kept.nano_usd) == (
        "01" * 32,
        "prohibited",
        "quarantine",
        "",
        "",
        70,
    )
    assert b"words" not in part_of(wave, "000000/000-000001-answers.jsonl").read_bytes()


def test_a_write_that_fails_is_tried_again_under_its_name_and_counts_once(wave: str) -> None:
    opener = Opener()
    journal = begun(opener, wave)
    in_the_way = part_of(wave, "000000/000-000001-answers.jsonl")
    in_the_way.mkdir()
    with pytest.raises(Reject, match="unreadable"):
        journal.answers([answered(1)])
    in_the_way.rmdir()
    journal.answers([answered(1)])
    assert read_wave(opener, wave).attempts[0, 0].spent == 70
    assert len(list(read_records(opener, wave, []))) == 1


def test_a_look_at_earlier_attempts_that_fails_halfway_loses_none_of_them(wave: str) -> None:
    opener = Opener()
    journal = begun(opener, wave)
    journal.answers([answered(1)])
    in_the_way = part_of(wave, "000000/000-000002-answers.jsonl")
    in_the_way.mkdir()
    later = begun(opener, wave, attempt=1)
    with pytest.raises(Reject, match="unreadable"):
        later.earlier()
    in_the_way.rmdir()
    journal.answers([answered(2)])
    assert {one.key for one in later.earlier()[0]} == {asked(1).key, asked(2).key} and later.earlier()[0] == []


def test_the_intent_of_a_job_forgets_an_image_and_keeps_what_it_can_be_billed(place: tuple[Opener, str]) -> None:
    opener, wave = place
    usage, uri = {"prompt": 1, "image": 2, "output": 3, "thoughts": 0, "estimated": False}, f"{wave}.jobs/studbook-1.json"
    opener.write(uri, json.dumps({"k1": ["aa", False, usage], "k2": ["bb", True, usage]}).encode())
    assert caption_wave.holds(opener, uri, frozenset({"aa", "cc"})) and not caption_wave.holds(opener, uri, frozenset({"cc"}))
    caption_wave.blot(opener, uri, frozenset({"aa", "cc"}))
    assert json.loads(opener.read(uri)) == {"k1": ["", False, usage], "k2": ["bb", True, usage]}
    assert not caption_wave.holds(opener, uri, frozenset({"aa"}))


@pytest.mark.parametrize("cut", [0, 1, 40, -2, -30, -90])
def test_a_half_written_part_is_named_and_its_attempt_counts_as_broken(wave: str, cut: int) -> None:
    journal = begun(Opener(), wave)
    journal.answers([answered(1)])
    journal.answers([answered(2)])
    path = part_of(wave, "000000/000-000002-answers.jsonl")
    path.write_bytes(path.read_bytes()[:cut])
    found = read_wave(Opener(), wave)
    assert [(one.uri.rpartition("/")[2], one.why, one.harm) for one in found.strange] == [(path.name, "it is not whole", True)]
    assert found.attempts[0, 0].broken and found.attempts[0, 0].spent == 70
    strange: list[Strange] = []
    assert [one.key for _, one in read_records(Opener(), wave, strange)] == [asked(1).key]
    assert len(strange) == 1


def test_foreign_files_are_named_and_harm_nothing(wave: str) -> None:
    journal = begun(Opener(), wave)
    journal.answers([answered(1)])
    whole = part_of(wave, "000000/000-000001-answers.jsonl").read_bytes()
    foreign = {
        "000000/000-000002-answers.jsonl.4711.part": (whole[:50], "a write that was not finished", False),
        "000000/.DS_Store": (b"\0\xff", "not of the journal", False),
        "000000/000-000007-answers.jsonl": (whole, "it says that it is part 1 of attempt 0 of partition 0", True),
        "000000/000-000008-answers.jsonl": (b"[" * 100_000, "it is not whole", True),
        "000000/000-000009-answers.jsonl": (b"[1]\n", "it is not whole", True),
        "notes": (b"hello", "not of the journal", False),
    }
    for name, (data, _, _) in foreign.items():
        part_of(wave, name).write_bytes(data)
    part_of(wave, "backup").mkdir()
    found = read_wave(Opener(), wave)
    expected = {name: (why, harm) for name, (_, why, harm) in foreign.items()} | {"backup": ("not of the journal", False)}
    assert {one.uri.removeprefix(f"{wave}/"): (one.why, one.harm) for one in found.strange} == expected
    assert found.attempts[0, 0].spent == 70 and found.attempts[0, 0].broken
    assert len(list(read_records(Opener(), wave, []))) == 1


def test_a_part_of_another_format_is_named(wave: str) -> None:
    begun(Opener(), wave)
    data = part_of(wave, "000000/000-000000-open.jsonl").read_bytes()
    with pytest.raises(ValueError, match="not whole"):
        parse(data.replace(b'"format":1', b'"format":2'))
    header = {"format": 2}
    with pytest.raises(ValueError, match="its format is 2, this code reads 1"):
        parse(caption_record.to_bytes(header, ()))


def test_a_store_that_fails_is_an_error_and_no_empty_journal(wave: str) -> None:
    with pytest.raises(Reject, match="address_refused"):
        read_wave(Opener(), "ftp://x/y")
