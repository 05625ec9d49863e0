"""The window: rounds that one verdict pools, and which runs each estimand sets against which.

Three estimands, since an average hides a single exploiter:

    selected    the explorer that dev-A picked against the anchor, in each round of the window
    mean        all explorers of the window that have an external score against their anchors
    cumulative  the standing recipe (the anchor) against the frozen origin, in the last round: sees slow drift
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from megatron_evolve.eval.paired import Answers, Contrast, RunItems, contrast, difference
from megatron_evolve.eval.reported import ReportedScores, reported_contrast
from megatron_evolve.eval.seeds import RunReplicates, SeedVariance, weight_vector, weighted_sum

Estimand = Literal["selected", "mean", "cumulative"]

# Level of what is only described, never claimed.
DESCRIPTION_ALPHA = 0.05


@dataclass(frozen=True, eq=False)
class RoundItems:
    """What a round's runs answered on dev-B and external, and the dev-A means that selected among the explorers.

    dev_b holds runs of the anchor and of every explorer named in dev_a, and of the origin where it was scored on these
    items. external holds runs of those whose external score was asked; it may be empty. Runs, or their stacked answers,
    or what a target reported that shows no items.
    """

    number: int
    anchor: str
    dev_a: Mapping[str, float]
    dev_b: Sequence[RunItems] | Answers
    external: Sequence[RunItems] | Answers | ReportedScores
    dev_weights: Mapping[str, float]
    external_weights: Mapping[str, float]
    origin: str | None = None
    dev_answers: Answers = field(init=False)
    external_answers: Answers | ReportedScores | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dev_answers", _stacked(self.dev_b))
        object.__setattr__(self, "external_answers", _stacked(self.external) if self.external else None)
        scored = {name for name, _ in self.dev_answers.runs}
        if missing := sorted({self.anchor, *self.dev_a} - scored):
            raise ValueError(
                f"round {self.number}: expected dev-B runs of the anchor and of all in dev-A, got none of "
                f"{', '.join(missing)}: score them or leave them out"
            )
        if not all(math.isfinite(mean) for mean in self.dev_a.values()):
            raise ValueError(f"round {self.number}: expected finite dev-A means, got {dict(self.dev_a)}: score again")

    @property
    def explorers(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.dev_a) - {self.anchor}))

    @property
    def winner(self) -> str | None:
        """The explorer with the best dev-A mean; of equals the first by name."""
        return min(self.explorers, key=lambda name: (-self.dev_a[name], name), default=None)

    def seeds_on_both(self, candidate: str) -> tuple[int, ...]:
        """Seeds of a candidate with dev and external answers: only they have a gap."""
        external = self.external_answers.seeds_of(candidate) if self.external_answers else ()
        return tuple(seed for seed in self.dev_answers.seeds_of(candidate) if seed in external)

    def replicates(self) -> tuple[RunReplicates, ...]:
        """Every candidate of the round with two runs or more, for the pool."""
        found = []
        for name in sorted({name for name, _ in self.dev_answers.runs}):
            if len(both := self.seeds_on_both(name)) >= 2:
                dev, external = (one.replicates(name, both) for one in (self.dev_answers, self.external_answers))
                found.append(RunReplicates(dev, external))
            elif len(seeds := self.dev_answers.seeds_of(name)) >= 2:
                found.append(RunReplicates(self.dev_answers.replicates(name, seeds)))
        return tuple(found)


def _stacked(runs: Sequence[RunItems] | Answers | ReportedScores) -> Answers | ReportedScores:
    return runs if isinstance(runs, Answers | ReportedScores) else Answers.of(runs)


@dataclass(frozen=True, eq=False)
class Pair:
    """One estimand's contrast on both splits, or why there is none."""

    dev: Contrast | None = None
    external: Contrast | None = None
    missing: str = ""
    num_rounds: int = 0


