"""What the launcher's tests share: short real jobs, waiting with a deadline, and a tiny disk."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_evolve.launch.job import Job, JobOutcome
from megatron_evolve.launch.local import LocalLauncher

DEADLINE_S = 20.0


def _wait_until(condition: Callable[[], object], what: str) -> object:
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {DEADLINE_S} s in vain for {what}"
        time.sleep(0.005)
    return value


@pytest.fixture
def wait_until() -> Callable[[Callable[[], object], str], object]:
    """Poll a condition until it is true, and return its value."""
    return _wait_until


@pytest.fixture
def ending_of() -> Callable[[LocalLauncher, str], JobOutcome]:
    """Poll a launcher until the job of this key has ended."""

    def wait(launcher: LocalLauncher, key: str) -> JobOutcome:
        def ended() -> JobOutcome | None:
            state = launcher.poll([key])[key]
            return state if isinstance(state, JobOutcome) else None

        return _wait_until(ended, f"the end of {key}")

    return wait


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    """A job of a shell command (text) or argv (tuple) in its own run folder. `$RUN` is that folder."""

    def make(key: str, command: str | tuple[str, ...], **fields: object) -> Job:
        run_dir = tmp_path / key
        argv = ("/bin/sh", "-c", command) if isinstance(command, str) else command
        env = {"RUN": str(run_dir)} | fields.pop("env", {})
        return Job(key, argv, run_dir, **({"time_limit_s": 30.0, "done_file": "done", "env": env} | fields))

    return make


@pytest.fixture
def python_job(make_job: Callable[..., Job]) -> Callable[..., Job]:
    """A job of Python source text."""
    return lambda key, source, **fields: make_job(key, (sys.executable, "-c", source), **fields)


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[LocalLauncher]:
    with LocalLauncher(2, tmp_path / "state") as launcher:
        yield launcher


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)
