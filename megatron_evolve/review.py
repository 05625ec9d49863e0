"""The reviewer: facts of a round in, one evidence artefact of a fixed schema out.

Every effect is paired with the same-round anchor on the same items. Verdicts come from the transfer-gap test on raw
per-item answers; nothing here knows what any family or axis is called.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_evolve.comparisons import (
    SPLITS,
    Comparisons,
    Weights,
    scored_on_all,
    seeds_of,
)
from megatron_evolve.constitution import Constitution
from megatron_evolve.eval.looks import round_to
from megatron_evolve.eval.paired import effect, estimate
from megatron_evolve.eval.power import minimum_detectable_effect
from megatron_evolve.eval.reported import WHOLE_WEIGHT
from megatron_evolve.eval.score import ItemRows, Score, overall_score
from megatron_evolve.eval.seeds import RunReplicates, SeedPool
from megatron_evolve.evidence import (
    CandidateEvidence,
    DomainEffect,
    Evidence,
    Noise,
    RunRecord,
    ScoreValue,
)
from megatron_evolve.facts import RoundFacts, RunFacts
from megatron_evolve.gap import OVERALL, GapTest, holm_levels, rule_of
from megatron_evolve.origin import Origin
from megatron_evolve.policy import OTHER, Objective, SearchPolicy
from megatron_evolve.released import (
    released,
    released_half,
    released_mean,
    released_value,
    step_of,
    told_contrast,
    told_runs,
    told_scores,
)
from megatron_evolve.verdict import Verdict, judge
from megatron_evolve.window import RoundItems

POOLED_ROUNDS = 64  # of 2 degrees of freedom each, or more: a seed's standard deviation is then known to 6 %
MDE_ALPHA = 0.05
CLAIM_ALPHA = 0.05


def a_half_means(facts: RoundFacts, weights: Weights) -> dict[str, float]:
    """Mean score of each explorer on the A half of the objective: what selection reads."""
    means = {name: _a_half_mean(facts, name, weights) for name in facts.explorers}
    return {name: mean for name, mean in means.items() if mean is not None}


def _a_half_mean(facts: RoundFacts, name: str, weights: Weights) -> float | None:
    if facts.policy.objective == "external" and weights.told_alone:
        return released_mean(
            facts, name, [run for run in told_runs(facts, name) if run in facts.before_confirmation(name)]
        )
    split = "dev-a" if facts.policy.objective == "dev" else "external-a"
    if facts.asked_before(split):
        return released_half(facts, name, split, weights.of(split))
    runs = facts.first(name, split)
    return statistics.fmean(_overall(run, split, weights) for run in runs) if runs else None


def _overall(run: RunFacts, split: str, weights: Weights) -> float:
    return overall_score(run.rows(split), weights.of(split)).mean


def review(
    window: Sequence[RoundFacts],
    constitution: Constitution,
    origin: Origin,
    weights: Weights,
    earlier: Sequence[Mapping[str, Any]],
    looks: Mapping[str, int],
) -> Evidence:
    """The evidence of the window's last round.

    `window` holds at most the constitution's window of rounds, in order; `earlier` the replicates that the evidence of
    the `pooled_rounds` before the last one keeps; `looks` the account's counts so far.
    """
    facts = window[-1]
    judged_origin = origin.candidate if "cumulative" in constitution.gap.estimands else None
    rounds = [round_items(one, weights, judged_origin) for one in window if one.has_anchor]
    replicates = rounds[-1].replicates() if facts.has_anchor else ()
    pool = SeedPool((*origin.pooled(), *(RunReplicates.from_dict(one) for one in earlier), *replicates))
    rule = rule_of(constitution, () if weights.told_alone else sorted(weights.external))
    verdicts = judge(rounds, rule, pool) if facts.has_anchor else unjudged(rule)
    means = a_half_means(facts, weights)
    compared = Comparisons(facts, weights, pool)
    gains = claimed_gains(compared)
    reviewed = [_candidate(compared, name).replace(gain=name in gains) for name in _names(facts)]
    return Evidence(
        round=facts.number,
        substrate=facts.substrate,
        judge=facts.judge,
        policy=facts.policy_digest,
        objective=facts.policy.objective,
        anchor=facts.anchor,
        selected=min(means, key=lambda name: (-means[name], name)) if means else None,
        candidates=(*reviewed, *refused(facts)),
        noise=_noise(facts, reviewed, weights, pool),
        minimum_detectable_effect=_detectable(compared),
        verdicts=tuple(verdict.to_dict() for verdict in verdicts),
        looks=dict(looks),
        replicates=tuple(one.to_dict() for one in replicates),
        cpu_seconds=sum(run.spent.cpu_seconds for runs in facts.runs.values() for run in runs),
        gpu_seconds=sum(run.spent.gpu_seconds for runs in facts.runs.values() for run in runs),
    )


def unjudged(rule: GapTest) -> tuple[Verdict, ...]:
    """What can be said of a round whose anchor has no score: nothing, which spends none of the level."""
    told = "No run of the anchor was scored in this round, so there is nothing to compare with."
    return tuple(
        Verdict(outcome="UNRESOLVED", estimand=one, domain=OVERALL, alpha_spent=0.0, ranking_usable=False, reason=told)
        for one in rule.estimands
    )


def first_pooled(policy: SearchPolicy, constitution: Constitution) -> int:
    """First round that this policy's verdicts pool: in the window, and since the objective moved or a premise fell."""
    return max(1, policy.objective_since, policy.round - constitution.gap.window + 1)


