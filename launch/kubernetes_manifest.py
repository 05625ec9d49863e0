"""Kubernetes: an attempt at a job as the one object that is created for it. Nothing here talks to a cluster.

    Job + attempt + Cluster --manifest--> Indexed Job (batch/v1), or TrainJob (Kubeflow Trainer) on several nodes

- Its pods run the supervisor, so the outcome comes from the run folder, on a claim that the controller mounts too, at
  the same path. The job's own argv and env stay in that folder: a manifest carries no environment and no secret.
- Nothing is tried again by the cluster (restartPolicy Never, backoffLimit 0): whoever submits decides that.
- SIGTERM and terminationGracePeriodSeconds do here what --signal does for Slurm.
- One object, so that it is there whole or not at all: the headless service through which pods meet is the namespace's.
"""

import hashlib
import json
import math
import re
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from megatron_evolve.launch import rundir
from megatron_evolve.launch.job import Job, num_nodes

Manifest = dict[str, Any]

MANAGED_BY = {"app.kubernetes.io/managed-by": "megatron-evolve"}
JOB_LABEL, ATTEMPT_LABEL = "megatron-evolve/job", "megatron-evolve/attempt"
KEY_ANNOTATION, FOLDER_ANNOTATION = "megatron-evolve/key", "megatron-evolve/run-folder"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
GPU = "nvidia.com/gpu"
CONTAINER = "node"  # Kubeflow Trainer's name of the container that trains
MEETING_PORT = 29500
# Beyond the job's own grace: the supervisor's sweep of what would not die (10 s), and its outcome onto a slow disk.
LAST_WORDS_S = 30
IMAGE_PULL_S = 3600  # the pod's own deadline counts from before its image was there
KEEP_S = 7 * 24 * 3600  # a finished Job stays for a person to look at; its outcome is in the run folder

_NAMES = ("namespace", "claim", "service", "training_runtime", "service_account", "priority_class", "queue", "secret")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # DNS-1123
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?")
# distribution/reference: host[:port]/path[:tag][@digest]
_IMAGE = re.compile(
    r"([A-Za-z0-9.-]+(:[0-9]+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)


@dataclass(frozen=True)
class Cluster:
    """What jobs need to know of a namespace. None leaves a choice to the cluster.

    image             holds this package at the controller's path of the interpreter: the controller's own, at best
    claim, mount      the PersistentVolumeClaim of all run folders and substrates, and where pods and controller see it
    gpus_per_node     a job with more is spread evenly over several pods
    service           headless, selects our pods; through it those of one Indexed Job find each other
    training_runtime  a TrainingRuntime of the namespace: jobs of several pods are TrainJobs on it
    memory            of each pod, request and limit, as in `200Gi`
    user              uid and gid of the pods; None: the image's
    queue             Kueue's LocalQueue
    secret            a Secret that Jobs (not TrainJobs) have in their environment, as for the key of an endpoint
    context           of the kubeconfig; None: the current one, or the pod's own service account
    """

    namespace: str
    image: str
    claim: str
    mount: str
    gpus_per_node: int = 0
    service: str = "megatron-evolve"
    training_runtime: str | None = None
    memory: str | None = None
    user: int | None = None
    service_account: str | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    priority_class: str | None = None
    queue: str | None = None
    secret: str | None = None
    pull_secrets: tuple[str, ...] = ()
    context: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "node_selector", types.MappingProxyType(dict(self.node_selector)))
        object.__setattr__(self, "tolerations", tuple(dict(one) for one in self.tolerations))
        for name in _NAMES:
            value = getattr(self, name)
            if value is not None and not _LABEL.fullmatch(value):
                raise ValueError(
                    f"kubernetes.{name} must be a DNS label (a-z, 0-9, inner hyphens, at most 63); got {value!r}: "
                    "give the object's own name"
                )
        if not _IMAGE.fullmatch(self.image):
            raise ValueError(
                f"kubernetes.image must be written as HOST/PATH:TAG or HOST/PATH@sha256:DIGEST; got {self.image!r}: "
                "copy it from the registry"
            )
        if not self.mount.startswith("/") or ":" in self.mount or self.mount == "/":
            raise ValueError(f"kubernetes.mount must be an absolute folder; got {self.mount!r}: as in /claim")
        if self.memory is not None and not _QUANTITY.fullmatch(self.memory):
            raise ValueError(f"kubernetes.memory must be a quantity as in 200Gi; got {self.memory!r}: add its unit")


