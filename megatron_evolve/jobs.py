"""A candidate's runs as jobs: train, then score. What the launcher says and what the trainer says become one ending.

    Run --train--> train/result.json --dev--> dev/scores.json --external-a, -b--> external-b/scores.json

Each stage is one job in a folder of its own. `drive` keeps the launcher busy and hands every ended stage back once, in
the order they end; what it does not know is what any of it means. What failed by its machine's fault is tried again as
`retries` says, and nothing is started that could exceed a budget.
"""

import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_evolve.artefacts import CampaignFolder, check_file, save_json
from megatron_evolve.budget import Account, Spend, spent_before, spent_in_all
from megatron_evolve.candidate import Candidate
from megatron_evolve.launch.gpus import GpusFilled
from megatron_evolve.launch.job import INFRASTRUCTURE_KINDS, Job, JobOutcome, Launcher, OutcomeKind
from megatron_evolve.launch.rundir import (
    JOB_FILE,
    OUTCOME_FILE,
    SUPERVISOR_FILE,
    DamagedFile,
    RunDirError,
    attempt_dir,
    latest_attempt,
    read_json,
    read_outcome,
)
from megatron_evolve.launch.slurm_queue import SlurmError
from megatron_evolve.placement import Placement
from megatron_evolve.retries import Paused, Retries
from megatron_evolve.substrate.digest import digest_file

Stage = Literal["train", "dev", "external-a", "external-b", "final", "open"]
FINAL_STAGE: Stage = "final"
RESULT_FILE = "result.json"
SCORES_FILE = "scores.json"
ROWS_FILE = "scores.parquet"
MANIFEST_FILE = "checkpoint/manifest.json"
SPLITS_OF: dict[str, tuple[str, ...]] = {"dev": ("dev-a", "dev-b")}

# What the system says of a disk that takes no more. No fault of a candidate: the campaign pauses until it does.
DISK_WORDS = tuple(os.strerror(code).lower() for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))

# The controller's own share of the processor is budgeted at 2 %: a poll costs about 0.3 ms, so 20 a second is 0.6 %.
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Run:
    """One run of a candidate in a round."""

    round: int
    candidate: Candidate
    seed: int

    @property
    def key(self) -> str:
        return f"{self.round}/{self.candidate.id}/{self.seed}"


@dataclass(frozen=True)
class StageEnd:
    """How one stage of one run ended. `outcome` is a job's kind, or `diverged`, which only the trainer can know.

    What it took is that of all its attempts, the failed ones included.
    """

    run: Run
    stage: Stage
    outcome: str
    reason: str
    cpu_seconds: float
    seconds: float
    attempts: int
    gpu_seconds: float = 0.0

    @property
    def finished(self) -> bool:
        return self.outcome == OutcomeKind.FINISHED.value


@dataclass(frozen=True)
class Ground:
    """Where the frozen parts lie, and what a job may use. `scores`, if given, is where scores go."""

    folder: CampaignFolder
    substrate: Path
    judge: Path
    time_limit_s: float
    env: dict[str, str] = field(default_factory=dict)
    exclude: Path | None = None
    scores: Path | None = None
    placement: Placement = field(default_factory=Placement)

    def stage_dir(self, run: Run, stage: Stage) -> Path:
        """Where a stage of a run works and leaves its files."""
        if self.scores is not None and stage != "train":
            return self.scores / run.candidate.id / str(run.seed) / stage
        return self.folder.run(run.round, run.candidate.id, run.seed) / stage

    def job(self, run: Run, stage: Stage) -> Job:
        """The job of a stage. Only a scoring job's arguments lead to the judge, and so to the target."""
        run_dir = self.stage_dir(run, stage).resolve()
        argv = self._train_argv(run, run_dir) if stage == "train" else self._score_argv(run, stage, run_dir)
        return Job(
            key=f"{run.key}/{stage}",
            argv=argv,
            run_dir=run_dir,
            time_limit_s=self.time_limit_s,
            done_file=RESULT_FILE if stage == "train" else SCORES_FILE,
            env={**self.placement.environment(trains=stage == "train"), **self.env},
            resources=self.placement.resources(trains=stage == "train"),
            stall_s=self.placement.site.stall_seconds,
            start_s=self.placement.site.start_seconds,
            grace_s=self.placement.site.grace_seconds,
        )

    def _train_argv(self, run: Run, run_dir: Path) -> tuple[str, ...]:
        candidate = self.folder.candidate(run.round, run.candidate.id).resolve() / "candidate.json"
        argv = (sys.executable, *self.placement.rank_starter, "-m", "megatron_evolve.substrate.train.run")
        argv += ("--substrate", str(self.substrate), "--candidate", str(candidate), "--seed", str(run.seed))
        argv += ("--out", str(run_dir), *self.placement.training.options)
        return argv + (("--exclude", str(self.exclude)) if self.exclude else ())

    def _score_argv(self, run: Run, stage: Stage, run_dir: Path) -> tuple[str, ...]:
        splits = SPLITS_OF.get(stage, (stage,))
        argv = (sys.executable, "-m", "megatron_evolve.eval.run", "--judge", str(self.judge))
        argv += ("--substrate", str(self.substrate), "--run", str(self.stage_dir(run, "train").resolve()))
        return (*argv, "--round", str(run.round), "--splits", ",".join(splits), "--out", str(run_dir))

    def end_of(self, run: Run, stage: Stage, outcome: JobOutcome, total: Spend) -> StageEnd:
        """The job's ending joined with what the trainer wrote and with what all attempts took."""
        kind, reason = outcome.kind.value, outcome.reason
        if stage == "train" and outcome.kind is OutcomeKind.FINISHED:
            result = read_json(self.stage_dir(run, stage) / RESULT_FILE)
            if result["diverged"]:
                kind = "diverged"
                reason = f"diverged at step {result['diverged']['step']}: {result['diverged']['reason']}"
        return StageEnd(
            run=run,
            stage=stage,
            outcome=kind,
            reason="" if kind == "finished" else reason,
            cpu_seconds=round(total.cpu_seconds, 6),
            seconds=round(total.seconds, 6),
            attempts=outcome.attempt,
            gpu_seconds=round(total.gpu_seconds, 6),
        )

    def files(self, end: StageEnd) -> dict[str, str]:
        """Digest of each file that a finished stage left to be read, by name; weights by what names their sha256."""
        names = (RESULT_FILE, MANIFEST_FILE) if end.stage == "train" else (SCORES_FILE, ROWS_FILE)
        folder = self.stage_dir(end.run, end.stage)
        left = [name for name in names if name != MANIFEST_FILE or (folder / name).exists()]
        return {name: digest_file(folder / name) for name in left} if end.finished else {}

    def check_files(self, run: Run, stage: Stage, files: Mapping[str, str]) -> None:
        """Raises ValueError unless a stage's files are still those whose digests `files` gave."""
        for name, digest in files.items():
            check_file(self.stage_dir(run, stage) / name, digest)


