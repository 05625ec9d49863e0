"""A job: a command with its resources and run folder, and the closed set of ways it can end.

    Job --submit--> Launcher --poll--> "pending" | "running" | JobOutcome

A job's key is opaque: whoever submits decides what it stands for. "finished" needs exit status 0 *and* the done file,
which the job itself writes last: a trainer that saved on a signal and left with status 0 has not finished.
"""

import dataclasses
import json
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol


class OutcomeKind(StrEnum):
    """How a job ended. `megatron_evolve.launch.ending` states the rule that picks one."""

    FINISHED = "finished"  # exit status 0 and the done file
    CRASHED = "crashed"  # ended by its own fault: an exit status, a signal, or no done file
    OUT_OF_MEMORY = "out_of_memory"  # an allocator said so, or the kernel's out-of-memory killer struck
    TIMED_OUT = "timed_out"  # stopped by its supervisor at its time limit
    CANCELLED = "cancelled"  # stopped because the submitter asked
    HUNG = "hung"  # lived, but its count of progress stood still, or a collective operation never returned
    LOST = (
        "lost"  # ended by neither itself nor us: its machine or supervisor is gone or failed it, SIGKILL from outside
    )


# Endings that say nothing about what was run: the same job is worth another attempt, unchanged.
INFRASTRUCTURE_KINDS = (OutcomeKind.LOST, OutcomeKind.HUNG)


@dataclass(frozen=True)
class Resources:
    """What a job may use, in all. memory_bytes limits the data segment of each of its processes (None: no limit).

    tasks  processes that the launcher starts with the job's argv, each a rank; 1 where argv itself starts them
    """

    cores: int = 1
    gpus: int = 0
    memory_bytes: int | None = None
    tasks: int = 1

    def __post_init__(self) -> None:
        if self.cores < 1 or self.gpus < 0 or self.tasks < 1:
            raise ValueError(
                f"resources need cores >= 1, gpus >= 0 and tasks >= 1; got {self.cores}, {self.gpus} and {self.tasks}: "
                "correct the job"
            )
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise ValueError(f"memory_bytes must be positive; got {self.memory_bytes}: leave it None for no limit")


@dataclass(frozen=True)
class Job:
    """One command to be run to its end in its own run folder.

    argv      the command; `(sys.executable, "-m", MODULE, *args)` may run in a fork of a warm parent
    run_dir   absolute; belongs to this key alone
    env       variables set on top of the launcher's own (written to disk: no secrets)
    grace_s   time between SIGTERM and SIGKILL when the job is stopped: a trainer saves in it
    done_file name within run_dir that the job writes last
    stall_s   time within which the job's count of progress must move (`rundir.Pulse`), or it hangs; None: never asked
    start_s   the same before its first count and after its last: loading, compiling, writing out what was made
    """

    key: str
    argv: tuple[str, ...]
    run_dir: Path
    time_limit_s: float
    done_file: str
    env: Mapping[str, str] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)
    grace_s: float = 10.0
    stall_s: float | None = None
    start_s: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "argv", tuple(self.argv))
        object.__setattr__(self, "run_dir", Path(self.run_dir))
        object.__setattr__(self, "env", types.MappingProxyType(dict(self.env)))
        if not self.key:
            raise ValueError("a job needs a key that names it; got an empty one: give the digest of what it computes")
        if not self.argv or not all(isinstance(word, str) for word in self.argv):
            raise ValueError(
                f"argv must be one or more strings; got {self.argv!r}: convert paths and numbers with str()"
            )
        if not self.run_dir.is_absolute():
            raise ValueError(f"run_dir must be absolute; got {self.run_dir}: resolve it first")
        if not self.done_file or Path(self.done_file).name != self.done_file:
            raise ValueError(f"done_file must be a plain name within run_dir; got {self.done_file!r}: drop the folder")
        if not (self.time_limit_s > 0 and math.isfinite(self.time_limit_s) and self.grace_s >= 0):
            raise ValueError(
                f"time_limit_s must be positive and grace_s not negative; got {self.time_limit_s} and {self.grace_s}"
            )
        for name in ("stall_s", "start_s"):
            if (value := getattr(self, name)) is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive; got {value}: leave it None for no watchdog")

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "argv": list(self.argv),
            "run_dir": str(self.run_dir),
            "time_limit_s": self.time_limit_s,
            "done_file": self.done_file,
            "env": dict(self.env),
            "resources": dataclasses.asdict(self.resources),
            "grace_s": self.grace_s,
            "stall_s": self.stall_s,
            "start_s": self.start_s,
        }

    @classmethod
    def from_json(cls, document: object) -> "Job":
        fields = _fields_of(cls, _with_later({"stall_s": None, "start_s": None}, document))
        resources = fields["resources"]
        resources = Resources(**_fields_of(Resources, _with_later({"tasks": 1}, resources)))
        return cls(**(fields | {"resources": resources}))


