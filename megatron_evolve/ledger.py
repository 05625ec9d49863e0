"""The ledger: what happened in a campaign, in order, append-only and hash-chained.

One JSON object a line: number, time, kind, key, data, the hash of the line before, its own hash. There is one writer; a
line is on disk (fsync) before anything that depends on it happens. `once` is how the loop resumes: an event whose kind
and key already stand in the ledger is returned instead of happening again.

What is kept of an event in memory is where its line lies (some 300 bytes), under its kind, key and round; the event
itself is read again when it is asked for. So a campaign of 1,250 rounds costs what the last round costs.
"""

import errno
import json
import os
import sys
from array import array
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_evolve.launch.rundir import RunDirError, sync_folder
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.frozen import Frozen

LEDGER = "ledger.jsonl"
GENESIS = "0" * 64


class Event(Frozen):
    """One line of the ledger."""

    number: int
    time: str
    kind: str
    key: str
    data: dict[str, Any]
    previous: str
    hash: str


def event_hash(number: int, time: str, kind: str, key: str, data: dict[str, Any], previous: str) -> str:
    """sha256 that chains an event to the one before it."""
    return digest_of({"number": number, "time": time, "kind": kind, "key": key, "data": data, "previous": previous})


class History:
    """The whole events of a ledger's file: the chain is checked once, and an event is read again when it is asked for.

    A last line without its newline was torn by a crash while it was written: nothing depended on it yet, so it is left
    out here and cut off when the ledger is next opened for writing.
    """

    def __init__(self, path: Path, see: Callable[[Event], None] = lambda event: None) -> None:
        """Shows `see` each event. Raises ValueError where there is no file, or naming the first broken line."""
        self.path = path
        self.last = GENESIS
        self.whole_bytes = 0
        self._places = array("Q")  # first byte of each line
        self._numbers: dict[tuple[str, str], int] = {}
        self._rounds: dict[tuple[str, int], list[int]] = {}
        try:
            with open(path, "rb") as file:
                for line in file:
                    if line.endswith(b"\n"):
                        event = self._parsed(line, len(self))
                        check_follows(path, event, self.last)
                        self._note(event, len(line))
                        see(event)
        except FileNotFoundError:
            raise ValueError(
                f"{path.parent} holds no campaign: expected {path.name} in it; give a campaign's folder"
            ) from None

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Event]:
        """All events in order, one at a time."""
        with open(self.path, "rb") as file:
            for number in range(len(self)):
                yield self._parsed(file.readline(), number)

    def find(self, kind: str, key: str = "") -> Event | None:
        """The event of this kind and key, if it happened."""
        number = self._numbers.get((kind, key))
        return None if number is None else self._read([number])[0]

    def has(self, kind: str, key: str = "") -> bool:
        """Whether an event of this kind and key happened."""
        return (kind, key) in self._numbers

    def of_round(self, kind: str, number: int) -> list[Event]:
        """The events of a kind whose keys begin with a round's number, in order."""
        return self._read(self._rounds.get((kind, number), []))

    def keys(self, kind: str) -> list[str]:
        """The keys under which events of a kind happened, in order."""
        return [key for one, key in self._numbers if one == kind]

    def of_kind(self, kind: str) -> Iterator[Event]:
        """The events of a kind, in order, one at a time."""
        return (self._read([number])[0] for (one, _), number in list(self._numbers.items()) if one == kind)

    @property
    def latest(self) -> Event | None:
        """The event that happened last."""
        return self._read([len(self) - 1])[0] if len(self) else None

    def latest_but(self, kinds: Collection[str]) -> Event | None:
        """The event that happened last, those of these kinds passed over."""
        events = (self._read([number])[0] for number in reversed(range(len(self))))
        return next((event for event in events if event.kind not in kinds), None)

    def _read(self, numbers: list[int]) -> list[Event]:
        if not numbers:
            return []
        found = []
        with open(self.path, "rb") as file:
            for number in numbers:
                file.seek(self._places[number])
                found.append(self._parsed(file.readline(), number))
        return found

    def _note(self, event: Event, length: int) -> None:
        self._places.append(self.whole_bytes)
        self.whole_bytes += length
        self.last = event.hash
        kind = sys.intern(event.kind)
        self._numbers[kind, event.key] = event.number
        first = event.key.partition("/")[0]
        if first.isdigit():
            self._rounds.setdefault((kind, int(first)), []).append(event.number)

    def _parsed(self, line: bytes, number: int) -> Event:
        return parsed_event(self.path, line, number)


