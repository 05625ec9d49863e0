"""The default worker: every operator gives an allowed change that changes something, whatever the policy."""

import random

import pytest

from megatron_evolve.constitution import Constitution
from megatron_evolve.delta import Change, Delta, canonical_change, same_settings
from megatron_evolve.meta import initial_policy
from megatron_evolve.policy import Axis, DeadEnd, DomainState, SearchPolicy, premise, struck
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.recipe import Adapter, Recipe
from megatron_evolve.substrate.settings import Settings
from megatron_evolve.workers.brief import Brief, Proposal, document
from megatron_evolve.workers.operators import OPERATIONS
from megatron_evolve.workers.propose import propose, rows_ratios
from megatron_evolve.workers.validate import validate

RULES = Constitution()
FAMILIES = ("red", "green", "blue", "grey")
STYLES = {
    "red": ["answer", "trace"],
    "green": ["answer", "trace"],
    "blue": ["answer", "short", "long"],
    "grey": ["answer"],
}


def settings(weight=None, style=None, **recipe) -> Settings:
    mix = Mix(weight=weight or dict.fromkeys(FAMILIES, 1.0), style=style or dict.fromkeys(FAMILIES, "answer"))
    return Settings(mix=mix, recipe=Recipe(**recipe))


def policy_of(standing: Settings, accuracy=(0.5, 0.2, 0.8, 0.4), **changes) -> SearchPolicy:
    domains = {
        name: DomainState(dev=value, external=None, dev_weight=0.25, external_weight=None)
        for name, value in zip(FAMILIES, accuracy, strict=True)
    }
    return initial_policy(standing, domains, RULES).replace(**changes)


def brief_of(policy: SearchPolicy, axis: Axis, seed: int = 0, **told) -> Brief:
    view = {
        "name": "tiny",
        "digest": "a" * 64,
        "architecture": {},
        "default": policy.standing.model_dump(mode="json"),
        "construction": {"families": list(FAMILIES), "difficulty": "nano", "styles": STYLES},
    }
    told = {"verb": "propose", "mutation_space": RULES.mutation_space, "limits": RULES.limits, **told}
    return Brief(substrate=view, policy=policy, axis=axis, seed=seed, **told)


def resolved(brief: Brief, proposal: Proposal) -> Settings:
    assert proposal.delta is not None, proposal.nothing
    found = validate(proposal.delta, brief.policy, brief, brief.substrate)
    assert isinstance(found, Settings), found
    return found


def random_policy(rng: random.Random) -> SearchPolicy:
    steps = rng.choice([20, 100, 140, 290, 300])
    adapter = (
        Adapter(rank=rng.choice([1, 4, 64, 512]), alpha=8.0, targets=("attention",)) if rng.random() < 0.5 else None
    )
    standing = settings(
        weight={name: rng.choice([0.0, 0.3, 1.0, 2.0]) + 0.1 * (name == "red") for name in FAMILIES},
        style={name: rng.choice(STYLES[name]) for name in FAMILIES},
        steps=steps,
        lr=rng.choice([1e-7, 1e-4, 3e-3, 1.0]),
        warmup_steps=rng.choice([0, 1, 10, steps - 1]),
        schedule=rng.choice(["cosine", "linear", "constant"]),
        min_lr_ratio=rng.choice([0.0, 0.5, 1.0]),
        weight_decay=rng.choice([0.0, 0.1, 1.0]),
        clip_grad=rng.choice([0.0, 1.0]),
        adapter=adapter,
        checkpoint_selection=rng.choice(["last", "lowest-loss", "lowest-loss-uniform"]),
    )
    change = {"recipe.batch_size": {"from": 64, "to": 32}}
    domains = {
        name: DomainState(
            dev=rng.choice([None, 0.0, 0.3, 1.0]),
            external=rng.choice([None, 0.2]),
            dev_weight=rng.choice([0.0, 0.2, 0.5]),
            external_weight=rng.choice([None, 0.25]),
        )
        for name in FAMILIES
    }
    fallen = tuple(struck(premise(name)) for name in (None, *FAMILIES) if rng.random() < 0.3)
    return policy_of(
        standing,
        domains=domains,
        objective=rng.choice(["dev", "external"]),
        premises=fallen,
        pending=({"axis": "waiting", "candidate": "c", "change": change},),
    )