@dataclass(frozen=True)
class JobOutcome:
    """How one attempt at a job ended. A measurement that nobody could take is None, never a number.

    seconds, cpu_seconds and max_rss_bytes are of the whole process tree: wall time, user + system time, and the largest
    process. started_at is UTC, ISO 8601. reason is one sentence. max_gpu_bytes is the most memory seen in use on the
    fullest of its GPUs.
    """

    key: str
    kind: OutcomeKind
    exit_code: int | None
    signal: int | None
    seconds: float | None
    cpu_seconds: float | None
    max_rss_bytes: int | None
    host: str
    attempt: int
    started_at: str | None
    reason: str
    max_gpu_bytes: int | None = None

    @classmethod
    def unmeasured(cls, key: str, attempt: int, kind: OutcomeKind, host: str, reason: str) -> "JobOutcome":
        """The end of an attempt that nobody watched to its end, or that never began."""
        return cls(key, kind, None, None, None, None, None, host, attempt, None, reason)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"kind": self.kind.value}

    @classmethod
    def from_json(cls, document: object) -> "JobOutcome":
        fields = _fields_of(cls, _with_later({"max_gpu_bytes": None}, document))
        return cls(**(fields | {"kind": OutcomeKind(fields["kind"])}))


def num_nodes(job: Job, gpus_per_node: int) -> int:
    """Nodes that a job takes: one, or all GPUs of several. Raises ValueError where they do not come out even."""
    gpus, tasks = job.resources.gpus, job.resources.tasks
    if gpus <= gpus_per_node:
        return 1
    if gpus_per_node == 0 or gpus % gpus_per_node or tasks % (gpus // gpus_per_node):
        raise ValueError(
            f"job {job.key} must fill whole nodes of {gpus_per_node} GPUs with equally many tasks each; it asks for "
            f"{gpus} GPUs and {tasks} tasks: change the number of ranks or the node's GPUs"
        )
    return gpus // gpus_per_node


JobState = JobOutcome | Literal["pending", "running"]


class Launcher(Protocol):
    """The four verbs. Every backend (local, Slurm, Kubernetes) has them and nothing else that a caller may use."""

    def render(self, job: Job) -> str:
        """The script that would run this job, for a person to read."""
        ...

    def submit(self, job: Job, attempt: int = 1) -> None:
        """See to it that attempt `attempt` at this job has been started. Doing so twice changes nothing.

        A job that finished, or an attempt that already ended or still runs, is adopted as it is. Attempt n + 1 is
        started only after attempt n ended in another way than finished: the caller decides whether to retry.
        """
        ...

    def poll(self, keys: Iterable[str]) -> Mapping[str, JobState]:
        """Where each of these submitted jobs stands; cheap enough to be called several times a second."""
        ...

    def cancel(self, key: str) -> None:
        """Stop this job; poll says "cancelled" once its processes are gone. Without effect on a job that has ended."""
        ...


class Known(Protocol):
    """What a launcher holds of a submitted job: the job, its latest attempt, and where that stands."""

    job: Job
    attempt: int
    state: JobState


def is_new_attempt(job: Job, attempt: int, known: Known | None) -> bool:
    """Whether submitting this asks for an attempt that has yet to be started; the rule of `Launcher.submit`.

    Raises ValueError for a job that changed its run folder, or an attempt before the one ahead of it has ended.
    """
    if known is not None and known.job.run_dir != job.run_dir:
        raise ValueError(
            f"job {job.key} must keep its run folder {known.job.run_dir}; got {job.run_dir}: submit it there"
        )
    latest, state = (0, None) if known is None else (known.attempt, known.state)
    if attempt <= latest or (isinstance(state, JobOutcome) and state.kind is OutcomeKind.FINISHED):
        return False
    if attempt != latest + 1 or not (latest == 0 or isinstance(state, JobOutcome)):
        raise ValueError(
            f"attempt {attempt} at job {job.key} must follow the end of attempt {attempt - 1}; "
            f"attempt {latest} is {state if isinstance(state, str) else 'the latest'}: wait for it"
        )
    return True


def canonical_json(document: object) -> str:
    """One text for one value: sorted keys, no spaces, no NaN, a final newline."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n"


def _with_later(fields: dict[str, Any], document: object) -> object:
    """`document` with the fields that files of an earlier version lack."""
    return {**fields, **document} if isinstance(document, dict) else document


def _fields_of(cls: type, document: object) -> dict[str, Any]:
    """`document` as the keyword arguments of `cls`. Raises ValueError unless its keys are exactly the fields."""
    expected = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(document, dict):
        raise ValueError(f"a {cls.__name__} must be a JSON object; got {type(document).__name__}: restore the file")
    if document.keys() != expected:
        unknown, missing = sorted(document.keys() - expected), sorted(expected - document.keys())
        raise ValueError(
            f"a {cls.__name__} has the keys {sorted(expected)}; got unknown {unknown}, missing {missing}: "
            "restore the file or use the version that wrote it"
        )
    return document
