"""The laboratory: trains and scores on a response surface, counts what that costs, and stops at the budget.

A run has luck: its seed moves each domain's accuracy on dev and outside nearly alike, by as much as nano's seeds do.
Its answers flip: an item is known to all who are good enough for it, and a share is answered by chance all the same,
so that two runs of one candidate disagree on as many items as nano's do (simulate/noise.py). A run started from another
run's weights ends between what that one knew and what its own settings lead to, and keeps part of its luck: handing
weights on is no way round the limit on the length of a run.
"""

from dataclasses import dataclass, field

import numpy as np

from megatron_evolve.contest.space import Space, Spent
from megatron_evolve.contest.surface import FAMILIES, SCORING_SECONDS, Learnt, Surface
from megatron_evolve.eval.seeds import weight_vector
from megatron_evolve.simulate.noise import MEASURED, Noise
from megatron_evolve.substrate.settings import Settings

# Of what a run knew, and of its luck, in a run that starts from its weights. Not measured: nano campaigns never hand
# weights on. Luck is weights, so nearly all of it stays where the next run starts.
KEPT_SKILL, KEPT_LUCK = 0.5, 0.8


@dataclass(frozen=True, eq=False)
class Trained:
    """A checkpoint: its settings, what it knows, and its accuracies by domain with its luck in them."""

    settings: Settings
    learnt: Learnt
    luck_2F: np.ndarray  # dev, external
    accuracies_2F: np.ndarray


@dataclass(frozen=True, eq=False)
class Sheet:
    """The items of one split: how hard each is, and its domain."""

    split: str
    difficulty_n: np.ndarray
    codes_n: np.ndarray
    ids_n: np.ndarray
    families_n: np.ndarray


@dataclass(eq=False)
class Laboratory:
    """What one campaign may use. `runs`, `looks` and `seconds` count what it used."""

    surface: Surface
    rng: np.random.Generator
    budget: int
    noise: Noise = field(default=MEASURED)
    runs: int = 0
    looks: int = 0
    seconds: float = 0.0

    @property
    def space(self) -> Space:
        return self.surface.space

    @property
    def left(self) -> int:
        return self.budget - self.runs

    def train(self, settings: Settings, start: Trained | None = None) -> Trained | None:
        """One run under a fresh seed; none if it diverged. Raises Spent beyond the budget."""
        if self.runs >= self.budget:
            raise Spent
        self.runs += 1
        if self.surface.does_diverge(settings):
            self.seconds += self.surface.cpu_seconds(settings) / 2
            return None
        self.seconds += self.surface.cpu_seconds(settings)
        return self._trained(settings, start)

    def origin_runs(self, settings: Settings, count: int) -> list[Trained]:
        """Runs that were frozen with the judge, before the campaign: they count for nobody."""
        return [self._trained(settings, None) for _ in range(count)]

    def sheet(self, split: str, number: int = 1) -> Sheet:
        """Fresh items of a split, or of both dev halves; items of one round are no more alike than others here."""
        codes = np.repeat(np.arange(len(FAMILIES)), self.space.num_items(split))
        ids = np.array([f"{split}/{self.rng.integers(1 << 62)}-{place}" for place in range(len(codes))])
        return Sheet(split, self.rng.random(len(codes)), codes, ids, np.array(FAMILIES)[codes])

    def answers(self, trained: Trained, sheet: Sheet) -> np.ndarray:
        """Which items a run gets right, (n,)."""
        outside = not sheet.split.startswith("dev")
        accuracy_n = trained.accuracies_2F[int(outside)][sheet.codes_n]
        by_chance = self.rng.random(len(accuracy_n)) < self.noise.redraw
        return np.where(by_chance, self.rng.random(len(accuracy_n)), sheet.difficulty_n) < accuracy_n

    def scoring_seconds(self, trained: Trained, sheet: Sheet) -> float:
        """CPU-seconds of one scoring job: of both dev halves, or of one half of the target."""
        return SCORING_SECONDS["dev" if sheet.split.startswith("dev") else "external"]

    def score(self, trained: Trained, sheet: Sheet) -> float:
        """The weighted score of a run on a sheet; its cost and its look are counted."""
        outside = not sheet.split.startswith("dev")
        self.seconds += self.scoring_seconds(trained, sheet)
        self.looks += outside
        weights = self.surface.external_weights if outside else self.surface.dev_weights
        right = self.answers(trained, sheet)
        means = np.bincount(sheet.codes_n, right) / np.bincount(sheet.codes_n)
        return float(means @ weight_vector(weights, FAMILIES))

    def ship(self, settings: Settings) -> Trained:
        """One more run of the final settings, after the campaign: what is shipped."""
        return self._trained(settings, None)

    def sealed(self, shipped: Trained) -> tuple[float, float]:
        """The expected score of a checkpoint on the sealed half, and of the same training under other seeds."""
        w = weight_vector(self.surface.external_weights, FAMILIES)
        return float(shipped.accuracies_2F[1] @ w), self.surface.external_score(shipped.learnt)

    def _trained(self, settings: Settings, start: Trained | None) -> Trained:
        learnt, luck = self.surface.learnt(settings), self._luck()
        if start is not None:
            skill_F, cue_F = (
                KEPT_SKILL * before + (1 - KEPT_SKILL) * own
                for before, own in ((start.learnt.skill_F, learnt.skill_F), (start.learnt.cue_F, learnt.cue_F))
            )
            learnt, luck = Learnt(skill_F, cue_F), luck + KEPT_LUCK * start.luck_2F
        accuracies = np.stack(self.surface.accuracies(learnt)) + luck
        return Trained(settings, learnt, luck, accuracies.clip(0.01, 0.99))

    def _luck(self) -> np.ndarray:
        sd, correlation = self.noise.seed_sd * np.sqrt(len(FAMILIES)), self.noise.seed_correlation
        common, own = self.rng.normal(size=(2, len(FAMILIES)))
        return sd * np.stack([common, correlation * common + np.sqrt(1 - correlation**2) * own])
