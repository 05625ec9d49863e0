"""The Kubernetes launcher against an API server over real HTTP, whose pods run their real commands here."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("kubernetes", reason="the official client is the optional extra [k8s]")

from megatron_evolve.launch import rundir
from megatron_evolve.launch.job import Job, JobOutcome, OutcomeKind
from megatron_evolve.launch.kubernetes import KubernetesLauncher
from megatron_evolve.launch.kubernetes_client import Client, KubernetesError, connect
from megatron_evolve.launch.kubernetes_manifest import Cluster, object_name
from tests.launch.kubernetes.server import CLAIM, PODS, FakeCluster, end, job_path

# --- one job, from submit to its outcome -----------------------------------------------------------------------------


def test_a_pod_runs_the_job_and_its_folder_tells(
    cluster: FakeCluster, launcher: KubernetesLauncher, make_job: Callable[..., Job], ending_of: Callable
) -> None:
    job = make_job("1/ab/train", 'echo "$WORD" > "$RUN/done"', env={"WORD": "it's; here"})
    launcher.check()
    launcher.submit(job)
    assert launcher.poll([job.key]) == {job.key: "pending"}
    assert cluster.start(job_path(job)).wait(20) == 0
    outcome = ending_of(launcher, job.key)
    assert (outcome.kind, outcome.attempt, outcome.exit_code) == (OutcomeKind.FINISHED, 1, 0)
    assert (job.run_dir / "done").read_text() == "it's; here\n"
    assert set(cluster.tokens) == {"Bearer secret-token"}
    assert not any("it's" in str(found) for found in cluster.objects.values())  # no environment in a manifest


def test_submitting_again_changes_nothing(
    cluster: FakeCluster, site: Cluster, client: Client, launcher: KubernetesLauncher, make_job: Callable[..., Job]
) -> None:
    job = make_job("a", "true")
    launcher.submit(job)
    launcher.submit(job)
    with KubernetesLauncher(site, client) as another:  # a controller that was started anew
        another.submit(job)
        assert another.poll(["a"]) == {"a": "pending"}
    assert cluster.find("/jobs/") == [job_path(job)]
    with pytest.raises(ValueError, match="attempt 2 at job a must follow the end of attempt 1"):
        launcher.submit(job, 2)


@pytest.mark.parametrize("after", [True, False], ids=["reply lost", "request lost"])
def test_a_lost_reply_makes_no_second_job(
    after: bool, cluster: FakeCluster, launcher: KubernetesLauncher, make_job: Callable[..., Job]
) -> None:
    job = make_job("a", "true")
    cluster.fail("POST", "/jobs?fieldValidation=Strict", 0, after=after)
    launcher.submit(job)
    assert cluster.find("/jobs/") == [job_path(job)]
    assert launcher.poll(["a"]) == {"a": "pending"}


def test_a_job_that_was_prepared_and_never_created_is_created(
    cluster: FakeCluster, site: Cluster, client: Client, launcher: KubernetesLauncher, make_job: Callable[..., Job]
) -> None:
    job = make_job("a", "true")
    rundir.prepare_attempt(job, 1)  # and the controller died
    launcher.submit(job)
    assert cluster.find("/jobs/") == [job_path(job)]


def test_a_name_that_another_holds_is_not_adopted(
    cluster: FakeCluster, launcher: KubernetesLauncher, make_job: Callable[..., Job]
) -> None:
    job = make_job("a", "true")
    cluster.put(job_path(job), {"metadata": {"name": object_name(job, 1), "annotations": {}}})
    with pytest.raises(KubernetesError, match="must be of job a; it is of None"):
        launcher.submit(job)
    assert not job.run_dir.exists()


def test_attempts_follow_each_other(
    cluster: FakeCluster, launcher: KubernetesLauncher, make_job: Callable[..., Job], ending_of: Callable
) -> None:
    job = make_job("a", '[ -e "$RUN/once" ] && touch "$RUN/done" || { touch "$RUN/once"; exit 3; }')
    for attempt, kind in ((1, OutcomeKind.CRASHED), (2, OutcomeKind.FINISHED)):
        launcher.submit(job, attempt)
        cluster.start(job_path(job, attempt)).wait(20)
        assert ending_of(launcher, "a").kind is kind
    launcher.submit(job, 3)  # finished: adopted as it is
    assert len(cluster.find("/jobs/")) == 2


# --- how a job ends --------------------------------------------------------------------------------------------------


def test_cancel_stops_what_runs_and_says_so(
    cluster: FakeCluster, launcher: KubernetesLauncher, make_job: Callable[..., Job], ending_of: Callable, wait_until
) -> None:
    job = make_job("a", 'touch "$RUN/up"; exec sleep 60')
    launcher.submit(job)
    pod = cluster.start(job_path(job))
    wait_until((job.run_dir / "up").exists, "the job to run")
    assert launcher.poll(["a"]) == {"a": "running"}
    launcher.cancel("a")
    assert any(request.startswith("DELETE") for request in cluster.requests)
    end(pod)  # as the kubelet does for a Job deleted in the foreground
    assert ending_of(launcher, "a").kind is OutcomeKind.CANCELLED
    launcher.cancel("a")


def test_cancel_before_it_began_and_of_what_is_gone(
    cluster: FakeCluster, launcher: KubernetesLauncher, make_job: Callable[..., Job], ending_of: Callable
) -> None:
    job = make_job("a", "true")
    launcher.submit(job)
    cluster.delete(job_path(job))
    launcher.cancel("a")
    outcome = ending_of(launcher, "a")
    assert (outcome.kind, outcome.reason) == (OutcomeKind.CANCELLED, "was cancelled before it began")
    assert rundir.read_outcome(rundir.attempt_dir(job.run_dir, 1)) == outcome


def test_a_cancelled_job_is_deleted_whoever_dies_before(
    cluster: FakeCluster, site: Cluster, client: Client, launcher: KubernetesLauncher, make_job, ending_of
) -> None:
    job = make_job("a", "true")
    launcher.submit(job)
    rundir.write_whole(rundir.attempt_dir(job.run_dir, 1) / rundir.CANCEL_FILE, "")  # and the controller died
    with KubernetesLauncher(site, client, settle_s=0.0) as another:
        another.submit(job)
        assert ending_of(another, "a").kind is OutcomeKind.CANCELLED
    assert cluster.find("/jobs/") == []


def test_a_supervisor_that_hangs_is_stopped_at_the_pod_s_deadline(
    cluster: FakeCluster, launcher: KubernetesLauncher, make_job: Callable[..., Job], ending_of: Callable, wait_until
) -> None:
    job = make_job("a", 'touch "$RUN/up"; exec sleep 60')
    launcher.submit(job)
    pod = cluster.start(job_path(job))
    wait_until((job.run_dir / "up").exists, "the job to run")
    end(pod, signal.SIGKILL)
    cluster.add_pod(job_path(job), phase="Failed", reason="DeadlineExceeded")
    cluster.condition(job_path(job), "Failed", "BackoffLimitExceeded")
    assert ending_of(launcher, "a").kind is OutcomeKind.TIMED_OUT


def disrupted(reason: str, message: str = "words") -> dict:
    return {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}]}


def terminated(reason: str, code: int, message: str = "") -> dict:
    ended = {"reason": reason, "exitCode": code, "message": message}
    return {"phase": "Failed", "containerStatuses": [{"name": "node", "state": {"terminated": ended}}]}


ENDINGS = [
    (terminated("OOMKilled", 137), OutcomeKind.OUT_OF_MEMORY, "killed by the kernel at its memory limit"),
    (disrupted("PreemptionByScheduler"), OutcomeKind.LOST, "preempted by a pod of higher priority"),
    (disrupted("EvictionByEvictionAPI"), OutcomeKind.LOST, "when a node is drained"),
    (disrupted("DeletionByTaintManager"), OutcomeKind.LOST, "node is tainted"),
    (disrupted("DeletionByPodGC"), OutcomeKind.LOST, "was lost with its node"),
    (disrupted("TerminationByKubelet", "low on memory"), OutcomeKind.LOST, "low on memory"),
    ({"phase": "Failed", "reason": "Evicted", "message": "disk"}, OutcomeKind.LOST, "by its node: Evicted, disk"),
    ({"phase": "Failed", "reason": "DeadlineExceeded"}, OutcomeKind.LOST, "deadline while it waited to begin"),
    (terminated("Error", 1, "cannot read /claim"), OutcomeKind.LOST, "status 1 (Error, cannot read /claim)"),
]


@pytest.mark.parametrize(("status", "kind", "says"), ENDINGS, ids=[says for _, _, says in ENDINGS])
def test_the_cluster_tells_where_no_outcome_was_written(
    status: dict, kind: OutcomeKind, says: str, cluster: FakeCluster, launcher: KubernetesLauncher, make_job, ending_of
) -> None:
    job = make_job("a", "true")
    launcher.submit(job)
    cluster.add_pod(job_path(job), **status)
    cluster.condition(job_path(job), "Failed", "PodFailurePolicy", "Pod here/x has condition DisruptionTarget")
    outcome = ending_of(launcher, "a")
    assert outcome.kind is kind and says in outcome.reason and outcome.seconds is None


@pytest.mark.parametrize(
    ("condition", "kind", "says"),
    [
        (("Failed", "PodFailurePolicy", "x has DisruptionTarget"), OutcomeKind.LOST, "x has DisruptionTarget"),
        (("Complete", "", ""), OutcomeKind.LOST, "its Job ended, without an outcome"),
        (None, OutcomeKind.LOST, "is gone, without an outcome"),
    ],
)
def test_the_job_tells_where_its_pods_are_gone(
    condition: tuple | None, kind: OutcomeKind, says: str, cluster: FakeCluster, launcher, make_job, ending_of
) -> None:
    job = make_job("a", "true")
    launcher.submit(job)
    if condition is None:
        cluster.delete(job_path(job))
    else:
        cluster.condition(job_path(job), *condition)
    outcome = ending_of(launcher, "a")
    assert outcome.kind is kind and says in outcome.reason


def test_an_evicted_pod_saves_and_is_told_apart_from_a_crash(
    cluster: FakeCluster, launcher: KubernetesLauncher, make_job: Callable[..., Job], ending_of: Callable, wait_until
) -> None:
    job = make_job("a", 'trap \'touch "$RUN/saved"; exit 0\' TERM; touch "$RUN/up"; sleep 60 & wait')
    launcher.submit(job)
    pod = cluster.start(job_path(job))
    wait_until((job.run_dir / "up").exists, "the job to run")
    path = cluster.add_pod(job_path(job))
    cluster.condition(path, "DisruptionTarget", "EvictionByEvictionAPI", "the node is drained")
    end(pod)
    outcome = ending_of(launcher, "a")
    assert outcome.kind is OutcomeKind.LOST and (job.run_dir / "saved").exists()
    assert "the node is drained; was stopped because its supervisor was signalled" in outcome.reason
    assert cluster.find("/jobs/") == []  # so that no queue starts it again
    launcher.submit(job, 2)
    assert cluster.find("/jobs/") == [job_path(job, 2)]


def test_an_outcome_may_arrive_after_the_end(
    cluster: FakeCluster, site: Cluster, client: Client, make_job: Callable[..., Job], ending_of: Callable
) -> None:
    """A shared disk shows a file late: within the settling time, an ended Job without an outcome is no lost one."""
    job = make_job("a", 'touch "$RUN/done"')
    with KubernetesLauncher(site, client, settle_s=20.0) as launcher:
        launcher.submit(job)
        cluster.condition(job_path(job), "Complete")
        time.sleep(0.1)
        assert launcher.poll(["a"]) == {"a": "pending"}
        cluster.start(job_path(job)).wait(20)
        assert ending_of(launcher, "a").kind is OutcomeKind.FINISHED


# --- what a user gave ------------------------------------------------------------------------------------------------


def test_a_namespace_that_forbids_is_one_sentence_and_leaves_nothing(
    cluster: FakeCluster, launcher: KubernetesLauncher, make_job: Callable[..., Job]
) -> None:
    said = 'jobs.batch is forbidden: User "me" cannot create resource "jobs"'
    cluster.fail("POST", "/jobs", 403, message=said)
    job = make_job("a", "true")
    with pytest.raises(KubernetesError) as error:
        launcher.submit(job)
    assert said in str(error.value) and "give this account the Role of docs/kubernetes.md" in str(error.value)
    assert not job.run_dir.exists() and cluster.find("/jobs/") == []


def test_a_forbidden_watch_stops_the_campaign(
    cluster: FakeCluster, site: Cluster, client: Client, make_job: Callable[..., Job], wait_until
) -> None:
    cluster.fail("GET", "/pods", 403, times=100, message="pods is forbidden")
    with KubernetesLauncher(site, client) as launcher:
        launcher.submit(make_job("a", "true"))
        wait_until(lambda: launcher._mirrors["Pod"]._trouble, "the refusal")
        with pytest.raises(KubernetesError, match=r"list .*/pods: pods is forbidden"):
            launcher.poll(["a"])


def test_a_webhook_that_cannot_try_is_no_refusal(
    cluster: FakeCluster, launcher: KubernetesLauncher, make_job: Callable[..., Job]
) -> None:
    cluster.fail("POST", "dryRun", 400, message='admission webhook "x" does not support dry run')
    job = make_job("a", "true")
    launcher.submit(job)
    assert cluster.find("/jobs/") == [job_path(job)]


def test_a_claim_that_is_not_there(cluster: FakeCluster, launcher: KubernetesLauncher) -> None:
    cluster.delete(CLAIM)
    with pytest.raises(KubernetesError, match="namespace here must have the PersistentVolumeClaim work; it has none"):
        launcher.check()


def test_a_run_folder_outside_the_claim(launcher: KubernetesLauncher, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run folders must lie under .* got /elsewhere/run"):
        launcher.submit(Job("a", ("true",), Path("/elsewhere/run"), 1.0, "done"))


@pytest.mark.parametrize("reason", ["InvalidImageName", "ImagePullBackOff"])
def test_an_image_that_is_not_there_calls_the_job_off(
    reason: str, cluster: FakeCluster, launcher: KubernetesLauncher, make_job: Callable[..., Job], wait_until
) -> None:
    job = make_job("a", "true")
    launcher.submit(job)
    waiting = {"reason": reason, "message": 'Back-off pulling image "evolve:2"'}
    pod = cluster.objects[cluster.add_pod(job_path(job), containerStatuses=[{"state": {"waiting": waiting}}])]
    wait_until(lambda: launcher._mirrors["Pod"].objects(), "the watch to tell")
    if reason == "ImagePullBackOff":
        assert launcher.poll(["a"]) == {"a": "pending"}  # its registry may only be down
        pod["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z"
        cluster.put(f"{PODS}/{pod['metadata']['name']}", pod)
    with pytest.raises(KubernetesError, match=r"job a was called off: pod .* cannot start: .*evolve:2"):
        wait_until(lambda: launcher.poll(["a"]) and False, "the launcher to see it")
    assert cluster.find("/jobs/") == []
    assert isinstance(launcher.poll(["a"])["a"], JobOutcome)
    assert rundir.read_outcome(rundir.attempt_dir(job.run_dir, 1)).kind is OutcomeKind.CANCELLED


def test_why_a_pod_waits_is_kept_beside_its_attempt(
    cluster: FakeCluster, launcher: KubernetesLauncher, make_job: Callable[..., Job], wait_until
) -> None:
    """No pod, a queue that holds the Job, no room on any node, no image: each in the cluster's own words."""
    job = make_job("a", "true")
    launcher.submit(job)
    folder, path = rundir.attempt_dir(job.run_dir, 1), job_path(job)

    def told(words: str) -> dict:
        wait_until(lambda: launcher.poll(["a"]) and words in kept()["reason"], words)
        return kept()

    def kept() -> dict:
        where = folder / rundir.QUEUE_FILE
        return rundir.read_json(where) if where.exists() else {"reason": ""}

    assert told("has no pod yet")["state"] == "Pending"
    cluster.condition(path, "Suspended", "JobSuspended", "Job suspended")
    told("JobSuspended, Job suspended")
    full = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."
    unplaced = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": full}
    pod = cluster.add_pod(path, conditions=[unplaced])
    assert told(full) == {"job": path.rsplit("/", 1)[1], "state": "Pending", "nodes": "node0"} | {
        "reason": f"Unschedulable, {full}"
    }
    waiting = {"reason": "ErrImagePull", "message": "manifest unknown"}
    found = cluster.objects[pod]
    cluster.put(pod, found | {"status": {"phase": "Pending", "containerStatuses": [{"state": {"waiting": waiting}}]}})
    assert "on node0: ErrImagePull, manifest unknown" in told("ErrImagePull")["reason"]
    written = (folder / rundir.QUEUE_FILE).stat().st_mtime_ns
    for _ in range(3):
        launcher.poll(["a"])
    assert (folder / rundir.QUEUE_FILE).stat().st_mtime_ns == written, "written when it changes, not at each look"
    waiting = {"reason": "ContainerCreating"}
    cluster.put(pod, found | {"status": {"phase": "Pending", "containerStatuses": [{"state": {"waiting": waiting}}]}})
    wait_until(lambda: launcher.poll(["a"]) and kept()["reason"] == "", "the pod to be on its way")


def test_a_pod_is_known_by_its_service_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes.config import incluster_config

    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    for name, text in (("SERVICE_TOKEN_FILENAME", "of-the-pod"), ("SERVICE_CERT_FILENAME", "certificate")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(incluster_config, name, str(tmp_path / name))
    client = connect()
    assert client.host == "https://10.0.0.1:443"
    assert client._headers() == {"Authorization": "bearer of-the-pod"}


def test_no_way_to_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(KubernetesError, match=r"no way to a cluster: .*; set KUBECONFIG"):
        connect()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KubernetesError, match=r"pip install 'megatron-evolve\[k8s\]'"):
        connect()
