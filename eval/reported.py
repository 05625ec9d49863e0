"""Reported scores: an external target that tells one number a run, as a leaderboard does, and shows no item.

What such a number is worth has to be bounded from what is declared of it: `items`, how many it is a mean over, and
`step`, what it is rounded to. All runs answer the same items, in every round, so within each side of a comparison their
errors are at worst alike, and between the sides at worst independent:

    var = p (1 - p) / n x ((sum of candidates' coefficients)^2 + (sum of anchors')^2) + step^2 / 12 x sum c^2

More rounds of the same items do not shrink the first part. Scores of items are worth far more (paired, about a quarter
of this variance at 12 % flips). At a side's true accuracy p it is an upper bound; made of the score that came it is an
estimate of one, and 0 where all answers were wrong or all right, whatever p is. So as many right and as many wrong
answers are asked of each side as items that tell two sides apart elsewhere, the usual condition for a share to be
normal: the rarer of them, on the side where they are fewest, counts as `discordant`. The seeds' variance is the
replicates' own, with nothing taken off for flips, which nobody sees.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_evolve.eval.discordant import rarer_answers
from megatron_evolve.eval.paired import Contrast
from megatron_evolve.eval.seeds import Replicates, RunKey

WHOLE = "whole"  # the one family of a target that names none
WHOLE_WEIGHT = {WHOLE: 1.0}


@dataclass(frozen=True, eq=False)
class ReportedScores:
    """The score of each run, between 0 and 1. Stands where `Answers` does for a target whose items are seen.

    A score may be an array over campaigns, as the simulator's are.
    """

    scores: Mapping[RunKey, float | np.ndarray]
    items: int
    step: float = 0.0
    families = (WHOLE,)

    def __post_init__(self) -> None:
        if not self.scores:
            raise ValueError("expected the reported score of at least one run, got none: submit one")
        for (name, seed), score in self.scores.items():
            if not np.all((np.asarray(score) >= 0) & (np.asarray(score) <= 1)):  # NaN included
                raise ValueError(f"run {name}/{seed}: expected a score between 0 and 1, got {score}: enter it again")
        if self.items < 2 or not 0 <= self.step < 1:
            raise ValueError(
                f"expected a score over at least 2 items, rounded to a step below 1, got {self.items} items and step "
                f"{self.step}: declare what the target publishes"
            )

    @property
    def runs(self) -> tuple[RunKey, ...]:
        return tuple(self.scores)

    def family_means_RF(self) -> np.ndarray:
        return np.stack([np.asarray(score) for score in self.scores.values()], axis=-1)[..., None]

    def seeds_of(self, candidate: str) -> tuple[int, ...]:
        return tuple(seed for name, seed in self.scores if name == candidate)

    def replicates(self, candidate: str, seeds: Sequence[int]) -> Replicates:
        """These runs of one candidate, for the seed variance of their scores."""
        means = np.stack([np.asarray(self.scores[candidate, seed]) for seed in seeds], axis=-1)[..., None]
        return Replicates(candidate, tuple(seeds), self.families, means, np.zeros(1))


def reported_contrast(parts: Sequence[tuple[ReportedScores, Mapping[RunKey, float]]]) -> Contrast:
    """Sums `coefficient x score`; a part is one round's scores. Raises ValueError if they are of different targets."""
    first = parts[0][0]
    totals: dict[RunKey, float] = {}
    mean, rounding = 0.0, 0.0
    sides = {1: [0.0, 0.0], -1: [0.0, 0.0]}  # by sign of the coefficient: sum of |c|, sum of |c| x score
    for scores, coefficients in parts:
        if (scores.items, scores.step) != (first.items, first.step):
            raise ValueError(
                f"expected one target in all rounds, got {first.items} items at step {first.step} and {scores.items} "
                f"at {scores.step}: pool only rounds of one target"
            )
        for key, coefficient in coefficients.items():
            score = scores.scores[key]
            mean += coefficient * score
            rounding += coefficient**2 * quantisation_variance(scores.step)
            side = sides[1 if coefficient > 0 else -1]
            side[0] += abs(coefficient)
            side[1] += abs(coefficient) * score
            totals[key] = totals.get(key, 0.0) + coefficient
    items = sum(weight * total * (1 - total / weight) / first.items for weight, total in sides.values() if weight)
    rarer = np.min([rarer_answers(total / weight, first.items) for weight, total in sides.values() if weight], axis=0)
    return Contrast(
        first.families,
        np.stack([mean], axis=-1),
        np.stack([items + rounding], axis=-1),
        np.array([first.items - 1.0]),
        np.stack([0.0 * rarer], axis=-1),
        np.stack([rarer], axis=-1),
        first.items,
        totals,
    )


def quantisation_variance(step: float) -> float:
    """Variance that rounding to multiples of `step` adds to a score known only as a rounded number."""
    return step**2 / 12
