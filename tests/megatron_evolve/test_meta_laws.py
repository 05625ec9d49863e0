"""Laws of meta over random rounds: labels and orders carry no meaning, time does not either, and evidence does."""

import json
import random
import re

from megatron_evolve.constitution import Constitution
from megatron_evolve.delta import canonical_change
from megatron_evolve.evidence import Evidence
from megatron_evolve.meta import check_edits, initial_policy, next_policy
from megatron_evolve.policy import Axis, DeadEnd, DomainState, SearchPolicy, struck
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.recipe import Recipe
from megatron_evolve.substrate.settings import Settings, write_all
from megatron_evolve.workers.brief import Brief, document
from megatron_evolve.workers.operators import OPERATIONS
from megatron_evolve.workers.propose import propose

RULES = Constitution()
CASES = 200
LABELS = tuple(f"label{letter}x" for letter in "abcdef")
SEEN = {
    "dev": ["TRACKING", "DECOUPLED", "INVERSE", "UNRESOLVED", "UNRESOLVED", "UNRESOLVED"],
    "external": ["TRACKING", "TRACKING", "TRACKING", "INVERSE", "UNRESOLVED", "UNRESOLVED"],
}


def random_policy(rng: random.Random) -> SearchPolicy:
    # Tenths sum to exact shares, so that no renormalising of a random mix hides a difference in the ninth digit.
    settings = Settings(
        mix=Mix(weight=dict.fromkeys(LABELS, 1.0), style={name: rng.choice(["answer", "trace"]) for name in LABELS}),
        recipe=Recipe(lr=rng.choice([1e-3, 2e-3]), steps=rng.choice([100, 140])),
    )
    domains = {
        name: DomainState(dev=rng.random(), external=rng.random(), dev_weight=rng.random(), external_weight=None)
        for name in LABELS
    }
    policy = initial_policy(settings, domains, RULES)
    axes = tuple(
        axis.replace(
            direction=rng.choice(["up", "down"]),
            magnitude=rng.choice([0.5, 1.0, 2.0]),
            misses_up=rng.randrange(3),
            misses_down=rng.randrange(3),
        )
        for axis in policy.axes
    )
    return policy.replace(axes=axes, mode=rng.choice(["stabilise", "stack-and-calibrate", "exploit-proxy"]))


def random_start(rng: random.Random) -> SearchPolicy:
    """A policy as it stands after some rounds: a premise struck, axes retired, changes waiting, dead ends known."""
    policy = random_policy(rng)
    axes = [axis.replace(retired="Plateau.") if rng.random() < 0.25 else axis for axis in policy.axes[1:]]
    axes = [policy.axes[0], *axes, Axis(name="stack", operator="stack")]
    waiting = canonical_change(policy.standing, write_all(policy.standing, {"recipe.weight_decay": 0.02}))
    told = {"ground": digest_of(policy.standing), "round": 1, "reason": "It lost.", "evidence": ("/round",)}
    dead_ends = [
        DeadEnd(axis=axis, candidate=f"{axis}-id", change=change, objective=objective, way_back=back, **told)
        for axis, objective, back in (("lr", "any", False), ("style", "dev", True), ("headroom", "external", False))
        if (change := random_change(rng, policy))
    ]
    far = DeadEnd(axis="steps", candidate="steps-id", change=waiting, objective="dev", **{**told, "ground": "another"})
    policy = policy.replace(
        round=rng.randrange(3, 9),
        pending=({"axis": "schedule", "candidate": "earlier", "change": waiting},),
        dead_ends=(*dead_ends, far),
    )
    if rng.random() < 0.4:
        return as_read(policy.replace(axes=tuple(axes)))
    fallen = rng.choice(policy.premises)
    steps = {"misses_up": rng.randrange(3), "misses_down": rng.randrange(3), "retired": rng.choice(["", "Plateau."])}
    policy = policy.replace(
        objective="external",
        objective_since=2,
        mode="proxy-aware",
        premises=tuple(struck(text) if text == fallen else text for text in policy.premises),
        axes=(*axes, Axis(name="selection", operator="selection", **steps)),
    )
    return as_read(policy)


