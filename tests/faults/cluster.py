"""A cluster that is not there: jobs end in logical time, with drawn endings, by writing the files real jobs write.

    FakeLauncher (dies with the controller) --messages--> Cluster (outlives it)

A job's own ending, and what of its time is known, are drawn from its key, so they belong to the campaign. What befalls
its attempts (lost, disk full, messages lost or sent twice) is drawn from the schedule, so it does not; nor does how
often an attempt is made again, so such attempts cost nothing, unless the cluster `charges` them.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_evolve.budget import Spend
from megatron_evolve.eval.score import write_rows
from megatron_evolve.jobs import RESULT_FILE, ROWS_FILE, SCORES_FILE, SPLITS_OF
from megatron_evolve.launch import rundir
from megatron_evolve.launch.job import INFRASTRUCTURE_KINDS, Job, JobOutcome, JobState, OutcomeKind
from megatron_evolve.launch.rundir import RunDirError
from tests.faults.files import FaultyFiles
from tests.faults.invented import comparison, rows_of
from tests.faults.lives import leave

HOST = "nowhere"
ROOM = 3  # jobs that run at one time
DISK_FULL = "exited with status 1; stderr says: OSError: [Errno 28] No space left on device"

# How often a job's own ending is which, by stage; the rest finishes. Every kind there is comes up in a few campaigns.
TRAINING = {
    "diverged": 0.05,
    OutcomeKind.CRASHED: 0.04,
    OutcomeKind.OUT_OF_MEMORY: 0.04,
    OutcomeKind.TIMED_OUT: 0.04,
    OutcomeKind.LOST: 0.03,
    OutcomeKind.HUNG: 0.03,
}
SCORING = {
    OutcomeKind.CRASHED: 0.03,
    OutcomeKind.TIMED_OUT: 0.02,
    OutcomeKind.LOST: 0.02,
    OutcomeKind.HUNG: 0.01,
}
AGAIN = (*INFRASTRUCTURE_KINDS, OutcomeKind.CANCELLED)  # endings after which an attempt may be made again


def own_ending(key: str, share: float = 1.0) -> str:
    """How a job ends by its own nature: the value of an outcome kind, or `diverged`. `share` of these odds."""
    odds = {kind: share * odd for kind, odd in (TRAINING if key.endswith("/train") else SCORING).items()}
    return _draw(random.Random(f"ending of {key}"), odds, OutcomeKind.FINISHED)


def _draw(rng: random.Random, odds: dict, otherwise: str) -> str:
    left = rng.random()
    for kind, share in odds.items():
        left -= share
        if left < 0:
            return str(kind)
    return str(otherwise)


@dataclass(eq=False)
class _Attempt:
    job: Job
    number: int
    ends_at: float | None = None  # None: waits for room
    cancelled: bool = False
    disobeys: bool = False  # if it begins: it came after an order to stop


@dataclass
class Troubles:
    """What a schedule does to attempts and messages: a probability each."""

    lost: float = 0.0
    disk_full: float = 0.0
    submit_fails: float = 0.0
    reply_lost: float = 0.0
    sent_twice: float = 0.0
    poll_stale: float = 0.0


@dataclass
class Cluster:
    """The machines, their queue and their clock."""

    rng: random.Random
    files: FaultyFiles
    troubles: Troubles = field(default_factory=Troubles)
    room: int = ROOM
    own_failures: float = 1.0
    most_losses: int = 2  # of one job: a third would be its end
    charges: bool = False  # for attempts that are made again
    budget: Spend | None = None  # no attempt may begin that could exceed it
    spent: Spend = field(default_factory=Spend)
    took: dict[str, list[tuple[Spend, Spend]]] = field(default_factory=dict)  # each attempt, and its most with doubts
    exceeded: list[str] = field(default_factory=list)
    losses: dict[str, int] = field(default_factory=dict)
    now: float = 0.0
    queue: list[_Attempt] = field(default_factory=list)
    begun: set[tuple[str, int]] = field(default_factory=set)
    finished: dict[str, int] = field(default_factory=dict)
    befell: list[str] = field(default_factory=list)
    ordered: bool = False  # to stop, before this controller began: then no attempt may be new
    disobeyed: list[str] = field(default_factory=list)
    account: Path | None = None  # of looks: what asks the target must stand there before it begins
    unpaid: list[str] = field(default_factory=list)

    def begin(self, job: Job, number: int) -> None:
        """Takes an attempt once, however often it is sent."""
        if (job.key, number) not in self.begun:
            self.begun.add((job.key, number))
            self.queue.append(_Attempt(job, number, disobeys=self.ordered))
            if self.account is not None and not self._is_paid(job.key):
                self.unpaid.append(job.key)
            worst = sum((_worst(one.job) for one in self.queue), self.spent)
            if self.budget is not None and (
                worst.cpu_seconds > self.budget.cpu_seconds or worst.gpu_seconds > self.budget.gpu_seconds
            ):
                self.exceeded.append(job.key)

    def _is_paid(self, key: str) -> bool:
        run, _, stage = key.rpartition("/")
        if stage in ("train", "dev"):  # dev is asked of all, and paid before it is read
            return True
        with self.files.outside():
            looks = [json.loads(line) for line in self.account.read_bytes().splitlines()]
        return any(look["split"] == stage and run in look["runs"] for look in looks)

    def cancel(self, key: str) -> None:
        """An attempt is gone in a moment, in which its controller may die."""
        for one in self.queue:
            if one.job.key == key and not one.cancelled:
                one.cancelled, one.ends_at = True, self.now + self.rng.uniform(0.01, 0.4)

    def pass_time(self, seconds: float) -> None:
        """Lets jobs begin and end. What they write is nobody's fault."""
        self.now += seconds
        with self.files.outside():
            for one in [one for one in self.queue if one.ends_at is not None and one.ends_at <= self.now]:
                self.queue.remove(one)
                self._end(one)
            for one in [one for one in self.queue if one.ends_at is None][: self.room - self.running()]:
                one.ends_at = self.now + self.rng.uniform(0.01, 0.4)
                (rundir.attempt_dir(one.job.run_dir, one.number) / rundir.SUPERVISOR_FILE).write_text("{}")
                self.disobeyed += [one.job.key] * one.disobeys

    def running(self) -> int:
        return sum(one.ends_at is not None for one in self.queue)

    def where(self, key: str) -> JobState | None:
        """An attempt in the queue."""
        found = next((one for one in self.queue if one.job.key == key), None)
        return None if found is None else "pending" if found.ends_at is None else "running"

    def _end(self, one: _Attempt) -> None:
        job, kind, reason = one.job, own_ending(one.job.key, self.own_failures), "drawn"
        # What an attempt that is charged nothing leaves says that it never began.
        (rundir.attempt_dir(job.run_dir, one.number) / rundir.SUPERVISOR_FILE).unlink(missing_ok=True)
        fails_anyway = kind in INFRASTRUCTURE_KINDS
        if one.cancelled:
            kind, reason = OutcomeKind.CANCELLED.value, "was stopped because its submitter cancelled it"
        elif not fails_anyway and self.losses.get(job.key, 0) < self.most_losses and self.happens("lost", job.key):
            self.losses[job.key] = self.losses.get(job.key, 0) + 1
            kind, reason = OutcomeKind.LOST.value, "its node is gone"
            (job.run_dir / f".{job.done_file}.left.tmp").write_bytes(b"half a fi")
        elif self.happens("disk_full", job.key):
            kind, reason = OutcomeKind.CRASHED.value, DISK_FULL
        (job.run_dir / job.done_file).unlink(missing_ok=True)
        if kind in (OutcomeKind.FINISHED.value, "diverged"):
            _write_results(job, kind)
            self.finished[job.key] = self.finished.get(job.key, 0) + 1
            kind = OutcomeKind.FINISHED.value
        seconds, doubt_s = random.Random(f"cost of {job.key}").uniform(1, 20), 0.0
        again = kind in AGAIN or reason == DISK_FULL
        if again and not self.charges:
            seconds = 0.0
        outcome = JobOutcome(
            job.key, OutcomeKind(kind), None, None, seconds, seconds, None, HOST, one.number, None, reason
        )
        if seconds:
            lot = random.Random(f"life of {job.key}" + f" {one.number}" * again)
            outcome, doubt_s = leave(rundir.attempt_dir(job.run_dir, one.number), outcome, lot)
        took = Spend(seconds, seconds, seconds * job.resources.gpus)
        most = Spend.most(job.resources, seconds + doubt_s)
        self.spent += took
        known = outcome.cpu_seconds is not None
        self.took.setdefault(job.key, []).append((took, replace(most, cpu_seconds=seconds) if known else most))
        rundir.write_outcome(job.run_dir, outcome)

    def happens(self, trouble: str, key: str) -> bool:
        if self.rng.random() >= getattr(self.troubles, trouble):
            return False
        self.befell.append(f"{trouble} {key}")
        return True


