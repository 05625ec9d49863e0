"""The workshop: a laboratory that trains and scores for real, by the product's own jobs, on a frozen substrate.

Every run costs whoever uses it what it really took, whether this method was the first to train it or not. Only the
judge's jobs see an item: a sheet here is the name of a split and a round, and what was asked is known from the answers.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_evolve.candidate import candidate, candidate_id
from megatron_evolve.contest.shared_runs import SEARCHED, SharedRuns
from megatron_evolve.contest.space import Space, Spent
from megatron_evolve.eval.paired import RunItems
from megatron_evolve.eval.seeds import weight_vector
from megatron_evolve.facts import STAGE_OF_SPLIT
from megatron_evolve.jobs import Run, Stage
from megatron_evolve.origin import ORIGIN_ROUND
from megatron_evolve.substrate.settings import Settings


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A run on disk, and where it is asked."""

    settings: Settings
    run: Run
    runs: SharedRuns


@dataclass(eq=False)
class AskedSheet:
    """The items of one round and split, or of both dev halves; their names are known once a run has answered them."""

    split: str
    number: int
    ids_n: np.ndarray | None = None
    families_n: np.ndarray | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        return ("dev-a", "dev-b") if self.split == "dev" else (self.split,)

    @property
    def stage(self) -> Stage:
        """The job that asks them."""
        return STAGE_OF_SPLIT[self.splits[0]]


@dataclass(eq=False)
class Workshop:
    """What one campaign of one method may use. `failed` counts runs that ended without weights."""

    space: Space
    rng: np.random.Generator
    budget: int
    shared: SharedRuns
    frozen: SharedRuns
    frozen_seeds: tuple[int, ...]
    say: Callable[[str], None] = lambda line: None
    runs: int = 0
    looks: int = 0
    seconds: float = 0.0
    failed: int = 0
    _tried: Counter = field(default_factory=Counter)

    @property
    def left(self) -> int:
        return self.budget - self.runs

    def train(self, settings: Settings, start: Any = None) -> TrainedRun | None:
        """One run under a seed that this method has not used; none if it gave no weights. Raises Spent."""
        if start is not None:
            raise ValueError(
                "expected a run from the frozen substrate, got other weights to start from: real runs "
                "never inherit; use a simulated surface"
            )
        if self.runs >= self.budget:
            raise Spent
        self.runs += 1
        name = candidate_id(self.space.substrate, settings)
        run = self.shared.run_of(settings, SEARCHED, self._tried[name])
        self._tried[name] += 1
        end = self.shared.train(run)
        self.seconds += end.cpu_seconds
        self.failed += not end.finished
        self.say(f"run {self.runs} of {self.budget}: {name} {end.outcome}, {end.cpu_seconds:.0f} CPU-s")
        return TrainedRun(settings, run, self.shared) if end.finished else None

    def origin_runs(self, settings: Settings, count: int) -> list[TrainedRun]:
        """The runs that were frozen with the judge: they count for nobody."""
        origin = candidate(self.space.substrate, settings)
        return [
            TrainedRun(settings, Run(ORIGIN_ROUND, origin, seed), self.frozen) for seed in self.frozen_seeds[:count]
        ]

    def sheet(self, split: str, number: int = 1) -> AskedSheet:
        """The items of a split in a round: the same for every method, so that a shared run is asked once."""
        return AskedSheet(split, number)

    def answers(self, trained: TrainedRun, sheet: AskedSheet) -> np.ndarray:
        """Which items a run gets right, (n,)."""
        found = items_of(trained, sheet.stage, sheet.number, *sheet.splits)
        if sheet.ids_n is None:
            sheet.ids_n, sheet.families_n = found.item_ids, found.families
        if not np.array_equal(sheet.ids_n, found.item_ids):
            raise ValueError(f"run {trained.run.key} answered other items of {sheet.split} than the runs before it")
        return found.correct.astype(bool)  # 0 or 1 each

    def scoring_seconds(self, trained: TrainedRun, sheet: AskedSheet) -> float:
        """CPU-seconds that the job took which asked these items."""
        return trained.runs.ask(trained.run, sheet.stage, sheet.number).cpu_seconds

    def score(self, trained: TrainedRun, sheet: AskedSheet) -> float:
        """The weighted score of a run on a sheet; its cost and its look are counted."""
        outside = not sheet.split.startswith("dev")
        self.seconds += self.scoring_seconds(trained, sheet)
        self.looks += outside
        right = self.answers(trained, sheet)
        weights = self.space.external_weights if outside else self.space.dev_weights
        return weighted(right, sheet.families_n, weights)

    def ship(self, settings: Settings) -> Settings:
        """What is shipped; it is trained afresh once the campaign is over (`sealed_half.py`)."""
        return settings


def items_of(trained: TrainedRun, stage: Stage, number: int, *splits: str) -> RunItems:
    """A run's answers to some splits of a round."""
    rows = trained.runs.rows(trained.run, stage, number)
    return rows.of_run(trained.run.candidate.id, trained.run.seed, *splits)


def weighted(right_n: np.ndarray, families_n: np.ndarray, weights: Mapping[str, float]) -> float:
    """The score of some answers."""
    families = sorted(set(families_n.tolist()))
    means = np.array([right_n[families_n == name].mean() for name in families])
    return float(means @ weight_vector(weights, families))
