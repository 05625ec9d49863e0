"""The policy without an anchor: explorers are set against the last score that the standing settings ever had.

What a loop does that keeps its baseline's number and spends the anchor's runs on explorers. The two sides answered
other items, so nothing is paired: both sides' items count, p (1 - p) / n each, and only the winner is judged, since
there is no common ground for a mean. Everything after the comparison is the product's: gap test, readings, meta.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_evolve.comparisons import SPLITS, Comparisons, Weights
from megatron_evolve.contest.product import DrawnRun, ProductCampaign
from megatron_evolve.eval.discordant import rarer_answers
from megatron_evolve.eval.paired import Answers, Contrast
from megatron_evolve.eval.seeds import RunReplicates, SeedPool
from megatron_evolve.evidence import CandidateEvidence, DomainEffect, Evidence, Noise, ScoreValue
from megatron_evolve.facts import RoundFacts, RunFacts
from megatron_evolve.gap import OVERALL, decide, look_at, rule_of, scope_of
from megatron_evolve.policy import OTHER, Objective
from megatron_evolve.review import a_half_means, refused
from megatron_evolve.verdict import Verdict
from megatron_evolve.window import Pair

JUDGED = ("dev-b", "external")


class Unanchored(Comparisons):
    """Explorers against runs of the standing settings from an earlier round."""

    def __init__(self, facts: RoundFacts, weights: Weights, pool: SeedPool, baseline: Sequence[RunFacts]) -> None:
        super().__init__(facts, weights, pool)
        self.baseline = baseline

    def _contrast(self, name: str, split: str) -> Contrast | None:
        mine = _scored(self.facts.runs.get(name, ()), SPLITS[split])
        theirs = _scored(self.baseline, SPLITS[split])
        if not mine or not theirs:
            return None
        sides = [(_side(mine, SPLITS[split]), 1.0), (_side(theirs, SPLITS[split]), -1.0)]
        return Contrast(
            families=sides[0][0].families,
            means_F=sum(factor * _means(answers) for answers, factor in sides),
            variances_F=sum(_means(answers) * (1 - _means(answers)) / answers.counts for answers, _ in sides),
            dfs_F=np.minimum(*(answers.counts - 1.0 for answers, _ in sides)),
            thirds_F=np.zeros(len(sides[0][0].families)),  # the count of rarer answers says how skew they are
            discordant_F=np.minimum(*(rarer_answers(_means(answers), answers.counts) for answers, _ in sides)),
            num_items=sum(len(answers.item_ids) for answers, _ in sides),
            coefficients={
                (f"{sign}{name}", seed): factor / len(answers.runs)
                for sign, (answers, factor) in zip("+-", sides, strict=True)
                for name, seed in answers.runs
            },
        )


def _scored(runs: Sequence[RunFacts], splits: Sequence[str]) -> list[RunFacts]:
    return [run for run in runs if all(run.has(split) for split in splits)]


def _side(runs: Sequence[RunFacts], splits: tuple[str, ...]) -> Answers:
    return Answers.of([run.items(splits) for run in runs])


def _means(answers: Answers) -> np.ndarray:
    return answers.family_means_RF().mean(0)


class UnanchoredCampaign(ProductCampaign):
    """A campaign of the variant without an anchor."""

    baseline: Sequence[DrawnRun] = ()

    def _evidence(self, facts: RoundFacts, looks: Mapping[str, int]) -> Evidence:
        self.baseline = facts.runs.get(facts.anchor) or self._last_runs_of(facts.anchor)
        replicates = [_replicated(name, runs) for name, runs in facts.runs.items()]
        known = [RunReplicates.from_dict(one) for found in self.evidence for one in found.replicates]
        new = [one for one in replicates if one is not None]
        pool = SeedPool((*self.origin.pooled(), *known, *new))
        compared = Unanchored(facts, self.weights, pool, self.baseline)
        means = a_half_means(facts, self.weights)
        winner = min(means, key=lambda name: (-means[name], name)) if means else None
        return Evidence(
            round=facts.number,
            substrate=facts.substrate,
            judge="",
            policy="",
            objective=facts.policy.objective,
            anchor=facts.anchor,
            selected=winner,
            candidates=(
                self._standing(facts),
                *(self._explorer(compared, one) for one in facts.proposals),
                *refused(facts),
            ),
            noise=Noise(),
            verdicts=tuple(one.to_dict() for one in self._verdicts(compared, winner)),
            looks=dict(looks),
            replicates=tuple(one.to_dict() for one in new),
        )

    def _last_runs_of(self, name: str) -> Sequence[DrawnRun]:
        """Runs of the standing settings from the round that tried them; the origin's frozen ones before any moved."""
        for facts in reversed(self.closed):
            if name in facts.runs:
                return facts.runs[name]
        return self.baseline or self.origin_drawn

    def _standing(self, facts: RoundFacts) -> CandidateEvidence:
        domains = {
            name: DomainEffect(dev=self._domain(name, ("dev-b",)), external=self._domain(name, SPLITS["external"]))
            for name in self.weights.dev
        }
        return CandidateEvidence(id=facts.anchor, axis="anchor", role="anchor", change={}, runs=(), domains=domains)

    def _domain(self, domain: str, splits: tuple[str, ...]) -> ScoreValue | None:
        runs = _scored(self.baseline, splits)
        if not runs:
            return None
        answers = _side(runs, splits)
        place = answers.families.index(domain)
        mean, n = float(_means(answers)[place]), int(answers.counts[place])
        return ScoreValue(mean=mean, se=float(np.sqrt(mean * (1 - mean) / n)), n=n)

    def _explorer(self, compared: Unanchored, one: Any) -> CandidateEvidence:
        objective = compared.facts.policy.objective
        effects = {split: compared.effect(one.candidate, split) for split in SPLITS}
        return CandidateEvidence(
            id=one.candidate,
            axis=one.axis,
            role="explorer",
            change=one.change,
            runs=(),
            effects={split: found for split, found in effects.items() if found is not None},
            confirmed=self._confirmed(compared, one.candidate, objective),
            confirmed_off_objective=self._confirmed(compared, one.candidate, OTHER[objective]),
        )

    def _confirmed(self, compared: Unanchored, name: str, objective: Objective) -> bool:
        split = "dev-b" if objective == "dev" else "external-b"
        later = _scored(compared.facts.further(name), (split,))
        theirs = _scored(self.baseline, (split,))
        if not later or not theirs:
            return False
        w = np.array([self.weights.of(split)[family] for family in sorted(self.weights.dev)])
        return float((_means(_side(later, (split,))) - _means(_side(theirs, (split,)))) @ w) > 0

    def _verdicts(self, compared: Unanchored, winner: str | None) -> list[Verdict]:
        """The gap test on the unpaired winner, overall and by domain, at the product's levels."""
        rule = rule_of(self.rules, sorted(self.weights.external)).replace(estimands=("selected",))
        sides = [compared._contrast(winner, split) for split in JUDGED] if winner else [None]
        if any(one is None for one in sides):
            return []
        pair, weights = Pair(*sides, num_rounds=1), (self.weights.dev, self.weights.external)
        looks = [
            look_at("selected", pair, domain, scope_of(domain, weights, rule, compared.pool), rule)
            for domain in (OVERALL, *rule.domains)
        ]
        return [
            Verdict(
                outcome=str(one.outcome),
                estimand="selected",
                domain=one.look.domain,
                alpha_spent=float(one.level),
                ranking_usable=False,
                reason="Unpaired.",
            )
            for one in decide(looks, compared.facts.number, rule)
        ]


def _replicated(name: str, runs: Sequence[RunFacts]) -> RunReplicates | None:
    """A candidate's replicates on both sides, for the seed pool."""
    both = _scored(runs, ("dev-b", *SPLITS["external"]))
    if len(both) < 2:
        return None
    seeds = [run.seed for run in both]
    dev, outside = (_side(both, splits).replicates(name, seeds) for splits in (("dev-b",), SPLITS["external"]))
    return RunReplicates(dev, outside)
