"""The supervisor: one small process per attempt that starts a job, stops it at its limit and records how it ended.

    launcher --> supervisor (own session) --> job (own process group) --> whatever the job starts

- The launcher may die at any moment: the job goes on, and its outcome is written here.
- If the supervisor is killed, the kernel kills the job with it (PR_SET_PDEATHSIG), so a job never runs unwatched.
- Nothing a job starts outlives it: the supervisor is a subreaper, to which every orphan among its descendants falls.
- An attempt begins at most once, however often its supervisor is started: the lock, then supervisor.json.
- A job that lives and does not move is stopped too (`watchdog`), and the memory of its GPUs is sampled (`gpus`).
- It touches the attempt's file `alive` while it lives, which bounds what a job took whose end nobody saw (`starts`).
"""

import contextlib
import dataclasses
import datetime
import functools
import math
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from megatron_evolve.launch import rundir
from megatron_evolve.launch.ending import Ending, Stop, classify, count_oom_kills, read_tail
from megatron_evolve.launch.gpus import DEVICES_VARIABLE, MemoryLog, XidLog
from megatron_evolve.launch.job import Job, JobOutcome, OutcomeKind
from megatron_evolve.launch.process import ProcessIdentity, become_subreaper, children_of, set_death_signal
from megatron_evolve.launch.watchdog import Watchdog

STDERR_LOG = "stderr.log"
SWEEP_S = 10.0  # a process in uninterruptible sleep may not die at all
OUTCOME_RETRY_S = 600.0  # on a full disk: time for an operator to free space before a finished job counts as lost
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_CANNOT_RUN = 127  # the shell's exit status for a command that cannot be run


