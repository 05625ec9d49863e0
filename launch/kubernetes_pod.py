"""One pod of a job: runs it, or with several tasks starts its share of the ranks, as srun does on a node.

    pod 0      waits for the others, then supervises the attempt; its ranks are the supervised job
    pod 1..    say that they are there, wait for pod 0 to begin, run their ranks, and end with the attempt

They speak through the attempt's folder alone:

    pod-K.begun    pod K is there; a second pod K goes away again
    pod-K.json     pod K's ranks failed: how, and the end of what they said; pod 0 fails with those words
    supervisor.json, outcome.json    pod 0 has begun; the attempt has ended, and so does every pod

No clock runs and nothing is charged until all pods are there. Each rank is told its place as torchrun tells it.

Every attempt raises the fence of its run folder (`fence`): a pod that was deleted by force behind a partition may run
on, and its lock may be gone with its node's connection. A later attempt shuts it out, and so does giving this one up.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_evolve.launch import rundir
from megatron_evolve.launch.ending import read_tail
from megatron_evolve.launch.fence import Fenced, Token, fence_environment, raise_fence, read_fence
from megatron_evolve.launch.job import Job, JobOutcome
from megatron_evolve.launch.supervise import Start, exec_argv, redirect, supervise

INDEX_VARIABLE = "JOB_COMPLETION_INDEX"  # set by Kubernetes in every pod of an Indexed Job
LOOK_S = 0.5  # between looks at a shared disk
STOPPED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Pod:
    """This pod among `pods`. Ranks meet at host:port, where rank 0 is."""

    folder: Path
    index: int
    pods: int
    host: str
    port: int

    @property
    def run_dir(self) -> Path:
        return self.folder.parent.parent

    def failure(self, index: int) -> Path:
        return self.folder / f"pod-{index}.json"

    def presence(self, index: int) -> Path:
        return self.folder / f"pod-{index}.begun"

    def environment_of(self, job: Job, local_rank: int) -> dict[str, str]:
        """What a rank finds in its environment."""
        here = job.resources.tasks // self.pods
        place = {
            "RANK": self.index * here + local_rank,
            "WORLD_SIZE": job.resources.tasks,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": here,
            "MASTER_ADDR": self.host,
            "MASTER_PORT": self.port,
        }
        own = {name: str(value) for name, value in place.items()}
        return {**os.environ, **job.env, rundir.ATTEMPT_VARIABLE: str(self.folder), **own}


class Interrupted(Exception):
    """SIGTERM while there was nothing to stop yet."""


def first_pod(pod: Pod) -> None:
    """Run the attempt, once all other pods are there. Raises Fenced if it or a later one has begun."""
    token = Token(int(pod.folder.name), 0, f"a pod on {os.uname().nodename}")
    with _interruptible():
        _wait_until(lambda: all(pod.presence(index).exists() for index in range(1, pod.pods)))
        raise_fence(pod.run_dir, token)
    os.environ.update(fence_environment(pod.run_dir, token))

    def settle(outcome: JobOutcome) -> JobOutcome | None:
        if (held := read_fence(pod.run_dir)) != token:
            print(f"{held or 'nobody'} holds the run folder: {token} records nothing", file=sys.stderr)
            return None
        # What ranks in other pods used nobody took.
        return outcome if pod.pods == 1 else dataclasses.replace(outcome, cpu_seconds=None, max_rss_bytes=None)

    supervise(pod.folder, lambda job: _become_job(pod, job), Start(0.0, settle, locked=True))


def other_pod(pod: Pod) -> int:
    """Run this pod's share. Returns the pod's exit status: not 0 only where it was stopped from outside."""
    with _interruptible():
        try:
            os.close(os.open(pod.presence(pod.index), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:  # put in place of a pod that had begun; an attempt begins once
            return 0
        _wait_until(lambda: _has_ended(pod) or (pod.folder / rundir.SUPERVISOR_FILE).exists())
    if _has_ended(pod):
        return 0
    held = read_fence(pod.run_dir)  # pod 0 has raised it for this attempt
    if held is None or (held.attempt, held.start) != (int(pod.folder.name), 0):
        return 0  # given up since, or a later attempt has the folder
    os.environ.update(fence_environment(pod.run_dir, held))
    job, stopped = rundir.read_job(pod.folder), []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(STOPPED))
    log = pod.folder / f"stderr-pod-{pod.index}.log"
    redirect(1, pod.folder / f"stdout-pod-{pod.index}.log")
    redirect(2, log)
    every = _Seldom(lambda: STOPPED if _has_ended(pod) else 0)
    status = _run(_start(pod, job), lambda: stopped[0] if stopped else every(), job.grace_s)
    if stopped:
        return STOPPED
    if status != 0 and not _has_ended(pod):
        rundir.write_json(pod.failure(pod.index), {"status": status, "stderr": read_tail(log)})
    return 0


def _become_job(pod: Pod, job: Job) -> NoReturn:
    """The supervised job of pod 0: the one process, or its own ranks, which fail with those of any other pod."""
    if job.resources.tasks == 1:
        exec_argv(job)
    signal.signal(signal.SIGTERM, lambda *_: None)  # the supervisor signals the group, so the ranks have it already
    every = _Seldom(lambda: _failed_elsewhere(pod))
    os._exit(_run(_start(pod, job), every, job.grace_s))


def _failed_elsewhere(pod: Pod) -> int:
    """The status of another pod's failed rank, 0 while there is none; its last words are said here too."""
    for index in range(1, pod.pods):
        path = pod.failure(index)
        if path.exists():
            failure = rundir.read_json(path)
            print(f"{failure['stderr']}\npod {index} failed first", file=sys.stderr, flush=True)
            return failure["status"]
    return 0


