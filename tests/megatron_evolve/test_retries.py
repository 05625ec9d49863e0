"""Retries: bounded for one bad job; a bad machine pauses the campaign and costs no job its place."""

import random
import time
from pathlib import Path

import pytest

from megatron_evolve.launch import gpus, local
from megatron_evolve.launch.gpus import Gpu
from megatron_evolve.launch.job import Job, JobOutcome, OutcomeKind, Resources
from megatron_evolve.launch.rundir import prepare_attempt, read_outcome, write_outcome
from megatron_evolve.retries import Paused, Retries
from tests.megatron_evolve.small_jobs import DONE, LOST, Bench


def lost(key: str, attempt: int) -> JobOutcome:
    return JobOutcome.unmeasured(key, attempt, OutcomeKind.LOST, "host", "its node died")


def test_a_job_that_fails_alone_is_given_up_after_three() -> None:
    retries = Retries()
    assert [retries.failed("a", lost("a", n), began=n, now=n) for n in (1, 2, 3)] == [2.0, 16.0, None]


def test_a_job_that_fails_while_others_end_is_given_up_after_three() -> None:
    retries = Retries()
    assert retries.failed("a", lost("a", 1), 1, 1) and retries.failed("b", lost("b", 1), 1, 2)
    retries.ended("b", 3)
    assert retries.failed("a", lost("a", 2), 4, 4) == 16.0
    assert retries.failed("a", lost("a", 3), 5, 5) is None


