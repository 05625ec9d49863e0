"""What a batch script runs on its node: one start of one attempt, under the supervisor, fenced against older starts.

    python -m megatron_evolve.launch.slurm_batch ATTEMPT -- [srun ... | apptainer exec ...]

ATTEMPT is the attempt's folder, or for an array a file with the folder of each task on its line. The words after `--`
stand before the job's own command. Slurm may start the same job again (preempted, its node lost, its time up):

    attempts/N/owner          the Slurm job of this attempt; any other one that was submitted for it ends at once
    attempts/N/starts/        how each start ended and what it said: all of them are charged (`starts`)
    attempts/N/outcome.json   written by the last start alone

A start that was told to stop, or that asks for another one by status 75, is put back into the queue, without an
outcome: the attempt goes on. Its time so far counts against the job's limit, and so does that of a start which died
with its node.
"""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from megatron_evolve.launch import rundir, starts
from megatron_evolve.launch.ending import STOPPED_FROM_OUTSIDE, read_tail
from megatron_evolve.launch.fence import Fenced, Token, check_free, claim, fence_environment, raise_fence, read_fence
from megatron_evolve.launch.job import Job, JobOutcome, OutcomeKind
from megatron_evolve.launch.process import set_death_signal
from megatron_evolve.launch.supervise import Start, exec_argv, redirect, supervise

OWNER_FILE = "owner"
AGAIN_STATUS = 75  # EX_TEMPFAIL of sysexits.h: it saved itself and wants to be started again
MOST_STARTS = 200  # of one attempt; a week of hourly preemption is 168
COMMAND_S = 60.0
_OUT_OF_MEMORY_WORDS = ("oom_kill event", "oom-kill event", "Out Of Memory")


def begin(folder: Path, before: Sequence[str]) -> int:
    """Run this start of the attempt to its end; the exit status of the batch script. Raises RunDirError."""
    holder, number = job_id(os.environ), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    token, run_dir = Token(int(folder.name), number, holder), folder.parent.parent
    owner = claim(folder / OWNER_FILE, holder)
    if owner != holder or rundir.read_outcome(folder) is not None:
        print(f"attempt {folder} belongs to Slurm job {owner} or has ended: job {holder} does nothing", file=sys.stderr)
        return 0
    before_it = check_free(run_dir, token)
    if before_it is not None and before_it.attempt == token.attempt:
        # Before the fence is raised, or a start that dies in between would leave its predecessor's time as its own.
        starts.put_aside(folder, before_it.start)
    raise_fence(run_dir, token)
    job = rundir.read_job(folder)
    if number and (run_dir / job.done_file).exists():
        reason = f"an earlier start wrote {job.done_file}; how it exited was not seen"
        finished = JobOutcome.unmeasured(job.key, token.attempt, OutcomeKind.FINISHED, os.uname().nodename, reason)
        rundir.write_outcome(run_dir, starts.charged(folder, finished))
        return 0
    os.environ.update(fence_environment(run_dir, token))
    enter = exec_argv if not before else _by_srun(before) if before[0] == "srun" else _behind(before)
    settle = _Settlement(folder, token, ranks=bool(before) and before[0] == "srun")
    supervise(folder, enter, Start(starts.life_s(folder), settle))
    return 0


def job_id(environment: Mapping[str, str]) -> str:
    """What Slurm's commands call the job that this process belongs to, and it alone: `17`, of an array's tasks `17_2`.

    The last task of an array has the array's own number for its SLURM_JOB_ID, by which a command means all tasks.
    """
    if "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


# --- how a start ended ------------------------------------------------------------------------------------------------


class _Settlement:
    """Decides what is recorded of how a start ended; None: nothing, the attempt goes on or belongs to a later start."""

    def __init__(self, folder: Path, token: Token, *, ranks: bool) -> None:
        self._folder, self._token, self._ranks = folder, token, ranks

    def __call__(self, outcome: JobOutcome) -> JobOutcome | None:
        if self._ranks:  # the supervisor saw srun; the ranks' own use nobody took
            outcome = dataclasses.replace(outcome, cpu_seconds=None, max_rss_bytes=None)
            outcome = self._with_slurm_s_words(outcome)
        held = read_fence(self._folder.parent.parent)
        if held != self._token:
            print(f"{held or 'nobody'} holds the run folder: {self._token} records nothing", file=sys.stderr)
            return None
        starts.record(self._folder, self._token.start, outcome)
        if (self._folder / rundir.CANCEL_FILE).exists() and outcome.kind is not OutcomeKind.FINISHED:
            cancelled = "was stopped because its submitter cancelled it"
            outcome = dataclasses.replace(outcome, kind=OutcomeKind.CANCELLED, reason=cancelled)
        elif _wants_another_start(outcome):
            refused = _put_back(self._token)
            if refused is None:
                return None
            outcome = dataclasses.replace(
                outcome, kind=OutcomeKind.LOST, reason=f"was told to stop, and Slurm did not put it back: {refused}"
            )
        return starts.charged(self._folder, outcome)

    def _with_slurm_s_words(self, outcome: JobOutcome) -> JobOutcome:
        """A rank killed for its memory is SIGKILLed like any other; Slurm says why on srun's stderr."""
        if outcome.kind not in (OutcomeKind.LOST, OutcomeKind.CRASHED):
            return outcome
        said = [
            line
            for line in read_tail(self._folder / "stderr.log").splitlines()
            if any(words in line for words in _OUT_OF_MEMORY_WORDS)
        ]
        if not said:
            return outcome
        return dataclasses.replace(outcome, kind=OutcomeKind.OUT_OF_MEMORY, reason=f"Slurm says: {said[0].strip()}")