@dataclass
class _Watch:
    """What has been seen of the job so far. status is the wait status of its first process, once that has ended.

    alive is the open file that is touched as a sign of life: by its number, so that a copy which lives on after its
    node was given up goes on signing for itself when a later start has put its file aside.
    """

    worker: int
    alive: int
    signed_at: float = field(default_factory=time.monotonic)
    sampler: int | None = None
    status: int | None = None
    stop: Stop | None = None
    stood_still: str = ""
    cpu_seconds: float = 0.0
    max_rss_bytes: int = 0

    def sign(self) -> None:
        """Show that this supervisor lives, now and then."""
        if time.monotonic() - self.signed_at >= rundir.ALIVE_EVERY_S:
            with contextlib.suppress(OSError):  # a disk that fails must not end the job: it is charged for less then
                os.utime(self.alive)
            self.signed_at = time.monotonic()

    def reap(self) -> bool:
        """Collect every child that has ended, with its usage. Returns whether children remain."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.sampler:
                continue
            self.cpu_seconds += usage.ru_utime + usage.ru_stime
            self.max_rss_bytes = max(self.max_rss_bytes, usage.ru_maxrss * 1024)
            if pid == self.worker:
                self.status = status


@dataclass(frozen=True)
class Start:
    """One start of an attempt under a fence, by a scheduler that may start a job more than once or lose sight of it.

    spent_s  wall time of earlier starts, which counts against the job's limit
    settle   what to record of how this start ended; None where the attempt goes on with another start
    locked   whether the lock must be free besides; else the fence does what it does
    """

    spent_s: float
    settle: Callable[[JobOutcome], JobOutcome | None]
    locked: bool = False


def supervise(
    folder: Path, enter: Callable[[Job], NoReturn] | None = None, start: Start | None = None
) -> JobOutcome | None:
    """Run the attempt prepared in `folder` to its end and record its outcome.

    Call it in a process of its own that leads its session and has no threads. `enter` becomes the job in the forked
    child and never returns; the default replaces the child by argv. Returns None, having done nothing, if the attempt
    has already begun. Raises RunDirError if the attempt cannot be read or its outcome cannot be written. With `start`
    the lock may be another's, unless it says otherwise: of an older copy that nobody can reach.
    """
    job, run_dir = rundir.read_job(folder), folder.parent.parent
    if start is not None:
        job = dataclasses.replace(job, time_limit_s=max(1.0, job.time_limit_s - start.spent_s))
    # Blocked signals wait until sigtimedwait asks for them: no handler, no race, no polling.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS | {signal.SIGCHLD})
    lock = rundir.Lock(run_dir / rundir.LOCK_FILE)
    try:
        lock.acquire()
    except rundir.LockHeld:  # another supervisor of this attempt was faster, or the attempt was just given up
        if start is None or start.locked:
            return None
    if (folder / rundir.SUPERVISOR_FILE).exists() or (folder / rundir.OUTCOME_FILE).exists():
        return None
    me = ProcessIdentity.of(os.getpid())
    rundir.write_whole(folder / rundir.ALIVE_FILE, "")
    alive = os.open(folder / rundir.ALIVE_FILE, os.O_WRONLY)
    rundir.write_json(folder / rundir.SUPERVISOR_FILE, vars(me))
    if (folder / rundir.CANCEL_FILE).exists():
        outcome = JobOutcome.unmeasured(
            job.key, int(folder.name), OutcomeKind.CANCELLED, me.host, "was cancelled before it began"
        )
        outcome = dataclasses.replace(outcome, seconds=0.0, cpu_seconds=0.0)
    else:
        _put_aside_earlier_results(job, folder)
        outcome = _run(job, folder, me, lock, alive, enter or exec_argv)
    if start is not None:
        outcome = start.settle(outcome)
    if outcome is not None:
        _record(run_dir, outcome)
    return outcome


def exec_argv(job: Job) -> NoReturn:
    """Become the job's command."""
    try:
        os.execvp(job.argv[0], job.argv)
    except OSError as error:
        print(f"cannot run {job.argv[0]!r}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(_CANNOT_RUN)


def _run(
    job: Job, folder: Path, me: ProcessIdentity, lock: rundir.Lock, alive: int, enter: Callable[[Job], NoReturn]
) -> JobOutcome:
    """Start the job, watch it to its end, leave nothing of it running, and say how it ended."""
    started_at, started, oom_kills = datetime.datetime.now(datetime.UTC), time.monotonic(), count_oom_kills()
    become_subreaper()
    (folder / STDERR_LOG).touch()  # a job that is stopped at once may not come to open it
    watch = _Watch(_fork_worker(job, folder, lock, enter), alive)
    xids = XidLog() if job.resources.gpus else None
    memory = _sample_gpus(job, folder)
    watch.sampler = memory.pid if memory else None
    status = _wait(job, folder, watch)
    swept = _sweep(watch)
    ending = Ending(
        exit_code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        stop=watch.stop,
        done_file=job.done_file,
        done=(job.run_dir / job.done_file).exists(),
        oom_kills=count_oom_kills() - oom_kills,
        stderr_tail=read_tail(folder / STDERR_LOG),
        stood_still=watch.stood_still,
        xids=xids.faults() if xids else (),
    )
    kind, reason = classify(ending)
    return JobOutcome(
        key=job.key,
        kind=kind,
        exit_code=ending.exit_code,
        signal=ending.signal,
        seconds=round(time.monotonic() - started, 6),
        cpu_seconds=round(watch.cpu_seconds, 6),
        max_rss_bytes=watch.max_rss_bytes,
        host=me.host,
        attempt=int(folder.name),
        started_at=started_at.isoformat(timespec="milliseconds"),
        reason=reason if swept else f"{reason}; some of its processes would not die",
        max_gpu_bytes=memory.peak_bytes() if memory else None,
    )


def _sample_gpus(job: Job, folder: Path) -> MemoryLog | None:
    """Start sampling the memory of the job's GPUs. What samples dies with this process."""
    if not job.resources.gpus:
        return None
    return MemoryLog(folder, job.env.get(DEVICES_VARIABLE, ""), functools.partial(set_death_signal, os.getpid()))


def _fork_worker(job: Job, folder: Path, lock: rundir.Lock, enter: Callable[[Job], NoReturn]) -> int:
    """Fork the job's first process and return its pid."""
    supervisor = os.getpid()
    worker = os.fork()
    if worker != 0:
        with contextlib.suppress(PermissionError, ProcessLookupError):  # it already runs its command, or has ended
            os.setpgid(worker, worker)
        return worker
    try:
        lock.release()
        os.setpgid(0, 0)
        set_death_signal(supervisor)
        for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        redirect(0, Path(os.devnull), os.O_RDONLY)
        redirect(1, folder / "stdout.log")
        redirect(2, folder / STDERR_LOG)
        # A GPU driver reserves far more address space than it uses, so the limit would strike at nothing there.
        if job.resources.memory_bytes is not None and job.resources.gpus == 0:
            resource.setrlimit(resource.RLIMIT_DATA, (job.resources.memory_bytes, job.resources.memory_bytes))
        os.environ.update(job.env)
        os.environ[rundir.ATTEMPT_VARIABLE] = str(folder)
        enter(job)
    finally:  # whatever happens, this copy must not go on as a second supervisor
        traceback.print_exc()
        os._exit(_CANNOT_RUN)


def redirect(fd: int, path: Path, flags: int = os.O_WRONLY | os.O_CREAT | os.O_APPEND) -> None:
    """Have file descriptor `fd`, also of programs started from here, refer to the file at `path`."""
    opened = os.open(path, flags, 0o644)
    if opened != fd:
        os.dup2(opened, fd)
        os.close(opened)
    os.set_inheritable(fd, True)


def _wait(job: Job, folder: Path, watch: _Watch) -> int:
    """Wait for the job's first process, stopping its group when it must, and return its wait status."""
    deadline, watchdog = time.monotonic() + job.time_limit_s, Watchdog(job, folder)
    while True:
        wait_s = max(0.0, min(deadline - time.monotonic(), watchdog.tick_s, rundir.ALIVE_EVERY_S))
        received = signal.sigtimedwait(_STOP_SIGNALS | {signal.SIGCHLD}, wait_s)
        watch.sign()
        watch.reap()
        if watch.status is not None:
            return watch.status
        stop = _reason_to_stop(folder, watch, watchdog, received, late=time.monotonic() >= deadline)
        if stop is not None:
            watch.stop = stop
            os.killpg(watch.worker, signal.SIGTERM)
            deadline = time.monotonic() + job.grace_s
        elif watch.stop is not None and received is None and time.monotonic() >= deadline:  # the grace is over
            os.killpg(watch.worker, signal.SIGKILL)
            deadline = math.inf


def _reason_to_stop(
    folder: Path, watch: _Watch, watchdog: Watchdog, received: signal.struct_siginfo | None, *, late: bool
) -> Stop | None:
    """Why the job must be stopped now, None if it goes on or is being stopped already."""
    if watch.stop is not None:
        return None
    if received is not None and received.si_signo in _STOP_SIGNALS:
        return Stop.CANCEL if (folder / rundir.CANCEL_FILE).exists() else Stop.SIGNAL
    if late:
        return Stop.TIME_LIMIT
    if still := watchdog.hang():
        watch.stood_still = still
        return Stop.STANDSTILL
    return None


def _sweep(watch: _Watch) -> bool:
    """Kill what the job left running, its orphans included. Returns whether all of it is gone."""
    deadline = time.monotonic() + SWEEP_S
    while watch.reap():
        if time.monotonic() > deadline:
            return False
        for pid in children_of(os.getpid()):
            os.kill(pid, signal.SIGKILL)  # unreaped children of ours: the pids cannot have been reused
        signal.sigtimedwait({signal.SIGCHLD}, 0.1)
    return True


def _put_aside_earlier_results(job: Job, folder: Path) -> None:
    """Move an earlier attempt's done file into its own folder, so that it can't pass for this attempt's."""
    done = job.run_dir / job.done_file
    if done.exists():
        done.rename(folder / f"{job.done_file}.earlier")
    (job.run_dir / rundir.OUTCOME_FILE).unlink(missing_ok=True)


def _record(run_dir: Path, outcome: JobOutcome) -> None:
    """Write the outcome, waiting for space if there is none."""
    deadline = time.monotonic() + OUTCOME_RETRY_S
    while True:
        try:
            return rundir.write_outcome(run_dir, outcome)
        except rundir.RunDirError as error:
            if time.monotonic() > deadline:
                raise
            with contextlib.suppress(OSError):  # the log is on the same full disk
                print(error, file=sys.stderr, flush=True)
        time.sleep(1.0)


def main() -> int:
    """`python -m megatron_evolve.launch.supervise ATTEMPT_FOLDER`"""
    try:
        supervise(Path(sys.argv[1]))
    except rundir.RunDirError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
