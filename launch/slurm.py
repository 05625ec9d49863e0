"""Slurm's scripts: a job, or several of one shape as an array, as the text that `sbatch` takes.

    Job + Queue --> slurm/train.sbatch (several ranks) or slurm/eval.sbatch (one process), its fields filled in

The templates are the scripts: what an administrator reads and edits is what is submitted. A script says how a job is
started (options, srun, container); what is started stands in the attempt's job.json, which `slurm_batch` reads. A job's
tasks are srun's own ranks, spread evenly over as many whole nodes as its GPUs fill.
"""

import dataclasses
import hashlib
import math
import re
import shlex
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_evolve.launch import rundir
from megatron_evolve.launch.job import Job, canonical_json, num_nodes

SCRIPTS = Path(__file__).resolve().parent.parent / "slurm"
# Before its end a job is told to stop: its own grace to save in, and a minute, by which Slurm may be early or late.
LEAD_S = 60.0
_FIELD = re.compile(r"@([a-z]+)@")


@dataclass(frozen=True)
class Container:
    """What jobs run in. `mounts` are HOST:INSIDE; `python` is the interpreter inside, None for the path it has here."""

    runtime: Literal["pyxis", "apptainer"]
    image: str
    mounts: tuple[str, ...] = ()
    python: str | None = None


@dataclass(frozen=True)
class Queue:
    """Where a cluster takes jobs, and how many GPUs each of its nodes has. None leaves a choice to the cluster.

    options    further options of sbatch by their long names; an empty value stands for an option without one
    throttle   jobs of one shape that are submitted together become one array, of which so many run at one time
    longest_s  longest allocation to ask for; a job that may take longer is put back into the queue at its end
    scripts    folder of train.sbatch and eval.sbatch
    """

    gpus_per_node: int
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    throttle: int | None = None
    longest_s: float | None = None
    container: Container | None = None
    scripts: Path = SCRIPTS

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", types.MappingProxyType(dict(self.options)))


@dataclass(frozen=True)
class Script:
    """A script ready for sbatch. `name` is the job's, and no other submission's: by it a lost one is found again."""

    name: str
    text: str


def render(job: Job, queue: Queue, attempt: int = 1) -> Script:
    """The script of a job. Raises ValueError where its GPUs or tasks do not fill whole nodes."""
    folder = rundir.attempt_dir(job.run_dir, attempt)
    command = (*(f"{variable}={value}" for variable, value in sorted(job.env.items())), *job.argv)
    return _filled(job, queue, name_of([folder], job.key), folder, folder / "slurm.log", None, command)


def render_array(jobs: Sequence[Job], queue: Queue, attempts: Path, name: str) -> Script:
    """The script of jobs of one shape; line i of the file `attempts` is the attempt folder of the array's task i."""
    array = f"0-{len(jobs) - 1}%{queue.throttle}" if queue.throttle else f"0-{len(jobs) - 1}"
    log = attempts.with_suffix(".%a.log")
    return _filled(jobs[0], queue, name, attempts, log, array, ("the command in job.json of the attempt's folder",))


def name_of(attempts: Sequence[Path], title: str) -> str:
    """A submission's name: what a person calls it, and the digest of the attempts that it starts."""
    digest = hashlib.sha256(canonical_json([str(folder) for folder in attempts]).encode()).hexdigest()[:16]
    return f"{re.sub(r'[^A-Za-z0-9._/-]', '_', title)}.{digest}"


def shape(job: Job) -> tuple[object, ...]:
    """What two jobs must share to be tasks of one array."""
    return (job.resources, job.time_limit_s, job.grace_s)


def inside(job: Job, queue: Queue) -> Job:
    """The job with the interpreter that it has inside its container."""
    if queue.container is None or queue.container.python is None or job.argv[0] != sys.executable:
        return job
    return dataclasses.replace(job, argv=(queue.container.python, *job.argv[1:]))


def lead_s(job: Job) -> int:
    """Seconds before the end of its allocation at which a job is told to stop."""
    return math.ceil(job.grace_s + LEAD_S)