def parsed_event(path: Path, line: bytes, number: int) -> Event:
    """The event in a line, its own hash checked. Raises ValueError in one sentence, with the line's place."""
    where = f"{path} line {number + 1}"
    corrupt = f"{where} is corrupt: expected one JSON event, got {line[:40]!r}; restore it from a copy"
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(corrupt) from None
    event = Event.parse(fields, where=where)
    try:
        expected = event_hash(number, event.time, event.kind, event.key, event.data, event.previous)
    except (ValueError, RecursionError):  # half a surrogate pair, or brackets without end: JSON of no event
        raise ValueError(corrupt) from None
    if event.number != number or event.hash != expected:
        raise _broken(where, expected, event.hash)
    return event


def check_follows(path: Path, event: Event, last: str) -> None:
    """Raises ValueError unless an event is chained to the hash before it."""
    if event.previous != last:
        raise _broken(f"{path} line {event.number + 1}", last, event.previous)


def _broken(where: str, expected: str, got: str) -> ValueError:
    return ValueError(
        f"{where} breaks the chain: expected hash {expected[:12]}, got {got[:12]}; a line was changed, removed or "
        "moved; restore the ledger from a copy"
    )


def read_ledger(path: Path) -> list[Event]:
    """All whole events, chain checked, in memory. Raises ValueError as `History` does."""
    events: list[Event] = []
    History(path, events.append)
    return events


class Ledger(History):
    """The open ledger of a running campaign. Hold the campaign's lock while you write."""

    def __init__(self, folder: Path, see: Callable[[Event], None] = lambda event: None) -> None:
        """Raises ValueError as `History` does. `see` is shown each event that stands there, not those appended."""
        path = folder / LEDGER
        # Unbuffered: nothing may reach the file later than the truncation that takes a failed line back.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open for the campaign's life
        try:
            # A power cut may yet take what a controller before this one wrote and did not live to secure.
            os.fsync(self._file.fileno())
            sync_folder(folder)
            super().__init__(path, see)
            self._file.truncate(self.whole_bytes)
        except BaseException:
            self._file.close()
            raise

    def append(self, kind: str, key: str, data: dict[str, Any]) -> Event:
        """Writes one event and returns it once it is on disk. A kind and key happen once. Raises RunDirError."""
        assert not self.has(kind, key), f"{kind} {key} happened before"
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        number, plain = len(self), json.loads(json.dumps(data))
        event = Event(
            number=number,
            time=time,
            kind=kind,
            key=key,
            data=plain,
            previous=self.last,
            hash=event_hash(number, time, kind, key, plain, self.last),
        )
        line = json.dumps(event.model_dump(), ensure_ascii=False).encode() + b"\n"
        self._write(line)
        self._note(event, len(line))
        return event

    def _write(self, line: bytes) -> None:
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self.whole_bytes)
            raise RunDirError(
                f"expected to enter an event in {self.path}, got {(error.strerror or str(error)).lower()}: free space "
                "on that disk, then run the same command again"
            ) from error

    def once(self, kind: str, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Data of the event, which happens now unless it did before."""
        event = self.find(kind, key)
        return event.data if event else self.append(kind, key, make()).data

    def close(self) -> None:
        """Closes the file; the ledger can be read on."""
        self._file.close()
