"""The Slurm launcher on a real cluster: endings told apart, arrays, lost replies, restarts of the controller."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_evolve.launch import rundir, slurm_queue
from megatron_evolve.launch.job import Job, OutcomeKind, Resources
from megatron_evolve.launch.slurm import Queue, render
from megatron_evolve.launch.slurm_launcher import SUBMISSION_FILE, SlurmLauncher
from tests.megatron_evolve import tiny
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ends, running, states, until

pytestmark = pytest.mark.slow
FINISH = 'echo started >> "$RUN/starts"; sleep 0.5; touch "$RUN/done"'

MakeJob = Callable[..., Job]
MakeLauncher = Callable[..., SlurmLauncher]


def names_in_queue(cluster: Cluster, states: str = "all") -> list[str]:
    return cluster.run("squeue", "--me", "--noheader", "--array", f"--states={states}", "--format=%j").splitlines()


@pytest.fixture
def shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a program in front of one of Slurm's: shell text in which `real` is the real one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write(name: str, text: str) -> Path:
        real = shutil.which(name, path=os.environ["PATH"].split(os.pathsep, 1)[1])
        program = folder / name
        program.write_text(f'#!/bin/sh\nreal() {{ {real} "$@"; }}\n{text}\n')
        program.chmod(0o755)
        return program

    return write


def test_endings_are_told_apart(make_launcher: MakeLauncher, make_job: MakeJob, cluster: Cluster) -> None:
    launcher = make_launcher()
    finished = make_job("finished", FINISH)
    third_fails = 'touch "$RUN/$SLURM_PROCID"; [ "$SLURM_PROCID" != 3 ] || exit 7'
    ranks = make_job("ranks", third_fails, resources=Resources(4, 4, tasks=4))
    unfinished = make_job("unfinished", "true")
    slow = make_job("slow", "sleep 60", time_limit_s=1.0)
    memory = make_job("memory", "echo 'MemoryError: cannot allocate' >&2; exit 1")
    stopped, foreign = make_job("stopped", "sleep 60"), make_job("foreign", "sleep 60")
    jobs = [finished, ranks, unfinished, slow, memory, stopped, foreign]
    for job in jobs:
        launcher.submit(job)
    running(launcher, stopped, foreign)
    until(lambda: rundir.read_supervisor(foreign.run_dir / "attempts/1"), "its supervisor")
    launcher.cancel(stopped.key)
    submission = rundir.read_json(foreign.run_dir / "attempts/1" / SUBMISSION_FILE)
    cluster.run("scancel", submission["job"])
    found = {outcome.key: outcome for outcome in ends(launcher, *jobs)}
    assert {key: outcome.kind.value for key, outcome in found.items()} == {
        "finished": "finished",
        "ranks": "crashed",
        "unfinished": "crashed",
        "slow": "timed_out",
        "memory": "out_of_memory",
        "stopped": "cancelled",
        "foreign": "lost",
    }
    assert found["finished"].cpu_seconds is not None and found["ranks"].cpu_seconds is None
    assert found["ranks"].exit_code == 7
    assert {path.name for path in ranks.run_dir.iterdir()} >= {"0", "1", "2", "3"}
    assert "did not put it back: its state was" in found["foreign"].reason
    measured = [outcome.host for outcome in found.values() if outcome.seconds is not None]  # its supervisor told
    assert len(measured) >= 4 and {*measured} <= {"n1", "n2", "n3", "n4"}


def test_a_held_job_waits_and_is_told_of(
    make_launcher: MakeLauncher, make_job: MakeJob, cluster: Cluster, capfd
) -> None:
    launcher, job, foreign = make_launcher(options={"hold": ""}), make_job("held", FINISH), make_job("foreign", FINISH)
    launcher.submit(job)
    launcher.submit(foreign)
    until(
        lambda: states(launcher, job) and (foreign.run_dir / "attempts/1" / rundir.QUEUE_FILE).exists(),
        "the queue's word",
    )
    assert rundir.read_json(foreign.run_dir / "attempts/1" / rundir.QUEUE_FILE)["reason"] == "JobHeldUser"
    assert "foreign is held (JobHeldUser): `scontrol release" in capfd.readouterr().err
    assert states(launcher, job, foreign) == ["pending", "pending"]
    cluster.run("scancel", rundir.read_json(foreign.run_dir / "attempts/1" / SUBMISSION_FILE)["job"])
    launcher.cancel(job.key)
    ours, theirs = ends(launcher, job, foreign)
    assert ours.kind is OutcomeKind.CANCELLED
    assert theirs.kind is OutcomeKind.LOST and "was cancelled in Slurm, not by us" in theirs.reason
    assert not (job.run_dir / "starts").exists()
    launcher.submit(job, 2)  # held again, but the first attempt's end stands
    assert json.loads((job.run_dir / "attempts/1/outcome.json").read_text())["kind"] == "cancelled"
    launcher.cancel(job.key)


def test_an_array_never_runs_more_than_its_throttle(make_launcher: MakeLauncher, make_job: MakeJob) -> None:
    launcher = make_launcher(throttle=3)
    command = 'date +%s.%N > "$RUN/from"; sleep 1; date +%s.%N > "$RUN/to"; touch "$RUN/done"'
    jobs = [make_job(f"task-{number}", command) for number in range(8)]
    for job in jobs:
        launcher.submit(job)
    assert {outcome.kind for outcome in ends(launcher, *jobs)} == {OutcomeKind.FINISHED}
    spans = [[float((job.run_dir / name).read_text()) for name in ("from", "to")] for job in jobs]
    assert max(sum(start <= moment < end for start, end in spans) for moment, _ in spans) == 3
    ids = [rundir.read_json(job.run_dir / "attempts/1" / SUBMISSION_FILE)["job"] for job in jobs]
    assert len({one.split("_")[0] for one in ids}) == 1 and [one.split("_")[1] for one in ids] == list("01234567")


def test_a_lost_reply_never_makes_a_second_job(
    make_launcher: MakeLauncher, make_job: MakeJob, cluster: Cluster, shim: Callable[[str, str], Path], tmp_path: Path
) -> None:
    counted = f"echo x >> {tmp_path}/calls\n"
    program = shim("sbatch", counted + 'real "$@" >/dev/null; echo "sbatch: error: Socket timed out" >&2; exit 1')
    launcher = make_launcher()
    one, several = make_job("one", FINISH), [make_job(f"several-{number}", FINISH) for number in range(3)]
    launcher.submit(one)
    assert states(launcher, one) == ["pending"]
    assert rundir.read_json(one.run_dir / "attempts/1" / SUBMISSION_FILE)["job"] is None
    # The controller dies here; the next one has the same intent before it, and an array whose reply is lost too.
    again = make_launcher(throttle=8)
    for job in (one, *several):
        again.submit(job)
    assert {outcome.kind for outcome in ends(again, one, *several)} == {OutcomeKind.FINISHED}
    program.unlink()
    assert (tmp_path / "calls").read_text() == "x\nx\n"
    names = names_in_queue(cluster)
    for job in (one, *several):
        assert (job.run_dir / "starts").read_text() == "started\n"
        name = rundir.read_json(job.run_dir / "attempts/1" / SUBMISSION_FILE)["name"]
        assert names.count(name) == (1 if job is one else 3)


def test_a_request_that_never_arrived_is_made_again(
    make_launcher: MakeLauncher, make_job: MakeJob, shim: Callable[[str, str], Path], tmp_path: Path, capfd
) -> None:
    program = shim("sbatch", 'echo "sbatch: error: Unable to contact slurm controller (connect failure)" >&2; exit 1')
    launcher, job = make_launcher(), make_job("again", FINISH)
    launcher.submit(job)
    assert states(launcher, job) == states(launcher, job) == ["pending"]
    assert capfd.readouterr().err.count("Slurm does not answer: sbatch said") == 1
    program.unlink()
    assert ends(launcher, job)[0].kind is OutcomeKind.FINISHED


def test_a_new_controller_adopts_what_runs_and_what_ended(make_launcher: MakeLauncher, make_job: MakeJob) -> None:
    waits = 'echo started >> "$RUN/starts"; while [ ! -e "$RUN/go" ]; do sleep 0.1; done; touch "$RUN/done"'
    long = make_job("long", waits)
    short, dropped = make_job("short", FINISH), make_job("dropped", "sleep 60")
    first = make_launcher()
    for job in (long, short, dropped):
        first.submit(job)
    running(first, long, dropped)
    until((short.run_dir / "done").exists, "the short job")
    second = make_launcher()
    for job in (long, short, dropped):
        second.submit(job)
    running(second, long, dropped)
    second.cancel(dropped.key)
    third = make_launcher()
    for job in (long, short, dropped):
        third.submit(job)
    (long.run_dir / "go").touch()
    kinds = [outcome.kind for outcome in ends(third, long, short, dropped)]
    assert kinds == [OutcomeKind.FINISHED, OutcomeKind.FINISHED, OutcomeKind.CANCELLED]
    for job in (long, short):
        assert (job.run_dir / "starts").read_text() == "started\n"


def test_what_slurm_refuses_is_one_sentence_and_leaves_nothing(
    make_launcher: MakeLauncher, make_job: MakeJob, cluster: Cluster
) -> None:
    job = make_job("refused", FINISH)
    for fields, says in (
        ({"partition": "nosuch"}, "nvalid partition"),
        ({"constraint": "gold"}, "nvalid feature"),
        ({"options": {"mem": "9T"}}, "onfiguration"),
    ):
        queue = Queue(**({"gpus_per_node": 2} | fields))
        with pytest.raises(slurm_queue.SlurmError, match=f"^Slurm refuses the job: .*{says}.*site file$"):
            slurm_queue.check(render(job, queue).text)
        launcher = make_launcher(**fields)
        launcher.submit(job)
        with pytest.raises(slurm_queue.SlurmError, match=says):
            launcher.poll([job.key])
        assert not (job.run_dir / "attempts/1" / SUBMISSION_FILE).exists()
    slurm_queue.check(render(job, Queue(2, partition="main")).text)
    assert names_in_queue(cluster, "pending,running") == []


def test_a_campaign_that_slurm_would_refuse_is_one_sentence_before_anything_is_written(
    cluster: Cluster, tmp_path: Path
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("{schema: site/1, launcher: slurm, slurm: {partition: nosuch}}")
    words = ("run", "demo", "--site", site, "--dir", tmp_path / "run", "--store", tmp_path / "store")
    refused = tiny.command(*words)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1 and "Slurm refuses the job: " in refused.stderr
    assert "nvalid partition" in refused.stderr and "Traceback" not in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site.yaml"]


def test_slurm_is_asked_seldom_and_forgets(
    make_launcher: MakeLauncher, make_job: MakeJob, shim: Callable[[str, str], Path], tmp_path: Path
) -> None:
    program = shim("squeue", f'echo x >> {tmp_path}/calls\nreal "$@"')
    launcher, job, gone = (
        make_launcher(),
        make_job("seldom", 'sleep 2; touch "$RUN/done"'),
        make_job("gone", "sleep 60"),
    )
    launcher.submit(job)
    launcher.submit(gone)
    running(launcher, job, gone)
    (tmp_path / "calls").unlink()
    end = time.monotonic() + 1.5
    polls = 0
    while time.monotonic() < end:
        launcher.poll([job.key, gone.key])
        polls += 1
    assert polls > 100 and (tmp_path / "calls").read_text().count("x") <= 6
    until((job.run_dir / "attempts/1/outcome.json").exists, "the end of it, unseen")
    # As after MinJobAge: Slurm knows neither. What ended wrote so itself; of the other nobody knows.
    program.write_text("#!/bin/sh\n")
    ended, lost = ends(launcher, job, gone)
    assert ended.kind is OutcomeKind.FINISHED
    assert lost.kind is OutcomeKind.LOST and "Slurm no longer knows it" in lost.reason
    program.unlink()
    slurm_queue.cancel([rundir.read_json(gone.run_dir / "attempts/1" / SUBMISSION_FILE)["job"]])
