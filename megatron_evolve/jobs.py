"""A candidate's runs as jobs: train, then score. What the launcher says and what the trainer says become one ending.

    Run --train--> train/result.json --dev--> dev/scores.json --external-a, -b--> external-b/scores.json

Each stage is one job in a folder of its own. `drive` keeps the launcher busy and hands every ended stage back once, in
the order they end; what it does not know is what any of it means.
"""

import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_evolve.artefacts import CampaignFolder, save_json
from megatron_evolve.candidate import Candidate
from megatron_evolve.launch.job import Job, JobOutcome, Launcher, OutcomeKind
from megatron_evolve.launch.rundir import RunDirError, attempt_dir, latest_attempt, read_json, read_outcome
from megatron_evolve.placement import Placement
from megatron_evolve.substrate.digest import digest_file

Stage = Literal["train", "dev", "external-a", "external-b", "final", "open"]
FINAL_STAGE: Stage = "final"
RESULT_FILE = "result.json"
SCORES_FILE = "scores.json"
ROWS_FILE = "scores.parquet"
SPLITS_OF: dict[str, tuple[str, ...]] = {"dev": ("dev-a", "dev-b")}

# An ending that says nothing about the candidate; tried again this often, each attempt kept.
INFRASTRUCTURE_KINDS = (OutcomeKind.LOST,)
INFRASTRUCTURE_ATTEMPTS = 3

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
    """How one stage of one run ended. `outcome` is a job's kind, or `diverged`, which only the trainer can know."""

    run: Run
    stage: Stage
    outcome: str
    reason: str
    cpu_seconds: float
    seconds: float
    attempts: int

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

    def end_of(self, run: Run, stage: Stage, outcome: JobOutcome) -> StageEnd:
        """The job's ending joined with what the trainer wrote."""
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
            cpu_seconds=outcome.cpu_seconds or 0.0,
            seconds=outcome.seconds or 0.0,
            attempts=outcome.attempt,
        )

    def files(self, end: StageEnd) -> dict[str, str]:
        """Digest of each file that a finished stage left to be read, by name."""
        names = (RESULT_FILE,) if end.stage == "train" else (SCORES_FILE, ROWS_FILE)
        folder = self.stage_dir(end.run, end.stage)
        return {name: digest_file(folder / name) for name in names} if end.finished else {}


def write_candidate(folder: CampaignFolder, round_number: int, candidate: Candidate) -> str:
    """Puts a candidate where its runs read it; returns its digest."""
    return save_json(folder.candidate(round_number, candidate.id) / "candidate.json", candidate)


def drive(
    ground: Ground,
    launcher: Launcher,
    runs: Iterable[tuple[Run, Stage]],
    after: Callable[[StageEnd], Iterable[tuple[Run, Stage]]],
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[StageEnd]:
    """Runs stages until none is left, yielding each end once; `after` may add stages that follow from it.

    A lost attempt is tried again up to 3 times. When `stop` turns true nothing new is started and what runs is waited
    for. Raises RunDirError when a job found its disk full: it is tried again when the campaign goes on.
    """
    open_stages: dict[str, tuple[Run, Stage]] = {}

    def submit(run: Run, stage: Stage, attempt: int | None = None) -> None:
        job = ground.job(run, stage)
        launcher.submit(job, attempt or next_attempt(job))
        open_stages[job.key] = (run, stage)

    for run, stage in runs:
        submit(run, stage)
    while open_stages:
        for key, state in launcher.poll(list(open_stages)).items():
            if state == "pending" and stop():
                launcher.cancel(key)
            if not isinstance(state, JobOutcome):
                continue
            run, stage = open_stages.pop(key)
            if state.kind is OutcomeKind.CANCELLED and stop():
                continue
            if is_disk_trouble(state):
                raise RunDirError(f"{key} {state.reason}; free space on that disk, then run the same command again")
            if state.kind in INFRASTRUCTURE_KINDS and state.attempt < INFRASTRUCTURE_ATTEMPTS and not stop():
                submit(run, stage, state.attempt + 1)
                continue
            end = ground.end_of(run, stage, state)
            yield end
            if not stop():
                for next_run, next_stage in after(end):
                    submit(next_run, next_stage)
        time.sleep(POLL_SECONDS)


def next_attempt(job: Job) -> int:
    """The attempt to submit: the latest, or one more if that was called off or its disk was full."""
    latest = latest_attempt(job.run_dir)
    outcome = read_outcome(attempt_dir(job.run_dir, latest)) if latest else None
    again = outcome is not None and (outcome.kind is OutcomeKind.CANCELLED or is_disk_trouble(outcome))
    return max(1, latest + again)


def is_disk_trouble(outcome: JobOutcome) -> bool:
    """Whether a job crashed because its disk took no more, by the system's words in its last line."""
    return outcome.kind is OutcomeKind.CRASHED and any(words in outcome.reason.lower() for words in DISK_WORDS)
