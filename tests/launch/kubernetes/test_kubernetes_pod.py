"""What runs in a job's pods: their share of the ranks, which begin together and end together."""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("kubernetes", reason="the official client is the optional extra [k8s]")

from megatron_evolve.launch import rundir
from megatron_evolve.launch.fence import GAVE_UP, NO_START, Token, raise_fence
from megatron_evolve.launch.job import Job, OutcomeKind, Resources
from megatron_evolve.launch.kubernetes import KubernetesLauncher
from megatron_evolve.launch.kubernetes_manifest import object_name
from tests.launch.kubernetes.server import FakeCluster, end, job_path

CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--map-root-user")
WIDE = Resources(cores=16, gpus=16, tasks=4)


def test_ranks_of_several_pods_know_their_place(
    cluster: FakeCluster, launcher: KubernetesLauncher, make_job: Callable[..., Job], ending_of: Callable, wait_until
) -> None:
    words = (
        'echo $RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $MASTER_PORT > "$RUN/rank$RANK"; '
        'while [ ! -e "$RUN/rank0" -o ! -e "$RUN/rank3" ]; do sleep 0.05; done; touch "$RUN/done"'  # ranks meet
    )
    job = make_job("a", words, resources=WIDE)
    launcher.submit(job)
    first = cluster.start(job_path(job), 0)
    time.sleep(0.3)
    assert launcher.poll(["a"]) == {"a": "pending"}  # pod 0 alone begins nothing: no clock runs
    second = cluster.start(job_path(job), 1)
    assert first.wait(20) == 0 and second.wait(20) == 0
    assert cluster.start(job_path(job), 1).wait(20) == 0  # a pod put in the place of one that had begun does nothing
    outcome = ending_of(launcher, "a")
    assert outcome.kind is OutcomeKind.FINISHED and outcome.seconds > 0
    assert outcome.cpu_seconds is None, "pod 0 knows of its own ranks alone"
    place = [(job.run_dir / f"rank{rank}").read_text().split() for rank in range(4)]
    host = f"{object_name(job, 1)}-0.megatron-evolve"
    assert place == [[str(rank), "4", str(rank % 2), host, "29500"] for rank in range(4)]


LIVES_ON = """
import os, time
from pathlib import Path
from megatron_evolve.launch.fence import Fenced, check_fence
run, rank = Path(os.environ["RUN"]), os.environ.get("RANK", "0")
(run / f"up{rank}").touch()
try:
    while True:
        check_fence()
        time.sleep(0.05)
except Fenced:
    (run / f"fenced{rank}").touch()
"""


@pytest.mark.parametrize(("resources", "pods"), [(Resources(), 1), (WIDE, 2)])
def test_a_pod_that_lives_on_is_shut_out_by_the_next_attempt(
    resources: Resources, pods: int, cluster: FakeCluster, launcher: KubernetesLauncher, python_job, wait_until
) -> None:
    """Deleted by force behind a partition, with its lock lost: it wrote on into the folder of its successor."""
    job = python_job("a", LIVES_ON, resources=resources)
    launcher.submit(job)
    begun = [cluster.start(job_path(job), index) for index in range(pods)]
    wait_until(lambda: len(list(job.run_dir.glob("up*"))) == resources.tasks, "all ranks to run")
    raise_fence(job.run_dir, Token(2, 0, "a pod on another node"))
    assert [pod.wait(20) for pod in begun] == [0] * pods
    assert len(list(job.run_dir.glob("fenced*"))) == resources.tasks
    assert rundir.read_outcome(rundir.attempt_dir(job.run_dir, 1)) is None, "and records nothing"


def test_a_late_pod_of_an_attempt_that_was_given_up_runs_nothing(
    cluster: FakeCluster, launcher: KubernetesLauncher, make_job: Callable[..., Job]
) -> None:
    job = make_job("a", 'touch "$RUN/up$RANK"', resources=WIDE)
    launcher.submit(job)
    (rundir.attempt_dir(job.run_dir, 1) / rundir.SUPERVISOR_FILE).write_text("{}")  # pod 0 had begun
    raise_fence(job.run_dir, Token(1, NO_START, GAVE_UP))
    assert cluster.start(job_path(job), 1).wait(20) == 0
    assert list(job.run_dir.glob("up*")) == []


