"""The local launcher: idempotent, never over its cores, and able to pick up where a dead one left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_evolve.launch import rundir
from megatron_evolve.launch.job import Job, JobOutcome, OutcomeKind, Resources, canonical_json
from megatron_evolve.launch.local import LocalLauncher
from megatron_evolve.launch.process import read_stat

UNTIL_GO = (
    "echo $$ > $RUN/pid.new; mv $RUN/pid.new $RUN/pid; until [ -e $RUN/go ]; do sleep 0.02; done; touch $RUN/done"
)

CONTROLLER = """
import json, sys, time
from pathlib import Path
from megatron_evolve.launch.job import Job
from megatron_evolve.launch.local import LocalLauncher
job = Job.from_json(json.loads(sys.argv[2]))
launcher = LocalLauncher(1, Path(sys.argv[1]))
launcher.submit(job)
while True:
    print(launcher.poll([job.key])[job.key], flush=True)
    time.sleep(0.01)
"""


def supervisor_of(job: Job, attempt: int = 1) -> int:
    return rundir.read_supervisor(rundir.attempt_dir(job.run_dir, attempt)).pid


def started_by_a_controller_that_is_killed(job: Job, state_dir: Path, wait_until: Callable) -> None:
    command = [sys.executable, "-c", CONTROLLER, str(state_dir), canonical_json(job.to_json())]
    controller = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_until((job.run_dir / "pid").exists, "the job")
    controller.kill()
    controller.wait()


def test_a_job_goes_from_pending_to_its_outcome(
    launcher: LocalLauncher, make_job: Callable[..., Job], ending_of: Callable
) -> None:
    job = make_job("a", UNTIL_GO)
    launcher.submit(job)
    assert launcher.poll(["a"]) == {"a": "running"}
    (job.run_dir / "go").touch()
    assert ending_of(launcher, "a").kind is OutcomeKind.FINISHED


def test_submitting_again_changes_nothing(
    launcher: LocalLauncher, make_job: Callable[..., Job], ending_of: Callable, tmp_path: Path
) -> None:
    job = make_job("a", "echo x >> $RUN/ran; touch $RUN/done")
    for _ in range(3):
        launcher.submit(job)
        launcher.poll(["a"])
    first = ending_of(launcher, "a")
    launcher.submit(job)
    launcher.submit(job, attempt=2)  # finished: there is nothing to retry
    assert launcher.poll(["a"])["a"] == first
    another = LocalLauncher(1, tmp_path / "state")
    another.submit(job)
    assert another.poll(["a"])["a"] == first
    assert (job.run_dir / "ran").read_text() == "x\n"


def test_never_more_than_its_cores(
    launcher: LocalLauncher, make_job: Callable[..., Job], ending_of: Callable, tmp_path: Path
) -> None:
    active = tmp_path / "active"
    active.mkdir()
    script = f"touch {active}/$$; sleep 0.3; ls {active} | wc -l > $RUN/done; sleep 0.3; rm {active}/$$"
    jobs = [make_job(f"j{i}", script) for i in range(6)]
    jobs.append(make_job("wide", f"ls {active} | wc -l > $RUN/done", resources=Resources(cores=2)))
    for job in jobs:
        launcher.submit(job)
    assert all(ending_of(launcher, job.key).kind is OutcomeKind.FINISHED for job in jobs)
    counts = [int((job.run_dir / "done").read_text()) for job in jobs]
    assert max(counts) == 2 and counts[-1] == 0


def test_a_retry_is_a_new_attempt_and_keeps_the_old(
    launcher: LocalLauncher, make_job: Callable[..., Job], ending_of: Callable
) -> None:
    job = make_job("a", "[ -e $RUN/again ] && touch $RUN/done; touch $RUN/again; [ -e $RUN/done ]")
    with pytest.raises(ValueError, match=r"attempt 2 .* must follow"):
        launcher.submit(job, attempt=2)
    launcher.submit(job)
    first = ending_of(launcher, "a")
    assert first.kind is OutcomeKind.CRASHED
    for _ in range(2):
        launcher.submit(job, attempt=2)
        launcher.submit(job, attempt=1)
    second = ending_of(launcher, "a")
    assert (second.kind, second.attempt) == (OutcomeKind.FINISHED, 2)
    assert rundir.read_outcome(job.run_dir / "attempts/1") == first
    assert rundir.latest_attempt(job.run_dir) == 2


def test_a_running_attempt_cannot_be_retried(
    launcher: LocalLauncher, make_job: Callable[..., Job], ending_of: Callable
) -> None:
    job = make_job("a", UNTIL_GO)
    launcher.submit(job)
    launcher.poll([])
    with pytest.raises(ValueError, match="attempt 1 is running: wait for it"):
        launcher.submit(job, attempt=2)
    launcher.cancel("a")
    ending_of(launcher, "a")


def test_a_running_job_is_adopted_after_its_controller_was_killed(
    make_job: Callable[..., Job], ending_of: Callable, wait_until: Callable, tmp_path: Path
) -> None:
    job, next_job = make_job("a", f"echo x >> $RUN/ran; {UNTIL_GO}"), make_job("b", "touch $RUN/done")
    started_by_a_controller_that_is_killed(job, tmp_path / "state", wait_until)
    launcher = LocalLauncher(1, tmp_path / "state")
    launcher.submit(job)
    launcher.submit(next_job)
    assert launcher.poll(["a", "b"]) == {"a": "running", "b": "pending"}  # its core is taken
    (job.run_dir / "go").touch()
    assert ending_of(launcher, "a").kind is OutcomeKind.FINISHED
    assert ending_of(launcher, "b").kind is OutcomeKind.FINISHED
    assert (job.run_dir / "ran").read_text() == "x\n"


def test_a_job_that_ended_without_a_controller_has_its_outcome(
    make_job: Callable[..., Job], wait_until: Callable, tmp_path: Path
) -> None:
    job = make_job("a", UNTIL_GO)
    started_by_a_controller_that_is_killed(job, tmp_path / "state", wait_until)
    (job.run_dir / "go").touch()
    wait_until((job.run_dir / "outcome.json").exists, "the outcome")
    launcher = LocalLauncher(1, tmp_path / "state")
    launcher.submit(job)
    assert launcher.poll(["a"])["a"].kind is OutcomeKind.FINISHED


def test_an_attempt_that_was_prepared_but_never_begun_is_begun(
    launcher: LocalLauncher, make_job: Callable[..., Job], ending_of: Callable
) -> None:
    job = make_job("a", "touch $RUN/done")
    rundir.prepare_attempt(job, 1)
    launcher.submit(job)
    outcome = ending_of(launcher, "a")
    assert (outcome.kind, outcome.attempt) == (OutcomeKind.FINISHED, 1)


def test_a_supervisor_that_begins_while_its_job_waits_is_noticed(
    launcher: LocalLauncher, make_job: Callable[..., Job], ending_of: Callable, wait_until: Callable
) -> None:
    """A dead controller had started it, but it signs the attempt only now, when this launcher's cores are taken."""
    busy, late = make_job("busy", UNTIL_GO, resources=Resources(cores=2)), make_job("late", UNTIL_GO)
    folder = rundir.prepare_attempt(late, 1)
    launcher.submit(busy)
    launcher.submit(late)
    assert launcher.poll(["busy", "late"]) == {"busy": "running", "late": "pending"}
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "megatron_evolve.launch.supervise", folder], start_new_session=True
    )
    wait_until(lambda: launcher.poll(["late"])["late"] == "running", "the late supervisor")
    for job in (busy, late):
        (job.run_dir / "go").touch()
        assert ending_of(launcher, job.key).kind is OutcomeKind.FINISHED
    supervisor.wait()


