"""The files of a run folder: written whole or not at all, and held by one owner at a time.

    RUN_DIR/lock                       held by the live supervisor, whoever waits for it
    RUN_DIR/outcome.json               how the latest attempt ended
    RUN_DIR/attempts/N/job.json        what was asked for; its presence makes N an attempt
    RUN_DIR/attempts/N/supervisor.json the supervisor's identity; its presence means that N has begun, as it does once
    RUN_DIR/attempts/N/alive           when its supervisor last said that it lives, by the file's time
    RUN_DIR/attempts/N/cancel          asked to stop
    RUN_DIR/attempts/N/progress.json   how far N is, by its own word
    RUN_DIR/attempts/N/queue.json      what the scheduler last said of N, where there is one
    RUN_DIR/attempts/N/outcome.json    how N ended; stays when N + 1 follows
    RUN_DIR/attempts/N/{stdout,stderr,supervisor}.log
    everything else                    the job's own

Rename within one folder and the fsync of that folder are what NFS and Lustre promise too.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_evolve.launch.job import Job, JobOutcome, canonical_json
from megatron_evolve.launch.process import ProcessIdentity

JOB_FILE = "job.json"
SUPERVISOR_FILE = "supervisor.json"
OUTCOME_FILE = "outcome.json"
ALIVE_FILE = "alive"
CANCEL_FILE = "cancel"
LOCK_FILE = "lock"
PROGRESS_FILE = "progress.json"
QUEUE_FILE = "queue.json"
SUPERVISOR_LOG = "supervisor.log"
ATTEMPT_VARIABLE = "MEGATRON_EVOLVE_ATTEMPT"  # tells a job its attempt folder, and tells whose a stray process is
PROGRESS_EVERY_S = 2.0
ALIVE_EVERY_S = 20.0  # so much too much is charged at most where nobody saw the end: 0.04 hours of 8 GPUs

_REMEDIES = {
    errno.ENOSPC: "free space on that disk, then run the same command again",
    errno.EDQUOT: "free some of your quota, then run the same command again",
    errno.EROFS: "mount it writable or choose another folder",
    errno.EACCES: "make it writable for this user or choose another folder",
    errno.EPERM: "make it writable for this user or choose another folder",
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "choose another path: a part of it is a file",
}


class RunDirError(Exception):
    """A file of a run folder could not be read or written. The message is one sentence with the remedy."""


class DamagedFile(RunDirError):
    """A file was there and could be read, but what it holds is not what belongs into it."""


class LockHeld(RunDirError):
    """The lock belongs to another live process, which the message names."""


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees all of it or none, even after a power cut. Raises RunDirError.

    What stands there and is no regular file (a folder, a device, a pipe) is not replaced: a rename would take it away.
    """
    if path.exists() and not path.is_file():
        raise RunDirError(f"expected to write a file at {path}, found something else there: name a file")
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        raise _told(error, "write", path) from error


def publish(partial: Path, path: Path) -> None:
    """Give a whole file or folder its name, for good: what is in `partial`, then the name, reach the disk.

    The files within a folder are synced by who wrote them. Raises OSError as the file system does.
    """
    assert partial.parent == path.parent, f"{partial} and {path} must lie in one folder, or the rename is not atomic"
    sync(partial)
    os.rename(partial, path)
    sync_folder(path.parent)


def write_json(path: Path, document: object) -> None:
    """Write canonical JSON whole."""
    write_whole(path, canonical_json(document))


def read_json(path: Path) -> Any:
    """Read a JSON document. Raises RunDirError if there is none to read, DamagedFile if it is truncated or not JSON."""
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError as error:
        raise RunDirError(
            f"expected the file {path}; it is missing: restore it or redo the step that writes it"
        ) from error
    except OSError as error:
        raise _told(error, "read", path) from error
    except UnicodeDecodeError as error:
        raise DamagedFile(f"expected JSON in {path}; got bytes that are not UTF-8: restore it from a copy") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # Canonical JSON ends with a newline, so text that stops without one has lost its end.
        found = "an empty file" if not text else f"text that goes wrong at byte {error.pos} of {len(text.encode())}"
        why = "truncated" if not text.endswith("\n") else "not JSON"
        raise DamagedFile(f"expected JSON in {path}; got {found} ({why}): restore it from a copy") from error
    except RecursionError:
        raise DamagedFile(f"expected JSON in {path}; got thousands of brackets in brackets: restore it") from None


def resolved(path: Path) -> Path:
    """The whole path, links followed. Raises RunDirError where they lead round in a circle."""
    try:
        return path.resolve()
    except RuntimeError:  # until Python 3.13, which leaves such a path as it is
        raise RunDirError(f"cannot follow {path}: its links lead round in a circle; choose another path") from None