@pytest.mark.parametrize("failing", [0, 3])
def test_one_failed_rank_ends_them_all_with_its_words(
    failing: int, cluster: FakeCluster, launcher: KubernetesLauncher, make_job: Callable[..., Job], ending_of: Callable
) -> None:
    words = f'[ $RANK = {failing} ] && {{ echo "ValueError: no such row" >&2; exit 4; }}; exec sleep 60'
    job = make_job("a", words, resources=WIDE)
    launcher.submit(job)
    pods = [cluster.start(job_path(job), index) for index in (0, 1)]
    assert [pod.wait(20) for pod in pods] == [0, 0]
    outcome = ending_of(launcher, "a")
    assert (outcome.kind, outcome.exit_code) == (OutcomeKind.CRASHED, 4) and "no such row" in outcome.reason


def test_a_pod_that_is_drained_fails_its_job(
    cluster: FakeCluster, launcher: KubernetesLauncher, make_job: Callable[..., Job], ending_of: Callable, wait_until
) -> None:
    job = make_job("a", 'touch "$RUN/up$RANK"; exec sleep 60', resources=WIDE)
    launcher.submit(job)
    first, second = (cluster.start(job_path(job), index) for index in (0, 1))
    wait_until(lambda: len(list(job.run_dir.glob("up*"))) == 4, "all ranks to run")
    assert end(second) == 128 + signal.SIGTERM  # so the Job fails, and the others are stopped by the cluster
    assert end(first) == 0
    assert ending_of(launcher, "a").kind is OutcomeKind.LOST


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_container_s_first_process_hears_sigterm(
    tasks: int, cluster: FakeCluster, launcher: KubernetesLauncher, make_job: Callable[..., Job], ending_of, wait_until
) -> None:
    """The kernel keeps signals without a handler from the first process of a container, which the supervisor is."""
    job = make_job("a", 'touch "$RUN/up"; exec sleep 60', resources=Resources(cores=2, tasks=tasks))
    launcher.submit(job)
    pod = cluster.start(job_path(job), wrapped=CONTAINER)
    try:
        wait_until(lambda: (job.run_dir / "up").exists() or pod.poll() is not None, "the job to run")
        if pod.poll() is not None:
            pytest.skip("this machine makes no process namespaces")
        launcher.cancel("a")
        (first,) = [int(word) for word in Path(f"/proc/{pod.pid}/task/{pod.pid}/children").read_text().split()]
        os.kill(first, signal.SIGTERM)
        pod.wait(20)
    finally:
        pod.kill()
        pod.wait()
    assert ending_of(launcher, "a").kind is OutcomeKind.CANCELLED


PROGRAM = """
import os, pathlib, torch
import torch.distributed as dist
from megatron_evolve.substrate.ranks import place_in
place = place_in(os.environ)
dist.init_process_group("gloo", init_method=place.meet, rank=place.rank, world_size=place.world_size)
total = torch.tensor([10.0**place.rank])
dist.all_reduce(total)
if place.rank == 0:
    pathlib.Path(os.environ["RUN"], "done").write_text(str(int(total)))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_of_two_pods_meet(
    cluster: FakeCluster, launcher: KubernetesLauncher, python_job: Callable[..., Job], ending_of: Callable
) -> None:
    """As the trainer meets, over gloo; this machine has no names of pods, so that both are told an address instead."""
    pytest.importorskip("torch", reason="the training half is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = f"127.0.0.1:{free.getsockname()[1]}"
    one_each = Resources(cores=16, gpus=16, tasks=2)
    job = python_job("a", PROGRAM, resources=one_each, env={"OMP_NUM_THREADS": "1"}, time_limit_s=120.0)
    launcher.submit(job)
    found = cluster.objects[job_path(job)]
    found["spec"]["template"]["spec"]["containers"][0]["command"][-1] = meet
    pods = [cluster.start(job_path(job), index) for index in (0, 1)]
    assert [pod.wait(120) for pod in pods] == [0, 0]
    outcome = ending_of(launcher, "a")
    assert outcome.kind is OutcomeKind.FINISHED, outcome.reason
    assert (job.run_dir / "done").read_text() == "11"