def as_read(policy: SearchPolicy) -> SearchPolicy:
    """As a round reads it from its file: lists where memory has tuples."""
    return SearchPolicy.parse(json.loads(json.dumps(dumped(policy))), where="policy")


def random_change(rng: random.Random, policy: SearchPolicy) -> dict:
    values = rng.choice(
        [
            {f"mix.weight.{rng.choice(LABELS)}": 0.5},
            {f"mix.style.{name}": "trace" for name in rng.sample(LABELS, 2)},
            {f"mix.style.{name}": "trace" for name in rng.sample(LABELS, 3)},
            {"recipe.lr": rng.choice([4e-3, 5e-4])},
            {"recipe.steps": rng.choice([70, 280]), "recipe.clip_grad": 0.5},
            {"recipe.adapter": {"rank": 8, "alpha": 8.0}},
        ]
    )
    return canonical_change(policy.standing, write_all(policy.standing, values))


def random_effect(rng: random.Random) -> dict:
    mean = rng.choice([-0.05, 0.0, 0.05, 0.05])  # few values, so that ties are common
    return {
        "mean": mean,
        "se": 0.01,
        "low": mean - 0.02,
        "high": mean + 0.02,
        "p_better": min(1.0, max(0.0, 0.5 + 10 * mean)),
    }


def random_evidence(rng: random.Random, policy: SearchPolicy) -> Evidence:
    score = {"mean": rng.random(), "se": 0.01, "n": 500}
    candidates = [
        {
            "id": "anchor-id",
            "axis": "anchor",
            "role": "anchor",
            "change": {},
            "runs": [],
            "domains": {n: {"dev": score} for n in LABELS},
        }
    ]
    for axis in policy.axes:
        scored = rng.random() < 0.85
        splits = ["dev-a", "dev-b", *(["external-a", "external-b", "external"] if rng.random() < 0.8 else [])]
        outcome = "finished" if scored else rng.choice(["diverged", "out_of_memory", "lost"])
        run = {"seed": 1, "outcome": outcome, "reason": "", "scores": {"dev-b": score} if scored else {}}
        runs = [run] if scored or rng.random() < 0.7 else []
        candidates.append(
            {
                "id": f"{axis.name}-id",
                "axis": axis.name,
                "role": "explorer",
                "change": random_change(rng, policy),
                "runs": runs,
                "effects": {split: random_effect(rng) for split in splits} if scored else {},
                "confirmed": rng.random() < 0.8,
                "confirmed_off_objective": rng.random() < 0.5,
                "refused": "" if runs else "No move.",
                "nothing": not runs and rng.random() < 0.7,
            }
        )
    verdicts = [
        {
            "outcome": rng.choice(SEEN[policy.objective]),
            "estimand": "selected",
            "domain": domain,
            "reason": f"Numbers of {domain}.",
        }
        for domain in ("overall", *LABELS)
        if rng.random() < 0.5
    ]
    return Evidence.parse(
        {
            "round": policy.round,
            "substrate": "s",
            "judge": "j",
            "policy": "p",
            "objective": policy.objective,
            "anchor": "anchor-id",
            "selected": None,
            "candidates": candidates,
            "noise": {"signal_to_noise": rng.choice([None, 0.5, 1.5, 3.0])},
            "verdicts": verdicts,
        },
        where="evidence",
    )


def renamed(document, names: dict[str, str]):
    """The document with every label exchanged, in keys and inside sentences."""
    pattern = re.compile("|".join(names))
    return json.loads(pattern.sub(lambda found: names[found.group()], json.dumps(document)))


def relabelled(policy: SearchPolicy, names: dict[str, str]) -> dict:
    """A policy's document with every label exchanged, and the digest of its ground with them."""
    tree = renamed(dumped(policy), names)
    grounds = {digest_of(policy.standing): digest_of(Settings.parse(tree["standing"], where="standing"))}
    for entry in tree["dead_ends"]:
        entry["ground"] = grounds.get(entry["ground"], entry["ground"])
    return tree


def dumped(value) -> dict:
    return value.model_dump(mode="json", by_alias=True)


