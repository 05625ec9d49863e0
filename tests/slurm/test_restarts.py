"""What Slurm starts again: a preempted job, one told to stop, alone or in an array, one whose node died, and the copy
that lives on there."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_evolve.launch import rundir, slurm_queue
from megatron_evolve.launch.job import Job, JobOutcome, OutcomeKind, Resources
from megatron_evolve.launch.rundir import ALIVE_EVERY_S
from megatron_evolve.launch.slurm_launcher import SUBMISSION_FILE, SlurmLauncher
from megatron_evolve.launch.starts import life_s
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ends, running, states, until

pytestmark = pytest.mark.slow

# Waits to be told to stop, saves how far it came and asks for another start; the next start goes on and finishes.
SAVES = """
import os, signal, sys
from pathlib import Path
run, told = Path(os.environ["RUN"]), []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
with open(run / "starts", "a") as file:
    file.write(os.environ.get("SLURM_RESTART_COUNT", "0") + "\\n")
if (run / "saved").exists():
    (run / "done").touch()
    sys.exit(0)
while not told:
    signal.sigtimedwait([signal.SIGUSR2], 0.1)
(run / "saved").touch()
sys.exit(75)
"""

# Rank 0 of 2 keeps count of starts; the second one finishes. The first waits to be told to stop, or for the file `go`.
RANK = """
import os, signal, sys
from pathlib import Path
run, told = Path(os.environ["RUN"]), []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
if os.environ["SLURM_PROCID"] == "0":
    with open(run / "starts", "a") as file:
        file.write(os.environ.get("SLURM_RESTART_COUNT", "0") + "\\n")
while "SLURM_RESTART_COUNT" not in os.environ and not (run / "go").exists():
    signal.sigtimedwait([signal.SIGUSR2], 0.1)
    if told:
        sys.exit(75)
(run / "done").touch()
"""

# The first start never ends by itself, but stops once a later one has taken its folder; that one waits to see it.
LIVES_ON = """
import os, sys, time
from pathlib import Path
from megatron_evolve.launch.fence import Fenced, check_fence
run = Path(os.environ["RUN"])
with open(run / "starts", "a") as file:
    file.write(os.environ.get("SLURM_RESTART_COUNT", "0") + "\\n")
try:
    while "SLURM_RESTART_COUNT" not in os.environ:
        check_fence()
        time.sleep(0.1)
except Fenced as error:
    (run / "fenced").write_text(str(error))
    sys.exit(1)
while os.environ.get("WAIT_FOR") and not (run / os.environ["WAIT_FOR"]).exists():
    time.sleep(0.1)
(run / "done").touch()
"""

MakeLauncher = Callable[..., SlurmLauncher]
PythonJob = Callable[..., Job]


def started(job: Job) -> str:
    path = job.run_dir / "starts"
    return path.read_text() if path.exists() else ""


def start_of(job: Job, number: int) -> JobOutcome:
    return JobOutcome.from_json(rundir.read_json(job.run_dir / f"attempts/1/starts/{number}.json"))


def slurm_job(job: Job) -> str:
    return rundir.read_json(job.run_dir / "attempts/1" / SUBMISSION_FILE)["job"]


def node_of(job: Job) -> str:
    return rundir.read_json(job.run_dir / "attempts/1" / rundir.QUEUE_FILE)["nodes"]


def test_a_job_told_to_stop_is_put_back_and_goes_on(
    make_launcher: MakeLauncher, python_job: PythonJob, cluster: Cluster
) -> None:
    """By Slurm's own clock, before its allocation ends: at two minutes less the job's grace and a minute."""
    launcher, job = make_launcher(), python_job("stopped", SAVES, grace_s=54.0, time_limit_s=600.0)
    launcher.submit(job)
    running(launcher, job)
    until(lambda: started(job), "its start")
    cluster.run("scontrol", "update", f"JobId={slurm_job(job)}", "TimeLimit=2")
    until(lambda: states(launcher, job) == ["pending"], "its return into the queue")
    (outcome,) = ends(launcher, job)
    assert outcome.kind is OutcomeKind.FINISHED and outcome.attempt == 1
    assert started(job) == "0\n1\n"
    first, second = start_of(job, 0), start_of(job, 1)
    assert first.seconds < 90  # long before the two minutes
    assert first.kind is OutcomeKind.LOST and second.kind is OutcomeKind.FINISHED
    assert outcome.seconds == pytest.approx(first.seconds + second.seconds)
    assert outcome.cpu_seconds == pytest.approx(first.cpu_seconds + second.cpu_seconds)


def test_a_task_of_an_array_that_is_told_to_stop_is_put_back_alone(
    make_launcher: MakeLauncher, python_job: PythonJob, cluster: Cluster
) -> None:
    """The last task goes by the array's number: its ranks, its state and its requeue must not be those of all tasks."""
    launcher = make_launcher(throttle=3)
    jobs = [python_job(f"task-{number}", RANK, resources=Resources(2, 0, tasks=2)) for number in range(3)]
    for job in jobs:
        launcher.submit(job)
    running(launcher, *jobs)
    until(lambda: all(map(started, jobs)), "their start")
    array = slurm_job(jobs[0]).partition("_")[0]
    numbers = {row.id: row.number for row in slurm_queue.queue()}
    (last,) = [job for job in jobs if numbers[slurm_job(job)] == array]
    ended, runs = [job for job in jobs if job is not last]
    (ended.run_dir / "go").touch()
    assert ends(launcher, ended)[0].kind is OutcomeKind.FINISHED
    cluster.run("scancel", "--signal=TERM", "--batch", slurm_job(last))
    (outcome,) = ends(launcher, last)
    assert outcome.kind is OutcomeKind.FINISHED and outcome.attempt == 1, outcome.reason
    assert states(launcher, runs) == ["running"]
    (runs.run_dir / "go").touch()
    assert ends(launcher, runs)[0].kind is OutcomeKind.FINISHED
    assert [started(job) for job in (ended, runs, last)] == ["0\n", "0\n", "0\n1\n"]