def pooled_rounds(number: int) -> range:
    """Rounds before `number` whose replicates still tell what a seed is worth: not all, so that no round costs more."""
    return range(max(1, number - POOLED_ROUNDS), number)


def round_items(facts: RoundFacts, weights: Weights, origin: str | None = None) -> RoundItems:
    """A round's answers as the gap test wants them: dev-B, and of external what selection has not used.

    `origin`, where it is judged, brings in its frozen runs as far as they were asked this round's items, or an
    explorer's that proposed those very settings again.
    """
    splits = SPLITS["external-b" if facts.policy.objective == "external" else "external"]
    names = [facts.anchor, *facts.explorers]
    means = {name: _a_half_mean(facts, name, weights) for name in names}
    answered = origin is not None and (origin == facts.anchor or bool(facts.scored(origin, "dev-b")))
    names += [origin] if answered and origin not in names else []
    return RoundItems(
        number=facts.number,
        anchor=facts.anchor,
        dev_a={name: mean for name, mean in means.items() if mean is not None},
        dev_b=[run.items(("dev-b",)) for name in names for run in facts.scored(name, "dev-b")],
        external=told_scores(facts, names)
        if weights.told_alone
        else [run.items(splits) for name in names for run in scored_on_all(facts, name, splits)],
        dev_weights=weights.dev,
        external_weights=weights.external,
        origin=origin if answered else None,
    )


# --- one candidate ---------------------------------------------------------------------------------------------------


def claimed_gains(compared: Comparisons) -> set[str]:
    """Explorers that may be said to gain on the objective: Holm at 5 % over all that were judged in this round."""
    facts = compared.facts
    split = "dev-b" if facts.policy.objective == "dev" else "external-b"
    split = split if split in compared.weights.splits else "external"
    found = {name: compared.estimate(name, split) for name in facts.explorers if name != facts.anchor}
    p = {name: float(one.p_above()) if one.enough else 1.0 for name, one in found.items() if one is not None}
    levels = holm_levels(np.array(list(p.values())), CLAIM_ALPHA) if p else ()
    return {name for (name, value), level in zip(p.items(), levels, strict=True) if value <= level}


def _names(facts: RoundFacts) -> list[str]:
    return list(dict.fromkeys([facts.anchor, *(one.candidate for one in facts.proposals)]))


def _candidate(compared: Comparisons, name: str) -> CandidateEvidence:
    facts, weights = compared.facts, compared.weights
    proposal = next((one for one in facts.proposals if one.candidate == name), None)
    anchor = name == facts.anchor
    selecting = facts.first(name, "dev-a")
    effects = {} if anchor else {split: compared.effect(name, split) for split in weights.splits}
    return CandidateEvidence(
        id=name,
        axis="anchor" if proposal is None else proposal.axis,
        role="anchor" if anchor else "explorer",
        change={} if proposal is None else proposal.change,
        hypothesis="" if proposal is None else proposal.hypothesis,
        runs=tuple(_run_record(run, weights, run in selecting) for run in facts.runs.get(name, ())),
        dev=_score(facts, name, "dev-b", weights.dev),
        external=_outside(facts, name, weights),
        effects={split: found for split, found in effects.items() if found is not None},
        confirmed=not anchor and _confirmed(facts, name, weights, facts.policy.objective),
        confirmed_off_objective=not anchor and _confirmed(facts, name, weights, OTHER[facts.policy.objective]),
        domains={domain: _domain(compared, name, domain) for domain in weights.domains},
    )


def refused(facts: RoundFacts) -> list[CandidateEvidence]:
    """Workers that ended without a candidate, one entry each with the last reason."""
    accepted = {one.worker for one in facts.proposals}
    last = {one["worker"]: one for one in facts.refusals if one["worker"] not in accepted}
    return [
        CandidateEvidence(
            id=f"none-{worker}",
            axis=one["axis"],
            role="explorer",
            change={},
            runs=(),
            refused=one["reason"],
            nothing=all(said["nothing"] for said in facts.refusals if said["worker"] == worker),
        )
        for worker, one in sorted(last.items())
    ]


def _run_record(run: RunFacts, weights: Weights, selects: bool) -> RunRecord:
    """A run and its scores; on dev-A only of one that selects, whose look was paid before anything confirmed it."""
    failed = next((end for end in run.ends.values() if end["outcome"] != "finished"), None)
    scores = {}
    for split in ("dev-a", "dev-b", "external-a", "external-b"):
        if run.has(split) and split in weights.splits and (selects or split != "dev-a"):
            overall = overall_score(run.rows(split), weights.of(split))
            scores[split] = ScoreValue(mean=overall.mean, se=overall.se, n=overall.n)
    return RunRecord(
        seed=run.seed,
        outcome=failed["outcome"] if failed else "finished",
        reason=failed["reason"] if failed else "",
        cpu_seconds=run.spent.cpu_seconds,
        gpu_seconds=run.spent.gpu_seconds,
        scores=scores,
    )


