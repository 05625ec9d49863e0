"""Draws what simulated campaigns' runs answered, as the judge's own values: `Answers`, `RoundItems`, `SeedPool`.

Letters: B campaigns at once, K explorers, R runs, F families, n items of a split. A round's explorers stand in the
order of their A-half scores, best first, so that the same row is the leader's in every campaign.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_evolve.constitution import Constitution
from megatron_evolve.eval.judge import MIN_ORIGIN_SEEDS
from megatron_evolve.eval.paired import Answers
from megatron_evolve.eval.reported import ReportedScores
from megatron_evolve.eval.seeds import RunKey, RunReplicates, SeedPool
from megatron_evolve.policy import Replicates
from megatron_evolve.simulate.exam import EVEN, Exam
from megatron_evolve.simulate.noise import Noise
from megatron_evolve.simulate.scenarios import Scenario
from megatron_evolve.window import RoundItems

ANCHOR, ORIGIN = "anchor", "origin"


@dataclass(frozen=True, eq=False)
class State:
    """Where B campaigns stand: true gains of each axis from the standing settings, and of these from the origin."""

    d_BKF: np.ndarray
    t_BKF: np.ndarray
    standing_d_BF: np.ndarray
    standing_t_BF: np.ndarray
    external_B: np.ndarray  # whether the search is after the external score
    away_B: np.ndarray  # whether the standing settings have left the origin's

    @classmethod
    def at_origin(cls, d_BKF: np.ndarray, t_BKF: np.ndarray) -> "State":
        """Before the first round."""
        nothing = np.zeros((len(d_BKF), d_BKF.shape[-1]))
        no = np.zeros(len(d_BKF), dtype=bool)
        return cls(d_BKF, t_BKF, nothing, nothing, no, no)


@dataclass(frozen=True, eq=False)
class Plan:
    """What a round runs: who, under which seeds, and on how many items of dev-B (and, by scenario, of the target)."""

    rules: Constitution = field(default=Constitution())
    replicates: Replicates = field(default=Replicates())
    origin_seeds: int = MIN_ORIGIN_SEEDS
    items: int = 500
    exam: Exam = EVEN

    def __post_init__(self) -> None:
        families = len(self.exam.families)
        if self.items < 2 * families or self.items % families:
            raise ValueError(
                f"expected a multiple of {families} items, 2 a family at least, got {self.items}: simulated "
                "families share the items alike"
            )

    @property
    def explorers(self) -> int:
        return self.rules.workers - 1

    @property
    def judges_origin(self) -> bool:
        """Whether the standing settings are judged against the origin, which then answers each round's items."""
        return "cumulative" in self.rules.gap.estimands

    def judging_origin(self) -> "Plan":
        """The same with all three estimands."""
        gap = self.rules.gap.replace(estimands=("selected", "mean", "cumulative"))
        return replace(self, rules=self.rules.replace(gap=gap))

    def seeds_of(self, rank: int) -> int:
        """Runs of the explorer at a rank: leaders get further seeds."""
        further = self.replicates.confirm_seeds if rank < self.replicates.confirm_candidates else 0
        return self.replicates.explorer + further

    def runs(self, number: int, origin: bool) -> list[tuple[RunKey, int]]:
        """Run and rank of its explorer; -1 for the anchor, -2 for the origin."""
        rows = [((ANCHOR, self.rules.anchor_seeds * number + seed), -1) for seed in range(self.rules.anchor_seeds)]
        for rank in range(self.explorers):
            rows += [((name_of(rank, number), seed), rank) for seed in range(self.seeds_of(rank))]
        return rows + [((ORIGIN, seed), -2) for seed in range(self.origin_seeds) if origin]


def name_of(rank: int, number: int) -> str:
    """A candidate of one round; another round's is another candidate, with seeds of its own."""
    return f"round-{number}-rank-{rank}"