@pytest.mark.parametrize("operator", sorted(OPERATIONS))
def test_every_operator_proposes_something_valid_and_new(operator: str) -> None:
    for case in range(100):
        rng = random.Random(case)
        policy = random_policy(rng)
        axis = Axis(
            name="mine",
            operator=operator,
            magnitude=rng.choice([0.125, 0.5, 1.0, 2.0]),
            direction=rng.choice(["up", "down"]),
        )
        brief = brief_of(policy, axis, seed=case)
        proposal = propose(brief)
        assert proposal == propose(brief)
        found = resolved(brief, proposal)
        assert not same_settings(found, policy.standing)
        assert proposal.delta.hypothesis
        assert set(proposal.delta.predict.domains) <= set(FAMILIES)
        assert Proposal.parse(document(proposal), where="proposal") == proposal


@pytest.mark.parametrize("operator", sorted(set(OPERATIONS) - {"stack"}))
def test_dead_ends_are_avoided_until_nothing_is_left(operator: str) -> None:
    policy = policy_of(settings(weight=dict(zip(FAMILIES, (4.0, 3.0, 2.0, 1.0), strict=True))))
    seen: list[Settings] = []
    for _ in range(60):
        brief = brief_of(policy, Axis(name="mine", operator=operator))
        proposal = propose(brief)
        if proposal.delta is None:
            break
        found = resolved(brief, proposal)
        assert not any(same_settings(found, one) for one in seen)
        seen.append(found)
        entry = DeadEnd(
            axis="mine",
            change=canonical_change(policy.standing, found),
            ground=digest_of(policy.standing),
            objective="dev",
            candidate=f"c{len(seen)}",
            round=1,
            reason="It lost.",
            evidence=("/round",),
        )
        policy = policy.replace(dead_ends=(*policy.dead_ends, entry))
    assert len(seen) >= 2
    assert proposal.delta is None and "dead end" in proposal.nothing


def test_a_worker_does_not_undo_what_was_just_shown_to_pay() -> None:
    """From the last form of every style the worker would take a part of the families back."""
    old = settings(style={"red": "answer", "green": "answer", "blue": "short", "grey": "answer"})
    now = settings(style={"red": "trace", "green": "trace", "blue": "long", "grey": "answer"})
    policy, axis = policy_of(now), Axis(name="style", operator="style")
    change = canonical_change(old, now)
    assert propose(brief_of(policy, axis)).delta.change.keys() <= change.keys()
    entry = DeadEnd(
        axis="style",
        change={path: {"from": both["to"], "to": both["from"]} for path, both in change.items()},
        ground=digest_of(now),
        objective="dev",
        candidate="c",
        round=1,
        reason="It undoes what was just shown to pay.",
        evidence=("/round",),
        way_back=True,
    )
    for seed in range(10):
        proposal = propose(brief_of(policy.replace(dead_ends=(entry,)), axis, seed=seed))
        assert proposal.delta is None and "just shown to pay" in proposal.nothing
    other = propose(brief_of(policy.replace(dead_ends=(entry,)), Axis(name="lr", operator="lr")))
    assert other.delta is not None


def test_headroom_goes_where_weight_times_error_is() -> None:
    policy = policy_of(settings())
    brief = brief_of(policy, Axis(name="headroom", operator="headroom"))
    proposal = propose(brief)
    shares = resolved(brief, proposal).mix.weight
    assert sorted(shares, key=shares.get) == ["blue", "red", "grey", "green"]
    assert proposal.delta.predict.domains == {"red": "flat", "green": "up", "blue": "down", "grey": "flat"}
    low, high = proposal.delta.predict.dev
    assert low < high
    away = propose(brief_of(policy, Axis(name="headroom", operator="headroom", direction="down")))
    assert resolved(brief, away).mix.weight["green"] < 0.25


def test_headroom_under_external_leaves_what_does_not_carry_over() -> None:
    policy = policy_of(settings(), objective="external", premises=(struck(premise("green")),))
    brief = brief_of(policy, Axis(name="headroom", operator="headroom"))
    proposal = propose(brief)
    assert resolved(brief, proposal).mix.weight["green"] < 0.25, "the largest headroom by dev, yet nothing is won there"
    assert "green" in proposal.delta.hypothesis
    known = {
        name: DomainState(dev=0.5, external=0.1 if name == "blue" else 0.9, dev_weight=0.25, external_weight=0.25)
        for name in FAMILIES
    }
    external = propose(brief_of(policy.replace(domains=known, premises=()), brief.axis))
    shares = resolved(brief, external).mix.weight
    assert max(shares, key=shares.get) == "blue"
    assert external.delta.predict.external is not None