def unordered(policy: SearchPolicy, edits, evidence: Evidence) -> tuple:
    """Policy and edits as values in which orders of axes and of candidates no longer show."""
    from megatron_evolve.policy import resolve_pointer

    document = dumped(evidence)

    def cited(pointers) -> list[str]:
        # An index into the candidates means the candidate; every other pointer speaks for itself.
        found = []
        for pointer in pointers:
            head = re.match(r"/candidates/(\d+)", pointer)
            name = resolve_pointer(document, head.group())["id"] + pointer[head.end() :] if head else pointer
            found.append(name)
        return sorted(found)

    tree = dumped(policy)
    tree["axes"] = sorted(tree["axes"], key=lambda axis: axis["name"])
    for entry in tree["dead_ends"]:
        entry["evidence"] = cited(entry["evidence"])
    listed = []
    for edit in edits:
        one = dumped(edit)
        if one["path"].startswith("dead_ends."):
            one["to"]["evidence"] = cited(one["to"]["evidence"])
        listed.append(json.dumps({**one, "evidence": cited(one["evidence"])}, sort_keys=True))
    return tree, sorted(listed)


def test_permuting_labels_and_axes_permutes_the_policy_and_nothing_else() -> None:
    turned = returned = promoted = ruled_out = back = anew = 0
    for case in range(CASES):
        rng = random.Random(case)
        policy = random_start(rng) if case % 2 else random_policy(rng)
        evidence = random_evidence(rng, policy)
        following, edits = next_policy(RULES, policy, evidence)
        check_edits(policy, following, edits, evidence)
        turned += following.objective == "external"
        returned += (policy.objective, following.objective) == ("external", "dev")
        promoted += following.standing != policy.standing
        ruled_out += len(following.dead_ends) > len(policy.dead_ends)
        for entry in following.dead_ends[len(policy.dead_ends) :]:
            back += entry.way_back
            assert not entry.way_back or entry.ground == digest_of(following.standing)
        anew += len({axis.name for axis in following.open_axes()} - {axis.name for axis in policy.open_axes()})

        names = dict(zip(LABELS, rng.sample(LABELS, len(LABELS)), strict=True))
        other_policy = relabelled(policy, names)
        rng.shuffle(other_policy["axes"])
        other_evidence = renamed(dumped(evidence), names)
        rng.shuffle(other_evidence["candidates"])
        other_policy = SearchPolicy.parse(other_policy, where="policy")
        other_evidence = Evidence.parse(other_evidence, where="evidence")
        other, other_edits = next_policy(RULES, other_policy, other_evidence)

        tree, listed = unordered(following, edits, evidence)
        # The digest of the ground names the labels; it is equal where the renamed settings are.
        expected = renamed({"tree": tree, "edits": [json.loads(edit) for edit in listed]}, names)
        found_tree, found_edits = unordered(other, other_edits, other_evidence)
        found = {"tree": found_tree, "edits": [json.loads(edit) for edit in found_edits]}
        assert comparable(found) == comparable(expected), f"case {case}"
    reached = (turned, promoted, ruled_out, back, anew)
    assert min(reached) > CASES // 10 and returned > CASES // 50, "the cases must reach every rule"


