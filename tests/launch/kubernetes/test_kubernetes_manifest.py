"""Manifests: any job renders to a valid one, names are of one attempt each, and the operator's page holds."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("kubernetes_validate", reason="Kubernetes' schemas are of the extra [test]")

from megatron_evolve.launch.job import Job, Resources
from megatron_evolve.launch.kubernetes_manifest import (
    MANAGED_BY,
    Cluster,
    manifest,
    object_name,
    render,
)
from tests.launch.kubernetes.rules import broken_rules, check_schema

PAGE = Path(__file__).resolve().parents[3] / "docs" / "kubernetes.md"
PLAIN = Cluster("here", "registry.example/evolve:1", "work", "/claim", gpus_per_node=8)
FULL = Cluster(
    "here",
    "host:5000/a/evolve@sha256:" + "0" * 64,
    "work",
    "/claim",
    gpus_per_node=8,
    training_runtime="evolve",
    memory="1.5Ti",
    user=1000,
    service_account="jobs",
    node_selector={"zone": "a"},
    tolerations=({"key": "nvidia.com/gpu", "operator": "Exists"},),
    priority_class="high",
    queue="team",
    secret="keys",
    pull_secrets=("login",),
)


def job(key: str = "1/ab/train", run: str = "run", **fields: object) -> Job:
    return Job(key, ("/bin/sh", "-c", "it's; here"), Path("/claim") / run, 90.0, "done", **fields)


# Whole nodes of eight GPUs, or a part of one, with equally many tasks a pod.
RESOURCES = st.tuples(st.integers(1, 12), st.integers(0, 8), st.integers(1, 8), st.integers(1, 999)).map(
    lambda drawn: Resources(cores=drawn[3], gpus=drawn[1] if drawn[0] == 1 else 8 * drawn[0], tasks=drawn[0] * drawn[2])
)


@settings(max_examples=25, deadline=None)
@given(
    key=st.text(min_size=1, max_size=300),
    run=st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=100),
    attempt=st.integers(1, 10**6),
    resources=RESOURCES,
    grace_s=st.floats(0, 1e5),
    cluster=st.sampled_from([PLAIN, FULL]),
)
def test_any_job_renders_to_a_valid_manifest(
    key: str, run: str, attempt: int, resources: Resources, grace_s: float, cluster: Cluster
) -> None:
    asked = job(key, f"r{run}", resources=resources, grace_s=grace_s, env={"SECRET": "swordfish"})
    found = manifest(asked, attempt, cluster)
    check_schema(found)
    assert broken_rules(found) == []
    assert found["metadata"]["annotations"]["megatron-evolve/key"] == key
    assert found["metadata"]["annotations"]["megatron-evolve/run-folder"] == str(asked.run_dir)
    text = render(asked, attempt, cluster)
    assert yaml.safe_load(text) == found and "swordfish" not in text


KEY = st.text("ab/\n", min_size=1, max_size=2)  # few, so that keys meet in different folders


@settings(deadline=None)
@given(st.lists(st.tuples(KEY, st.sampled_from(["a", "b", "a/b"]), st.integers(1, 30)), unique=True, max_size=30))
def test_a_name_is_of_one_attempt_at_one_job(asked: list[tuple[str, str, int]]) -> None:
    """Keys are the campaign's own, so that the run folder belongs to the name: a namespace has many campaigns."""
    names = [object_name(job(key, run), attempt) for key, run, attempt in asked]
    assert len(set(names)) == len(names)
    assert names == [object_name(job(key, run), attempt) for key, run, attempt in asked]


