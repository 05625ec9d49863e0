"""What runs now: the controller and its jobs, read from their files by somebody who takes no lock and stops nothing.

    DIR/controller.lock                                           who holds the campaign, or held it last
    DIR/rounds/N/CANDIDATE/runs/SEED/STAGE/attempts/A/*.json      jobs of round N
    DIR/closing/CANDIDATE/SEED/STAGE/attempts/A/*.json            the origin's runs, asked at the end

Files come and go while they are read: what is not there, or not whole, is not known, and is no error. The cost is one
listing of the open round's folders and four small files for each job in it that the ledger does not hold as ended.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.launch.process import ProcessIdentity
from megatron_evolve.launch.rundir import (
    JOB_FILE,
    OUTCOME_FILE,
    PROGRESS_FILE,
    QUEUE_FILE,
    SUPERVISOR_FILE,
    Queued,
    attempt_dir,
)
from megatron_evolve.tally import Tally

JobState = Literal["running", "gone", "ended", "waiting"]
STATES: tuple[JobState, ...] = get_args(JobState)  # in the order that jobs are told in


@dataclass(frozen=True)
class JobNow:
    """A job that the ledger does not hold as ended.

    state       waiting: asked for and not begun; running; gone: its supervisor on this machine died, which the
                controller will find; ended: over, and not yet entered in the ledger
    step, steps how far it says it is; None before it has said anything
    told_at     when it said so, unix seconds
    since       when its attempt began, unix seconds
    waits_for   why a scheduler has not started it, in its own words; empty where it has, or says nothing
    """

    key: str
    attempt: int
    state: JobState
    step: int | None
    steps: int | None
    told_at: float | None
    since: float | None
    waits_for: str = ""

    @property
    def share(self) -> float:
        """Done of one whole, 0 where nothing is known."""
        return min(1.0, self.step / self.steps) if self.step is not None and self.steps else 0.0


@dataclass(frozen=True)
class Controller:
    """Who holds a campaign. `alive` is None for a process of another machine, which cannot be seen from here."""

    pid: int
    host: str
    alive: bool | None


def controller_of(folder: CampaignFolder) -> Controller | None:
    """The controller that the lock names, alive or not; None where none ever was."""
    identity = _identity(_read(folder.lock))
    return None if identity is None else Controller(identity.pid, identity.host, _alive(identity))


def jobs_now(folder: CampaignFolder, tally: Tally) -> list[JobNow]:
    """The jobs of the open round, or of the closing, that have an attempt and are not in the ledger as ended."""
    if tally.opened is None or tally.closing is not None:
        return []
    number = tally.round + tally.round_is_closed
    stages = [(f"{number}/{key}", path) for key, path in _stages(folder.round(number), ("*", "runs", "*", "*"))]
    if number > tally.rounds:
        stages += [(f"0/{key}", path) for key, path in _stages(folder.closing, ("*", "*", "*"))]
    found = [_job(key, path) for key, path in stages if key not in tally.ended_in_round]
    return sorted((job for job in found if job is not None), key=lambda job: (STATES.index(job.state), job.key))


def _stages(base: Path, pattern: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Stage folders below `base`, as `CANDIDATE/SEED/STAGE`. A name in `pattern` is a folder, a star any of them."""
    level: list[tuple[str, Path]] = [("", base)]
    for name in pattern:
        if name != "*":
            level = [(key, path / name) for key, path in level]
            continue
        level = [(f"{key}/{child.name}".lstrip("/"), child) for key, path in level for child in _folders(path)]
    yield from level


def _folders(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir())
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):  # not made yet, or just removed
            return []
        raise


def _job(key: str, run_dir: Path) -> JobNow | None:
    attempts = [int(path.name) for path in _folders(run_dir / "attempts") if path.name.isdigit()]
    if not attempts:
        return None
    folder = attempt_dir(run_dir, max(attempts))
    if not (folder / JOB_FILE).exists():
        return None
    supervisor = _identity(_read(folder / SUPERVISOR_FILE))
    told = _progress(_read(folder / PROGRESS_FILE))
    state: JobState = "running" if supervisor or told else "waiting"
    if (folder / OUTCOME_FILE).exists():
        state = "ended"
    elif supervisor is not None and _alive(supervisor) is False:
        state = "gone"
    step, steps, at = told or (None, None, None)
    since = _modified(folder / SUPERVISOR_FILE)
    waits_for = "" if state == "ended" else _waits_for(folder, max(since or 0.0, at or 0.0))
    if waits_for:  # its scheduler has put it back, if it had begun
        state = "waiting"
    return JobNow(key, max(attempts), state, step, steps, at, since, waits_for)


def _waits_for(folder: Path, began: float) -> str:
    """What its scheduler says of an attempt that is pending. Old news once the attempt began, or said how far it is."""
    document = _read(folder / QUEUE_FILE)
    try:
        queued = Queued(**document)
    except TypeError:  # none, or not whole
        return ""
    is_news = (_modified(folder / QUEUE_FILE) or 0.0) > began
    return queued.reason if is_news and queued.state.lower() == "pending" else ""


def _progress(document: Any) -> tuple[int, int, float] | None:
    """Step, steps and when, if the document says so; a job is not trusted to count well."""
    try:
        step, steps, at = int(document["step"]), int(document["steps"]), float(document["at"])
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
    return (min(max(step, 0), steps), steps, at) if steps > 0 else None


def _identity(document: Any) -> ProcessIdentity | None:
    try:
        return ProcessIdentity(**document)
    except TypeError:  # none, or not whole
        return None


def _alive(identity: ProcessIdentity) -> bool | None:
    """None for another host: containers of one machine share its boot, and not its processes."""
    return identity.is_alive if identity.host == os.uname().nodename else None


def _read(path: Path) -> Any:
    """A JSON document, None if there is none to read now: a writer may be between two of its steps."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_bytes())
    return None


def _modified(path: Path) -> float | None:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return None