def test_relabelling_a_brief_relabels_the_proposal_and_nothing_else() -> None:
    """A worker knows no label either: every axis of every start, with its dead ends and its struck premises."""
    answered = set()
    for case in range(CASES // 8):
        rng = random.Random(case)
        policy = random_start(rng)
        names = dict(zip(LABELS, rng.sample(LABELS, len(LABELS)), strict=True))
        view = {
            "digest": "a" * 64,
            "default": policy.standing.model_dump(mode="json"),
            "construction": {"styles": {name: ["answer", "short", "trace"] for name in LABELS}},
        }
        for axis in policy.axes:
            told = {"verb": "propose", "seed": case, "mutation_space": RULES.mutation_space, "limits": RULES.limits}
            brief = Brief(substrate=view, policy=policy, axis=axis, **told)
            other = {**renamed(document(brief), names), "policy": relabelled(policy, names)}
            mine, theirs = propose(brief), propose(Brief.parse(other, where="brief"))
            ours = {**renamed(document(mine), names), "brief": theirs.brief}
            assert ours == document(theirs), f"case {case}, {axis.name}"
            answered |= {axis.name} if mine.delta else set()
    assert answered == {*OPERATIONS}, "every operator answers in some case"


def test_later_rounds_decide_as_earlier_ones() -> None:
    """Every number of a round moved by as many: the next policy is the same, as many rounds later."""
    late = 7
    for case in range(CASES // 5):
        rng = random.Random(case)
        policy = random_start(rng)
        evidence = random_evidence(rng, policy)
        following, edits = next_policy(RULES, policy, evidence)
        later, later_edits = next_policy(RULES, shifted(policy, late), evidence.replace(round=evidence.round + late))
        assert later == shifted(following, late) and len(later.dead_ends) >= len(policy.dead_ends)
        assert [(one.path, one.evidence) for one in later_edits] == [(one.path, one.evidence) for one in edits]


def shifted(policy: SearchPolicy, late: int) -> SearchPolicy:
    entries = tuple(entry.replace(round=entry.round + late) for entry in policy.dead_ends)
    times = {"round": policy.round + late, "objective_since": policy.objective_since + late}
    return policy.replace(**times, dead_ends=entries)


def comparable(value: dict) -> str:
    """One text of policy and edits: digests of settings left out, since they hash labels; edits without order."""

    def strip(node):
        if isinstance(node, dict):
            return {key: strip(item) for key, item in node.items() if key != "ground"}
        return [strip(item) for item in node] if isinstance(node, list) else node

    edits = sorted(json.dumps(strip(edit), sort_keys=True) for edit in value["edits"])
    return json.dumps([strip(value["tree"]), edits], sort_keys=True)


def null_round(policy: SearchPolicy) -> Evidence:
    verdicts = [{"outcome": "UNRESOLVED", "estimand": "selected", "domain": "overall", "reason": ""}]
    return turning_round(policy).replace(verdicts=tuple(verdicts))


def turning_round(policy: SearchPolicy) -> Evidence:
    evidence = random_evidence(random.Random(0), policy)
    flat = {"mean": 0.0, "se": 0.01, "low": -0.02, "high": 0.02, "p_better": 0.5}
    candidates = [
        {**dumped(one), "effects": dict.fromkeys(one.effects, flat), "runs": [], "confirmed": False}
        for one in evidence.candidates
    ]
    verdicts = [{"outcome": "DECOUPLED", "estimand": "selected", "domain": LABELS[2], "reason": ""}]
    return Evidence.parse({**dumped(evidence), "candidates": candidates, "verdicts": verdicts}, where="evidence")


def stance(policy: SearchPolicy) -> tuple:
    return policy.objective, policy.mode, policy.premises, policy.objective_since - policy.round


def test_null_rounds_first_move_the_turn_by_as_many_rounds() -> None:
    start = random_policy(random.Random(1)).replace(mode="stabilise")
    at_once, _ = next_policy(RULES, start, turning_round(start))
    assert at_once.objective == "external"
    for nulls in range(1, 12):
        policy = start
        for _ in range(nulls):
            policy, _ = next_policy(RULES, policy, null_round(policy))
            assert policy.objective == "dev"
        later, _ = next_policy(RULES, policy, turning_round(policy))
        assert stance(later) == stance(at_once)
        assert later.round == at_once.round + nulls


def test_without_an_alarm_nothing_turns_whatever_the_scores_say() -> None:
    for case in range(CASES):
        rng = random.Random(case)
        policy = random_policy(rng)
        evidence = random_evidence(rng, policy)
        calm = [one for one in evidence.verdicts if one["outcome"] in ("TRACKING", "UNRESOLVED")]
        following, _ = next_policy(RULES, policy, evidence.replace(verdicts=tuple(calm)))
        assert following.objective == "dev"
        assert following.premises == policy.premises


def test_dead_ends_only_grow() -> None:
    for case in range(40):
        rng = random.Random(case)
        policy = random_start(rng)
        for _ in range(3):
            following, _ = next_policy(RULES, policy, random_evidence(rng, policy))
            assert following.dead_ends[: len(policy.dead_ends)] == policy.dead_ends
            policy = following
