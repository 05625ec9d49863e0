"""The Kubernetes launcher: one object in the cluster per attempt, and the run folder for everything that counts.

    submit --create--> Job or TrainJob --> pod --supervisor--> RUN_DIR/attempts/N/outcome.json --poll--> JobOutcome

Its name follows from key, run folder and attempt, so that asking twice, or after a lost reply, finds the first one.
What the cluster says only matters where a run folder says nothing: the object is gone, or ended without an outcome.
This process may die at any moment: a new one is told the same jobs by submit and adopts them.
"""

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from megatron_evolve.launch import rundir
from megatron_evolve.launch.fence import GAVE_UP, shut_out
from megatron_evolve.launch.job import Job, JobOutcome, JobState, OutcomeKind, is_new_attempt
from megatron_evolve.launch.kubernetes_client import TRIES, Client, KubernetesError, Refused, Unanswered
from megatron_evolve.launch.kubernetes_ending import Cause, cause_of, is_finished, queued, why_it_cannot_start
from megatron_evolve.launch.kubernetes_manifest import (
    ATTEMPT_LABEL,
    FOLDER_ANNOTATION,
    JOB_LABEL,
    KEY_ANNOTATION,
    MANAGED_BY,
    Cluster,
    Manifest,
    check_place,
    digest,
    manifest,
    object_name,
    render,
)
from megatron_evolve.launch.kubernetes_watch import Mirror

CONFLICT = 409
# NFS shows a new file to a client up to 60 s late (acdirmax), so a pod may have ended before its outcome can be seen.
SETTLE_S = 90.0
ADDRESSES = {
    "Job": ("/apis/batch/v1", "jobs"),
    "Pod": ("/api/v1", "pods"),
    "PersistentVolumeClaim": ("/api/v1", "persistentvolumeclaims"),
    "Service": ("/api/v1", "services"),
    "TrainJob": ("/apis/trainer.kubeflow.org/v1alpha1", "trainjobs"),
    "TrainingRuntime": ("/apis/trainer.kubeflow.org/v1alpha1", "trainingruntimes"),
}
_SELECTOR = ",".join(f"{name}={value}" for name, value in MANAGED_BY.items())


@dataclass(eq=False)
class _Entry:
    """One submitted job and what is known of its latest attempt."""

    job: Job
    attempt: int
    kind: str  # "Job" or "TrainJob"
    state: JobState = "pending"
    created: bool = True  # unless the cluster has yet to answer that it was
    ended_at: float | None = None  # when the cluster was first seen to have ended it without an outcome
    told: rundir.Queued | None = None  # what was last kept of why it waits

    @property
    def folder(self) -> Path:
        return rundir.attempt_dir(self.job.run_dir, self.attempt)

    @property
    def name(self) -> str:
        return object_name(self.job, self.attempt)

    @property
    def begun(self) -> bool:
        return (self.folder / rundir.SUPERVISOR_FILE).exists()

    @property
    def cancelled(self) -> bool:
        return (self.folder / rundir.CANCEL_FILE).exists()


