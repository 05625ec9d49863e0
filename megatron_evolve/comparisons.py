"""Comparisons: a round's candidates against its anchor on the same items, each worked out once and used often."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_evolve.campaign import Campaign
from megatron_evolve.eval.paired import Answers, Contrast, Estimate, contrast, difference, estimate, probability_better
from megatron_evolve.eval.reported import WHOLE, WHOLE_WEIGHT
from megatron_evolve.eval.seeds import SeedPool, SeedVariance
from megatron_evolve.evidence import EffectValue
from megatron_evolve.facts import RoundFacts, RunFacts
from megatron_evolve.released import released, step_of, told_contrast, told_scores

SPLITS: dict[str, tuple[str, ...]] = {
    "dev-a": ("dev-a",),
    "dev-b": ("dev-b",),
    "external-a": ("external-a",),
    "external-b": ("external-b",),
    "external": ("external-a", "external-b"),
}
INTERVAL_ALPHA = 0.025


@dataclass(frozen=True)
class Weights:
    """Weight of each family's accuracy in the dev and in the external score."""

    dev: Mapping[str, float]
    external: Mapping[str, float]

    def of(self, split: str) -> Mapping[str, float]:
        return self.dev if split.startswith("dev") else self.external

    @property
    def told_alone(self) -> bool:
        """Whether the target tells one number a run and shows no item."""
        return set(self.external) == {WHOLE}

    @property
    def splits(self) -> dict[str, tuple[str, ...]]:
        """The splits on which candidates are compared: a target that tells scores alone has no halves."""
        if not self.told_alone:
            return SPLITS
        return {name: SPLITS[name] for name in ("dev-a", "dev-b", "external")}

    @property
    def domains(self) -> tuple[str, ...]:
        """Families that are told apart on either side."""
        return tuple(sorted({*self.dev, *self.external} - {WHOLE}))


def score_weights(suites: Mapping[str, Any], campaign: Campaign) -> Weights:
    """The weights of a campaign's two scores, from what its judge tells of its suites."""
    if campaign.judge.told_scores:
        return Weights(suites["weights"]["dev"], WHOLE_WEIGHT)
    return Weights(**suites["weights"])


def scored_on_all(facts: RoundFacts, name: str, splits: Sequence[str]) -> list[RunFacts]:
    """Runs of a candidate that were scored on all these splits, in order of replicate."""
    return [run for run in facts.scored(name, splits[0]) if all(run.has(split) for split in splits)]


def read_on(facts: RoundFacts, name: str, split: str) -> list[RunFacts]:
    """Runs of a candidate whose score on a split counts. Dev-A selects: confirming runs are not asked, only scored."""
    return facts.first(name, split) if split == "dev-a" else scored_on_all(facts, name, SPLITS[split])


class Comparisons:
    """A round's candidates against its anchor: each contrast and each seed variance is worked out once."""

    def __init__(self, facts: RoundFacts, weights: Weights, pool: SeedPool) -> None:
        self.facts, self.weights, self.pool = facts, weights, pool
        self._contrasts: dict[tuple[str, str], Contrast | None] = {}
        self._seeds: dict[tuple[str, str | None], SeedVariance | None] = {}

    def estimate(self, name: str, split: str, domain: str | None = None) -> Estimate | None:
        """Candidate minus anchor; none where one of the two has no score, or the split does not ask the domain."""
        known = (name, split)
        if known not in self._contrasts:
            self._contrasts[known] = self._contrast(name, split)
        found = self._contrasts[known]
        if found is None or (domain is not None and domain not in self.weights.of(split)):
            return None
        return estimate([(1.0, found, _only(self.weights.of(split), domain))], self._seeds_of(split, domain))

    def effect(self, name: str, split: str, domain: str | None = None) -> EffectValue | None:
        """The estimate as evidence keeps it: what selection and the next policy may read."""
        found = self.estimate(name, split, domain)
        if found is not None and self._told(split):
            found = released(found, step_of(told_scores(self.facts, (name,))))
        elif found is not None and self.facts.asked_before(split):
            found = released(found, 1.0 / self._contrasts[name, split].items_of(_only(self.weights.of(split), domain)))
        # Where no item tells the two sides apart there is no variance, so no interval and no number.
        if found is None or not found.item_variance:
            return None
        return EffectValue(
            mean=found.mean,
            se=found.se,
            low=found.lower(INTERVAL_ALPHA),
            high=found.upper(INTERVAL_ALPHA),
            p_better=min(1.0, max(0.0, probability_better(found))),
        )

    def _contrast(self, name: str, split: str) -> Contrast | None:
        if self._told(split):
            return told_contrast(self.facts, name)
        mine, anchors = (read_on(self.facts, one, split) for one in (name, self.facts.anchor))
        if not mine or not anchors:
            return None
        answers = Answers.of([run.items(SPLITS[split]) for run in (*mine, *anchors)])
        coefficients = difference({name: [run.seed for run in mine]}, 1.0)
        coefficients |= difference({self.facts.anchor: [run.seed for run in anchors]}, -1.0)
        return contrast([(answers, coefficients)])

    def _told(self, split: str) -> bool:
        return self.weights.told_alone and split.startswith("external")

    def _seeds_of(self, split: str, domain: str | None) -> SeedVariance | None:
        side = "dev" if split.startswith("dev") else "external"
        if (side, domain) not in self._seeds:
            self._seeds[side, domain] = seeds_of(self.pool, self.weights, split, domain)
        return self._seeds[side, domain]


def _only(weights: Mapping[str, float], domain: str | None) -> Mapping[str, float]:
    return weights if domain is None else {name: float(name == domain) for name in weights}


def seeds_of(pool: SeedPool, weights: Weights, split: str, domain: str | None = None) -> SeedVariance | None:
    """Pooled variance between seeds of a split's score, overall or in one domain; none while nothing was run twice."""
    dev, external = _only(weights.dev, domain), _only(weights.external, domain)
    if split.startswith("dev"):
        return pool.variance(1.0, dev, 0.0, external)
    return pool.variance(0.0, dev, 1.0, external)
