"""The watchdog: a job whose count of progress stands still hangs, however busy it looks.

A rank that waits in a collective for one that died burns its core and its GPU for ever, so neither load nor life tells
work from a hang. The job's own count does (`rundir.Pulse`). What is measured is how long ago this process last saw the
count change, on its own monotonic clock: no clock of the job's or of the file system's is believed.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

from megatron_evolve.launch import rundir
from megatron_evolve.launch.job import Job

LONGEST_TICK_S = 5.0


class Watchdog:
    """Looks at one attempt's progress now and then. A job without `stall_s` and `start_s` is never said to hang."""

    def __init__(self, job: Job, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._clock = folder, clock
        self._stall_s = job.stall_s if job.stall_s is not None else math.inf
        self._start_s = job.start_s if job.start_s is not None else math.inf
        self._seen: rundir.Progress | None = None
        self._moved_at = clock()

    @property
    def tick_s(self) -> float:
        """How often to look: a hang is found within a quarter of its allowance."""
        shortest = min(self._stall_s, self._start_s) / 4
        return min(LONGEST_TICK_S, shortest) if math.isfinite(shortest) else math.inf

    def hang(self) -> str | None:
        """What stands still, in words, if the job hangs by now."""
        if not math.isfinite(self.tick_s):
            return None
        found = self._read()
        if found is not None and (self._seen is None or found.step != self._seen.step):
            self._seen, self._moved_at = found, self._clock()
        still_s = self._clock() - self._moved_at
        if still_s <= self._allowance_s():
            return None
        if self._seen is None:
            return f"told no progress in {still_s:.0f} s since its start"
        return f"stood still at step {self._seen.step} of {self._seen.steps} for {still_s:.0f} s"

    def _allowance_s(self) -> float:
        between = self._seen is not None and self._seen.step < self._seen.steps
        return self._stall_s if between else self._start_s

    def _read(self) -> rundir.Progress | None:
        """The latest word. A file that cannot be read now is no progress, and no reason to end a job's supervisor."""
        try:
            return rundir.read_progress(self._folder)
        except rundir.RunDirError:
            return None
