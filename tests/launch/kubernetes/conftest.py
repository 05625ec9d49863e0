"""What the Kubernetes tests share: a cluster, its server over HTTP, and a launcher that is logged in there."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_evolve.launch.kubernetes import KubernetesLauncher
from megatron_evolve.launch.kubernetes_client import Client, connect
from megatron_evolve.launch.kubernetes_manifest import Cluster
from tests.launch.kubernetes.server import CLAIM, FakeCluster, serving


@pytest.fixture
def server() -> Iterator[tuple[FakeCluster, str]]:
    cluster = FakeCluster()
    with serving(cluster) as address:
        cluster.put(CLAIM, {"metadata": {"name": "work"}})
        cluster.put("/api/v1/namespaces/here/services/megatron-evolve", {"metadata": {"name": "megatron-evolve"}})
        yield cluster, address


def client_of(address: str, folder: Path) -> Client:
    """A client as `connect` makes it from a kubeconfig; it waits a hundredth of the real times."""
    config = folder / "kubeconfig"
    config.write_text(
        f"apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: k, cluster: {{server: '{address}'}}}}]\n"
        "users: [{name: u, user: {token: secret-token}}]\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(config))
        client = connect()
    client.backoff_s = 0.005
    return client


@pytest.fixture
def site(tmp_path: Path) -> Cluster:
    return Cluster("here", "registry.example/evolve:1", "work", str(tmp_path), gpus_per_node=8)


@pytest.fixture
def client(server: tuple[FakeCluster, str], tmp_path: Path) -> Client:
    return client_of(server[1], tmp_path)


@pytest.fixture
def launcher(site: Cluster, client: Client) -> Iterator[KubernetesLauncher]:
    with KubernetesLauncher(site, client, settle_s=0.0) as launcher:
        yield launcher


@pytest.fixture
def cluster(server: tuple[FakeCluster, str]) -> FakeCluster:
    return server[0]
