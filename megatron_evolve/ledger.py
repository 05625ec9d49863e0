"""The ledger: what happened in a campaign, in order, append-only and hash-chained.

One JSON object a line: number, time, kind, key, data, the hash of the line before, its own hash. There is one writer; a
line is on disk (fsync) before anything that depends on it happens. `once` is how the loop resumes: an event whose kind
and key already stand in the ledger is returned instead of happening again.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator
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


def read_ledger(path: Path) -> list[Event]:
    """All whole events, chain checked. Raises ValueError naming the first broken line.

    A last line without its newline was torn by a crash while it was written: nothing depended on it yet, so it is left
    out here and cut off when the ledger is next opened for writing.
    """
    return list(_chained(path, _whole_lines(path)))


def _whole_lines(path: Path) -> list[bytes]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"{path.parent} holds no campaign: expected {path.name} in it; give a campaign's folder"
        ) from None
    return data.split(b"\n")[:-1]


def _chained(path: Path, lines: list[bytes]) -> Iterator[Event]:
    previous = GENESIS
    for number, line in enumerate(lines):
        where = f"{path} line {number + 1}"
        try:
            fields = json.loads(line)
        except ValueError:
            raise ValueError(
                f"{where} is corrupt: expected one JSON event, got {line[:40]!r}; restore it from a copy"
            ) from None
        event = Event.parse(fields, where=where)
        expected = event_hash(number, event.time, event.kind, event.key, event.data, previous)
        if event.number != number or event.previous != previous or event.hash != expected:
            raise ValueError(
                f"{where} breaks the chain: expected hash {expected[:12]}, got {event.hash[:12]}; a line was changed, "
                "removed or moved; restore the ledger from a copy"
            )
        previous = event.hash
        yield event


class Ledger:
    """The open ledger of a running campaign. Hold the campaign's lock while you write."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER
        fresh = not self.path.exists()
        lines = [] if fresh else _whole_lines(self.path)
        self.events = list(_chained(self.path, lines))
        self._by_key = {(event.kind, event.key): event for event in self.events}
        # Unbuffered: nothing may reach the file later than the truncation that takes a failed line back.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open for the campaign's life
        self._whole_bytes = sum(len(line) + 1 for line in lines)
        self._file.truncate(self._whole_bytes)
        if fresh:
            sync_folder(folder)

    def find(self, kind: str, key: str = "") -> Event | None:
        """The event of this kind and key, if it happened."""
        return self._by_key.get((kind, key))

    def of_kind(self, kind: str) -> list[Event]:
        """All events of a kind, in order."""
        return [event for event in self.events if event.kind == kind]

    def append(self, kind: str, key: str, data: dict[str, Any]) -> Event:
        """Writes one event and returns it once it is on disk. A kind and key happen once. Raises RunDirError."""
        assert (kind, key) not in self._by_key, f"{kind} {key} happened before"
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        previous = self.events[-1].hash if self.events else GENESIS
        number = len(self.events)
        plain = json.loads(json.dumps(data))
        event = Event(
            number=number,
            time=time,
            kind=kind,
            key=key,
            data=plain,
            previous=previous,
            hash=event_hash(number, time, kind, key, plain, previous),
        )
        self._write(json.dumps(event.model_dump(), ensure_ascii=False).encode() + b"\n")
        self.events.append(event)
        self._by_key[kind, key] = event
        return event

    def _write(self, line: bytes) -> None:
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._whole_bytes)
            raise RunDirError(
                f"expected to enter an event in {self.path}, got {(error.strerror or str(error)).lower()}: free space "
                "on that disk, then run the same command again"
            ) from error
        self._whole_bytes += len(line)

    def once(self, kind: str, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Data of the event, which happens now unless it did before."""
        event = self.find(kind, key)
        return event.data if event else self.append(kind, key, make()).data

    def close(self) -> None:
        """Closes the file; the ledger can be read on."""
        self._file.close()