def test_a_preempted_job_saves_and_goes_on(
    make_launcher: MakeLauncher, python_job: PythonJob, make_job: Callable[..., Job], cluster: Cluster
) -> None:
    launcher = make_launcher(partition="spot", options={"exclusive": "", "nodelist": "n1"})
    urgent = make_launcher(partition="high", options={"exclusive": "", "nodelist": "n1"})
    job, first = python_job("preempted", SAVES), make_job("urgent", 'sleep 1; touch "$RUN/done"')
    launcher.submit(job)
    running(launcher, job)
    until(lambda: started(job), "its start")
    urgent.submit(first)
    assert ends(urgent, first)[0].kind is OutcomeKind.FINISHED
    until(lambda: states(launcher, job) == ["pending"], "its return into the queue")
    (outcome,) = ends(launcher, job)
    assert outcome.kind is OutcomeKind.FINISHED and outcome.attempt == 1
    assert started(job) == "0\n1\n" and (job.run_dir / "saved").exists()


def test_a_node_that_dies_and_one_that_is_only_lost_from_sight(
    make_launcher: MakeLauncher, python_job: PythonJob, cluster: Cluster
) -> None:
    """kill -9 of one node's slurmd with its step, and of another's slurmd alone, where the first copy lives on."""
    launcher = make_launcher(options={"exclusive": ""})
    dead, lost = python_job("dead", LIVES_ON), python_job("lost", LIVES_ON, env={"WAIT_FOR": "fenced"})
    for job in (dead, lost):
        launcher.submit(job)
    running(launcher, dead, lost)
    until(lambda: started(dead) and started(lost), "their start")
    nodes = node_of(dead), node_of(lost)
    cluster.kill_node(nodes[0])
    cluster.kill_node(nodes[1], only_slurmd=True)
    try:
        outcomes = ends(launcher, dead, lost)
    finally:
        for node in nodes:
            cluster.start_node(node)
    for outcome, job, node in zip(outcomes, (dead, lost), nodes, strict=True):
        assert outcome.kind is OutcomeKind.FINISHED and outcome.attempt == 1 and outcome.host != node
        assert started(job) == "0\n1\n"
        assert outcome.seconds is None, "what its first start took nobody measured"
        assert life_s(job.run_dir / "attempts/1") - start_of(job, 1).seconds > ALIVE_EVERY_S - 0.001
    assert not (dead.run_dir / "fenced").exists()
    assert "start 1 of attempt 1" in (lost.run_dir / "fenced").read_text()
    said = (lost.run_dir / "attempts/1" / rundir.SUPERVISOR_LOG).read_text()
    assert "holds the run folder: start 0 of attempt 1" in said
    assert not Path(lost.run_dir / "attempts/1/starts/0.json").exists()
