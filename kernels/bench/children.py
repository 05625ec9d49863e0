"""Processes whose rows are read as they come, whatever becomes of the process: it dies, hangs, or prints other things.

Each runs in a process group of its own, so that what it started (a compiler, a second process) goes with it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import NamedTuple

ROOT = str(Path(__file__).resolve().parents[2])
SETTLE_S = 3.0  # from the end of a process, or its killing, to that of its lines: a grandchild may hold the pipe open
TOLD = 12  # lines of its complaint that are kept


class Ended(NamedTuple):
    """The last that is heard of a process; no reason where it ended well."""

    reason: str | None
    complaint: list[str]  # the end of what it wrote to stderr


class Child:
    """`python COMMAND` with its lines coming into a queue as (child, line), (child, None) at the last."""

    def __init__(self, command: list[str], lines: Queue, until: float, silent_s: float) -> None:
        # a pipe that nobody reads would fill and block; `end` closes the file
        self.complaint = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.complaint,
            text=True,
            errors="replace",
            cwd=ROOT,
            start_new_session=True,
        )
        self.until, self.silent_s, self.heard = until, silent_s, time.monotonic()
        self.given_up: float | None = None  # when nothing more is awaited
        self.late: str | None = None
        Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: Queue) -> None:
        for line in self.process.stdout:
            lines.put((self, line))
        lines.put((self, None))

    def is_over(self, now: float) -> bool:
        """Whether nothing more is to be awaited; kills one whose time is used up."""
        if self.given_up is not None:
            return now > self.given_up
        if self.process.poll() is not None:
            self.given_up = now + SETTLE_S
        elif now > self.until:
            self._give_up("it had not ended when the time of this check was used up")
        elif now > self.heard + self.silent_s:
            self._give_up(f"it said nothing for {self.silent_s:.0f} s")
        return False

    def _give_up(self, why: str) -> None:
        self.late = why
        self.kill()
        self.given_up = time.monotonic() + SETTLE_S

    def kill(self) -> None:
        """The process and all it started; harmless where all have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> Ended:
        """How it ended. One that SIGKILL does not end within seconds hangs in a driver, and is left."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(SETTLE_S)
        status = self.process.poll()
        self.kill()
        self.complaint.seek(0)
        told = [line[:500] for line in self.complaint.read().strip().splitlines()[-TOLD:]]
        self.complaint.close()
        if status == 0 and self.late is None:
            return Ended(None, [])
        last = self.late or (told[-1] if told else "no message")
        return Ended(f"status {status}: {last}", told)


class Children:
    """Several of them side by side; on leaving, none is left running."""

    def __init__(self) -> None:
        self.lines: Queue[tuple[Child, str | None]] = Queue()
        self.running: list[Child] = []

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.running:
            child.kill()
            child.end()

    def start(self, command: list[str], until: float = float("inf"), silent_s: float = float("inf")) -> Child:
        child = Child(command, self.lines, until, silent_s)
        self.running.append(child)
        return child

    def told(self) -> Iterator[tuple[Child, str | Ended]]:
        """Each line of each as it comes and its end, until none runs; some may be started meanwhile."""
        while self.running:
            try:
                child, line = self.lines.get(timeout=0.2)
            except Empty:
                child, line = None, None
            if child in self.running:
                child.heard = time.monotonic()
                if line is not None:
                    yield child, line
                else:
                    yield self._left(child)
            if self.lines.empty():
                now = time.monotonic()
                over = [child for child in self.running if child.is_over(now)]
                for child in over:
                    yield self._left(child)

    def _left(self, child: Child) -> tuple[Child, Ended]:
        self.running.remove(child)
        return child, child.end()
