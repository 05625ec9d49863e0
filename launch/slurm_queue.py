"""Slurm's commands: submit a script, read the queue, cancel. Every call answers, refuses, or says that Slurm is silent.

Works without slurmdbd: nothing here asks `sacct`. The controller forgets a job MinJobAge seconds (300 unless a site
says otherwise) after its end; what happened then stands in the run folder.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

COMMAND_S = 60.0  # srun and sbatch themselves retry a silent controller for some ten seconds
_FORMAT = "%i|%A|%T|%N|%r|%j"  # a reason or name may hold anything but comes last
_ELSEWHERE = "run where jobs can be submitted, or name a site with `launcher: local`"
_SILENT = re.compile(
    r"unable to contact|socket timed out|connection (refused|reset|timed out)|temporarily unable|transport endpoint"
    r"|zero bytes|communication|try again|MaxSubmitJob",  # the last: as many jobs as it may have; later there is room
    re.IGNORECASE,
)


class SlurmError(ValueError):
    """Slurm is not there or refuses, and will refuse again. The message is one sentence."""


class SlurmSilent(Exception):
    """Slurm gave no answer, or none that lasts. Whatever was asked may have been done."""


@dataclass(frozen=True)
class Row:
    """One job in the queue, or one task of an array.

    `number` is what the job itself calls SLURM_JOB_ID. Of an array's last task it is the array's: a name for all tasks.
    """

    id: str
    number: str
    state: str
    nodes: str
    reason: str
    name: str

    @property
    def task(self) -> int | None:
        """Its index in its array."""
        _, _, index = self.id.partition("_")
        return int(index) if index.isdigit() else None


def submit(script: Path) -> str:
    """Submit a script and return the job's id. Raises SlurmError where it is refused, SlurmSilent without an answer."""
    answer = _run("sbatch", "--parsable", str(script))
    return answer.strip().splitlines()[-1].split(";")[0]


def check(text: str) -> None:
    """Raises SlurmError where Slurm would refuse this script. Nothing is submitted."""
    _run("sbatch", "--test-only", text=text)


def queue() -> tuple[Row, ...]:
    """Every job of this user that Slurm still knows, tasks of arrays one by one. Raises SlurmSilent."""
    lines = _run("squeue", "--me", "--noheader", "--array", "--states=all", f"--format={_FORMAT}").splitlines()
    rows = []
    for line in lines:
        number_of_fields = _FORMAT.count("|")
        job, number, state, nodes, rest = line.split("|", number_of_fields - 1)
        reason, _, name = rest.rpartition("|")
        rows.append(Row(job, number, state, nodes, reason, name))
    return tuple(rows)


def cancel(ids: Iterable[str]) -> None:
    """Cancel these jobs. One that has ended stays as it ended. Raises SlurmSilent."""
    _run("scancel", "--quiet", *ids)


def _run(command: str, *words: str, text: str | None = None) -> str:
    if shutil.which(command) is None:
        raise SlurmError(f"expected Slurm's {command} on this machine's PATH, found none: {_ELSEWHERE}")
    try:
        done = subprocess.run(
            [command, *words],
            input="" if text is None else text,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            env=_outside(os.environ),
        )
    except subprocess.TimeoutExpired as error:
        raise SlurmSilent(f"{command} gave no answer within {COMMAND_S:g} s") from error
    if done.returncode == 0:
        return done.stdout
    if "configuration source" in done.stderr:
        raise SlurmError(f"expected a cluster that this machine belongs to, {command} found none: {_ELSEWHERE}")
    said = [line.split("error: ")[-1].strip() for line in done.stderr.splitlines() if line.strip()]
    if command != "sbatch" or done.returncode < 0 or not said or _SILENT.search(done.stderr):
        raise SlurmSilent(f"{command} said {said[-1] if said else 'nothing'!r} (status {done.returncode})")
    raise SlurmError(f"Slurm refuses the job: {' / '.join(dict.fromkeys(said))}; correct `slurm` in the site file")


def _outside(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what belongs to the job that this process may itself be part of.

    A controller that is a job would hand its own job's sizes on to the jobs that it submits.
    """
    keep = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {
        name: value for name, value in environment.items() if not name.startswith(("SLURM_", "SLURMD_")) or name in keep
    }
