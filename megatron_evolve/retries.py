"""Retries: how late and how often a job that its machine failed is tried again, and when to stop trying.

Only infrastructure endings (lost, hung) are tried again, each time after a longer wait. Two counts bound them:

- a job's own failures. The third gives it up, if anything ended otherwise since its first, or if it fails alone.
- failures in a row, with no other ending between. At five the breaker opens and the campaign pauses (`Paused`).

So one job that always fails costs three attempts and stops nothing, and a machine that fails everything costs no job
its place: until the breaker opens nothing is given up, and what failed before a pause is forgiven after it. Failures
that strike together count as one in the row: a node that goes down with eight jobs failed once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_evolve.launch.job import INFRASTRUCTURE_KINDS, JobOutcome, OutcomeKind
from megatron_evolve.launch.rundir import DamagedFile, attempt_dir, latest_attempt, read_outcome


class Paused(Exception):
    """Something that only an operator mends stands in the way. `attempts` is, by job, the latest that failed.

    Everything finished is kept and what runs goes on; the same command goes on once it is mended. A pause that is to
    come once and no oftener has a name, `once`, under which the ledger keeps it.
    """

    status = 69  # EX_UNAVAILABLE

    def __init__(self, why: str, attempts: Mapping[str, int], once: str = "") -> None:
        super().__init__(f"paused: {why}; mend that, then run the same command again")
        self.why = why
        self.attempts = dict(attempts)
        self.once = once


def _failed(folder: Path) -> bool:
    """Whether an attempt ended by its machine's fault; a damaged outcome says as much as none."""
    try:
        outcome = read_outcome(folder)
    except DamagedFile:
        return True
    return outcome is not None and outcome.kind in INFRASTRUCTURE_KINDS


def _goes_on(folder: Path) -> bool:
    """Whether an attempt has not ended, or was called off."""
    outcome = read_outcome(folder)
    return outcome is None or outcome.kind is OutcomeKind.CANCELLED


@dataclass
class Retries:
    """The failures that one controller has seen, and those before it that its jobs' folders keep.

    `forgiven` is, by job, the last attempt before a pause. Where a failed job is for somebody to start again, as the
    origin's are, nothing of before counts: `kept` is false. A job's waits are 2, 16, 128, 600, 600, ... seconds.
    """

    attempts: int = 3
    in_a_row: int = 5
    first_wait_s: float = 2.0
    factor: float = 8.0
    longest_wait_s: float = 600.0
    forgiven: Mapping[str, int] = field(default_factory=dict)
    kept: bool = True
    _failures: dict[str, int] = field(default_factory=dict, init=False)  # of each job, forgiven ones apart
    _latest: dict[str, int] = field(default_factory=dict, init=False)  # its attempt that failed last
    _first_at: dict[str, int] = field(default_factory=dict, init=False)  # when this controller first saw it fail
    _row: int = field(default=0, init=False)
    _row_jobs: set[str] = field(default_factory=set, init=False)
    _row_at: int = field(default=-1, init=False)  # when the row last grew
    _other_at: int = field(default=-1, init=False)  # when a job last ended otherwise

    def failures(self, key: str, run_dir: Path) -> int:
        """Infrastructure failures of a job that count: what its folder keeps, and what was seen since."""
        if key not in self._failures:
            latest = latest_attempt(run_dir)
            counted = range(self.forgiven.get(key, 0) + 1, latest + 1 if self.kept else 0)
            failed = [number for number in counted if _failed(attempt_dir(run_dir, number))]
            self._failures[key] = len(failed)
            # One that did not end otherwise since is in the row: what fails beside it does not fail alone.
            if failed and (failed[-1] == latest or _goes_on(attempt_dir(run_dir, latest))):
                self._row_jobs.add(key)
                self._latest[key] = failed[-1]
        return self._failures[key]

    def may_go_on(self, key: str, run_dir: Path) -> bool:
        """Whether a job that failed before this controller has an attempt left.

        Raises Paused where it has none and others failed beside it: the pause that its controller did not live to
        enter.
        """
        failures = self.failures(key, run_dir)
        if failures >= self.in_a_row and self._row_jobs != {key}:
            others = len(self._row_jobs - {key})
            raise Paused(f"{key} failed {failures} times, and {others} more failed beside it", self._latest)
        return failures < self.in_a_row

    def failed(self, key: str, outcome: JobOutcome, began: int, now: int) -> float | None:
        """Seconds to wait before the job's next attempt, None if it is given up. Raises Paused when the breaker opens.

        `began` and `now` count the controller's looks at its jobs: at `began` this attempt was first seen to run (or
        last seen not to), at `now` it had failed.
        """
        self._failures[key] = self._failures.get(key, 0) + 1
        self._latest[key] = outcome.attempt
        self._first_at.setdefault(key, now)
        self._row_jobs.add(key)
        if self._row == 0 or began >= self._row_at:
            self._row, self._row_at = self._row + 1, now
        alone, bounded = self._row_jobs == {key}, self._failures[key] >= self.attempts
        if self._row >= self.in_a_row and not (alone and bounded):
            last = f"{key} {outcome.kind.value} ({outcome.reason})"
            raise Paused(f"{self._row} infrastructure failures in a row, last: {last}", self._latest)
        if bounded and (alone or self._other_at >= self._first_at[key]):
            self._forget(key)
            return None
        return min(self.first_wait_s * self.factor ** (self._failures[key] - 1), self.longest_wait_s)

    def ended(self, key: str, now: int) -> None:
        """A job ended otherwise, which shows that its machine works: the row is broken."""
        self._row, self._other_at = 0, now
        self._row_jobs.clear()
        self._forget(key)

    def _forget(self, key: str) -> None:
        for known in (self._failures, self._latest, self._first_at):
            known.pop(key, None)