class KubernetesLauncher:
    """A Launcher for one namespace. Use it within `with`: it keeps a watch.

    settle_s  how long an attempt's outcome may take from the pod's disk to ours
    """

    def __init__(self, cluster: Cluster, client: Client, settle_s: float = SETTLE_S) -> None:
        self._cluster = cluster
        self._client = client
        self._settle_s = settle_s
        self._entries: dict[str, _Entry] = {}
        kinds = ["Job", "Pod", *(["TrainJob"] if cluster.training_runtime else [])]
        self._mirrors = {kind: Mirror(client, self._path(kind), _SELECTOR) for kind in kinds}
        self._watching = contextlib.ExitStack()

    def check(self) -> None:
        """Look for all that jobs will need, writing nothing. Raises KubernetesError with what is missing."""
        cluster = self._cluster
        self._client.list(self._path("Job"), _SELECTOR)
        needed = [("PersistentVolumeClaim", cluster.claim, "claim")]
        needed.append(
            ("TrainingRuntime", cluster.training_runtime, "training_runtime")
            if cluster.training_runtime
            else ("Service", cluster.service, "service")
        )
        for kind, name, setting in needed:
            if self._client.get(self._path(kind, name)) is None:
                raise KubernetesError(
                    f"namespace {cluster.namespace} must have the {kind} {name}; it has none: create it as in "
                    f"docs/kubernetes.md, or correct `kubernetes.{setting}` of the site file"
                )

    def render(self, job: Job) -> str:
        return render(job, 1, self._cluster)

    def submit(self, job: Job, attempt: int = 1) -> None:
        """See `Launcher.submit`. Raises ValueError for a job that can never run here, KubernetesError, RunDirError."""
        check_place(job, self._cluster)
        kind = manifest(job, 1, self._cluster)["kind"]
        entry = self._entries.get(job.key) or self._adopted(job, kind)
        if is_new_attempt(job, attempt, entry):
            entry = _Entry(job, attempt, kind)
            with contextlib.suppress(Unanswered):
                self._create(entry, only_try=True)  # what the cluster would refuse leaves no trace in the run folder
            rundir.prepare_attempt(job, attempt)
        self._entries[job.key] = entry
        if not (isinstance(entry.state, JobOutcome) or entry.begun or entry.cancelled):
            entry.created = False
            with contextlib.suppress(Unanswered):  # poll asks again: a control plane may be away for minutes
                self._create(entry)

    def poll(self, keys: Iterable[str]) -> dict[str, JobState]:
        """See `Launcher.poll`. Raises KubernetesError where the cluster refuses, is silent, or can't start a pod."""
        for mirror in self._mirrors.values():
            mirror.check()
        pods = defaultdict(list)
        for pod in self._mirrors["Pod"].objects().values():
            labels = pod["metadata"]["labels"]
            pods[labels.get(JOB_LABEL), labels.get(ATTEMPT_LABEL)].append(pod)
        states = {}
        for key in keys:
            entry = self._known(key)
            if not isinstance(entry.state, JobOutcome):
                with contextlib.suppress(Unanswered):  # the last known state holds until the mirrors lose patience
                    entry.state = self._state_of(entry, pods[digest(entry.job), str(entry.attempt)])
            states[key] = entry.state
        return states

    def cancel(self, key: str) -> None:
        """See `Launcher.cancel`."""
        entry = self._known(key)
        if not isinstance(entry.state, JobOutcome):
            rundir.write_whole(entry.folder / rundir.CANCEL_FILE, "")
            with contextlib.suppress(Unanswered):  # poll asks again, as it does if we die between these lines
                self._client.delete(self._path(entry.kind, entry.name))

    def close(self) -> None:
        """End the watch. Jobs go on in the cluster."""
        self._watching.close()

    def __enter__(self) -> "KubernetesLauncher":
        for mirror in self._mirrors.values():
            self._watching.enter_context(mirror)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _adopted(self, job: Job, kind: str) -> _Entry | None:
        """What the job's run folder holds of it, None if it was never tried. Raises ValueError if it is another's."""
        latest = rundir.latest_attempt(job.run_dir)
        if latest == 0:
            return None
        entry = _Entry(job, latest, kind)
        asked = rundir.read_job(entry.folder)
        if asked.key != job.key:
            raise ValueError(
                f"run folder {job.run_dir} must belong to job {job.key}; it belongs to {asked.key}: choose another"
            )
        outcome = self._outcome_of(entry)
        if outcome is not None:
            entry.state = outcome
        return entry

    def _known(self, key: str) -> _Entry:
        if key not in self._entries:
            raise ValueError(f"expected the key of a submitted job; got {key}: submit it first")
        return self._entries[key]

    def _create(self, entry: _Entry, *, only_try: bool = False, tries: int = TRIES) -> None:
        """Create the attempt's object, or adopt the one that is there. Raises KubernetesError."""
        asked = manifest(entry.job, entry.attempt, self._cluster)
        try:
            self._client.create(self._path(entry.kind), asked, only_try=only_try, tries=tries)
        except Refused as error:
            if only_try and error.status == 400 and "does not support dry run" in str(error):
                return  # an admission webhook of this cluster's, which says nothing about the job
            if error.status != CONFLICT:
                raise
            found = self._client.get(self._path(entry.kind, entry.name))
            annotations = found["metadata"].get("annotations", {}) if found is not None else {}
            if found is not None and (
                annotations.get(KEY_ANNOTATION) != entry.job.key
                or annotations.get(FOLDER_ANNOTATION) != str(entry.job.run_dir)
            ):
                raise KubernetesError(
                    f"{entry.kind} {entry.name} in namespace {self._cluster.namespace} must be of job {entry.job.key}; "
                    f"it is of {annotations.get(KEY_ANNOTATION)!r}: delete it, or use a namespace of its own"
                ) from error
        entry.created = not only_try

    def _find(self, entry: _Entry) -> Manifest | None:
        """The attempt's object as last seen. That it is gone is only believed when it was looked for by name."""
        found = self._mirrors[entry.kind].get(entry.name)
        return found or self._client.get(self._path(entry.kind, entry.name), tries=1)

    def _state_of(self, entry: _Entry, pods: list[Manifest]) -> JobState:
        outcome = self._outcome_of(entry)
        if outcome is not None:
            return self._explained(entry, outcome)
        if entry.ended_at is not None and time.monotonic() - entry.ended_at < self._settle_s:
            return entry.state
        if not (entry.created or entry.cancelled):
            self._create(entry, tries=1)
        found = self._find(entry)
        if found is not None and not is_finished(found):
            if entry.cancelled and "deletionTimestamp" not in found["metadata"]:
                self._client.delete(self._path(entry.kind, entry.name), tries=1)
            elif not entry.begun and (why := why_it_cannot_start(pods)) is not None:
                self._call_off(entry, why)
            if not (entry.begun or entry.cancelled):
                self._show(entry, queued(found, pods))
            return "running" if entry.begun else "pending"
        if entry.ended_at is None and self._settle_s > 0:
            entry.ended_at = time.monotonic()
            return entry.state
        return self._given_up(entry, found)

    def _outcome_of(self, entry: _Entry) -> JobOutcome | None:
        outcome, damage = rundir.take_outcome(entry.folder)
        return self._record(entry, Cause(OutcomeKind.LOST, damage)) if damage else outcome

    def _explained(self, entry: _Entry, outcome: JobOutcome) -> JobOutcome:
        """The outcome as its supervisor wrote it; if that only knows of a signal, with the cluster's reason for it."""
        if outcome.kind is not OutcomeKind.LOST:
            return outcome
        cause = cause_of(None, self._pods_of(entry))
        if cause is not None and cause.reason not in outcome.reason:
            outcome = dataclasses.replace(outcome, kind=cause.kind, reason=f"{cause.reason}; {outcome.reason}")
            rundir.write_outcome(entry.job.run_dir, outcome)
        # Whoever queues jobs may start a stopped one again; its pods would find the attempt over, but hold GPUs first.
        self._client.delete(self._path(entry.kind, entry.name), tries=1)
        return outcome

    def _show(self, entry: _Entry, said: rundir.Queued) -> None:
        if said != entry.told:
            entry.told = said
            rundir.write_queued(entry.folder, said)

    def _call_off(self, entry: _Entry, why: str) -> None:
        """Cancel an attempt that a person must help, so that the next one starts with what they changed."""
        self.cancel(entry.job.key)
        entry.state = self._record(entry, Cause(OutcomeKind.CANCELLED, why))
        raise KubernetesError(
            f"job {entry.job.key} was called off: {why}; correct the site's `kubernetes` section or what it names, "
            "then run the same command again"
        )

    def _given_up(self, entry: _Entry, found: Manifest | None) -> JobState:
        """Record how an attempt ended of which the cluster runs nothing any more and that left no outcome."""
        try:
            with rundir.Lock(entry.job.run_dir / rundir.LOCK_FILE):
                outcome = self._outcome_of(entry)  # the supervisor may have written it as its last act
                if outcome is not None:
                    return self._explained(entry, outcome)
                if entry.cancelled:
                    when = "after its supervisor had ended" if entry.begun else "before it began"
                    return self._record(entry, Cause(OutcomeKind.CANCELLED, f"was cancelled {when}"))
                gone = f"its {entry.kind} {entry.name} is gone" if found is None else f"its {entry.kind} ended"
                cause = cause_of(found, self._pods_of(entry)) or Cause(OutcomeKind.LOST, f"{gone}, without an outcome")
                if cause.kind is OutcomeKind.TIMED_OUT and not entry.begun:  # no time of its own was used
                    cause = Cause(OutcomeKind.LOST, f"{cause.reason} while it waited to begin")
                return self._record(entry, cause)
        except rundir.LockHeld:  # a pod that the cluster has lost sight of is still at it
            return "running"

    def _pods_of(self, entry: _Entry) -> list[Manifest]:
        """The attempt's pods, asked for now: the mirror of pods may be behind the one of Jobs."""
        selector = f"{_SELECTOR},{JOB_LABEL}={digest(entry.job)},{ATTEMPT_LABEL}={entry.attempt}"
        return self._client.list(self._path("Pod"), selector, tries=1)[0]

    def _record(self, entry: _Entry, cause: Cause) -> JobOutcome:
        where = f"namespace {self._cluster.namespace}"
        outcome = JobOutcome.unmeasured(entry.job.key, entry.attempt, cause.kind, where, cause.reason)
        shut_out(entry.job.run_dir, entry.attempt, GAVE_UP)
        rundir.write_outcome(entry.job.run_dir, outcome)
        shut_out(entry.job.run_dir, entry.attempt, GAVE_UP)
        return outcome

    def _path(self, kind: str, name: str = "") -> str:
        """The address of one object, or of all of its kind in the namespace."""
        group, plural = ADDRESSES[kind]
        return f"{group}/namespaces/{self._cluster.namespace}/{plural}" + (f"/{name}" if name else "")
