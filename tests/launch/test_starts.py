"""The starts of an attempt: each is counted once, however it ended and whatever else is known of it."""

import dataclasses
import itertools
import os
import time
from pathlib import Path

import pytest

from megatron_evolve.launch import rundir, starts, supervise
from megatron_evolve.launch.job import Job, JobOutcome, OutcomeKind

NOW = 1_800_000_000.0
LIVED_S, TOOK_S = 100.0, 7.0  # of an odd and an even start; a record says what it took, signs of life say more


def begin(folder: Path, number: int, lived_s: float = LIVED_S) -> None:
    """A start as its supervisor signs it, with signs of life for `lived_s`."""
    at = NOW + 1000.0 * number
    for name, time_s in ((rundir.SUPERVISOR_FILE, at), (rundir.ALIVE_FILE, at + lived_s)):
        (folder / name).write_text("{}")
        os.utime(folder / name, (time_s, time_s))


def took(seconds: float | None, cpu_seconds: float | None = None) -> JobOutcome:
    outcome = JobOutcome.unmeasured("a", 1, OutcomeKind.LOST, "host", "gone")
    return dataclasses.replace(outcome, seconds=seconds, cpu_seconds=cpu_seconds)


@pytest.mark.parametrize("recorded", itertools.product([True, False], repeat=3))
@pytest.mark.parametrize("last_left", ["its files", "nothing"])
def test_each_start_is_counted_once(recorded: tuple[bool, ...], last_left: str, tmp_path: Path) -> None:
    """Law, over every pattern of three starts of which each told how it ended or did not, before and after the last one
    was put aside by a fourth that never began."""
    for number, told in enumerate(recorded):
        if number:
            starts.put_aside(tmp_path, number - 1)
        begin(tmp_path, number)
        if told:
            starts.record(tmp_path, number, took(TOOK_S, 3.0))
    if last_left == "nothing":
        starts.put_aside(tmp_path, len(recorded) - 1)
    unseen = recorded.count(False)
    assert starts.life_s(tmp_path) == TOOK_S * (3 - unseen) + (LIVED_S + rundir.ALIVE_EVERY_S) * unseen
    outcome = starts.charged(tmp_path, took(None))
    assert (outcome.seconds, outcome.cpu_seconds) == ((None, None) if unseen else (3 * TOOK_S, 9.0))


def test_a_start_that_died_before_it_signed_leaves_its_predecessor_counted_once(tmp_path: Path) -> None:
    begin(tmp_path, 0)
    starts.record(tmp_path, 0, took(TOOK_S))
    starts.put_aside(tmp_path, 0)  # by start 1, which died; start 2 finds nothing to put aside
    starts.put_aside(tmp_path, 0)
    begin(tmp_path, 2)
    assert starts.life_s(tmp_path) == TOOK_S + LIVED_S + rundir.ALIVE_EVERY_S


def test_what_never_began_took_nothing_and_is_said_to_have_no_time(tmp_path: Path) -> None:
    assert starts.life_s(tmp_path) == 0.0
    assert starts.charged(tmp_path, took(None)).seconds is None


def test_a_damaged_record_is_as_good_as_none(tmp_path: Path) -> None:
    begin(tmp_path, 0)
    starts.record(tmp_path, 0, took(TOOK_S))
    (tmp_path / "starts/0.json").write_text("{")
    assert starts.life_s(tmp_path) == LIVED_S + rundir.ALIVE_EVERY_S


def test_processor_time_is_told_where_every_start_told_it(tmp_path: Path) -> None:
    for number, cpu_seconds in enumerate((3.0, None)):
        starts.record(tmp_path, number, took(TOOK_S, cpu_seconds))
    outcome = starts.charged(tmp_path, took(None))
    assert (outcome.seconds, outcome.cpu_seconds) == (2 * TOOK_S, None)


def test_a_supervisor_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its job has ended, also when a later start has put its file aside."""
    monkeypatch.setattr(rundir, "ALIVE_EVERY_S", 0.1)
    job = Job("a", ("sleep", "1"), tmp_path / "run", 30.0, "done")
    folder = rundir.prepare_attempt(job, 1)
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            supervise.supervise(folder)
        finally:  # whatever happens, this copy must not go on with the tests
            os._exit(0)
    while rundir.read_supervisor(folder) is None:
        time.sleep(0.01)
    begun = (folder / rundir.SUPERVISOR_FILE).stat().st_mtime
    aside = (folder / rundir.ALIVE_FILE).rename(folder / "aside")
    os.waitpid(child, 0)
    assert not (folder / rundir.ALIVE_FILE).exists()
    assert 0.7 < aside.stat().st_mtime - begun < 20
    assert rundir.read_outcome(folder).seconds > 1
