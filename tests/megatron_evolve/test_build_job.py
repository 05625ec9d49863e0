"""The job that builds a substrate is watched like any other: one that hangs is stopped and tried again, thrice at most.

What it builds is not the matter here: a short program stands in, which tells its steps as a build does.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_evolve.campaign import SubstrateSpec
from megatron_evolve.cli import app
from megatron_evolve.desk import Stopped
from megatron_evolve.launch.job import Job, OutcomeKind
from megatron_evolve.launch.local import LocalLauncher
from megatron_evolve.launch.rundir import CANCEL_FILE, attempt_dir, prepare_attempt, read_outcome
from megatron_evolve.placement import Placement
from megatron_evolve.prepare import build_job, run_one
from megatron_evolve.site import Site

# Tells one step of three and then, in the attempts it is told of, nothing more.
BUILD = """
import os, sys, time
from pathlib import Path
from megatron_evolve.launch.rundir import ATTEMPT_VARIABLE, Pulse
Pulse("train").tell(1, 3)
if int(Path(os.environ[ATTEMPT_VARIABLE]).name) <= int(sys.argv[1]):
    time.sleep(60)
(Path(sys.argv[2]) / "manifest.json").touch()
"""


@pytest.mark.parametrize(
    ("preset", "said"),
    [("nano-cup", "no preset 'nano-cup'; did you mean nano-cpu"), ("nemotron3-nano", "is imported, not built")],
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(preset: str, said: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    done = CliRunner().invoke(app, ["substrate", "build", "--preset", preset, "--store", str(store)])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert said in done.stderr and len(done.stderr.splitlines()) == 1 and not store.exists()


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[LocalLauncher]:
    with LocalLauncher(1, tmp_path) as launcher:
        yield launcher


def job(folder: Path, hangs: int) -> Job:
    argv = (sys.executable, "-c", BUILD, str(hangs), str(folder))
    return Job(f"build/{folder.name}", argv, folder, 60.0, "manifest.json", stall_s=0.4, start_s=20.0, grace_s=0.5)


def kinds(folder: Path) -> list[str]:
    return [
        read_outcome(attempt_dir(folder, number)).kind for number in range(1, len(list(folder.glob("attempts/*"))) + 1)
    ]


def test_a_build_that_hangs_is_stopped_and_goes_on(launcher: LocalLauncher, tmp_path: Path) -> None:
    done = run_one(launcher, job(tmp_path / "a", hangs=1), lambda: False)
    assert kinds(tmp_path / "a") == [OutcomeKind.HUNG, OutcomeKind.FINISHED] and done.attempt == 2
    with pytest.raises(ValueError, match="build/b hung: stood still at step 1 of 3 for"):
        run_one(launcher, job(tmp_path / "b", hangs=9), lambda: False)
    assert kinds(tmp_path / "b") == [OutcomeKind.HUNG] * 3


def test_it_is_watched_as_the_site_says(tmp_path: Path) -> None:
    site = Site(stall_seconds=70.0, start_seconds=None, grace_seconds=3.0)
    found = build_job(SubstrateSpec(preset="nano-cpu"), tmp_path, site)
    assert (found.stall_s, found.start_s, found.grace_s) == (70.0, None, 3.0)
    plain, ground = build_job(SubstrateSpec(preset="nano-cpu"), tmp_path), Placement().site
    assert (plain.stall_s, plain.start_s) == (ground.stall_seconds, ground.start_seconds)


def test_a_build_that_a_dead_controller_called_off_is_made(tmp_path: Path) -> None:
    """It was taken as an order to stop, though the one that gave it was over."""
    asked = job(tmp_path / "a", hangs=0)
    (prepare_attempt(asked, 1) / CANCEL_FILE).touch()
    with LocalLauncher(1, tmp_path) as launcher:
        done = run_one(launcher, asked, lambda: False)
    assert kinds(tmp_path / "a") == [OutcomeKind.CANCELLED, OutcomeKind.FINISHED] and done.attempt == 2


def test_a_build_is_not_begun_once_it_is_asked_to_stop(launcher: LocalLauncher, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run_one(launcher, job(tmp_path / "a", hangs=0), lambda: True)
    assert not (tmp_path / "a" / "attempts").exists()