def test_steps_stay_within_the_limits() -> None:
    for axis in (
        Axis(name="steps", operator="steps", magnitude=16.0),
        Axis(name="s", operator="steps", direction="down"),
    ):
        brief = brief_of(policy_of(settings(steps=250)), axis)
        assert resolved(brief, propose(brief)).recipe.steps <= RULES.limits.max_steps


def test_a_stack_is_the_union_of_what_waits() -> None:
    waiting = (
        {"axis": "lr", "change": {"recipe.lr": {"from": 3e-3, "to": 6e-3}}},
        {"axis": "style", "change": {"mix.style.red": {"from": "answer", "to": "trace"}}},
    )
    brief = brief_of(policy_of(settings(), pending=waiting), Axis(name="stack", operator="stack"))
    found = resolved(brief, propose(brief))
    assert (found.recipe.lr, found.mix.style["red"]) == (6e-3, "trace")
    nothing = propose(brief_of(policy_of(settings()), Axis(name="stack", operator="stack")))
    assert nothing.delta is None and "nothing to vary" in nothing.nothing


@pytest.mark.parametrize(
    ("ending", "path"), [("diverged", "lr"), ("out_of_memory", "batch_size"), ("timed_out", "steps")]
)
def test_a_repair_keeps_the_idea_and_relieves_what_broke_it(ending: str, path: str) -> None:
    policy = policy_of(settings())
    failed = propose(brief_of(policy, Axis(name="style", operator="style"))).delta
    brief = brief_of(
        policy, Axis(name="style", operator="style"), verb="repair", failed=failed, ending=ending, reason="It broke."
    )
    found = resolved(brief, propose(brief))
    assert getattr(found.recipe, path) == getattr(policy.standing.recipe, path) / 2
    assert found.mix.style["red"] == "trace"


def test_a_repair_after_a_refusal_or_a_crash_is_another_delta() -> None:
    policy = policy_of(settings())
    axis = Axis(name="lr", operator="lr")
    failed = propose(brief_of(policy, axis)).delta
    for ending in ("", "crashed", "diverged"):
        brief = brief_of(policy, axis, verb="repair", failed=failed, ending=ending, reason="It broke.")
        assert resolved(brief, propose(brief)).recipe.lr != policy.standing.recipe.lr * 2


def test_validation_names_what_is_wrong() -> None:
    policy = policy_of(settings())
    brief = brief_of(policy, Axis(name="lr", operator="lr"))

    def refusal(change: dict[str, Change], **base) -> str:
        delta = {"hypothesis": "A try.", "base": {"recipe": "policy/1", **base}, "change": change}
        found = validate(delta, policy, RULES, brief.substrate)
        assert isinstance(found, str)
        return found

    assert "exactly one" in refusal({"recipe.lr": {}})
    assert "mutation space" in refusal({"mix.difficulty": {"set": "challenge"}})
    assert "unknown setting" in refusal({"recipe.learning_rate": {"set": 1}})
    assert "at most 300" in refusal({"recipe.steps": {"set": 301}})
    assert "training rows" in refusal({"recipe.batch_size": {"set": 4096}})
    assert "expected one of answer, trace" in refusal({"mix.style.red": {"set": "song"}})
    assert "changes nothing" in refusal({"recipe.lr": {"scale": 1.0}})
    assert "policy/1" in refusal({"recipe.lr": {"scale": 2.0}}, recipe="policy/9")
    assert "substrate" in refusal({"recipe.lr": {"scale": 2.0}}, substrate="beef")
    assert "standing settings" in refusal_of_default(policy, brief)


def refusal_of_default(policy: SearchPolicy, brief: Brief) -> str:
    """A delta of the substrate's own recipe that lands where the standing settings are."""
    moved = policy.replace(standing=settings(lr=6e-3))
    delta = Delta(hypothesis="A try.", change={"recipe.lr": Change(set=6e-3)})
    return validate(delta, moved, RULES, brief.substrate)


def test_rows_ratios_count_shares_and_length() -> None:
    before = settings()
    after = settings(weight={"red": 3.0, "green": 1.0, "blue": 0.0, "grey": 0.0}, steps=280)
    assert rows_ratios(before, after) == {"red": 6.0, "green": 2.0, "blue": 0.0, "grey": 0.0}