def minutes(job: Job, queue: Queue) -> int:
    """Length of an allocation in whole minutes: longer than the job's own limit, so that the supervisor ends it.

    Raises ValueError where the longest allocation leaves hardly any time between start and stop.
    """
    wanted = math.ceil((job.time_limit_s + lead_s(job)) / 60)
    longest = math.inf if queue.longest_s is None else queue.longest_s // 60
    if longest < wanted and longest * 60 < 3 * lead_s(job):
        raise ValueError(
            f"the longest allocation must last {3 * lead_s(job)} s or more, since job {job.key} is told to stop "
            f"{lead_s(job)} s before its end; got {queue.longest_s:g} s: allow longer jobs"
        )
    return int(min(wanted, longest))


def _filled(
    job: Job, queue: Queue, name: str, attempt: Path, log: Path, array: str | None, command: Sequence[str]
) -> Script:
    nodes, asked = num_nodes(job, queue.gpus_per_node), job.resources
    values: dict[str, Sequence[str]] = {
        "name": _one(name),
        "array": _one(array),
        "nodes": _one(nodes),
        "tasks": _one(asked.tasks // nodes),
        "cores": _one(max(1, asked.cores // asked.tasks)),
        "gpus": _one(asked.gpus // nodes or None),
        "minutes": _one(minutes(job, queue)),
        "account": _one(queue.account),
        "partition": _one(queue.partition),
        "qos": _one(queue.qos),
        "constraint": _one(queue.constraint),
        "options": [
            f"--{name}={shlex.quote(value)}" if value else f"--{name}" for name, value in queue.options.items()
        ],
        "log": _one(log),
        "lead": _one(lead_s(job)),
        "command": [shlex.join(command).replace("\n", " ")],
        "python": _one(sys.executable),
        "attempt": _one(attempt),
        "container": [shlex.join(_container_words(job, queue))],
    }
    template = queue.scripts / ("train.sbatch" if asked.tasks > 1 else "eval.sbatch")
    lines = [filled for line in _lines_of(template) for filled in _fill(line, values, template)]
    return Script(name, "\n".join(line.rstrip() for line in lines) + "\n")


def _one(value: object) -> Sequence[str]:
    return [] if value is None else [shlex.quote(str(value))]


def _fill(line: str, values: Mapping[str, Sequence[str]], template: Path) -> list[str]:
    """A template's line with its fields filled in; an #SBATCH line as often as its field has values."""
    names = _FIELD.findall(line)
    unknown = [name for name in names if name not in values]
    if unknown:
        raise ValueError(f"{template}: unknown field @{unknown[0]}@; the fields are {', '.join(sorted(values))}")
    if not names:
        return [line]
    if line.startswith("#SBATCH"):
        return [line.replace(f"@{names[0]}@", value) for value in values[names[0]]]
    return [_FIELD.sub(lambda found: " ".join(values[found[1]]), line)]


def _lines_of(template: Path) -> list[str]:
    try:
        return template.read_text().splitlines()
    except OSError as error:
        raise ValueError(
            f"expected a script's template at {template}; it cannot be read ({(error.strerror or '').lower()}): copy "
            f"the one of {SCRIPTS} there"
        ) from error


def _container_words(job: Job, queue: Queue) -> tuple[str, ...]:
    """What stands before the job's command: options of the srun there, or the container's own command."""
    container = queue.container
    if container is None:
        return ()
    mounts = ",".join(container.mounts)
    if container.runtime == "apptainer":
        gpus = ("--nv",) if job.resources.gpus else ()
        return ("apptainer", "exec", *gpus, *(("--bind", mounts) if mounts else ()), container.image)
    # pyxis is a part of srun; a job of one process has no other need of it.
    srun = ("srun", "--kill-on-bad-exit=1", "--input=none") if job.resources.tasks == 1 else ()
    return (*srun, f"--container-image={container.image}", *((f"--container-mounts={mounts}",) if mounts else ()))
