"""A cluster in trouble: watches that break off or are too old, a server that is busy or down. No state is made up."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("kubernetes", reason="the official client is the optional extra [k8s]")

from megatron_evolve.launch.job import Job, OutcomeKind
from megatron_evolve.launch.kubernetes import KubernetesLauncher
from megatron_evolve.launch.kubernetes_client import Client, KubernetesError
from megatron_evolve.launch.kubernetes_manifest import Cluster
from tests.launch.kubernetes.conftest import client_of
from tests.launch.kubernetes.server import FakeCluster, job_path, serving


def watches(cluster: FakeCluster) -> int:
    return sum("watch=true" in request and "/jobs" in request for request in cluster.requests)


def lists(cluster: FakeCluster) -> int:
    return sum("limit=" in request and "/jobs" in request for request in cluster.requests)


@pytest.mark.parametrize("trouble", ["reset", "gone"])
def test_a_watch_is_taken_up_again(
    trouble: str, cluster: FakeCluster, launcher: KubernetesLauncher, make_job, ending_of, wait_until
) -> None:
    jobs = [make_job(f"j{number}", "true") for number in range(5)]  # two pages of the server's three
    for job in jobs:
        launcher.submit(job)
    wait_until(lambda: watches(cluster) == 1, "the watch")
    listed = lists(cluster)
    if trouble == "gone":
        cluster.forget_events()
    cluster.cut_watches()
    wait_until(lambda: watches(cluster) >= 2, "a second watch")
    cluster.condition(job_path(jobs[3]), "Failed", "BackoffLimitExceeded", "words")
    assert ending_of(launcher, "j3").kind is OutcomeKind.LOST
    states = launcher.poll([job.key for job in jobs])
    assert [states[f"j{number}"] for number in (0, 1, 2, 4)] == ["pending"] * 4
    assert (lists(cluster) > listed) is (trouble == "gone")  # a reset goes on from where it was
    versions = [
        request.split("resourceVersion=")[1].split("&")[0]
        for request in cluster.requests
        if "/jobs?" in request and "watch=true" in request
    ]
    assert trouble == "gone" or int(versions[-1]) >= int(versions[0])


def test_too_many_requests_are_asked_again_when_the_server_says(
    cluster: FakeCluster, launcher: KubernetesLauncher, make_job: Callable[..., Job]
) -> None:
    cluster.fail("POST", "dryRun", 429, headers={"Retry-After": "1"})
    started = time.monotonic()
    launcher.submit(make_job("a", "true"))
    assert time.monotonic() - started >= 1.0
    assert launcher.poll(["a"]) == {"a": "pending"}


def test_a_server_that_is_down_for_a_while_changes_no_state(
    site: Cluster, tmp_path: Path, make_job: Callable[..., Job], ending_of: Callable, wait_until
) -> None:
    cluster = FakeCluster()
    with serving(cluster) as address:
        launcher = KubernetesLauncher(site, client_of(address, tmp_path), settle_s=0.0).__enter__()
        job = make_job("a", "true")
        launcher.submit(job)
    assert launcher.poll(["a"]) == {"a": "pending"}
    later = make_job("b", "true")
    launcher.submit(later)
    assert launcher.poll(["a", "b"]) == {"a": "pending", "b": "pending"}
    with serving(cluster, int(address.rsplit(":", 1)[1])):
        cluster.condition(job_path(job), "Failed", "PodFailurePolicy", "words")
        assert ending_of(launcher, "a").kind is OutcomeKind.LOST
        wait_until(lambda: launcher.poll(["b"]) and cluster.find(job_path(later)), "the other job to be created")
        launcher.close()


def test_silence_beyond_patience_is_told(
    site: Cluster, client: Client, cluster: FakeCluster, launcher, make_job, wait_until
) -> None:
    launcher.submit(make_job("a", "true"))
    wait_until(lambda: watches(cluster) == 1, "the watch")
    launcher._mirrors["Job"]._patience_s = 0.05
    cluster.fail("GET", "watch=true", 503, times=1000)
    cluster.cut_watches()

    def told() -> str:
        try:
            launcher.poll(["a"])
        except KubernetesError as error:
            return str(error)
        return ""

    assert "they run on, and the same command goes on with them" in wait_until(told, "the launcher to lose patience")


FAULTS = st.tuples(st.sampled_from(["POST", "GET"]), st.sampled_from([0, 429, 500, 503]), st.booleans(), st.booleans())


@pytest.mark.slow
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=st.lists(FAULTS, max_size=5), kill=st.booleans())
def test_whatever_is_lost_an_attempt_is_one_object(
    faults: list[tuple[str, int, bool, bool]], kill: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Requests that are dropped, put off or answered into nothing, before or after they did their work."""
    place = tmp_path_factory.mktemp("law")
    site = Cluster("here", "registry.example/evolve:1", "work", str(place))
    jobs = [Job(f"j{number}", ("true",), place / f"j{number}", 30.0, "done") for number in range(2)]
    keys = [job.key for job in jobs]
    cluster = FakeCluster()
    for verb, status, after, of_jobs in faults:
        cluster.fail(verb, "/jobs" if of_jobs else "", status, after=after)
    with serving(cluster) as address:
        with KubernetesLauncher(site, client_of(address, place), settle_s=60.0) as launcher:
            for job in (*jobs, *jobs[: 0 if kill else 2]):
                launcher.submit(job)
            assert set(launcher.poll(keys).values()) == {"pending"}
        with KubernetesLauncher(site, client_of(address, place), settle_s=60.0) as again:
            for job in jobs:
                again.submit(job)
            for _ in range(len(faults) + 1):  # each poll asks once more for what is not there yet
                assert set(again.poll(keys).values()) == {"pending"}
    assert sorted(cluster.find("/jobs/")) == sorted(job_path(job) for job in jobs)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_watch_that_breaks_is_told(
    cluster: FakeCluster, site: Cluster, client: Client, make_job: Callable[..., Job], wait_until
) -> None:
    cluster.fail("GET", "/pods", 200, times=100)  # an object, and not a list of any
    with KubernetesLauncher(site, client) as launcher:
        launcher.submit(make_job("a", "true"))
        wait_until(lambda: not launcher._mirrors["Pod"]._thread.is_alive(), "the watch to break")
        with pytest.raises(KubernetesError, match=r"the mirror of .*/pods broke"):
            launcher.poll(["a"])