def _start(pod: Pod, job: Job) -> list[subprocess.Popen]:
    here = job.resources.tasks // pod.pods
    return [subprocess.Popen(job.argv, env=pod.environment_of(job, local)) for local in range(here)]


def _run(ranks: list[subprocess.Popen], elsewhere: Callable[[], int], grace_s: float) -> int:
    """Wait for all ranks. At the first that fails, or when told from elsewhere, the others are stopped.

    Returns 0, or the status of what failed first as a shell would give it.
    """
    status, deadline = 0, None
    while None in [rank.poll() for rank in ranks]:  # all are asked: `any` would stop at the first that runs
        if deadline is None and (status := _first_failure(ranks) or elsewhere()):
            deadline = time.monotonic() + grace_s
            _signal_all(ranks, signal.SIGTERM)
        elif deadline is not None and time.monotonic() > deadline:
            _signal_all(ranks, signal.SIGKILL)
        time.sleep(0.05)
    return status or _first_failure(ranks)


def _first_failure(ranks: list[subprocess.Popen]) -> int:
    codes = [rank.returncode for rank in ranks if rank.returncode]
    return next((code if code > 0 else 128 - code for code in codes), 0)


def _signal_all(ranks: list[subprocess.Popen], signum: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signum)


class _Seldom:
    """Asks a question of the shared disk once in LOOK_S, and else repeats the answer."""

    def __init__(self, ask: Callable[[], int]) -> None:
        self._ask = ask
        self._next, self._answer = 0.0, 0

    def __call__(self) -> int:
        if time.monotonic() >= self._next:
            self._answer, self._next = self._ask(), time.monotonic() + LOOK_S
        return self._answer


def _has_ended(pod: Pod) -> bool:
    return (pod.folder / rundir.OUTCOME_FILE).exists()


def _wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(LOOK_S)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends what is within: a container's first process would otherwise not even notice it."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> int:
    """`python -m megatron_evolve.launch.kubernetes_pod ATTEMPT_FOLDER PODS HOST:PORT`"""
    folder, pods, meet = sys.argv[1:]
    host, port = meet.rsplit(":", 1)
    pod = Pod(Path(folder), int(os.environ[INDEX_VARIABLE]), int(pods), host, int(port))
    try:
        if pod.index > 0:
            return other_pod(pod)
        first_pod(pod)
    except Interrupted:
        return STOPPED
    except Fenced as error:  # put in place of a pod that had begun, or given up
        print(error, file=sys.stderr)
        return 0
    except rundir.RunDirError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