def digest(job: Job) -> str:
    """A label's value for the job: its key is opaque, and only its run folder makes it one of the whole cluster."""
    named = json.dumps([job.key, str(job.run_dir)])
    return hashlib.sha256(named.encode()).hexdigest()[:32]


def object_name(job: Job, attempt: int) -> str:
    """The name of an attempt's object: the same whoever asks, so that creating it twice is a conflict.

    At most 48 characters for attempts below 10^11: JobSet's pods add 15 to it, and a host's name has 63.
    """
    return f"run-{digest(job)}-{attempt}"


def manifest(job: Job, attempt: int, cluster: Cluster) -> Manifest:
    """The object that runs this attempt. Raises ValueError where its GPUs or tasks do not fill whole pods."""
    pods = num_nodes(job, cluster.gpus_per_node)
    is_train_job = pods > 1 and cluster.training_runtime is not None
    return (_train_job if is_train_job else _indexed_job)(job, attempt, cluster, pods)


def render(job: Job, attempt: int, cluster: Cluster) -> str:
    """The manifest as YAML, under a comment with what it will run."""
    document = yaml.safe_dump(manifest(job, attempt, cluster), sort_keys=False, width=2**16)
    argv = json.dumps(job.argv, ensure_ascii=True)  # one line, whatever the words hold
    return f"# runs {argv}\n{document}"


def check_place(job: Job, cluster: Cluster) -> None:
    """Raises ValueError for a run folder that the job's pods would not see."""
    if not job.run_dir.is_relative_to(cluster.mount):
        raise ValueError(
            f"run folders must lie under {cluster.mount}, where the claim {cluster.claim} is mounted in every pod; got "
            f"{job.run_dir}: start the controller where that claim is mounted, with --dir and the store in it"
        )


def _indexed_job(job: Job, attempt: int, cluster: Cluster, pods: int) -> Manifest:
    name = object_name(job, attempt)
    pod: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,  # a job asks nothing of the cluster
        "activeDeadlineSeconds": math.ceil(job.time_limit_s + job.grace_s) + IMAGE_PULL_S,
        **_pod(job, cluster),
    }
    if cluster.priority_class:
        pod["priorityClassName"] = cluster.priority_class
    if pods > 1:
        pod["subdomain"] = cluster.service
    secret = {"envFrom": [{"secretRef": {"name": cluster.secret}}]} if cluster.secret else {}
    pod["containers"] = [
        {
            **secret,
            "name": CONTAINER,
            "image": cluster.image,
            "command": _command(job, attempt, pods, f"{name}-0.{cluster.service}"),
            "resources": _resources(job, cluster, pods),
            "terminationMessagePolicy": "FallbackToLogsOnError",  # the supervisor's last words, into the pod's status
            **_container(job, cluster),
        }
    ]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(job, attempt, cluster),
        "spec": {
            "completionMode": "Indexed",
            "completions": pods,
            "parallelism": pods,
            "backoffLimit": 0,
            "ttlSecondsAfterFinished": KEEP_S,
            "podReplacementPolicy": "Failed",  # no second pod while the first still ends
            "podFailurePolicy": {  # a disruption fails the Job under its own name, not as one failure too many
                "rules": [{"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
            },
            "template": {"metadata": {"labels": _labels(job, attempt)}, "spec": pod},
        },
    }


def _train_job(job: Job, attempt: int, cluster: Cluster, pods: int) -> Manifest:
    """The TrainJob of kubeflow/trainer 2.2 or newer (trainer.kubeflow.org/v1alpha1, with runtimePatches).

    restartPolicy, backoffLimit, podFailurePolicy and priorityClassName are the runtime's, which the patch cannot set.
    """
    name = object_name(job, attempt)
    pod = _pod(job, cluster) | {"containers": [{"name": CONTAINER, **_container(job, cluster)}]}
    template = {"metadata": {"labels": _labels(job, attempt)}, "spec": pod}
    replicated = {"name": CONTAINER, "template": {"spec": {"template": template}}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(job, attempt, cluster),
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "TrainingRuntime",
                "name": cluster.training_runtime,
            },
            "trainer": {
                "image": cluster.image,
                "command": _command(job, attempt, pods, f"{name}-{CONTAINER}-0-0.{name}"),
                "numNodes": pods,
                "resourcesPerNode": _resources(job, cluster, pods),
            },
            "runtimePatches": [
                {
                    "manager": "megatron-evolve/launcher",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}},
                }
            ],
        },
    }


