"""What the cluster says of an attempt that has not begun, wrote no outcome, or was stopped from outside.

One that has not begun waits for something, in the cluster's words (`queued`). One that ended has a kind and a sentence
(`cause_of`), in this order:
1. out_of_memory  a container was killed by the kernel at its memory limit (OOMKilled).
2. lost           a disruption, by its own name: preempted, drained, evicted by its node, its node gone.
3. timed_out      the pod's own deadline struck, behind the supervisor's.
4. lost           whatever else ended the supervisor, in the words of the pod, then of the Job.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from megatron_evolve.launch.job import OutcomeKind
from megatron_evolve.launch.rundir import Queued

Object = Mapping[str, Any]

IMAGE_PATIENCE_S = 900.0  # a registry may be down; a wrong tag stays wrong

# Condition DisruptionTarget of a pod, by its reason (Kubernetes: "Disruptions", pod disruption conditions).
_DISRUPTIONS = {
    "PreemptionByScheduler": "was preempted by a pod of higher priority",
    "DeletionByTaintManager": "was evicted because its node is tainted, as a node that does not answer is",
    "EvictionByEvictionAPI": "was evicted through the API, as when a node is drained",
    "DeletionByPodGC": "was lost with its node",
    "TerminationByKubelet": "was ended by its node",
}
# Reasons of pods whose server knows no such condition.
_POD_REASONS = {"Evicted", "NodeLost", "NodeAffinity", "Shutdown", "NodeShutdown", "Terminated", "Preempting"}
_NEVER_STARTS = {"InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError"}
_NO_IMAGE = {"ErrImagePull", "ImagePullBackOff"}
_DID_NOT_START = {"StartError", "ContainerCannotRun"}
_ON_ITS_WAY = {"ContainerCreating", "PodInitializing"}


class Cause(NamedTuple):
    """Why an attempt ended: the kind of ending, and in words."""

    kind: OutcomeKind
    reason: str


def is_finished(found: Object) -> bool:
    """Whether a Job or TrainJob has come to its end, good or bad, and all its pods with it."""
    return any(_condition(found, kind) for kind in ("Complete", "Failed"))


def cause_of(found: Object | None, pods: Iterable[Object]) -> Cause | None:
    """Why an attempt ended, as far as its pods and its object tell; None where neither does."""
    pods = list(pods)
    for rule in (_out_of_memory, _disrupted, _past_deadline, _last_words):
        for pod in pods:
            if (cause := rule(pod)) is not None:
                return cause
    failed = _condition(found, "Failed") if found is not None else None
    if failed is None:
        return None
    kind = OutcomeKind.TIMED_OUT if failed.get("reason") == "DeadlineExceeded" else OutcomeKind.LOST
    return Cause(kind, f"its {found['kind']} failed: {_said(failed)}")


def why_it_cannot_start(pods: Iterable[Object], now: datetime | None = None) -> str | None:
    """Why a pod will never run its container, where that is for a person to mend; None while it may yet."""
    for pod in pods:
        for container in _containers(pod):
            state = container.get("state", {})
            waiting, ended = state.get("waiting", {}), state.get("terminated", {})
            reason = waiting.get("reason")
            if reason in _NEVER_STARTS or (reason in _NO_IMAGE and _age_s(pod, now) > IMAGE_PATIENCE_S):
                return f"{_name(pod)} cannot start: {_said(waiting)}"
            if ended.get("reason") in _DID_NOT_START:
                return f"{_name(pod)} could not start: {_said(ended)}"
    return None


def queued(found: Object, pods: Iterable[Object]) -> Queued:
    """What the cluster says of an attempt that has not begun: of its first pod that waits for something, else of all.

    That is a node with room (Unschedulable, SchedulingGated), an image, or of the Job that it is suspended, as whoever
    queues jobs does.
    """
    pods = list(pods)
    for pod in pods:
        if reason := _waits_for(pod):
            return _queued(found, pod, reason)
    if pods:
        return _queued(found, pods[0], "")
    held = _condition(found, "Suspended")
    return Queued(found["metadata"]["name"], "Pending", "", _said(held) if held is not None else "has no pod yet")


def _queued(found: Object, pod: Object, reason: str) -> Queued:
    node, phase = pod.get("spec", {}).get("nodeName") or "", pod.get("status", {}).get("phase", "Pending")
    return Queued(found["metadata"]["name"], phase, node, reason)


def _waits_for(pod: Object) -> str:
    """Empty for a pod that waits for nothing but its own start."""
    unplaced = _condition(pod, "PodScheduled", "False")
    if unplaced is not None:
        return _said(unplaced)
    for container in _containers(pod):
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason") and waiting["reason"] not in _ON_ITS_WAY:
            return f"{_name(pod)}: {_said(waiting)}"
    return ""


def _out_of_memory(pod: Object) -> Cause | None:
    if any(ended.get("reason") == "OOMKilled" for ended in _terminations(pod)):
        return Cause(OutcomeKind.OUT_OF_MEMORY, f"{_name(pod)} was killed by the kernel at its memory limit")
    return None


def _disrupted(pod: Object) -> Cause | None:
    found = _condition(pod, "DisruptionTarget")
    if found is not None:
        words = _DISRUPTIONS.get(found.get("reason", ""), "was disrupted")
        return Cause(OutcomeKind.LOST, f"{_name(pod)} {words}: {_said(found)}")
    if pod.get("status", {}).get("reason") in _POD_REASONS:
        return Cause(OutcomeKind.LOST, f"{_name(pod)} was ended by its node: {_said(pod['status'])}")
    return None


def _past_deadline(pod: Object) -> Cause | None:
    if pod.get("status", {}).get("reason") == "DeadlineExceeded":
        return Cause(OutcomeKind.TIMED_OUT, f"{_name(pod)} was stopped at its deadline")
    return None


def _last_words(pod: Object) -> Cause | None:
    for ended in _terminations(pod):
        if ended.get("exitCode"):
            status = f"its supervisor in {_name(pod)} ended with status {ended['exitCode']}"
            return Cause(OutcomeKind.LOST, f"{status} ({_said(ended)})")
    return None


def _condition(found: Object, kind: str, status: str = "True") -> Object | None:
    for condition in found.get("status", {}).get("conditions") or ():
        if condition["type"] == kind and condition["status"] == status:
            return condition
    return None


def _containers(pod: Object) -> list[Object]:
    return pod.get("status", {}).get("containerStatuses") or []


def _terminations(pod: Object) -> list[Object]:
    return [one["state"]["terminated"] for one in _containers(pod) if one.get("state", {}).get("terminated")]


def _said(found: Object) -> str:
    """Reason and message in one line; a log's tail as a message is cut at its end, where the error is."""
    message = " ".join(str(found.get("message") or "").split())
    message = message if len(message) <= 300 else "..." + message[-297:]
    return ", ".join(part for part in (found.get("reason"), message) if part) or "no reason given"


def _name(pod: Object) -> str:
    node = pod.get("spec", {}).get("nodeName")
    return f"pod {pod['metadata']['name']}" + (f" on {node}" if node else "")


def _age_s(pod: Object, now: datetime | None) -> float:
    made = datetime.fromisoformat(pod["metadata"]["creationTimestamp"])
    return ((now or datetime.now(UTC)) - made).total_seconds()
