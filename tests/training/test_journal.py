"""The journal: what survives a kill, a full disk and a second process."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from conf.section import Mistake
from training.journal import CHUNK, Journal


def test_a_line_that_a_kill_tore_is_cut_off_and_the_next_event_stands_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in range(3):
        assert journal.append({"n": number}, sync=False) == ""
    journal.close()
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-4])
    again = Journal(tmp_path)
    assert (list(again), again.pending) == ([{"n": 0}, {"n": 1}], 2)
    again.append({"n": 7}, sync=True)
    assert [event for event, _ in again.read()] == [{"n": 0}, {"n": 1}, {"n": 7}]
    again.close()


def test_what_was_marked_is_not_read_again_after_a_restart(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in range(3):
        journal.append({"n": number}, sync=False)
    journal.facts["run"] = "r"
    journal.mark(journal.read()[1][1], 2)
    journal.close()
    again = Journal(tmp_path)
    assert ([event for event, _ in again.read()], again.pending, again.facts) == ([{"n": 2}], 1, {"run": "r"})
    again.close()


def test_an_event_larger_than_a_read_is_read_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"text": "x" * (2 * CHUNK)}, sync=False)
    assert len(journal.read()[0][0]["text"]) == 2 * CHUNK
    journal.close()


def test_a_second_process_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(Mistake, match="another process writes this journal"):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()


def test_events_that_a_full_disk_refused_are_written_with_the_next_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"n": 0}, sync=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 3, hard))  # the next line fits in part
    try:
        refused = journal.append({"n": 1}, sync=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in refused
    assert list(journal) == [{"n": 0}]
    assert journal.append({"n": 2}, sync=True) == ""
    assert list(journal) == [{"n": 0}, {"n": 1}, {"n": 2}]
    journal.close()
