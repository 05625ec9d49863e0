"""The local launcher: runs jobs on this machine, never more cores' worth at once than it was given.

Everything it must remember is in the run folders, so it may die at any moment: a new one is told the same jobs by
submit, adopts those that run, returns those that ended, and finds those whose supervisor died ("lost"). Finding out
costs two stats and one read of /proc per running job.
"""

import contextlib
import dataclasses
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from megatron_evolve.launch import rundir
from megatron_evolve.launch.ending import read_tail
from megatron_evolve.launch.gpus import DEVICES_VARIABLE, ORDER, Gpu, GpusFilled, filled_by_others, gpus_here
from megatron_evolve.launch.job import Job, JobOutcome, JobState, OutcomeKind, is_new_attempt
from megatron_evolve.launch.process import ProcessIdentity, kill_left_behind
from megatron_evolve.launch.warm_client import WarmClient, WarmSettings

ASK_AGAIN_S = 15.0  # between two looks at the memory of GPUs
FILLED_S = 60.0  # for what others leave behind to be given back, before a launcher that does nothing says so


@dataclass(eq=False)
class _Entry:
    """One submitted job and what is known of its latest attempt."""

    job: Job
    attempt: int
    state: JobState
    prepared: bool = False  # its folder exists, so that a supervisor may have begun it
    devices: tuple[str, ...] = ()  # the GPUs it was given when it was prepared
    launched: ProcessIdentity | None = None  # the supervisor as we started it
    supervisor: ProcessIdentity | None = None  # the supervisor as it signed the attempt

    @property
    def folder(self) -> Path:
        return rundir.attempt_dir(self.job.run_dir, self.attempt)


