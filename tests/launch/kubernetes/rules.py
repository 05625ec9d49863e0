"""What a manifest must hold: Kubernetes' own schemas, one of ours for TrainJob, and rules that no schema can see."""

import re
from typing import Any

Object = dict[str, Any]

VERSIONS = ("1.28", "1.37")  # the oldest that has all of it without a feature gate, and the newest known here
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?")


def _record(required: tuple[str, ...] = (), **fields: Any) -> Object:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


_text, _texts = {"type": "string", "maxLength": 253}, {"type": "object", "additionalProperties": {"type": "string"}}
_metadata = _record(name=_text, namespace=_text, labels=_texts, annotations=_texts)
_anything: Object = {"type": "array", "items": {"type": "object"}}  # held against Kubernetes' own Pod below
_pod = _record(
    affinity={"type": "object"},
    imagePullSecrets=_anything,
    initContainers=_anything,
    nodeSelector=_texts,
    schedulingGates=_anything,
    securityContext={"type": "object"},
    serviceAccountName=_text,
    terminationGracePeriodSeconds={"type": "integer", "minimum": 0},
    tolerations=_anything,
    volumes=_anything,
    containers={
        "type": "array",
        "items": _record(
            ("name",), name=_text, env=_anything, securityContext={"type": "object"}, volumeMounts=_anything
        ),
    },
)
_job_template = _record(metadata=_metadata, spec=_record(template=_record(metadata=_metadata, spec=_pod)))
_replicated = {"type": "array", "items": _record(("name",), name=_text, template=_job_template)}
_command = {"type": "array", "maxItems": 128, "items": {"type": "string"}}

# trainer.kubeflow.org_trainjobs.yaml of kubeflow/trainer 2.3, without initializer and status.
TRAIN_JOB: Object = _record(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "trainer.kubeflow.org/v1alpha1"},
    kind={"const": "TrainJob"},
    metadata=_metadata,
    spec=_record(
        ("runtimeRef",),
        runtimeRef=_record(("name",), apiGroup=_text, kind=_text, name=_text),
        trainer=_record(
            image={"type": "string", "maxLength": 500},
            command=_command,
            args=_command,
            env=_anything,
            numNodes={"type": "integer", "minimum": 0},
            numProcPerNode={"type": "integer"},
            resourcesPerNode=_record(limits=_texts, requests=_texts),
        ),
        runtimePatches={
            "type": "array",
            "maxItems": 16,
            "items": _record(
                ("manager",),
                manager=_text,
                trainingRuntimeSpec=_record(
                    template=_record(metadata=_metadata, spec=_record(replicatedJobs=_replicated))
                ),
            ),
        },
        suspend={"type": "boolean"},
        managedBy=_text,
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
    ),
)


def check_schema(found: Object) -> None:
    """Raises a ValidationError for what is not valid, strictly: a misspelt field is an error."""
    import jsonschema
    import kubernetes_validate

    if found["kind"] == "TrainJob":
        jsonschema.Draft202012Validator(TRAIN_JOB).validate(found)
        found = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod_of(found)}
    elif found["kind"] == "TrainingRuntime":
        (job,) = found["spec"]["template"]["spec"]["replicatedJobs"]
        found = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": job["template"]["spec"]}
    for version in VERSIONS:
        kubernetes_validate.validate(found, version, strict=True)


def pod_of(found: Object) -> Object:
    """The spec of the pods of a Job, TrainJob or TrainingRuntime, as they will be."""
    spec = found["spec"]
    if found["kind"] == "Job":
        return spec["template"]["spec"]
    if found["kind"] == "TrainingRuntime":
        return spec["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (patch,) = spec["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    trainer = spec["trainer"]
    own = {"image": trainer["image"], "command": trainer["command"], "resources": trainer["resourcesPerNode"]}
    return pod | {"containers": [container | own], "restartPolicy": "Never"}


def broken_rules(found: Object) -> list[str]:
    """What no schema sees, for the pods of one attempt. Empty for a manifest that holds."""
    metadata, pod = found["metadata"], pod_of(found)
    (container,) = pod["containers"]
    requests, limits = (container["resources"].get(name, {}) for name in ("requests", "limits"))
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    rules = {
        # JobSet's pods are NAME-node-0-0-xxxxx, and a host's name has 63 characters.
        "name": LABEL.fullmatch(metadata["name"]) and metadata["name"][0].isalpha() and len(metadata["name"]) <= 48,
        "label values": all(LABEL_VALUE.fullmatch(value) for value in metadata["labels"].values()),
        "nothing is started again": pod["restartPolicy"] == "Never",
        "time to save": pod["terminationGracePeriodSeconds"] >= 30,
        "every mount has its volume": {mount["name"] for mount in container["volumeMounts"]}
        == {volume["name"] for volume in pod["volumes"]},
        "mounts differ": len(set(mounts)) == len(mounts) and all(path.startswith("/") for path in mounts),
        "quantities": all(QUANTITY.fullmatch(value) for value in (*requests.values(), *limits.values())),
        "no GPU is overcommitted": requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu"),
        "no environment": "env" not in container
        and all(list(one) == ["secretRef"] for one in container.get("envFrom", [])),  # a name, never what it holds
    }
    if found["kind"] == "Job":
        spec = found["spec"]
        rules["no second pod"] = spec["backoffLimit"] == 0 and spec["podReplacementPolicy"] == "Failed"
        rules["all pods at once"] = spec["completions"] == spec["parallelism"]
        (rule,) = spec["podFailurePolicy"]["rules"]
        rules["disruptions by name"] = rule["onPodConditions"][0]["type"] == "DisruptionTarget"
        rules["hosts have names"] = spec["completions"] == 1 or "subdomain" in pod
        rules["labels of its pods"] = spec["template"]["metadata"]["labels"].items() <= metadata["labels"].items()
    return [name for name, holds in rules.items() if not holds]
