"""A site with `launcher: kubernetes`: what it says, what the dry run prints of it, and what a campaign does on it."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from megatron_evolve.campaign import Campaign, find_campaign
from megatron_evolve.document import load_yaml
from megatron_evolve.dry_run import dry_run
from megatron_evolve.launch.job import Job, OutcomeKind, num_nodes
from megatron_evolve.loop import Session, launcher_of
from megatron_evolve.prepare import run_one
from megatron_evolve.site import Site, load_site
from tests.launch.kubernetes.rules import broken_rules, check_schema
from tests.launch.kubernetes.server import FakeCluster, serving

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kubernetes.md"


def page_site() -> dict[str, Any]:
    """The site file of the operator's page."""
    (text,) = [part for part in PAGE.read_text().split("```yaml\n") if part.startswith("schema: site/1")]
    return yaml.safe_load(text.split("```")[0])


def with_section(**fields: Any) -> dict[str, Any]:
    found = page_site()
    return found | {"kubernetes": found["kubernetes"] | fields}


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (with_section(image="Evolve:1 "), "must be written as HOST/PATH:TAG"),
        (with_section(image="registry.example/evolve:1;rm"), "must be written as HOST/PATH:TAG"),
        (with_section(namespace="My_Space"), "namespace must be a DNS label"),
        (with_section(claim="a/b"), "claim must be a DNS label"),
        (with_section(mount="work"), "mount must be an absolute folder"),
        (with_section(memory="lots"), "memory must be a quantity as in 200Gi"),
        (with_section(imagee="a"), "unknown key 'kubernetes.imagee'; did you mean image"),
        (with_section(tolerations=[{"effect": "Never"}]), "kubernetes.tolerations.0.effect"),
        ({"launcher": "kubernetes"}, "belong together; give both or neither"),
        (page_site() | {"launcher": "local"}, "belong together; give both or neither"),
    ],
)
def test_wrong_sites_are_one_sentence(document: dict[str, Any], says: str, tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(ValueError) as error:
        load_site(file)
    assert str(error.value).startswith(f"{file}: ") and says in str(error.value)


@pytest.mark.parametrize("runtime", [None, "evolve"])
def test_the_dry_run_prints_the_very_manifests(runtime: str | None, tmp_path: Path) -> None:
    pytest.importorskip("kubernetes_validate", reason="Kubernetes' schemas are of the extra [test]")
    site = Site.parse(with_section(training_runtime=runtime), where="site")
    name = "nemotron3-super-lora"
    campaign = Campaign.parse(load_yaml(find_campaign(name)), where=name)
    told = dry_run(campaign, tmp_path / "run", site, tmp_path / "store")
    steps = {step["what"]: step for step in told["steps"]}
    train, score = (yaml.safe_load(steps[what]["script"]) for what in ("train", "score on dev"))
    assert (train["kind"], score["kind"]) == ("TrainJob" if runtime else "Job", "Job")
    for found in (train, score):
        check_schema(found)
        assert broken_rules(found) == []
    command = (train["spec"]["trainer"] if runtime else train["spec"]["template"]["spec"]["containers"][0])["command"]
    assert command[2] == "megatron_evolve.launch.kubernetes_pod" and command[4] == "2"
    assert "torch.distributed.run" not in steps["train"]["argv"]  # each rank is a task, which its pod starts
    assert any("Pods see the claim work at /claim" in note for note in told["notes"])
    assert list(tmp_path.iterdir()) == []


# --- a campaign on it ------------------------------------------------------------------------------------------------


@pytest.fixture
def kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names a server that is not there, until a test writes another."""
    pytest.importorskip("kubernetes", reason="the official client is the optional extra [k8s]")
    file = tmp_path / "kubeconfig"
    file.write_text(_config("http://127.0.0.1:9"))  # discard: nobody listens
    monkeypatch.setenv("KUBECONFIG", str(file))
    monkeypatch.setattr("megatron_evolve.launch.kubernetes_client.LONGEST_WAIT_S", 0.01)
    return file


def _config(address: str) -> str:
    return (
        f"apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: k, cluster: {{server: '{address}'}}}}]\n"
        "users: [{name: u, user: {token: t}}]\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n"
    )


def demo_on(site: dict[str, Any], place: Path) -> tuple[int, str]:
    """The command on the demo campaign: its exit status, and what it said."""
    from megatron_evolve.cli import app

    (place / "site.yaml").write_text(yaml.safe_dump(site))
    argv = ["run", "demo", "--dir", str(place / "run"), "--store", str(place / "store"), "--site"]
    done = CliRunner().invoke(app, [*argv, str(place / "site.yaml")])
    return done.exit_code, done.output


def small(mount: Path) -> dict[str, Any]:
    return with_section(mount=str(mount), memory=None, tolerations=[]) | {"gpus_per_node": 0}


def test_a_cluster_that_does_not_answer_is_one_sentence(kubeconfig: Path, tmp_path: Path) -> None:
    code, said = demo_on(small(tmp_path), tmp_path)
    assert code != 0 and "no answer from the API server http://127.0.0.1:9" in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("status", "says"), [(403, "the Role of docs/kubernetes.md"), (401, "log in again")])
def test_a_cluster_that_refuses_is_one_sentence(status: int, says: str, kubeconfig: Path, tmp_path: Path) -> None:
    cluster = FakeCluster()
    cluster.fail("GET", "/jobs", status, message="jobs.batch is forbidden")
    with serving(cluster) as address:
        kubeconfig.write_text(_config(address))
        code, said = demo_on(small(tmp_path), tmp_path)
    assert code != 0 and says in " ".join(said.split()) and not (tmp_path / "run").exists()


def test_a_missing_claim_is_one_sentence(kubeconfig: Path, tmp_path: Path) -> None:
    with serving(FakeCluster()) as address:
        kubeconfig.write_text(_config(address))
        code, said = demo_on(small(tmp_path), tmp_path)
    assert code != 0 and "must have the PersistentVolumeClaim work; it has none" in " ".join(said.split())
    assert not (tmp_path / "run").exists()


@pytest.fixture
def running_cluster(kubeconfig: Path) -> Iterator[FakeCluster]:
    """A cluster with what the page says, whose kubelet starts each Job once it is created."""
    cluster, over, pods = FakeCluster(), threading.Event(), {}
    for plural, name in (("persistentvolumeclaims", "work"), ("services", "megatron-evolve")):
        cluster.put(f"/api/v1/namespaces/evolve/{plural}/{name}", {"metadata": {"name": name}})

    def kubelet() -> None:
        while not over.wait(0.05):
            for path in cluster.find("/jobs/"):
                if path not in pods:
                    pods[path] = cluster.start(path)
                elif pods[path].poll() == 0 and "status" not in cluster.objects[path]:
                    cluster.condition(path, "Complete")

    thread = threading.Thread(target=kubelet)
    with serving(cluster) as address:
        kubeconfig.write_text(_config(address))
        thread.start()
        yield cluster
        over.set()
        thread.join()


def test_a_campaign_s_jobs_run_in_the_cluster(running_cluster: FakeCluster, tmp_path: Path) -> None:
    campaign = Campaign.parse(load_yaml(find_campaign("demo")), where="demo")
    site = Site.parse(small(tmp_path), where="site")
    session = Session(tmp_path / "run", tmp_path / "store", lambda what, facts: None, lambda: False, site)
    run_dir = tmp_path / "store" / "one"
    job = Job("build/one", ("/bin/sh", "-c", f"touch {run_dir}/done"), run_dir, 30.0, "done")
    assert num_nodes(job, site.gpus_per_node) == 1
    with launcher_of(campaign, session) as launcher:
        assert run_one(launcher, job, lambda: False).kind is OutcomeKind.FINISHED
        assert run_one(launcher, job, lambda: False).attempt == 1  # once more: adopted
    assert len(running_cluster.find("/jobs/")) == 1