class LocalLauncher:
    """A Launcher for this machine.

    cores      what the jobs that run at one time may use together
    state_dir  the campaign's folder, for the warm parent's pointer and log
    warm       what to load once and fork from; None starts every job from scratch
    devices    names of the GPUs to give, as CUDA_VISIBLE_DEVICES takes them; a job has its own for itself, and none is
               given while another program fills it, where nvidia-smi tells

    Jobs run in the current folder and environment of the launcher's process, with their own env on top.
    """

    def __init__(
        self, cores: int, state_dir: Path, warm: WarmSettings | None = None, devices: Sequence[str] = ()
    ) -> None:
        if cores < 1:
            raise ValueError(
                f"a local launcher needs at least one core; got {cores}: give it the number of cores to fill"
            )
        self._cores = cores
        self._devices = tuple(devices)
        self._gpus: list[Gpu] = []
        self._gpus_asked_at = self._filled_since = -math.inf
        self._entries: dict[str, _Entry] = {}
        self._pending: dict[str, _Entry] = {}  # in order of submission
        self._running: dict[str, _Entry] = {}
        self._children: list[subprocess.Popen] = []
        self._warm = WarmClient(warm, state_dir) if warm is not None else None

    def render(self, job: Job) -> str:
        gpus = f"{job.resources.gpus} GPUs, " if job.resources.gpus else ""
        lines = ["#!/bin/sh", f"# {job.key}: {job.resources.cores} cores, {gpus}at most {job.time_limit_s:g} s"]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(job.env.items())]
        lines.append(f"exec {shlex.join(job.argv)}")
        return "\n".join(lines) + "\n"

    def submit(self, job: Job, attempt: int = 1) -> None:
        """See `Launcher.submit`. Raises ValueError for a job that can never run here, RunDirError for a bad folder."""
        self._check_fits(job)
        entry = self._entries.get(job.key) or self._adopted(job)
        if is_new_attempt(job, attempt, entry):
            entry = _Entry(job, attempt, "pending")
        self._file(entry)

    def poll(self, keys: Iterable[str]) -> dict[str, JobState]:
        """See `Launcher.poll`; also starts what there is room for. Raises WarmError, RunDirError, GpusFilled."""
        self._children = [child for child in self._children if child.poll() is None]
        for entry in [*self._running.values(), *self._pending.values()]:
            begun = entry.prepared and (entry.folder / rundir.SUPERVISOR_FILE).exists()
            if entry.state == "running" or begun:
                entry.state = self._state_of(entry)
                self._file(entry)
        self._start_pending()
        return {key: self._known(key).state for key in keys}

    def cancel(self, key: str) -> None:
        """See `Launcher.cancel`."""
        entry = self._known(key)
        if isinstance(entry.state, JobOutcome):
            return
        if not entry.prepared:
            self._prepare(entry)
        rundir.write_whole(entry.folder / rundir.CANCEL_FILE, "")
        supervisor = rundir.read_supervisor(entry.folder)
        if supervisor is not None:
            supervisor.send(signal.SIGTERM)
            return
        with contextlib.suppress(rundir.LockHeld), rundir.Lock(entry.job.run_dir / rundir.LOCK_FILE):
            if rundir.read_supervisor(entry.folder) is None and rundir.read_outcome(entry.folder) is None:
                entry.state = self._record(entry, OutcomeKind.CANCELLED, "was cancelled before it began")
                self._file(entry)

    def close(self) -> None:
        """End the warm parent. Jobs that run go on under their supervisors."""
        if self._warm is not None:
            self._warm.close()

    def __enter__(self) -> "LocalLauncher":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check_fits(self, job: Job) -> None:
        if job.resources.cores > self._cores:
            raise ValueError(
                f"job {job.key} must fit this launcher's {self._cores} cores; it asks for {job.resources.cores}: "
                "ask for fewer"
            )
        if job.resources.gpus > len(self._devices):
            raise ValueError(
                f"this launcher has {len(self._devices) or 'no'} GPUs to give; job {job.key} asks for "
                f"{job.resources.gpus}: submit it elsewhere"
            )
        if job.resources.tasks > 1:
            raise ValueError(
                f"this launcher starts one process a job; job {job.key} asks for {job.resources.tasks} tasks: let its "
                "argv start them"
            )

    def _adopted(self, job: Job) -> _Entry | None:
        """What the job's run folder holds of it, None if it was never tried. Raises ValueError if it is another's."""
        latest = rundir.latest_attempt(job.run_dir)
        if latest == 0:
            return None
        entry = _Entry(job, latest, "pending", prepared=True)
        asked = rundir.read_job(entry.folder)
        if asked.key != job.key:
            raise ValueError(
                f"run folder {job.run_dir} must belong to job {job.key}; it belongs to {asked.key}: choose another"
            )
        given = asked.env.get(DEVICES_VARIABLE) if asked.resources.gpus else None
        entry.devices = tuple(given.split(",")) if given else ()
        if any((entry.folder / name).exists() for name in (rundir.SUPERVISOR_FILE, rundir.OUTCOME_FILE)):
            entry.state = self._state_of(entry)
        elif len(entry.devices) < asked.resources.gpus:
            with rundir.Lock(job.run_dir / rundir.LOCK_FILE):  # raises LockHeld, which names who runs it
                reason = "was asked for by another launcher, which gave it no GPUs of this machine"
                entry.state = self._record(entry, OutcomeKind.LOST, reason)
        return entry

    def _known(self, key: str) -> _Entry:
        if key not in self._entries:
            raise ValueError(f"expected the key of a submitted job; got {key}: submit it first")
        return self._entries[key]

    def _file(self, entry: _Entry) -> None:
        """Put an entry where its state belongs; one that is there already keeps its place."""
        self._entries[entry.job.key] = entry
        for state, queue in (("pending", self._pending), ("running", self._running)):
            if entry.state == state:
                queue[entry.job.key] = entry
            else:
                queue.pop(entry.job.key, None)

    def _start_pending(self) -> None:
        """Start jobs in order of submission while there is room. A big one is not overtaken, or it might starve."""
        free = self._cores - sum(entry.job.resources.cores for entry in self._running.values())
        for entry in list(self._pending.values()):
            free -= entry.job.resources.cores
            devices = self._devices_for(entry)
            if free < 0 or devices is None:
                return
            entry.devices = devices
            if not self._start(entry):
                return
            entry.state = "running"
            self._file(entry)

    def _devices_for(self, entry: _Entry) -> tuple[str, ...] | None:
        """GPUs that an entry may start on: those it was prepared for, or any that are free. None: it must wait."""
        taken = {device for running in self._running.values() for device in running.devices}
        free = tuple(device for device in self._devices if device not in taken)
        if entry.prepared:
            return None if taken & set(entry.devices) else entry.devices
        needed = entry.job.resources.gpus
        if needed == 0 or len(free) < needed:
            return None if needed else ()
        filled = filled_by_others(free, self._memory())
        empty = tuple(device for device in free if device not in filled)
        if len(empty) >= needed:
            self._filled_since = -math.inf
            return empty[:needed]
        self._say_if_filled(entry.job, filled)
        return None

    def _memory(self) -> list[Gpu]:
        """What nvidia-smi last said, at most 15 s ago."""
        if time.monotonic() - self._gpus_asked_at > ASK_AGAIN_S:
            self._gpus, self._gpus_asked_at = gpus_here(), time.monotonic()
        return self._gpus

    def _say_if_filled(self, job: Job, filled: dict[str, Gpu]) -> None:
        """Raises GpusFilled once nothing of ours has run for a minute and others' memory alone keeps a job waiting."""
        if self._running:
            self._filled_since = -math.inf
            return
        if self._filled_since == -math.inf:
            self._filled_since = time.monotonic()
        if time.monotonic() - self._filled_since > FILLED_S:
            used = ", ".join(f"GPU {name} {gpu.used_bytes / 2**30:.0f} GiB" for name, gpu in filled.items())
            raise GpusFilled(
                f"job {job.key} needs {job.resources.gpus} of the GPUs {','.join(self._devices)}, and other programs "
                f"fill some ({used}): end them, or give the campaign other GPUs by {DEVICES_VARIABLE}"
            )

    def _start(self, entry: _Entry) -> bool:
        """Start a supervisor for the attempt. Returns False if the warm parent is not ready."""
        if not entry.prepared:
            self._prepare(entry)
        if self._warm is None:
            child = _start_supervisor(entry.folder)
            self._children.append(child)
            pid = child.pid
        else:
            pid = self._warm.fork(entry.folder, Path.cwd(), os.environ)
            if pid is None:
                return False
        with contextlib.suppress(ProcessLookupError):  # over already
            entry.launched = ProcessIdentity.of(pid)
        return True

    def _prepare(self, entry: _Entry) -> None:
        job = entry.job
        if job.resources.gpus:
            job = dataclasses.replace(job, env={**job.env, **ORDER, DEVICES_VARIABLE: ",".join(entry.devices)})
        rundir.prepare_attempt(job, entry.attempt)
        entry.prepared = True

    def _state_of(self, entry: _Entry) -> JobState:
        """Where an attempt stands that was begun, or for which a supervisor was started."""
        outcome = self._outcome_of(entry)
        if outcome is not None:
            return outcome
        if entry.supervisor is None:
            entry.supervisor = rundir.read_supervisor(entry.folder)
        supervisor = entry.supervisor or entry.launched
        if supervisor is not None and supervisor.is_alive:
            return "running"
        return self._given_up(entry)

    def _outcome_of(self, entry: _Entry) -> JobOutcome | None:
        outcome, damage = rundir.take_outcome(entry.folder)
        return self._record(entry, OutcomeKind.LOST, damage) if damage else outcome

    def _given_up(self, entry: _Entry) -> JobState:
        """Record as lost an attempt whose supervisor is gone, once it is certain that nobody runs it."""
        try:
            with rundir.Lock(entry.job.run_dir / rundir.LOCK_FILE):
                outcome = self._outcome_of(entry)  # the supervisor may have written it as its last act
                if outcome is not None:
                    return outcome
                begun = rundir.read_supervisor(entry.folder)
                survivors = kill_left_behind(begun, f"{rundir.ATTEMPT_VARIABLE}={entry.folder}") if begun else []
                reason = "its supervisor ended " + ("without an outcome" if begun else "before the job began")
                log = entry.folder / rundir.SUPERVISOR_LOG
                if log.exists() and (words := read_tail(log).split("\n")[-2:-1]):
                    reason += f" and said {words[0]!r}"
                if survivors:
                    reason += f"; the processes {survivors} would not die"
                return self._record(entry, OutcomeKind.LOST, reason)
        except rundir.LockHeld:  # another supervisor of the attempt, or one on another host, is at it
            return "running"

    def _record(self, entry: _Entry, kind: OutcomeKind, reason: str) -> JobOutcome:
        outcome = JobOutcome.unmeasured(entry.job.key, entry.attempt, kind, os.uname().nodename, reason)
        rundir.write_outcome(entry.job.run_dir, outcome)
        return outcome


def _start_supervisor(folder: Path) -> subprocess.Popen:
    with open(folder / rundir.SUPERVISOR_LOG, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_evolve.launch.supervise", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # it outlives us, and an interrupt at our terminal is not for it
        )
