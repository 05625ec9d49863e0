"""What the tests on a real Slurm share: one cluster of four nodes, a launcher for it, short jobs, waiting."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_evolve.launch.job import Job, JobOutcome, JobState
from megatron_evolve.launch.slurm import Queue
from megatron_evolve.launch.slurm_launcher import SlurmLauncher
from tests.slurm.cluster import Cluster, Unavailable

DEADLINE_S = 240.0  # a loaded machine; the slowest wait, for a lost node, takes 25 s on an idle one
QUICK = {"queue_every_s": 0.3, "folders_every_s": 0.1, "settle_s": 1.0, "retry_s": 0.5}


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        # Sockets' paths are short; pytest's folders are not.
        cluster = Cluster.start(Path(f"/tmp/slurm-tests-{os.getpid()}"), nodes=4, cpus=2)
    except Unavailable as reason:
        pytest.skip(f"no Slurm for tests: {reason}")
    yield cluster
    cluster.stop()
    shutil.rmtree(cluster.root, ignore_errors=True)


@pytest.fixture
def cluster(running_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, known to Slurm's commands in this process."""
    for name, value in running_cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return running_cluster


@pytest.fixture
def make_launcher(cluster: Cluster, tmp_path: Path) -> Callable[..., SlurmLauncher]:
    """A launcher as a new controller would make it, with fields of its queue."""

    def make(**fields: object) -> SlurmLauncher:
        return SlurmLauncher(Queue(**({"gpus_per_node": 2, "partition": "main"} | fields)), tmp_path / "state", **QUICK)

    return make


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    """A job of a shell command (text) or argv (tuple) in its own run folder, `$RUN`."""

    def make(key: str, command: str | tuple[str, ...], **fields: object) -> Job:
        run_dir = tmp_path / "runs" / key
        argv = ("/bin/sh", "-c", command) if isinstance(command, str) else command
        env = {"RUN": str(run_dir)} | fields.pop("env", {})
        return Job(key, argv, run_dir, **({"time_limit_s": 120.0, "done_file": "done", "env": env} | fields))

    return make


@pytest.fixture
def python_job(make_job: Callable[..., Job]) -> Callable[..., Job]:
    """A job of Python source text."""
    return lambda key, source, **fields: make_job(key, (sys.executable, "-c", source), **fields)


def until(condition: Callable[[], object], what: str, within_s: float = DEADLINE_S) -> object:
    """Wait for a condition and return its value."""
    end = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {within_s} s in vain for {what}"
        time.sleep(0.05)
    return value


def states(launcher: SlurmLauncher, *jobs: Job) -> list[JobState]:
    found = launcher.poll([job.key for job in jobs])
    return [found[job.key] for job in jobs]


def ends(launcher: SlurmLauncher, *jobs: Job) -> list[JobOutcome]:
    """Poll until all of these jobs have ended."""

    def ended() -> list[JobState] | None:
        found = states(launcher, *jobs)
        return found if all(isinstance(state, JobOutcome) for state in found) else None

    return until(ended, f"the end of {', '.join(job.key for job in jobs)}")


def running(launcher: SlurmLauncher, *jobs: Job) -> None:
    """Poll until all of these jobs run."""
    until(lambda: states(launcher, *jobs) == ["running"] * len(jobs), f"{', '.join(job.key for job in jobs)} to run")
