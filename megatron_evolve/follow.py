"""Following a ledger that somebody else writes: each look reads and checks only what was added since the last one.

A reader holds no lock. It sees whole lines; one that is being written waits for its end. Where the file shrank, was
replaced or no longer continues what was read (the writer takes a line back that its disk did not keep), it is read
anew from the start, once; a chain that is broken then is broken.
"""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

from megatron_evolve.ledger import GENESIS, Event, event_hash

Take = Callable[[Event], None]


class Follower:
    """The events of one ledger file, one at a time, as they come.

    `begin` is called whenever the ledger is read from its start, and gives what takes the events from there on; what
    was taken before is void.
    """

    def __init__(self, path: Path, begin: Callable[[], Take]) -> None:
        self.path = path
        self._begin = begin
        self._start_anew()

    def _start_anew(self) -> None:
        self._take = self._begin()
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._count = 0
        self._last = GENESIS

    def read(self) -> None:
        """Takes what is new. Raises ValueError in one sentence where there is no ledger or its chain is broken."""
        from_start = self._offset == 0
        try:
            self._read_on()
        except ValueError:
            if from_start:
                raise
            self._start_anew()
            self._read_on()

    def _read_on(self) -> None:
        try:
            with open(self.path, "rb") as file:
                stat = os.fstat(file.fileno())
                if self._file not in (None, (stat.st_dev, stat.st_ino)) or stat.st_size < self._offset:
                    self._start_anew()
                self._file = (stat.st_dev, stat.st_ino)
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    self._take_line(line)
        except FileNotFoundError:
            raise ValueError(
                f"{self.path.parent} holds no campaign: expected {self.path.name} in it; give a campaign's folder"
            ) from None
        except OSError as error:
            if error.errno != errno.ESTALE:  # NFS, of a file replaced while it is read: the next look opens the new one
                raise

    def _take_line(self, line: bytes) -> None:
        where = f"{self.path} line {self._count + 1}"
        try:
            fields = json.loads(line)
        except ValueError:
            raise ValueError(
                f"{where} is corrupt: expected one JSON event, got {line[:40]!r}; restore it from a copy"
            ) from None
        event = Event.parse(fields, where=where)
        expected = event_hash(self._count, event.time, event.kind, event.key, event.data, self._last)
        if event.number != self._count or event.previous != self._last or event.hash != expected:
            raise ValueError(
                f"{where} breaks the chain: expected hash {expected[:12]}, got {event.hash[:12]}; a line was changed, "
                "removed or moved; restore the ledger from a copy"
            )
        self._offset += len(line)
        self._count, self._last = self._count + 1, event.hash
        self._take(event)