def pair_of(estimand: Estimand, rounds: Sequence[RoundItems]) -> Pair:
    """The estimand over the rounds, every candidate counted alike, from runs scored on both splits."""
    chosen = []
    for one in rounds[-1:] if estimand == "cumulative" else rounds:
        treated, control = _sides(estimand, one)
        on_both = [name for name in treated if one.seeds_on_both(name)]
        if control and one.seeds_on_both(control) and on_both:
            chosen.append((one, {name: one.seeds_on_both(name) for name in on_both}, control))
    if not chosen:
        return Pair(missing=_why_missing(estimand, rounds))
    total = sum(len(treated) for _, treated, _ in chosen)
    dev, external = [], []
    for one, treated, control in chosen:
        share = len(treated) / total
        coefficients = difference(treated, share)
        coefficients |= difference({control: one.seeds_on_both(control)}, -share)
        dev.append((one.dev_answers, coefficients))
        external.append((one.external_answers, coefficients))
    reported = isinstance(external[0][0], ReportedScores)
    outside = reported_contrast(external) if reported else contrast(external)
    return Pair(contrast(dev), outside, num_rounds=len(chosen))


def _sides(estimand: Estimand, one: RoundItems) -> tuple[list[str], str | None]:
    if estimand == "cumulative":
        return ([] if one.origin == one.anchor else [one.anchor]), one.origin
    if estimand == "selected":
        return [one.winner] if one.winner else [], one.anchor
    return list(one.explorers), one.anchor


def _why_missing(estimand: Estimand, rounds: Sequence[RoundItems]) -> str:
    last = rounds[-1]
    if not any(one.external_answers for one in rounds):
        return "no external target was asked in this window, so tracking is unknown: spend a look on it"
    if estimand == "cumulative" and last.origin is None:
        return "the origin was not scored on this round's items: score its frozen runs there"
    if estimand == "cumulative" and last.origin == last.anchor:
        return "the standing recipe is still the origin, so nothing has accumulated"
    if not any(one.explorers for one in rounds):
        return "no explorer of this window has a score"
    who = {"selected": "dev-A's winner", "mean": "any explorer", "cumulative": "the origin"}[estimand]
    return f"expected external scores of {who} and of the anchor in one round, got none: spend looks on both"


def seed_covariance(seeds: tuple[SeedVariance, ...], beta0: float) -> float:
    """What dev and external of a run share: Var(G) = beta0^2 Var(D) + Var(T) - 2 beta0 Cov(D, T)."""
    d, t, g = (one.replicate - one.flips for one in seeds)
    return max(0.0, (beta0**2 * d + t - g) / (2 * beta0))


def ranking_usable(
    rounds: Sequence[RoundItems], dev: Mapping[str, float], external: Mapping[str, float], luck_per_run: float
) -> bool:
    """Whether explorers better on dev are better outside, within rounds (one-sided t of the pooled correlation).

    A lucky seed lifts both scores of a run without any merit of the candidate, so that covariance is taken off.
    """
    from scipy.special import stdtr

    squares = np.zeros((2, 2))
    luck, degrees = 0.0, -1
    for one in rounds:
        seeds = {name: found for name in one.explorers if (found := one.seeds_on_both(name))}
        if len(seeds) < 2:
            continue
        means = np.array(
            [_candidate_means(one.dev_answers, seeds, dev), _candidate_means(one.external_answers, seeds, external)]
        )
        centred = means - means.mean(1, keepdims=True)
        squares += centred @ centred.T
        luck += (len(seeds) - 1) * luck_per_run * float(np.mean([1 / len(found) for found in seeds.values()]))
        degrees += len(seeds) - 1
    if degrees < 1 or not squares[0, 0] * squares[1, 1]:
        return False
    r = float((squares[0, 1] - luck) / math.sqrt(squares[0, 0] * squares[1, 1]))
    return r > 0 and bool(stdtr(degrees, -r * math.sqrt(degrees / max(1e-12, 1 - r * r))) <= DESCRIPTION_ALPHA)


def _candidate_means(
    answers: Answers | ReportedScores, seeds: Mapping[str, Sequence[int]], weights: Mapping[str, float]
) -> np.ndarray:
    w = weight_vector(weights, answers.families)
    score_of = {
        run: weighted_sum(means_F, w) for run, means_F in zip(answers.runs, answers.family_means_RF(), strict=True)
    }
    return np.array([np.mean([score_of[name, seed] for seed in found]) for name, found in seeds.items()])
