"""Following files that somebody else appends to: each look reads only what was added since the last one.

A reader holds no lock. It sees whole lines; one that is being written waits for its end. Where the file shrank, was
replaced, or (of a ledger) no longer continues what was read, for the writer takes a line back that its disk did not
keep, it is read anew from the start, once; a chain that is broken then is broken.
"""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

from megatron_evolve.eval.looks import is_budgeted
from megatron_evolve.ledger import GENESIS, Event, check_follows, parsed_event


class Tail:
    """The whole lines of one file, as they come.

    `begin` is called whenever the file is read from its start, and gives what takes the lines from there on; what was
    taken before is void.
    """

    def __init__(self, path: Path, begin: Callable[[], Callable[[bytes], None]]) -> None:
        self.path = path
        self._begin = begin
        self.start_anew()

    def start_anew(self) -> None:
        """Forgets what was read."""
        self._take = self._begin()
        self._file: tuple[int, int] | None = None
        self.offset = 0

    def read(self) -> None:
        """Takes what is new. Raises FileNotFoundError."""
        try:
            with open(self.path, "rb") as file:
                stat = os.fstat(file.fileno())
                if self._file not in (None, (stat.st_dev, stat.st_ino)) or stat.st_size < self.offset:
                    self.start_anew()
                self._file = (stat.st_dev, stat.st_ino)
                file.seek(self.offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    self._take(line)
                    self.offset += len(line)
        except OSError as error:
            if error.errno != errno.ESTALE:  # NFS, of a file replaced while it is read: the next look opens the new one
                raise


class Follower:
    """The events of a ledger, its chain checked, one at a time. `begin` as in `Tail`, for events."""

    def __init__(self, path: Path, begin: Callable[[], Callable[[Event], None]]) -> None:
        self.path = path
        self._begin = begin
        self._tail = Tail(path, self._start)

    def _start(self) -> Callable[[bytes], None]:
        self._take = self._begin()
        self._count, self._last = 0, GENESIS
        return self._take_line

    def read(self) -> None:
        """Takes what is new. Raises ValueError in one sentence where there is no ledger or its chain is broken."""
        from_start = self._tail.offset == 0
        try:
            self._tail.read()
        except FileNotFoundError:
            raise ValueError(
                f"{self.path.parent} holds no campaign: expected {self.path.name} in it; give a campaign's folder"
            ) from None
        except ValueError:
            if from_start:
                raise
            self._tail.start_anew()
            self._tail.read()

    def _take_line(self, line: bytes) -> None:
        event = parsed_event(self.path, line, self._count)
        check_follows(self.path, event, self._last)
        self._count, self._last = self._count + 1, event.hash
        self._take(event)


class LooksCount:
    """How many looks the account holds, by kind, as `Looks.summary` counts them; the limit apart."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tail = Tail(path, self._start)

    def _start(self) -> Callable[[bytes], None]:
        self.dev = self.external = 0
        return self._take_line

    def read(self) -> None:
        """Counts what is new; an account that is not there has none. Raises ValueError for a line that is no look."""
        try:
            self._tail.read()
        except FileNotFoundError:
            if self._tail.offset:
                self._tail.start_anew()

    def _take_line(self, line: bytes) -> None:
        try:
            split = json.loads(line)["split"]
            self.dev += split.startswith("dev")
            self.external += is_budgeted(split)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{self._path}: expected a look in JSON, got {line[:40]!r}: restore the account") from None
