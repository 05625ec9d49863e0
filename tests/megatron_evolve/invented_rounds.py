"""Rounds invented for meta: a policy of three families, explorers that moved it by so much, and their evidence."""

from megatron_evolve.constitution import Constitution
from megatron_evolve.delta import canonical_change
from megatron_evolve.evidence import (
    CandidateEvidence,
    DomainEffect,
    EffectValue,
    Evidence,
    Noise,
    RunRecord,
    ScoreValue,
)
from megatron_evolve.meta import check_edits, initial_policy, next_policy
from megatron_evolve.policy import DomainState, SearchPolicy
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.recipe import Recipe
from megatron_evolve.substrate.settings import Settings, write_all

RULES = Constitution()
FAMILIES = ("red", "green", "blue")
CHANGES = {
    "headroom": {"mix.weight.red": 2.0},
    "balance": {"mix.weight.green": 2.0},
    "style": {"mix.style.red": "trace"},
    "lr": {"recipe.lr": 2e-3},
    "steps": {"recipe.steps": 200},
    "schedule": {"recipe.schedule": "linear"},
    "adapter": {"recipe.adapter": {"rank": 8, "alpha": 8.0}},
    "selection": {"recipe.checkpoint_selection": "lowest-loss"},
    "stack": {"recipe.lr": 2e-3, "recipe.steps": 200},
}
UP, FLAT, DOWN = 0.03, 0.001, -0.03


def start(objective: str = "dev", **changes) -> SearchPolicy:
    settings = Settings(
        mix=Mix(weight=dict.fromkeys(FAMILIES, 1.0), style=dict.fromkeys(FAMILIES, "answer")), recipe=Recipe(lr=1e-3)
    )
    domains = {name: DomainState(dev=0.4, external=None, dev_weight=1 / 3, external_weight=None) for name in FAMILIES}
    return initial_policy(settings, domains, RULES).replace(objective=objective, **changes)


def effect(mean: float) -> EffectValue:
    p = 0.5 if abs(mean) < 0.01 else 0.99 if mean > 0 else 0.01
    return EffectValue(mean=mean, se=0.01, low=mean - 0.02, high=mean + 0.02, p_better=p)


def explorer(policy: SearchPolicy, axis: str, mean: float | None, **told) -> CandidateEvidence:
    """An explorer that moved the objective's halves by `mean`; `told` may set external, confirmed, outcome, change."""
    external, outcome = told.pop("external", None), told.pop("outcome", "finished")
    change = canonical_change(policy.standing, write_all(policy.standing, told.pop("change", CHANGES[axis])))
    effects = {} if mean is None else {f"{policy.objective}-{half}": effect(mean) for half in "ab"}
    if external is not None:
        effects |= {split: effect(external) for split in ("external-a", "external-b", "external")}
    scores = {} if mean is None else {"dev-b": ScoreValue(mean=0.5, se=0.01, n=500)}
    runs = (RunRecord(seed=1, outcome=outcome, reason="" if outcome == "finished" else "told why", scores=scores),)
    confirmed = told.pop("confirmed", mean is not None and mean > 0.01)
    return CandidateEvidence(
        id=f"id-{axis}",
        axis=axis,
        role="explorer",
        change=change,
        runs=runs,
        effects=effects,
        confirmed=confirmed,
        **told,
    )


def round_of(
    policy: SearchPolicy, *explorers: CandidateEvidence, verdicts=(), noise: float | None = 2.0, **more
) -> Evidence:
    domains = {name: DomainEffect(dev=ScoreValue(mean=0.45, se=0.01, n=500)) for name in FAMILIES}
    anchor = CandidateEvidence(id="id-anchor", axis="anchor", role="anchor", change={}, runs=(), domains=domains)
    return Evidence(
        round=policy.round,
        substrate="s",
        judge="j",
        policy="p",
        objective=policy.objective,
        anchor="id-anchor",
        selected=None,
        candidates=(anchor, *explorers),
        noise=Noise(signal_to_noise=noise),
        verdicts=tuple(verdicts),
        **more,
    )


def verdict(outcome: str, domain: str = "overall", estimand: str = "selected") -> dict:
    return {"outcome": outcome, "domain": domain, "estimand": estimand, "reason": "Told by numbers."}


def follow(policy: SearchPolicy, evidence: Evidence, rules: Constitution = RULES) -> SearchPolicy:
    """The next policy, its edits checked."""
    following, edits = next_policy(rules, policy, evidence)
    check_edits(policy, following, edits, evidence)
    assert next_policy(rules, policy, evidence) == (following, edits)
    return following