def test_a_job_whose_supervisor_was_killed_is_lost_with_all_it_started(
    launcher: LocalLauncher, make_job: Callable[..., Job], ending_of: Callable, wait_until: Callable
) -> None:
    script = f"sleep 300 & echo $! > $RUN/near; setsid sleep 300 & echo $! > $RUN/far; {UNTIL_GO}"
    job = make_job("a", script)
    launcher.submit(job)
    launcher.poll([])
    wait_until((job.run_dir / "pid").exists, "the job")
    os.kill(supervisor_of(job), signal.SIGKILL)
    outcome = ending_of(launcher, "a")
    assert (outcome.kind, outcome.seconds, outcome.attempt) == (OutcomeKind.LOST, None, 1)
    assert outcome.reason == "its supervisor ended without an outcome"
    for name in ("pid", "near", "far"):
        stat = read_stat(int((job.run_dir / name).read_text()))
        assert stat is None or stat.state in "ZX"
    (job.run_dir / "go").touch()
    launcher.submit(job, attempt=2)
    assert ending_of(launcher, "a").kind is OutcomeKind.FINISHED


def test_a_supervisor_that_cannot_begin_says_why(
    launcher: LocalLauncher, make_job: Callable[..., Job], ending_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher.submit(make_job("a", "true"))
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    launcher.poll([])
    outcome = ending_of(launcher, "a")
    assert outcome.kind is OutcomeKind.LOST
    assert outcome.reason.startswith("its supervisor ended before the job began and said ")


def test_a_damaged_outcome_is_kept_and_never_believed(
    launcher: LocalLauncher, make_job: Callable[..., Job], ending_of: Callable, tmp_path: Path
) -> None:
    job = make_job("a", "touch $RUN/done")
    launcher.submit(job)
    ending_of(launcher, "a")
    path = job.run_dir / "attempts/1/outcome.json"
    path.write_bytes(path.read_bytes()[:40])
    resumed = LocalLauncher(1, tmp_path / "state")
    resumed.submit(job)
    outcome = resumed.poll(["a"])["a"]
    assert outcome.kind is OutcomeKind.LOST and "truncated" in outcome.reason
    assert path.with_name("outcome.json.damaged").stat().st_size == 40


def test_cancelling_a_running_a_waiting_and_an_ended_job(
    launcher: LocalLauncher, make_job: Callable[..., Job], ending_of: Callable, wait_until: Callable
) -> None:
    wide = Resources(cores=2)
    running, waiting = (
        make_job("running", UNTIL_GO, resources=wide),
        make_job("waiting", "touch $RUN/done", resources=wide),
    )
    launcher.submit(running)
    launcher.submit(waiting)
    launcher.poll([])
    wait_until((running.run_dir / "pid").exists, "the job")
    launcher.cancel("waiting")
    outcome = launcher.poll(["waiting"])["waiting"]
    assert (outcome.kind, outcome.reason) == (OutcomeKind.CANCELLED, "was cancelled before it began")
    launcher.cancel("running")
    outcome = ending_of(launcher, "running")
    assert (outcome.kind, outcome.signal) == (OutcomeKind.CANCELLED, signal.SIGTERM)
    launcher.cancel("running")
    assert launcher.poll(["running"])["running"] == outcome


def test_cancelling_at_the_moment_of_starting(
    launcher: LocalLauncher, make_job: Callable[..., Job], ending_of: Callable
) -> None:
    """Whether the supervisor is not yet up, signing or running: the job ends cancelled."""
    for i in range(4):
        launcher.submit(make_job(f"a{i}", UNTIL_GO, resources=Resources(cores=2)))
        launcher.poll([])
        time.sleep(i * 0.03)  # walks through the supervisor's start
        launcher.cancel(f"a{i}")
        assert ending_of(launcher, f"a{i}").kind is OutcomeKind.CANCELLED


def test_what_cannot_run_is_refused(
    launcher: LocalLauncher, make_job: Callable[..., Job], ending_of: Callable, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="2 cores; it asks for 3"):
        launcher.submit(make_job("a", "true", resources=Resources(cores=3)))
    with pytest.raises(ValueError, match="no GPUs"):
        launcher.submit(make_job("a", "true", resources=Resources(gpus=1)))
    with pytest.raises(ValueError, match="one process a job; job a asks for 2 tasks"):
        launcher.submit(make_job("a", "true", resources=Resources(tasks=2)))
    with pytest.raises(ValueError, match="submit it first"):
        launcher.poll(["unknown"])
    job = make_job("a", "true")
    launcher.submit(job)
    ending_of(launcher, "a")
    with pytest.raises(ValueError, match="keep its run folder"):
        launcher.submit(Job("a", ("true",), tmp_path / "elsewhere", 1.0, "done"))
    with pytest.raises(ValueError, match="belongs to a: choose another"):
        launcher.submit(Job("b", ("true",), job.run_dir, 1.0, "done"))
    with pytest.raises(ValueError, match="at least one core"):
        LocalLauncher(0, tmp_path)


def test_gpus_are_given_to_one_job_at_a_time(
    make_job: Callable[..., Job], ending_of: Callable, wait_until: Callable, tmp_path: Path
) -> None:
    """The second waits for two GPUs although one is free, and the third does not overtake it."""
    show = f'echo "$CUDA_VISIBLE_DEVICES" > $RUN/gpus; {UNTIL_GO}'
    jobs = [make_job(name, show, resources=Resources(gpus=n)) for name, n in (("a", 2), ("b", 2), ("c", 1))]
    with LocalLauncher(3, tmp_path / "state", devices=("2", "3", "5")) as launcher:
        for job in jobs:
            launcher.submit(job)
        assert list(launcher.poll("abc").values()) == ["running", "pending", "pending"]
        for job in jobs:
            (job.run_dir / "go").parent.mkdir(exist_ok=True)
            (job.run_dir / "go").touch()
            assert ending_of(launcher, job.key).kind is OutcomeKind.FINISHED
        assert [(job.run_dir / "gpus").read_text() for job in jobs] == ["2,3\n", "2,3\n", "5\n"]
        with pytest.raises(ValueError, match="has 3 GPUs to give; job d asks for 4"):
            launcher.submit(make_job("d", "true", resources=Resources(gpus=4)))


def test_a_resumed_launcher_knows_whose_gpus_are_taken(
    make_job: Callable[..., Job], ending_of: Callable, wait_until: Callable, tmp_path: Path
) -> None:
    first, second = (make_job(name, UNTIL_GO, resources=Resources(gpus=1)) for name in "ab")
    with LocalLauncher(2, tmp_path / "state", devices=("0",)) as launcher:
        launcher.submit(first)
        launcher.poll(["a"])
        wait_until((first.run_dir / "pid").exists, "the job")
    with LocalLauncher(2, tmp_path / "state", devices=("0",)) as launcher:
        launcher.submit(first)
        launcher.submit(second)
        for _ in range(3):
            assert launcher.poll("ab") == {"a": "running", "b": "pending"}
        (first.run_dir / "go").touch()
        ending_of(launcher, "a")
        second.run_dir.mkdir(exist_ok=True)
        (second.run_dir / "go").touch()
        assert ending_of(launcher, "b").kind is OutcomeKind.FINISHED


@pytest.mark.parametrize("begun", [False, True])
def test_an_attempt_of_a_cluster_s_launcher_that_is_gone_is_lost_and_tried_again_here(
    begun: bool, make_job: Callable[..., Job], ending_of: Callable, tmp_path: Path
) -> None:
    """A campaign that goes on with another site: no GPUs of this machine were given to it, which was a traceback."""
    job = make_job("a", 'echo "$CUDA_VISIBLE_DEVICES" > $RUN/done', resources=Resources(gpus=2))
    folder = rundir.prepare_attempt(job, 1)
    if begun:
        there = {"pid": 1, "start_ticks": 1, "boot_id": "another", "host": "there"}
        rundir.write_json(folder / rundir.SUPERVISOR_FILE, there)
        with rundir.Lock(job.run_dir / rundir.LOCK_FILE), LocalLauncher(2, tmp_path, devices=("0", "1")) as launcher:
            launcher.submit(job)
            assert launcher.poll("a") == {"a": "running"}, "a node that holds the lock is at it"
    with LocalLauncher(2, tmp_path / "state", devices=("0", "1")) as launcher:
        launcher.submit(job)
        assert launcher.poll("a")["a"].kind is OutcomeKind.LOST
        launcher.submit(job, 2)
        assert ending_of(launcher, "a").kind is OutcomeKind.FINISHED
    assert (job.run_dir / "done").read_text() == "0,1\n"


def test_an_unwritable_run_folder_is_one_sentence(
    launcher: LocalLauncher, make_job: Callable[..., Job], tmp_path: Path
) -> None:
    (tmp_path / "a").write_text("a file where the folder should be")
    launcher.submit(make_job("b", "true"))
    with pytest.raises(rundir.RunDirError, match="a part of it is a file"):
        launcher.submit(make_job("a", "true"))
        launcher.poll(["a"])


def test_the_rendered_script_does_what_the_job_does(launcher: LocalLauncher, make_job: Callable[..., Job]) -> None:
    job = make_job("a", 'echo "$HELLO" > $RUN/done', env={"HELLO": "it's; here"})
    job.run_dir.mkdir()
    subprocess.run(["/bin/sh"], input=launcher.render(job), text=True, check=True)
    assert (job.run_dir / "done").read_text() == "it's; here\n"


def test_polling_is_cheap(launcher: LocalLauncher, make_job: Callable[..., Job], ending_of: Callable) -> None:
    """At 5 polls a second, 8 running jobs may cost 2 % of one core: 500 microseconds each."""
    jobs = [make_job(f"j{i}", UNTIL_GO) for i in range(2)]
    for job in jobs:
        launcher.submit(job)
    launcher.poll([])
    for job in jobs:
        (job.run_dir / "go").touch()
        assert isinstance(ending_of(launcher, job.key), JobOutcome)
    waiting = make_job("w", UNTIL_GO)
    launcher.submit(waiting)
    launcher.poll(["w"])
    started = time.process_time()
    for _ in range(100):
        assert launcher.poll(["w"])["w"] == "running"
    assert (time.process_time() - started) / 100 < 500e-6
    launcher.cancel("w")
    ending_of(launcher, "w")