def write_candidate(folder: CampaignFolder, round_number: int, candidate: Candidate) -> str:
    """Puts a candidate where its runs read it; returns its digest."""
    return save_json(folder.candidate(round_number, candidate.id) / "candidate.json", candidate)


def drive(
    ground: Ground,
    launcher: Launcher,
    runs: Iterable[tuple[Run, Stage]],
    after: Callable[[StageEnd], Iterable[tuple[Run, Stage]]],
    stop: Callable[[], bool] = lambda: False,
    retries: Retries | None = None,
    account: Account | None = None,
) -> Iterator[StageEnd]:
    """Runs stages until none is left, yielding each end once; `after` may add stages that follow from it.

    When `stop` turns true, or a budget is spent (`account.spent` then says so), nothing new is started and what runs is
    waited for. Without `retries` what failed before this call is forgotten. Raises RunDirError when a job found its
    disk full: it is tried again when the campaign goes on. Raises Paused when the machine fails job after job, others
    fill its GPUs, or Slurm refuses a job.
    """
    work = _Work(ground, launcher, stop, retries or Retries(kept=False), account or Account())
    for run, stage in runs:
        work.add(run, stage)
    while work.goes_on():
        for end in work.step():
            yield end
            if not stop():
                for run, stage in after(end):
                    work.add(run, stage)
        time.sleep(POLL_SECONDS)


@dataclass
class _Try:
    """An attempt at a stage: to be submitted from `due` on, or submitted.

    began    the look at which it was first seen to run, or the last at which it was seen not to
    begun    an earlier process asked for it, so it is taken as it is, whatever the budgets say
    adopted  it ended before this process asked for it, so it is no news of the machine
    """

    run: Run
    stage: Stage
    job: Job
    attempt: int
    due: float = 0.0
    began: int = 0
    running: bool = False
    begun: bool = False
    adopted: bool = False


