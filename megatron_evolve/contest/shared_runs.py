"""Real training runs of one contest campaign, each trained once and each asked once, whoever wants it.

    FOLDER/rounds/0/CANDIDATE/runs/SEED/train/           the trainer's job, as in a campaign
    FOLDER/rounds/0/CANDIDATE/runs/SEED/SPLIT-ROUND/     the judge's job on the items of that round
    .../ending.json                                      written last: how the job ended and what it took

A run is its settings and its place among the runs of these settings; its seed follows from both and from the campaign.
So two methods that try the same settings get the same run and the same answers. What has an ending is read, not done
again, by anybody, in any later process.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megatron_evolve.artefacts import save_json
from megatron_evolve.candidate import candidate, run_seed
from megatron_evolve.eval.score import ItemRows, read_rows
from megatron_evolve.jobs import ROWS_FILE, Ground, Run, Stage, StageEnd, write_candidate
from megatron_evolve.launch.job import INFRASTRUCTURE_KINDS
from megatron_evolve.launch.rundir import read_json
from megatron_evolve.substrate.settings import Settings

ENDING_FILE = "ending.json"
SEARCHED, SHIPPED = 0, 1  # what a run is for; seeds of the two never meet
TRAINED = 0  # the round under which runs are kept

# Runs one stage of one run to its end: a job of the launcher.
Execute = Callable[[Ground, Run, Stage], StageEnd]


@dataclass(frozen=True)
class SharedGround(Ground):
    """Where runs lie that several rounds' items are put to."""

    def stage_dir(self, run: Run, stage: Stage) -> Path:
        kept = self.folder.run(TRAINED, run.candidate.id, run.seed)
        if stage == "train":
            return kept / stage
        return super().stage_dir(run, stage) if self.scores else kept / f"{stage}-{run.round}"


def asked_by(ground: Ground, judge: Path, scores: Path) -> SharedGround:
    """The runs of a ground, asked by another judge; what it says lies in `scores`."""
    kept = {one.name: getattr(ground, one.name) for one in fields(Ground)}
    return SharedGround(**kept | {"judge": judge, "scores": scores})


@dataclass(frozen=True)
class Ending:
    """How a stage ended, and the CPU-seconds that it took."""

    outcome: str
    reason: str
    cpu_seconds: float

    @property
    def finished(self) -> bool:
        return self.outcome == "finished"


@dataclass(eq=False)
class SharedRuns:
    """The runs on one ground. `seed` is the campaign's; on the origin's ground it names nothing."""

    ground: Ground
    substrate: str
    seed: int
    execute: Execute
    _rows: dict[Path, ItemRows] = field(default_factory=dict)

    def run_of(self, settings: Settings, purpose: int, index: int) -> Run:
        """The run of these settings with this place among them."""
        found = candidate(self.substrate, settings)
        return Run(TRAINED, found, run_seed(self.seed, purpose, found.id, index))

    def train(self, run: Run) -> Ending:
        """Trains a run unless it is trained. A candidate that fails is an ending; a machine that fails raises."""
        write_candidate(self.ground.folder, TRAINED, run.candidate)
        return self._ended(replace(run, round=TRAINED), "train")

    def ask(self, run: Run, stage: Stage, number: int) -> Ending:
        """Puts the items of a round to a trained run, unless they were. Raises ValueError if that fails."""
        end = self._ended(replace(run, round=number), stage)
        if not end.finished:
            raise ValueError(
                f"scoring run {run.key} on {stage} {end.outcome} ({end.reason}): mend that and start again"
            )
        return end

    def rows(self, run: Run, stage: Stage, number: int) -> ItemRows:
        """Answers to the items of a round."""
        self.ask(run, stage, number)
        path = self.ground.stage_dir(replace(run, round=number), stage) / ROWS_FILE
        if path not in self._rows:
            self._rows[path] = read_rows(path)
        return self._rows[path]

    def _ended(self, run: Run, stage: Stage) -> Ending:
        path = self.ground.stage_dir(run, stage) / ENDING_FILE
        if not path.exists():
            end = self.execute(self.ground, run, stage)
            if end.outcome in {kind.value for kind in INFRASTRUCTURE_KINDS}:
                raise ValueError(f"run {run.key} {end.outcome} in {stage} ({end.reason}): mend that and start again")
            kept: dict[str, Any] = {"outcome": end.outcome, "reason": end.reason, "cpu_seconds": end.cpu_seconds}
            save_json(path, kept)
        return Ending(**read_json(path))