def test_a_machine_that_fails_everything_opens_the_breaker_before_any_job_is_given_up() -> None:
    retries = Retries(attempts=2)
    waits = [retries.failed(key, lost(key, 1 + n // 2), n, n) for n, key in enumerate("abab")]
    assert waits == [2.0, 2.0, 16.0, 16.0], "two failures each, and nothing has shown that the machine works"
    with pytest.raises(Paused) as paused:
        retries.failed("a", lost("a", 3), 9, 9)
    told = (
        "paused: 5 infrastructure failures in a row, last: a lost (its node died); mend that, then run the same command"
    )
    assert str(paused.value) == f"{told} again"
    assert paused.value.attempts == {"a": 3, "b": 2} and paused.value.status == 69


def test_failures_that_strike_together_count_once() -> None:
    """Eight jobs of one node that goes down, twice: two in a row, not sixteen."""
    retries = Retries()
    for attempt, (began, now) in enumerate(((1, 5), (6, 9)), start=1):
        for job in range(8):
            assert retries.failed(f"j{job}", lost(f"j{job}", attempt), began, now) is not None


def test_waits_grow_and_are_bounded() -> None:
    retries = Retries(attempts=10, in_a_row=99)
    waits = [retries.failed("a", lost("a", n), n, n) for n in range(1, 10)]
    assert waits == sorted(waits) and waits[:4] == [2.0, 16.0, 128.0, 600.0] and waits[-1] == 600.0


def test_however_jobs_fail_the_bounds_hold() -> None:
    """Law, on three jobs at a time: five in a row at most, and a job given up at three or more for a reason."""
    rng = random.Random(6)
    given_up = paused = 0
    for _ in range(300):
        retries, counts, first_at, other_at, row = Retries(), {"0": 0, "1": 0, "2": 0}, {}, -1, []
        try:
            for now in range(1, 200):
                key = rng.choice(list(counts))
                over = rng.random() < 0.25
                if over:
                    retries.ended(key, now)
                    other_at, row = now, []
                else:
                    counts[key] += 1
                    first_at.setdefault(key, now)
                    row.append(key)
                    over = retries.failed(key, lost(key, counts[key]), now, now) is None
                    if over:
                        given_up += 1
                        assert counts[key] >= 3 and (other_at >= first_at[key] or set(row) == {key})
                    assert len(row) < 5 or set(row) == {key}
                if over:
                    del counts[key]
                    counts[f"new {now}"] = 0
        except Paused:
            paused += 1
            assert len(row) == 5 and len(set(row)) > 1
    assert given_up > 100 and paused > 100


def test_only_the_machines_failures_are_tried_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    ends = bench.run({"bad": "exit 3", "slow": "sleep 60", "good": DONE}, time_limit_s=0.5)
    assert {name: (end.outcome, end.attempts) for name, end in ends.items()} == {
        "bad": ("crashed", 1),
        "slow": ("timed_out", 1),
        "good": ("finished", 1),
    }


def test_failed_attempts_are_kept_and_charged(tmp_path: Path) -> None:
    """Lost once after half a second on a GPU, then finished: the stage took both, and so says its end."""
    bench = Bench(tmp_path, devices=("0",))
    once = f"sleep 0.5; [ -e $RUN/again ] || {{ touch $RUN/again; {LOST}; }}; {DONE}"
    end = bench.run({"a": once}, retries=Retries(first_wait_s=0.01), resources=Resources(gpus=1))["a"]
    outcomes = [read_outcome(folder) for folder in bench.attempts("a")]
    assert [one.kind.value for one in outcomes] == ["lost", "finished"]
    assert (end.outcome, end.attempts) == ("finished", 2)
    assert end.seconds == pytest.approx(sum(one.seconds for one in outcomes), abs=1e-5)
    assert end.cpu_seconds == pytest.approx(sum(one.cpu_seconds for one in outcomes), abs=1e-5)
    assert end.gpu_seconds == pytest.approx(end.seconds) and end.seconds >= 1.0


def test_a_hang_is_stopped_and_tried_again(tmp_path: Path) -> None:
    once = f"[ -e $RUN/again ] && exec {DONE}; touch $RUN/again; sleep 60"
    end = Bench(tmp_path).run({"a": once}, retries=Retries(first_wait_s=0.01), stall_s=0.5)["a"]
    assert (end.outcome, end.attempts) == ("finished", 2) and end.seconds < 20


def test_waiting_for_the_next_attempt_holds_nothing_up(tmp_path: Path) -> None:
    """The lost job waits a minute; others end meanwhile, and a stop ends the wait at once, the job not given up."""
    bench = Bench(tmp_path, cores=1)
    commands = {"lost": f"[ -e {tmp_path}/mended ] || {LOST}; {DONE}", "one": DONE, "two": DONE}
    started = time.monotonic()
    ends = bench.run(commands, retries=Retries(first_wait_s=60), stop=lambda: len(bench.ends) == 2)
    assert set(ends) == {"one", "two"} and time.monotonic() - started < 30
    (tmp_path / "mended").touch()
    assert bench.run({"lost": commands["lost"]})["lost"].attempts == 2


def test_a_bad_machine_pauses_and_nothing_is_lost(tmp_path: Path) -> None:
    """Two jobs fail until the breaker opens; once it is mended both finish, whatever they had failed before."""
    bench = Bench(tmp_path)
    commands = dict.fromkeys("ab", f"[ -e {tmp_path}/mended ] || {LOST}; {DONE}")
    with pytest.raises(Paused, match="5 infrastructure failures in a row") as paused:
        bench.run(commands, retries=Retries(first_wait_s=0.01, factor=1.0))
    assert bench.ends == {} and set(paused.value.attempts) == {"1/a/7/dev", "1/b/7/dev"}
    assert all(attempt >= 3 for attempt in paused.value.attempts.values())
    (tmp_path / "mended").touch()
    ends = bench.run(commands, retries=Retries(forgiven=paused.value.attempts))
    assert {end.outcome for end in ends.values()} == {"finished"}


def test_a_controller_that_starts_again_counts_the_failures_before(tmp_path: Path) -> None:
    """Killed after two failures of a job that fails alone: one more is tried, then it is given up."""
    bench = Bench(tmp_path)

    def failed_twice() -> bool:
        return len(bench.attempts("a")) >= 2 and (bench.attempts("a")[1] / "outcome.json").exists()

    assert bench.run({"a": LOST}, retries=Retries(first_wait_s=0.01), stop=failed_twice) == {}
    end = bench.run({"a": LOST}, retries=Retries())["a"]
    assert (end.outcome, end.attempts) == ("lost", 3)
    for attempts in (4, 5, 5):  # each crash before that was entered is one attempt more, to as many as in a row
        again = Bench(tmp_path).run({"a": LOST}, retries=Retries())["a"]
        assert (again.outcome, again.attempts) == ("lost", attempts)
    mended = Bench(tmp_path).run({"a": DONE})["a"]
    assert (mended.outcome, mended.attempts) == ("finished", 6), "where somebody starts it again, nothing counts"


def test_a_stop_in_an_outage_costs_no_job_its_place(tmp_path: Path) -> None:
    """Two jobs that failed three times together were not given up; the controller after it took that as their end."""
    bench = Bench(tmp_path)
    commands = dict.fromkeys("ab", f"[ -e {tmp_path}/mended ] || {LOST}; {DONE}")

    def failed_thrice() -> bool:
        return all(sum((path / "outcome.json").exists() for path in bench.attempts(name)) >= 3 for name in "ab")

    # Both in one look or not, that is as many in a row as here they may.
    assert bench.run(commands, retries=Retries(first_wait_s=0.01, in_a_row=9), stop=failed_thrice) == {}
    (tmp_path / "mended").touch()
    ends = bench.run(commands, retries=Retries())
    assert {end.outcome for end in ends.values()} == {"finished"}


def failing(root: Path, failures: int) -> dict[str, Path]:
    """Run folders of three jobs whose machine failed them so often."""
    folders = {name: root / name for name in "abc"}
    for name, folder in folders.items():
        for attempt in range(1, failures + 1):
            prepare_attempt(Job(name, ("x",), folder, 1.0, "done"), attempt)
            write_outcome(folder, lost(name, attempt))
    return folders


def test_a_controller_that_starts_in_an_outage_gives_no_job_up(tmp_path: Path) -> None:
    """The first job that failed after the start had failed three times, and seemed to be the only one."""
    retries, folders = Retries(), failing(tmp_path, 2)
    assert [retries.failures(name, folder) for name, folder in folders.items()] == [2, 2, 2]
    assert [retries.failed(name, lost(name, 3), 1, 1) for name in folders] == [128.0] * 3
    for name in folders:
        retries = Retries()
        retries.failures(name, folders[name])
        assert retries.failed(name, lost(name, 3), 1, 1) is None, "this one did fail alone"


def test_the_pause_that_a_controller_did_not_live_to_enter_is_made_good(tmp_path: Path) -> None:
    """Jobs that had failed as often as opens the breaker were all given up at the next start."""
    retries, folders = Retries(), failing(tmp_path, 5)
    for name, folder in folders.items():
        retries.failures(name, folder)
    with pytest.raises(Paused, match="a failed 5 times, and 2 more failed beside it; mend that") as paused:
        retries.may_go_on("a", folders["a"])
    assert paused.value.attempts == {"a": 5, "b": 5, "c": 5}
    mended = Retries(forgiven=paused.value.attempts)
    assert all(mended.may_go_on(name, folder) for name, folder in folders.items())
    assert not Retries().may_go_on("a", folders["a"])


def test_an_attempt_with_a_damaged_outcome_is_tried_again(tmp_path: Path) -> None:
    Bench(tmp_path).run({"a": DONE})
    (Bench(tmp_path).attempts("a")[0] / "outcome.json").write_text('{"kind": "fini')
    end = Bench(tmp_path).run({"a": DONE}, retries=Retries())["a"]
    assert (end.outcome, end.attempts) == ("finished", 2)


def test_gpus_that_others_fill_pause_the_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "gpus_here", lambda: [Gpu("0", "GPU-0", 70 * gpus.MIB * 1024, 80 * gpus.MIB * 1024)])
    monkeypatch.setattr(local, "FILLED_S", 0.0)
    with pytest.raises(
        Paused, match=r"paused: job 1/a/7/dev needs 1 of the GPUs 0, .*GPU 0 70 GiB.*run the same command"
    ):
        Bench(tmp_path, devices=("0",)).run({"a": DONE}, resources=Resources(gpus=1))