def _worst(job: Job) -> Spend:
    """What an attempt takes that runs until it is killed."""
    seconds = job.time_limit_s + job.grace_s
    return Spend(seconds, seconds * job.resources.cores, seconds * job.resources.gpus)


def _write_results(job: Job, kind: str) -> None:
    _, name, seed, stage = job.key.split("/")
    if stage == "train":
        diverged = {"step": 7, "reason": "loss above ten times its start"} if kind == "diverged" else None
        rundir.write_json(job.run_dir / RESULT_FILE, {"diverged": diverged})
        return
    splits, asked = SPLITS_OF.get(stage, (stage,)), _round_asked(job)
    write_rows(job.run_dir / ROWS_FILE, rows_of(name, int(seed), asked, splits))
    told = {split: {"comparison_key": comparison(split, asked)} for split in splits}
    rundir.write_json(job.run_dir / SCORES_FILE, {"splits": told})


def _round_asked(job: Job) -> int:
    """Whose items are asked: the sealed ones are the same in every round."""
    return 0 if job.key.endswith("/final") else int(job.argv[job.argv.index("--round") + 1])


class FakeLauncher:
    """A Launcher as one controller has it: it knows what the run folders and the cluster tell it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._attempts: dict[str, tuple[Path, int]] = {}

    def render(self, job: Job) -> str:
        return " ".join(job.argv)

    def submit(self, job: Job, attempt: int = 1) -> None:
        if self.cluster.happens("submit_fails", job.key):
            raise RunDirError(f"cannot submit {job.key}: the controller of the cluster does not answer; run again")
        latest = rundir.latest_attempt(job.run_dir)
        ended = rundir.read_outcome(rundir.attempt_dir(job.run_dir, latest)) if latest else None
        if attempt > latest + 1 or (attempt > latest > 0 and ended is None):
            raise ValueError(f"attempt {attempt} at job {job.key} must follow the end of attempt {attempt - 1}")
        if latest == 0 or (attempt > latest and ended is not None and ended.kind is not OutcomeKind.FINISHED):
            latest += 1
            rundir.prepare_attempt(job, latest)
            ended = None
            if self.cluster.ordered:
                self.cluster.disobeyed.append(job.key)
        self._attempts[job.key] = (job.run_dir, latest)
        if ended is None:
            for _ in range(1 + self.cluster.happens("sent_twice", job.key)):
                self.cluster.begin(job, latest)
            if (rundir.attempt_dir(job.run_dir, latest) / rundir.CANCEL_FILE).exists():
                self.cluster.cancel(job.key)
        if self.cluster.happens("reply_lost", job.key):
            raise RunDirError(f"no answer to the submission of {job.key}; run again")

    def poll(self, keys: Iterable[str]) -> dict[str, JobState]:
        self.cluster.pass_time(0.0)
        found: dict[str, JobState] = {}
        for key in keys:
            state = self.cluster.where(key)
            if state is None and not self.cluster.happens("poll_stale", key):
                run_dir, attempt = self._attempts[key]
                state = rundir.read_outcome(rundir.attempt_dir(run_dir, attempt))
            found[key] = state or "running"
        return found

    def cancel(self, key: str) -> None:
        run_dir, attempt = self._attempts[key]
        asked = rundir.attempt_dir(run_dir, attempt) / rundir.CANCEL_FILE
        if not asked.exists():
            rundir.write_whole(asked, "")
        self.cluster.cancel(key)
