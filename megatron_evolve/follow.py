"""Following a ledger that somebody else writes: each look reads and checks only what was added since the last one.

A reader holds no lock. It sees whole lines; one that is being written waits for its end. Where the file shrank, was
replaced or no longer continues what was read (the writer takes a line back that its disk did not keep), it is read
anew from the start, once; a chain that is broken then is broken.
"""

import json
import os
from pathlib import Path

from megatron_evolve.ledger import GENESIS, Event, event_hash


class Follower:
    """The events of one ledger file, as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.restarts = -1  # the first reading is none
        self._start_anew()

    def _start_anew(self) -> None:
        self.restarts += 1
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._count = 0
        self._last = GENESIS

    def read(self) -> tuple[bool, list[Event]]:
        """Whether these events begin the ledger again (what was read before is void), and the new events.

        Raises ValueError in one sentence where there is no ledger or its chain is broken.
        """
        before, fresh = self.restarts, self._offset == 0
        try:
            events = self._next()
        except ValueError:
            if fresh:
                raise
            self._start_anew()
            events = self._next()
        return fresh or self.restarts != before, events

    def _next(self) -> list[Event]:
        try:
            with open(self.path, "rb") as file:
                stat = os.fstat(file.fileno())
                if self._file not in (None, (stat.st_dev, stat.st_ino)) or stat.st_size < self._offset:
                    self._start_anew()
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            raise ValueError(
                f"{self.path.parent} holds no campaign: expected {self.path.name} in it; give a campaign's folder"
            ) from None
        self._file = (stat.st_dev, stat.st_ino)
        return [self._event(line) for line in data.split(b"\n")[:-1]]

    def _event(self, line: bytes) -> Event:
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
        self._offset += len(line) + 1
        self._count, self._last = self._count + 1, event.hash
        return event