def make_folder(path: Path) -> None:
    """Make a folder and its parents, unless they exist; a new one is on disk in its parent. Raises RunDirError."""
    try:
        missing = [one for one in (path, *path.parents) if not one.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for one in missing:
            sync_folder(one.parent)
    except OSError as error:
        raise _told(error, "make the folder", path) from error


class Lock:
    """An advisory lock on a file, let go by the kernel when its holder dies. A process made by fork holds it too.

        with Lock(folder / "lock"):
            ...

    Acquiring raises LockHeld at once if another holds it; the file names the holder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self) -> "Lock":
        fd = None
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.write(fd, canonical_json(asdict(ProcessIdentity.of(os.getpid()))).encode())
        except OSError as error:
            if fd is not None:
                os.close(fd)
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise LockHeld(
                    f"expected {self.path.parent} to be free; it is in use by {_holder(self.path)}: "
                    "wait for it or stop it"
                ) from error
            raise _told(error, "lock", self.path) from error
        self._fd = fd
        return self

    def release(self) -> None:
        """Let go. In a forked child: let go of the child's share only."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> "Lock":
        return self.acquire()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def attempt_dir(run_dir: Path, attempt: int) -> Path:
    """Where an attempt's own files lie."""
    return run_dir / "attempts" / str(attempt)


def latest_attempt(run_dir: Path) -> int:
    """The number of the latest attempt, 0 if there is none."""
    try:
        names = os.listdir(run_dir / "attempts")
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise _told(error, "read", run_dir / "attempts") from error
    return max((int(n) for n in names if n.isdigit() and (run_dir / "attempts" / n / JOB_FILE).exists()), default=0)


def prepare_attempt(job: Job, attempt: int) -> Path:
    """Make the folder of an attempt, job.json last, and return it."""
    folder = attempt_dir(job.run_dir, attempt)
    make_folder(folder)
    write_json(folder / JOB_FILE, job.to_json())
    return folder


def read_job(folder: Path) -> Job:
    """The job of an attempt. Raises RunDirError."""
    return _parsed(folder / JOB_FILE, Job.from_json)


def read_supervisor(folder: Path) -> ProcessIdentity | None:
    """Who supervises an attempt, or None if it has not begun. Raises RunDirError."""
    path = folder / SUPERVISOR_FILE
    return _parsed(path, lambda document: ProcessIdentity(**document)) if path.exists() else None


def read_outcome(folder: Path) -> JobOutcome | None:
    """How the attempt ended, or None if it has not. Raises DamagedFile if its outcome says nothing."""
    path = folder / OUTCOME_FILE
    return read_outcome_file(path) if path.exists() else None


def read_outcome_file(path: Path) -> JobOutcome:
    """An outcome from its file. Raises RunDirError if there is none, DamagedFile if it says nothing."""
    return _parsed(path, JobOutcome.from_json)


def take_outcome(folder: Path) -> tuple[JobOutcome | None, str]:
    """Like `read_outcome`, but one that says nothing is put aside, and the second value is the sentence that tells."""
    try:
        return read_outcome(folder), ""
    except DamagedFile as error:
        path = folder / OUTCOME_FILE
        path.rename(path.with_name(f"{OUTCOME_FILE}.damaged"))
        return None, f"its outcome was damaged and is kept beside it ({error})"


def write_outcome(run_dir: Path, outcome: JobOutcome) -> None:
    """Record the end of an attempt: in its own folder first, which is what counts, then at the top for readers."""
    write_json(attempt_dir(run_dir, outcome.attempt) / OUTCOME_FILE, outcome.to_json())
    write_json(run_dir / OUTCOME_FILE, outcome.to_json())


@dataclass(frozen=True)
class Queued:
    """What a scheduler says of an attempt, in its own words: its name for the job, the state, where, and why."""

    job: str
    state: str
    nodes: str
    reason: str


def write_queued(folder: Path, queued: Queued) -> None:
    """Keep it beside the attempt, for whoever watches; no launcher reads it."""
    write_json(folder / QUEUE_FILE, asdict(queued))


# --- progress ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """How far a job is: `step` of `steps`, told at `at` (unix seconds) by `rank`. `stage` is "train" or "score"."""

    step: int
    steps: int
    at: float
    rank: int
    stage: str


def write_progress(folder: Path, progress: Progress) -> None:
    """Put how far an attempt is into its folder. A reader sees all of it or none. Raises RunDirError.

    Not synced: after a power cut nobody asks how far a job was, and an fsync in each step would cost more than the
    step of a small model.
    """
    path, temporary = folder / PROGRESS_FILE, folder / f".{PROGRESS_FILE}.{os.getpid()}.tmp"
    try:
        temporary.write_text(canonical_json(asdict(progress)))
        os.rename(temporary, path)
    except OSError as error:
        raise _told(error, "write", path) from error


def read_progress(folder: Path) -> Progress | None:
    """How far an attempt is, None if it has not said. Raises RunDirError."""
    path = folder / PROGRESS_FILE
    return _parsed(path, lambda document: Progress(**document)) if path.exists() else None


class Pulse:
    """A job's own word on how far it is, for its supervisor and whoever watches: at most every 2 s, and at the end.

    One process of a job has it. It is silent in a job that was started by hand, which nobody watches.
    """

    def __init__(self, stage: str, rank: int = 0) -> None:
        self._stage, self._rank = stage, rank
        self._told_at = float("-inf")
        named = os.environ.get(ATTEMPT_VARIABLE)
        self._folder = Path(named) if named else None

    def tell(self, step: int, steps: int) -> bool:
        """`step` of `steps` are done. Returns whether that was written down. Raises RunDirError."""
        now = time.monotonic()
        if self._folder is None or (step != steps and now - self._told_at < PROGRESS_EVERY_S):
            return False
        self._told_at = now
        write_progress(self._folder, Progress(step, steps, round(time.time(), 3), self._rank, self._stage))
        return True


def _parsed(path: Path, parse: Any) -> Any:
    document = read_json(path)
    try:
        return parse(document)
    except (TypeError, ValueError, KeyError) as error:
        raise DamagedFile(f"cannot use {path}: {error}") from error


def _holder(path: Path) -> str:
    """The holder as its lock file names it; between locking and writing the name there is an instant without."""
    try:
        holder = json.loads(path.read_bytes())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return "another process"


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: what was created in it, renamed or removed."""
    sync(folder, os.O_DIRECTORY)


def sync(path: Path, flags: int = 0) -> None:
    """Bring what a file or folder holds to the disk."""
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _told(error: OSError, verb: str, path: Path) -> RunDirError:
    remedy = _REMEDIES.get(error.errno or 0, "check that path and its disk")
    return RunDirError(f"cannot {verb} {path}: {(error.strerror or str(error)).lower()}; {remedy}")