def test_a_job_of_several_nodes_is_a_train_job_where_there_is_a_runtime() -> None:
    wide = job(resources=Resources(cores=32, gpus=16, tasks=16), grace_s=60.5)
    found = manifest(wide, 1, FULL)
    assert found["kind"] == "TrainJob" and found["spec"]["trainer"]["numNodes"] == 2
    name = found["metadata"]["name"]
    assert found["spec"]["trainer"]["command"][-2:] == ["2", f"{name}-node-0-0.{name}:29500"]
    assert found["spec"]["trainer"]["resourcesPerNode"]["limits"] == {"memory": "1.5Ti", "nvidia.com/gpu": "8"}
    (patched,) = found["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = patched["template"]["spec"]["template"]
    assert pod["spec"]["terminationGracePeriodSeconds"] == 61 + 30
    assert pod["metadata"]["labels"].items() <= found["metadata"]["labels"].items()
    assert manifest(job(), 1, FULL)["kind"] == "Job"
    indexed = manifest(wide, 1, PLAIN)
    assert (indexed["spec"]["completions"], indexed["spec"]["completionMode"]) == (2, "Indexed")
    command = indexed["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[2:] == [
        "megatron_evolve.launch.kubernetes_pod",
        "/claim/run/attempts/1",
        "2",
        f"{name}-0.megatron-evolve:29500",
    ]


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        (lambda job: job["spec"]["template"]["spec"].update(restartPolicy="Always"), "nothing is started again"),
        (lambda job: job["metadata"].update(name="Run_1"), "name"),
        (lambda job: job["metadata"]["labels"].update(key="1/ab/train"), "label values"),
        (lambda job: job["spec"]["template"]["spec"]["volumes"].pop(), "every mount has its volume"),
        (lambda job: job["spec"].update(backoffLimit=6), "no second pod"),
        (
            lambda job: job["spec"]["template"]["spec"]["containers"][0].update(env=[{"name": "A", "value": "b"}]),
            "no environment",
        ),
        (
            lambda job: job["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"].update(memory="8 GB"),
            "quantities",
        ),
    ],
)
def test_rules_see_what_the_schema_lets_pass(change, broken: str) -> None:
    found = copy.deepcopy(manifest(job(), 1, PLAIN))
    change(found)
    check_schema(found)
    assert broken in broken_rules(found)


@pytest.mark.parametrize("cluster", [PLAIN, FULL])
def test_the_schema_sees_a_misspelt_field(cluster: Cluster) -> None:
    found = manifest(job(resources=Resources(gpus=16, tasks=16)), 1, cluster)
    found["spec"]["backofLimit"] = 0
    with pytest.raises(Exception, match="backofLimit"):
        check_schema(found)


@pytest.mark.parametrize(("gpus", "tasks"), [(12, 12), (16, 3)])
def test_what_does_not_fill_whole_nodes_is_refused(gpus: int, tasks: int) -> None:
    with pytest.raises(ValueError, match=rf"whole nodes of 8 GPUs.*asks for {gpus} GPUs and {tasks} tasks"):
        manifest(job(resources=Resources(cores=16, gpus=gpus, tasks=tasks)), 1, PLAIN)


# --- the operator's page ---------------------------------------------------------------------------------------------

BLOCKS = [
    document
    for block in re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for document in yaml.safe_load_all(block)
]
OBJECTS = {document["kind"]: document for document in BLOCKS if "kind" in document}


@pytest.mark.parametrize("kind", OBJECTS)
def test_the_page_s_objects_are_valid(kind: str) -> None:
    check_schema(OBJECTS[kind])


def test_the_page_s_objects_fit_each_other() -> None:
    (site,) = [document for document in BLOCKS if document.get("schema") == "site/1"]
    section = site["kubernetes"]
    names = {kind: one["metadata"]["name"] for kind, one in OBJECTS.items()}
    assert {one["metadata"].get("namespace", section["namespace"]) for one in OBJECTS.values()} == {names["Namespace"]}
    assert (section["namespace"], section["claim"]) == (names["Namespace"], names["PersistentVolumeClaim"])
    assert names["Service"] == PLAIN.service and OBJECTS["Service"]["spec"]["selector"] == MANAGED_BY
    (subject,) = OBJECTS["RoleBinding"]["subjects"]
    assert subject["name"] == names["ServiceAccount"] and OBJECTS["RoleBinding"]["roleRef"]["name"] == names["Role"]
    pod = OBJECTS["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["serviceAccountName"] == names["ServiceAccount"] and container["image"] == section["image"]
    assert container["volumeMounts"] == [{"name": "work", "mountPath": section["mount"]}]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == section["claim"]
    (runtime,) = OBJECTS["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    own = manifest(job(), 1, PLAIN)["spec"]
    for name in ("backoffLimit", "podReplacementPolicy", "podFailurePolicy"):
        assert runtime["template"]["spec"][name] == own[name]


def test_the_page_s_role_allows_every_request() -> None:
    """What the launcher asks of a server in its own tests, by verb and kind."""
    pytest.importorskip("kubernetes", reason="the official client is the optional extra [k8s]")
    from megatron_evolve.launch import kubernetes

    allowed = {
        (group, resource): set(rule["verbs"])
        for rule in OBJECTS["Role"]["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    for kind, (path, plural) in kubernetes.ADDRESSES.items():
        group = "" if path == "/api/v1" else path.split("/")[2]
        needed = {"get"}
        if kind in ("Job", "TrainJob", "Pod"):
            needed |= {"list", "watch"}
        if kind in ("Job", "TrainJob"):
            needed |= {"create", "delete"}
        assert needed <= allowed[group, plural]
