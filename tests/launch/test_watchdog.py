"""The watchdog: what moves is let be, what stands still is stopped with everything it started."""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_evolve.launch import rundir
from megatron_evolve.launch.job import Job, JobOutcome, OutcomeKind
from megatron_evolve.launch.local import LocalLauncher
from megatron_evolve.launch.process import read_stat
from megatron_evolve.launch.watchdog import Watchdog

# Steps on for a while, then lives on without a step: asleep, or busy in a loop.
PROGRAM = """
import os, sys, time
from pathlib import Path
from megatron_evolve.launch import rundir
rundir.PROGRESS_EVERY_S = 0.0
steps, pause, then = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
pulse = rundir.Pulse("train")
for step in range(1, steps + 1):
    pulse.tell(step, 8)
    time.sleep(pause)
Path(os.environ["RUN"], "pid").write_text(str(os.getpid()))
while then == "busy":
    pass
while then == "asleep":
    time.sleep(60)
Path(os.environ["RUN"], "done").touch()
"""


@pytest.fixture
def outcome_of(make_job: Callable[..., Job], ending_of: Callable, launcher: LocalLauncher) -> Callable[..., JobOutcome]:
    def run(steps: int, pause: float, then: str, **limits: float) -> JobOutcome:
        job = make_job("a", (sys.executable, "-c", PROGRAM, str(steps), str(pause), then), grace_s=0.5, **limits)
        launcher.submit(job)
        return ending_of(launcher, "a")

    return run


@pytest.mark.parametrize("then", ["busy", "asleep"])
def test_a_job_that_lives_without_a_step_hangs(
    outcome_of: Callable[..., JobOutcome], tmp_path: Path, then: str
) -> None:
    outcome = outcome_of(3, 0.01, then, stall_s=0.6)
    assert outcome.kind is OutcomeKind.HUNG
    assert outcome.reason.startswith("stood still at step 3 of 8 for 1 s though it lived")
    assert outcome.seconds < 8
    stat = read_stat(int((tmp_path / "a" / "pid").read_text()))
    assert stat is None or stat.state in "ZX"


def test_a_slow_job_that_moves_is_let_be(outcome_of: Callable[..., JobOutcome]) -> None:
    assert outcome_of(5, 0.3, "end", stall_s=1.2).kind is OutcomeKind.FINISHED


def test_a_job_that_never_begins_to_count_hangs(outcome_of: Callable[..., JobOutcome]) -> None:
    outcome = outcome_of(0, 0.0, "asleep", stall_s=0.2, start_s=1.0)
    assert outcome.kind is OutcomeKind.HUNG and outcome.reason.startswith("told no progress in 1 s since its start")


@dataclasses.dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_allowance_is_the_starts_before_the_first_step_and_after_the_last(tmp_path: Path) -> None:
    clock = Clock()
    job = Job("a", ("true",), tmp_path, 1e6, "done", stall_s=10.0, start_s=100.0)
    dog = Watchdog(job, tmp_path, clock)

    def at(now: float, step: int | None = None, written_at: float = 0.0) -> bool:
        clock.now = now
        if step is not None:
            rundir.write_progress(tmp_path, rundir.Progress(step, 3, written_at, 0, "train"))
        return dog.hang() is not None

    assert not at(99) and at(101)
    assert not at(102, step=1)
    assert not at(111, step=1, written_at=1e9), "the file's own clock is not believed, in either direction"
    assert at(113, step=1, written_at=2e9)
    assert not at(114, step=3) and not at(213) and at(215)
    assert dog.tick_s == 2.5


def test_what_cannot_be_read_is_no_progress(tmp_path: Path) -> None:
    clock = Clock()
    dog = Watchdog(Job("a", ("true",), tmp_path, 1e6, "done", stall_s=10.0, start_s=10.0), tmp_path, clock)
    (tmp_path / "progress.json").write_text("{")
    assert dog.hang() is None
    clock.now = 11.0
    assert dog.hang() == "told no progress in 11 s since its start"


def test_without_limits_there_is_no_watchdog(tmp_path: Path) -> None:
    clock = Clock(now=1e9)
    dog = Watchdog(Job("a", ("true",), tmp_path, 1.0, "done"), tmp_path, lambda: clock.now)
    clock.now = 2e9
    assert dog.hang() is None and dog.tick_s == float("inf")
    assert not os.listdir(tmp_path)