def _wants_another_start(outcome: JobOutcome) -> bool:
    """Whether the job was stopped by neither itself nor us, or says that it saved and wants to go on."""
    if outcome.kind is OutcomeKind.LOST:
        return outcome.reason.startswith(STOPPED_FROM_OUTSIDE)
    # Slurm signals every process of a step, so that the job may be gone before its supervisor hears of it.
    told = outcome.exit_code in (AGAIN_STATUS, 128 + signal.SIGTERM) or outcome.signal == signal.SIGTERM
    return outcome.kind is OutcomeKind.CRASHED and told


def _put_back(token: Token) -> str | None:
    """Have Slurm start this job again; None if it will, else why not. A cancelled job stays cancelled."""
    if token.start + 1 >= MOST_STARTS:
        return f"it has been started {MOST_STARTS} times"
    shown = _slurm("scontrol", "show", "job", "--oneliner", token.holder)
    facts = dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)
    if int(facts.get("Restarts", 0)) > token.start:  # preempted: Slurm has put it back itself
        return None
    if shown.returncode == 0 and facts.get("JobState") != "RUNNING":
        return f"its state was {facts.get('JobState')}"  # requeuing would undo a scancel
    requeued = _slurm("scontrol", "requeue", token.holder)
    return None if requeued.returncode == 0 else requeued.stderr.strip()


def _slurm(*words: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 1, "", str(error))


# --- how the job is started -------------------------------------------------------------------------------------------


def _behind(before: Sequence[str]) -> Callable[[Job], NoReturn]:
    """Become the job's command with `before` in front of it."""
    return lambda job: exec_argv(dataclasses.replace(job, argv=(*before, *job.argv)))


def _by_srun(before: Sequence[str]) -> Callable[[Job], NoReturn]:
    """Start the job's ranks with srun, and hand SIGTERM on to them: srun itself would answer it with SIGKILL to all."""

    def enter(job: Job) -> NoReturn:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
        me = os.getpid()
        srun = subprocess.Popen(
            [*before, *job.argv],
            process_group=0,  # so that a signal to this process's group is for this process alone
            preexec_fn=lambda: _as_a_child(me),
        )
        while srun.poll() is None:
            received = signal.sigtimedwait({signal.SIGTERM, signal.SIGCHLD}, 1.0)
            if received is not None and received.si_signo == signal.SIGTERM:
                told = _slurm("scancel", "--signal=TERM", job_id(os.environ))  # to every step, not the batch
                if told.returncode:
                    print(f"the ranks could not be told to stop: {told.stderr.strip()}", file=sys.stderr, flush=True)
        os._exit(srun.returncode if srun.returncode >= 0 else 128 - srun.returncode)

    return enter


def _as_a_child(parent: int) -> None:
    set_death_signal(parent)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def main() -> int:
    """`python -m megatron_evolve.launch.slurm_batch ATTEMPT -- WORDS`"""
    words = sys.argv[1:]
    if len(words) < 2 or words[1] != "--" or "SLURM_JOB_ID" not in os.environ:
        print("expected ATTEMPT -- WORDS... in a job of Slurm's; let sbatch start this", file=sys.stderr)
        return 2
    folder = Path(words[0])
    try:
        if (task := os.environ.get("SLURM_ARRAY_TASK_ID")) is not None:
            folder = Path(folder.read_text().splitlines()[int(task)])
        for fd in (1, 2):  # as the supervisor of a local job: what it has to say lies with the attempt
            redirect(fd, folder / rundir.SUPERVISOR_LOG)
        return begin(folder, words[2:])
    except Fenced as error:
        print(error, file=sys.stderr)
        return 0
    except (rundir.RunDirError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