def _metadata(job: Job, attempt: int, cluster: Cluster) -> Manifest:
    labels = _labels(job, attempt) | ({QUEUE_LABEL: cluster.queue} if cluster.queue else {})
    return {
        "name": object_name(job, attempt),
        "namespace": cluster.namespace,
        "labels": labels,
        "annotations": {KEY_ANNOTATION: job.key, FOLDER_ANNOTATION: str(job.run_dir)},
    }


def _labels(job: Job, attempt: int) -> dict[str, str]:
    return {**MANAGED_BY, JOB_LABEL: digest(job), ATTEMPT_LABEL: str(attempt)}


def _command(job: Job, attempt: int, pods: int, first_host: str) -> list[str]:
    """What each pod runs, which supervises the job."""
    folder, host = str(rundir.attempt_dir(job.run_dir, attempt)), first_host if pods > 1 else "localhost"
    words = ["megatron_evolve.launch.kubernetes_pod", folder, str(pods), f"{host}:{MEETING_PORT}"]
    return [sys.executable, "-m", *words]


def _pod(job: Job, cluster: Cluster) -> Manifest:
    """What a pod of either kind has."""
    spec: Manifest = {
        "terminationGracePeriodSeconds": math.ceil(job.grace_s) + LAST_WORDS_S,
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "volumes": [{"name": "work", "persistentVolumeClaim": {"claimName": cluster.claim}}],
    }
    if cluster.user is not None:
        spec["securityContext"] |= {"runAsUser": cluster.user, "runAsGroup": cluster.user}
    if job.resources.gpus:  # NCCL's buffers between the GPUs of a node; a container has 64 MiB by itself
        spec["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    if cluster.service_account:
        spec["serviceAccountName"] = cluster.service_account
    if cluster.node_selector:
        spec["nodeSelector"] = dict(cluster.node_selector)
    if cluster.tolerations:
        spec["tolerations"] = [dict(one) for one in cluster.tolerations]
    if cluster.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in cluster.pull_secrets]
    return spec


def _container(job: Job, cluster: Cluster) -> Manifest:
    """What the container of either kind has."""
    mounts = [{"name": "work", "mountPath": cluster.mount}]
    if job.resources.gpus:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    return {"volumeMounts": mounts, "securityContext": {"allowPrivilegeEscalation": False}}


def _resources(job: Job, cluster: Cluster, pods: int) -> Manifest:
    """Requests and limits of one pod. Cores are only requested: a limit would throttle ranks beside idle cores."""
    requests, limits = {"cpu": str(max(1, job.resources.cores // pods))}, {}
    if cluster.memory is not None:
        requests["memory"] = limits["memory"] = cluster.memory
    if job.resources.gpus:
        requests[GPU] = limits[GPU] = str(job.resources.gpus // pods)
    return {"requests": requests, **({"limits": limits} if limits else {})}