def _score(facts: RoundFacts, name: str, split: str, weights: Mapping[str, float]) -> ScoreValue | None:
    """Mean over a candidate's runs; the standard error is the items', as one run's would be."""
    runs = scored_on_all(facts, name, SPLITS[split])
    if not runs:
        return None
    scores = [_joined_score(run, SPLITS[split], weights) for run in runs]
    return ScoreValue(
        mean=statistics.fmean(score.mean for score in scores),
        se=statistics.fmean(score.se for score in scores),
        n=scores[0].n,
    )


def _outside(facts: RoundFacts, name: str, weights: Weights) -> ScoreValue | None:
    return released_value(facts, name) if weights.told_alone else _score(facts, name, "external", weights.external)


def _joined_score(run: RunFacts, splits: Sequence[str], weights: Mapping[str, float]) -> Score:
    """The score over some splits as if they were one."""
    rows = [run.rows(split) for split in splits]
    if len(rows) == 1:
        return overall_score(rows[0], weights)
    columns = {name: np.concatenate([getattr(part, name) for part in rows]) for name in vars(rows[0])}
    columns["split"] = np.full(len(columns["split"]), splits[0])
    return overall_score(ItemRows(**columns), weights)


def _confirmed(facts: RoundFacts, name: str, weights: Weights, objective: Objective) -> bool:
    """Whether the further seeds alone, none that was selected on, are above the anchor on a score's B half, as read."""
    further = facts.further(name)
    if objective == "external" and weights.told_alone:
        contrast = told_contrast(facts, name, [run for run in further if run.reported is not None])
        found = contrast and estimate([(1.0, contrast, WHOLE_WEIGHT)])
        return found is not None and released(found, step_of(told_scores(facts, (name,)))).mean > 0
    split = "dev-b" if objective == "dev" else "external-b"
    mine = [run.items((split,)) for run in further if run.has(split)]
    anchors = [run.items((split,)) for run in facts.scored(facts.anchor, split)]
    if not mine or not anchors:
        return False
    found = effect(mine, anchors, weights.of(split))
    return (released(found, 1.0 / len(anchors[0].item_ids)) if facts.asked_before(split) else found).mean > 0


def _domain(compared: Comparisons, name: str, domain: str) -> DomainEffect:
    facts, anchor = compared.facts, name == compared.facts.anchor
    return DomainEffect(
        dev=_domain_score(facts, name, "dev-b", domain),
        external=None if compared.weights.told_alone else _domain_score(facts, name, "external", domain),
        dev_effect=None if anchor else compared.effect(name, "dev-b", domain),
        external_effect=None if anchor else compared.effect(name, "external", domain),
    )


def _domain_score(facts: RoundFacts, name: str, split: str, domain: str) -> ScoreValue | None:
    runs = scored_on_all(facts, name, SPLITS[split])
    shares, count = [], 0
    for run in runs:
        answers = run.items(SPLITS[split])
        mine = answers.correct[answers.families == domain]
        if mine.size:
            shares.append(float(mine.mean()))
            count = int(mine.size)
    if not shares:
        return None
    mean = statistics.fmean(shares)
    if facts.asked_before(split):
        mean = round_to(mean, 1.0 / count)
    return ScoreValue(mean=mean, se=math.sqrt(mean * (1 - mean) / count), n=count)


# --- the round as a whole --------------------------------------------------------------------------------------------


def _noise(facts: RoundFacts, reviewed: Sequence[CandidateEvidence], weights: Weights, pool: SeedPool) -> Noise:
    dev, external = seeds_of(pool, weights, "dev-b"), seeds_of(pool, weights, "external") if weights.external else None
    means = [one.dev.mean for one in reviewed if one.role == "explorer" and one.dev]
    between = statistics.stdev(means) if len(means) > 1 else None
    seed_sd = math.sqrt(dev.replicate) if dev else None
    return Noise(
        seed_sd_dev=seed_sd,
        seed_sd_external=math.sqrt(external.replicate) if external else None,
        between_sd_dev=between,
        signal_to_noise=between / seed_sd if between is not None and seed_sd else None,
        df=dev.df if dev else None,
    )


def _detectable(compared: Comparisons) -> dict[str, float]:
    """Smallest true effect of a typical explorer that this round would have seen (one-sided 5 %, 80 % power)."""
    found: dict[str, Any] = {}
    for split in compared.weights.splits:
        estimates = [compared.estimate(name, split) for name in compared.facts.explorers]
        sizes = [minimum_detectable_effect(one, MDE_ALPHA) for one in estimates if one and one.item_variance]
        if sizes:
            found[split] = statistics.median(sizes)
    return found