@dataclass
class _Work:
    """What `drive` has to do: attempts that wait, and those that were submitted, by key. `looks` counts its polls."""

    ground: Ground
    launcher: Launcher
    stop: Callable[[], bool]
    retries: Retries
    account: Account
    waiting: list[_Try] = field(default_factory=list)
    open: dict[str, _Try] = field(default_factory=dict)
    looks: int = 0

    def add(self, run: Run, stage: Stage) -> None:
        """Take up a stage; what it took before counts at once."""
        job = self.ground.job(run, stage)
        attempt = next_attempt(job, self.retries)
        self.account.hold(job.key, spent_before(job, attempt))
        begun, ended = ((attempt_dir(job.run_dir, attempt) / name).exists() for name in (JOB_FILE, OUTCOME_FILE))
        if begun and not ended:  # it may run already, so nothing else may count on what it can take
            self.account.reserve(job)
        self.waiting.append(_Try(run, stage, job, attempt, begun=begun, adopted=ended))

    def goes_on(self) -> bool:
        """Whether anything is left. When asked to stop, what waits to be submitted stays as it is.

        Not what a controller before this one submitted: that too is waited for, or called off while it waits.
        """
        if self.stop():
            self.waiting = [one for one in self.waiting if one.begun and not one.adopted]
        return bool(self.open or self.waiting)

    def step(self) -> Iterator[StageEnd]:
        """Submit what may start, look at what was submitted, and tell what ended."""
        yield from self._submit()
        self.looks += 1
        try:
            states = self.launcher.poll(list(self.open))
        except (GpusFilled, SlurmError) as error:
            raise Paused(str(error), {}) from error
        for key, state in states.items():
            one = self.open[key]
            if isinstance(state, JobOutcome):
                del self.open[key]
                yield from self._ended(one, state)
            elif state == "pending":
                one.began = self.looks
                if self.stop():
                    self.launcher.cancel(key)
            elif not one.running:
                one.began, one.running = self.looks, True

    def _submit(self) -> Iterator[StageEnd]:
        held, why = [], None
        for one in self.waiting:
            refused = None if one.due > time.monotonic() or one.begun else self.account.refusal(one.job)
            if one.due > time.monotonic() or refused:
                held.append(one)
                why = why or refused
                continue
            self.launcher.submit(one.job, one.attempt)
            if not one.adopted:
                self.account.reserve(one.job)
            one.began, self.open[one.job.key] = self.looks, one
            # What an earlier controller prepared may not be with the cluster yet, whose next poll would hand it over.
            if self.stop() and not (attempt_dir(one.job.run_dir, one.attempt) / SUPERVISOR_FILE).exists():
                self.launcher.cancel(one.job.key)
        self.waiting = held
        if why and not self.open and all(one.due <= time.monotonic() for one in held):
            self.account.spent = why
            self.waiting = []
            for one in held:
                yield from self._not_tried_again(one)

    def _ended(self, one: _Try, outcome: JobOutcome) -> Iterator[StageEnd]:
        key = one.job.key
        total = spent_in_all(one.job, outcome)
        self.account.hold(key, total)
        if outcome.kind is OutcomeKind.CANCELLED:
            # Called off in a drain: by this controller, or by one that died before it was over. That ends no stage.
            if not self.stop():
                self.waiting.append(_Try(one.run, one.stage, one.job, outcome.attempt + 1))
            return
        if is_disk_trouble(outcome):
            raise RunDirError(f"{key} {outcome.reason}; free space on that disk, then run the same command again")
        if outcome.kind in INFRASTRUCTURE_KINDS:
            wait_s = self._wait_for_next(one, outcome)
            if self.stop():
                return
            if wait_s is not None:
                again = _Try(one.run, one.stage, one.job, outcome.attempt + 1, due=time.monotonic() + wait_s)
                self.waiting.append(again)
                return
        elif not one.adopted:
            self.retries.ended(key, self.looks)
        self.account.settle(key, total)
        yield self.ground.end_of(one.run, one.stage, outcome, total)

    def _wait_for_next(self, one: _Try, outcome: JobOutcome) -> float | None:
        """Seconds to the next attempt at what its machine failed, None if it is given up. Old news does not wait."""
        if not one.adopted:
            return self.retries.failed(one.job.key, outcome, one.began, self.looks)
        return 0.0 if self.retries.may_go_on(one.job.key, one.job.run_dir) else None

    def _not_tried_again(self, one: _Try) -> Iterator[StageEnd]:
        """The end of a stage whose next attempt no budget allows: that of its last. One never begun has none."""
        before = read_outcome(attempt_dir(one.job.run_dir, one.attempt - 1)) if one.attempt > 1 else None
        if before is not None and before.kind in INFRASTRUCTURE_KINDS:
            total = spent_before(one.job)
            self.account.settle(one.job.key, total)
            yield self.ground.end_of(one.run, one.stage, before, total)


def next_attempt(job: Job, retries: Retries) -> int:
    """The attempt to submit: the latest, or one more if that was called off, its disk was full, or its machine failed.

    What stood between a job's failures is not known any more: one that waited out an outage may have failed one time
    fewer than opens the breaker. So only a job whose machine failed it as often as that keeps its latest, as its end;
    or as the pause that is due, if others failed with it.
    """
    failures, latest = retries.failures(job.key, job.run_dir), latest_attempt(job.run_dir)
    try:
        outcome = read_outcome(attempt_dir(job.run_dir, latest)) if latest else None
    except DamagedFile:  # the launcher puts it aside when it is asked for this attempt
        return latest
    again = outcome is not None and (
        outcome.kind is OutcomeKind.CANCELLED
        or is_disk_trouble(outcome)
        or (outcome.kind in INFRASTRUCTURE_KINDS and failures < retries.in_a_row)
    )
    return max(1, latest + again)


def is_disk_trouble(outcome: JobOutcome) -> bool:
    """Whether a job crashed because its disk took no more, by the system's words in its last line."""
    return outcome.kind is OutcomeKind.CRASHED and any(words in outcome.reason.lower() for words in DISK_WORDS)
