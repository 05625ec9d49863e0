"""The truth of a closed campaign: what its verdicts were about, measured again on thousands of fresh items.

Truth is a scoring, not the planted label. In every round all runs of the anchor and the first run of every explorer
answer the truth judge's dev and external items: the world's suites, enlarged, under a secret of their own, fresh in
each round. Per round, estimand and scope (overall or one domain), over the same window of rounds as the verdict's,

    D  gain on dev over the same-round anchor      T  gain outside      G = beta0 x D - T

The truth concerns these trained runs themselves. They are not a sample of runs, so seeds add no variance: the only
error is that of the items. A scope is truly apart in a campaign if, for some round and some estimand that was judged,

    D > 0 and G > 0                  (decoupled)    or
    D > 0 and T < 0, D < 0 and T > 0 (inverse)

with each one-sided bound at TRUTH_ALPHA over the number of such comparisons in the campaign (Bonferroni). So at most
TRUTH_ALPHA of the campaigns without any parting are said to have one. A campaign whose target tells scores alone is
judged overall, and so is its truth.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from megatron_evolve.audit import Record
from megatron_evolve.candidate import Candidate
from megatron_evolve.comparisons import Weights
from megatron_evolve.eval.freeze import SUITES_FILE
from megatron_evolve.eval.paired import Estimate, RunItems, estimate
from megatron_evolve.eval.score import read_rows
from megatron_evolve.facts import RoundFacts, RunFacts, round_facts
from megatron_evolve.jobs import Ground, Run
from megatron_evolve.launch.rundir import read_json
from megatron_evolve.placement import Placement
from megatron_evolve.review import round_items
from megatron_evolve.substrate.frozen import Frozen
from megatron_evolve.verdict import OVERALL, Bounds
from megatron_evolve.window import RoundItems, pair_of

TRUTH_ALPHA = 0.05
TRUTH_SPLITS = ("dev-b", "external-b")


class TrueEffect(Frozen):
    """What one verdict was about, as it truly is. Accuracy units: 0.01 is one point."""

    round: int
    estimand: str
    scope: str = Field(description="a family, or `overall`")
    d: Bounds
    t: Bounds
    g: Bounds
    apart: bool = Field(description="dev and the external target part beyond the items' noise")


def is_apart(d: Bounds, t: Bounds, g: Bounds) -> bool:
    """Decoupled or inverse, by the bounds."""
    decoupled = d.low > 0 and g.low > 0
    return decoupled or (d.low > 0 and t.high < 0) or (d.high < 0 and t.low > 0)


def true_effects(
    rounds: Sequence[RoundItems],
    estimands: Sequence[str],
    beta0: float,
    window: int,
    moves: Collection[int] = (),
    overall_alone: bool = False,
) -> tuple[TrueEffect, ...]:
    """The truth behind every verdict of these rounds, in order. An estimand without runs on both sides has none.

    `moves` are the rounds from which another objective was searched for, or before which a further premise fell: no
    verdict pools across one.
    """
    shared = set(rounds[0].dev_weights) & set(rounds[0].external_weights)
    domains = [] if overall_alone else sorted(shared)
    level = TRUTH_ALPHA / (len(rounds) * len(estimands) * (1 + len(domains)))
    found = []
    start = 0
    for position, last in enumerate(rounds):
        start = position if last.number in moves else max(start, position - window + 1)
        for estimand in estimands:
            pair = pair_of(estimand, rounds[start : position + 1])
            if pair.missing:
                continue
            for scope in (OVERALL, *domains):
                dev, external = (
                    (one, weights_in(scope, weights))
                    for one, weights in ((pair.dev, last.dev_weights), (pair.external, last.external_weights))
                )
                d, t = estimate([(1.0, *dev)]), estimate([(1.0, *external)])
                g = estimate([(beta0, *dev), (-1.0, *external)])
                found.append(true_effect(last.number, estimand, scope, (d, t, g), level))
    return tuple(found)


def weights_in(scope: str, weights: Mapping[str, float]) -> Mapping[str, float]:
    """The weights of a score overall, or with one domain alone."""
    return weights if scope == OVERALL else {name: float(name == scope) for name in weights}


def true_effect(
    number: int, estimand: str, scope: str, effects: tuple[Estimate, Estimate, Estimate], level: float
) -> TrueEffect:
    """D, T and G with their bounds, and whether they part."""
    d, t, g = (Bounds.of(one, level) for one in effects)
    return TrueEffect(round=number, estimand=estimand, scope=scope, d=d, t=t, g=g, apart=is_apart(d, t, g))


# --- the runs and their answers ---------------------------------------------------------------------------------------


def all_facts(record: Record) -> list[RoundFacts]:
    """The facts of every round of a campaign."""
    return [round_facts(record.folder, record.events, record.campaign.seed, number) for number in record.rounds]


def truth_ground(record: Record, judge: Path, place: Path) -> Ground:
    """Where the campaign's runs lie and where their true scores go."""
    return Ground(
        folder=record.folder,
        substrate=Path(record.opened["substrate_folder"]),
        judge=judge,
        time_limit_s=record.campaign.constitution.limits.run_seconds,
        scores=place / "truth",
        placement=Placement(record.campaign.launch.training),
    )


def truth_runs(facts: RoundFacts) -> list[Run]:
    """All runs of the anchor and the first run of each explorer, of those that have a dev score."""
    chosen: list[RunFacts] = facts.scored(facts.anchor, "dev-b")
    chosen = [*chosen, *(facts.first(name, "dev-b")[0] for name in facts.explorers)]
    return [Run(facts.number, read_candidate(facts, one.candidate), one.seed) for one in chosen]


def read_candidate(facts: RoundFacts, name: str) -> Candidate:
    """A candidate of the round, as its runs read it."""
    path = facts.folder.candidate(facts.number, name) / "candidate.json"
    return Candidate.parse(read_json(path), where=str(path))


def weights_of(judge: Path) -> Weights:
    """The weights of the two scores that a frozen judge asks."""
    return Weights(**read_json(judge / SUITES_FILE)["weights"])


def truth_items(ground: Ground, facts: RoundFacts, weights: Weights, told: Weights) -> RoundItems:
    """A round's true answers, set out as the gap test has them; dev-A's winner stays the one of the campaign.

    `told` are the weights of the campaign's own scores.
    """
    runs = truth_runs(facts)
    dev, external = ([_answers(ground, run, split) for run in runs] for split in TRUTH_SPLITS)
    return RoundItems(
        number=facts.number,
        anchor=facts.anchor,
        dev_a=round_items(facts, told).dev_a,
        dev_b=dev,
        external=external,
        dev_weights=weights.dev,
        external_weights=weights.external,
    )


def _answers(ground: Ground, run: Run, split: Any) -> RunItems:
    rows = read_rows(ground.stage_dir(run, split) / "scores.parquet")
    return rows.of_run(run.candidate.id, run.seed, split)


def truth_of(record: Record, ground: Ground, weights: Weights) -> tuple[TrueEffect, ...]:
    """The truth of a campaign whose runs the truth judge has scored. `weights` are those of its scores."""
    rounds = [truth_items(ground, facts, weights, record.weights) for facts in all_facts(record)]
    judged = {verdict["estimand"] for number in record.rounds for verdict in record.evidence(number).verdicts}
    rule = record.campaign.constitution.gap
    moves = {record.policy(number).objective_since for number in record.rounds}
    return true_effects(rounds, sorted(judged), rule.beta0, rule.window, moves, record.weights.told_alone)