class Draw:
    """The dice of B campaigns of one scenario."""

    def __init__(self, rng: np.random.Generator, noise: Noise, scenario: Scenario, plan: Plan, campaigns: int) -> None:
        self.rng, self.noise, self.scenario, self.plan = rng, noise, scenario, plan
        self.campaigns, self.exam = campaigns, plan.exam
        self.num_families = len(plan.exam.families)
        self.num_drawn = 0
        # Whose run of which round is lucky on dev alone, where the scenario has one.
        self.liar = rng.integers(0, [plan.rules.rounds, plan.explorers], (campaigns, 2))

    @property
    def external_items(self) -> int:
        """Items of the target in a round, both halves together."""
        return of_families(self.scenario.external_share * self.plan.items, self.num_families)

    def luck(self, runs: int) -> tuple[np.ndarray, np.ndarray]:
        """What the seeds of R runs do to each family's accuracy on dev and outside, (B, R, F) each."""
        sd, correlation = self.noise.seed_sd * np.sqrt(self.num_families), self.noise.seed_correlation
        common, own = self.rng.normal(size=(2, self.campaigns, runs, self.num_families))
        return sd * common, sd * (correlation * common + np.sqrt(1 - correlation**2) * own)

    def answers(self, runs: list[tuple[RunKey, int]], gain_BRF: np.ndarray, luck_BRF: np.ndarray, n: int) -> Answers:
        """Fresh items of one split, answered by all runs."""
        rng, redraw = self.rng, self.noise.redraw
        per_family, accuracy_F = n // self.num_families, self.exam.accuracy_F
        chance = rng.random((self.campaigns, len(runs), n), dtype=np.float32)
        if self.noise.shared:
            common = rng.random((self.campaigns, 1, n), dtype=np.float32)
            follows = rng.random(chance.shape, dtype=np.float32) < self.noise.shared
            follows &= np.array([rank >= 0 for _, rank in runs])[:, None]
            chance = np.where(follows, common, chance)
        # A gain makes unknown items right and a loss known ones wrong; a redrawn item is right at the accuracy.
        moved = (gain_BRF + luck_BRF).clip(-accuracy_F, 1 - accuracy_F)
        guess = redraw * (accuracy_F + moved)
        right_if = [
            guess + (1 - redraw) * (1 + np.minimum(moved, 0) / accuracy_F),
            guess + (1 - redraw) * np.maximum(moved, 0) / (1 - accuracy_F),
        ]
        known, unknown = (np.repeat(one.astype(np.float32), per_family, axis=-1) for one in right_if)
        is_known = rng.random((self.campaigns, 1, n), dtype=np.float32) < np.repeat(accuracy_F, per_family)
        ids = np.arange(self.num_drawn, self.num_drawn + n)
        self.num_drawn += n
        return Answers(
            runs=tuple(key for key, _ in runs),
            families=self.exam.families,
            item_ids=ids,
            codes=np.repeat(np.arange(self.num_families), per_family),
            counts=np.full(self.num_families, per_family),
            correct_Rn=chance < np.where(is_known, known, unknown),
        )

    def pool(self) -> SeedPool:
        """The origin's frozen replicates."""
        seeds = range(self.plan.origin_seeds)
        runs = [((ORIGIN, seed), -2) for seed in seeds]
        nothing = np.zeros((self.campaigns, len(seeds), self.num_families))
        sizes = self.plan.items, self.external_items
        scored = [self.answers(runs, nothing, luck, n) for luck, n in zip(self.luck(len(seeds)), sizes, strict=True)]
        if self.exam.step is not None:  # nobody submits the origin's runs to a leaderboard
            scored = scored[:1]
        return SeedPool((RunReplicates(*(one.replicates(ORIGIN, seeds) for one in scored)),))

    def round(self, number: int, state: State) -> tuple[RoundItems, np.ndarray]:
        """A round's answers, and which axis stands at which rank, (B, K)."""
        away = self.plan.judges_origin and bool(state.away_B.any())
        runs = self.plan.runs(number, away)
        ranks = np.array([rank for _, rank in runs])
        dev_luck, external_luck = self.luck(len(runs))
        first = [int(np.argmax(ranks == rank)) for rank in range(self.plan.explorers)]
        dev_luck[:, first] += self.lies(number)[..., None]
        order = self.order(state, dev_luck[:, first], external_luck[:, first])
        # The luck of the runs that were ranked goes with them to their ranks.
        for luck in (dev_luck, external_luck):
            luck[:, first] = np.take_along_axis(luck[:, first], order[..., None], axis=1)
        d_BRF = _by_run(ranks, np.take_along_axis(state.d_BKF, order[..., None], axis=1), state.standing_d_BF)
        t_BRF = _by_run(ranks, np.take_along_axis(state.t_BKF, order[..., None], axis=1), state.standing_t_BF)
        asked = [row for row, rank in enumerate(ranks) if rank <= 0 or self.scenario.ask == "all"]
        told = [runs[row] for row in asked]
        dev = self.answers(runs, d_BRF, dev_luck, self.plan.items)
        external = self.answers(told, t_BRF[:, asked], external_luck[:, asked], self.external_items)
        scores = {name_of(rank, number): -float(rank) for rank in range(self.plan.explorers)}
        origin = (ORIGIN if away else ANCHOR) if self.plan.judges_origin else None
        if self.exam.step is not None:
            external = self.reported(external)
        weights = self.exam.dev_weights, self.exam.external_weights
        return RoundItems(number, ANCHOR, scores, dev, external, *weights, origin), order

    def reported(self, answers: Answers) -> ReportedScores:
        """What a target tells that shows no item."""
        means_BR = answers.family_means_RF() @ self.exam.external_w
        step = self.exam.step
        rounded = np.round(means_BR / step) * step if step else means_BR
        scores = {key: rounded[..., place] for place, key in enumerate(answers.runs)}
        return ReportedScores(scores, answers.item_ids.size, step)

    def lies(self, number: int) -> np.ndarray:
        """What the campaign's one lying run adds to dev, by axis, (B, K): in its round, for its axis."""
        here = (self.liar[:, :1] + 1 == number) & (self.liar[:, 1:] == np.arange(self.plan.explorers))
        return self.scenario.lie * here

    def order(self, state: State, dev_luck_BKF: np.ndarray, external_luck_BKF: np.ndarray) -> np.ndarray:
        """The axes by their A-half scores, best first, (B, K). An A half is drawn as a normal, not item by item."""
        dice = self.rng.normal(size=state.d_BKF.shape[:2])
        unequal = self.num_families * float((self.exam.dev_w**2).sum())  # 1 where all weigh alike
        dev = (state.d_BKF + dev_luck_BKF) @ self.exam.dev_w
        dev = dev + dice * math.sqrt(unequal * self.noise.flips / 2 / self.plan.items)
        half = self.external_items / 2
        external = (state.t_BKF + external_luck_BKF) @ self.exam.external_w
        external = external + dice * math.sqrt(self.noise.flips / 2 / half)
        return np.argsort(-np.where(state.external_B[:, None], external, dev), axis=1)


def _by_run(ranks: np.ndarray, gains_BKF: np.ndarray, standing_BF: np.ndarray) -> np.ndarray:
    """True gain of each run over the standing settings, (B, R, F): the anchor's is nothing, the origin is behind."""
    fixed = np.stack([-standing_BF, np.zeros_like(standing_BF)], axis=1)
    return np.concatenate([fixed, gains_BKF], axis=1)[:, ranks + 2]


def of_families(items: float, families: int) -> int:
    """The nearest number of items that the families share alike, at least two each."""
    return max(2, round(items / families)) * families
