"""The starts of an attempt: what each took, measured or not. A scheduler may start the same job more than once.

    attempts/N/supervisor.json, alive         of the latest start; without them the attempt never began
    attempts/N/starts/0.supervisor.json ...   of the starts before it; 0.alive, and what it said
    attempts/N/starts/0.json ...              how a start ended, in its own words

A start that its node took with it leaves no such words. It is counted from its begin to its last sign of life, and for
the time in which the next sign was due: never short, and never for the hours that its successor waited in a queue. Both
are times of the file system, so that no node's clock matters.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_evolve.launch import rundir
from megatron_evolve.launch.job import JobOutcome
from megatron_evolve.launch.rundir import ALIVE_EVERY_S, ALIVE_FILE, SUPERVISOR_FILE, DamagedFile

STARTS_FOLDER = "starts"
_OF_A_START = (SUPERVISOR_FILE, ALIVE_FILE, "stdout.log", "stderr.log")


def record(folder: Path, number: int, outcome: JobOutcome) -> None:
    """Keep how a start ended. Raises RunDirError."""
    rundir.make_folder(folder / STARTS_FOLDER)
    rundir.write_json(folder / STARTS_FOLDER / f"{number}.json", outcome.to_json())


def put_aside(folder: Path, number: int) -> None:
    """Put aside what start `number`, the latest, left: the next one begins once too, and is judged by its own words."""
    rundir.make_folder(folder / STARTS_FOLDER)
    for name in _OF_A_START:
        if (folder / name).exists():
            (folder / name).rename(folder / STARTS_FOLDER / f"{number}.{name}")


def life_s(folder: Path) -> float:
    """Wall time of all starts of an attempt that have ended: as recorded, else as long as they can have lived."""
    records = _records(folder)
    return sum(one.seconds or 0.0 for one in records.values()) + sum(_unseen_s(folder, records))


def charged(folder: Path, outcome: JobOutcome) -> JobOutcome:
    """The end of an attempt with what all its starts took; None where one of them was not measured."""
    records = _records(folder)
    starts = [records[number] for number in sorted(records)]
    whole = bool(starts) and not any(True for _ in _unseen_s(folder, records))
    cpu_seconds = [one.cpu_seconds for one in starts]
    memory = [one.max_rss_bytes for one in starts if one.max_rss_bytes is not None]
    return dataclasses.replace(
        outcome,
        seconds=round(sum(one.seconds or 0.0 for one in starts), 6) if whole else None,
        cpu_seconds=round(sum(cpu_seconds), 6) if whole and None not in cpu_seconds else None,
        max_rss_bytes=max(memory, default=None),
        started_at=starts[0].started_at if starts else outcome.started_at,
    )


def _records(folder: Path) -> dict[int, JobOutcome]:
    """How starts ended, by number. One whose record is damaged is as good as not recorded."""
    found = {}
    for path in (folder / STARTS_FOLDER).glob("*.json"):
        if path.stem.isdigit():
            try:
                found[int(path.stem)] = rundir.read_outcome_file(path)
            except DamagedFile:
                continue
    return found


def _unseen_s(folder: Path, records: Mapping[int, JobOutcome]) -> Iterator[float]:
    """What each start can have lived that began and left no record."""
    aside = {int(path.name.partition(".")[0]): path for path in (folder / STARTS_FOLDER).glob(f"*.{SUPERVISOR_FILE}")}
    for number, begun in aside.items():
        if number not in records:
            yield _lived_s(begun, begun.with_name(f"{number}.{ALIVE_FILE}"))
    # The latest start's number is not told. It is above those put aside, and only its own record can be, too.
    latest = folder / SUPERVISOR_FILE
    if latest.exists() and max(records, default=-1) <= max(aside, default=-1):
        yield _lived_s(latest, folder / ALIVE_FILE)


def _lived_s(begun: Path, alive: Path) -> float:
    from_s = begun.stat().st_mtime
    last_s = alive.stat().st_mtime if alive.exists() else from_s
    return max(0.0, last_s - from_s) + ALIVE_EVERY_S
