"""Laws of meta over random rounds: labels and orders carry no meaning, time does not either, and evidence does."""

import json
import random
import re

from megatron_evolve.constitution import Constitution
from megatron_evolve.delta import canonical_change
from megatron_evolve.evidence import Evidence
from megatron_evolve.meta import check_edits, initial_policy, next_policy
from megatron_evolve.policy import DomainState, SearchPolicy
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.recipe import Recipe
from megatron_evolve.substrate.settings import Settings, write_all

RULES = Constitution()
CASES = 200
LABELS = tuple(f"label{letter}x" for letter in "abcdef")
SEEN = ["TRACKING", "DECOUPLED", "INVERSE", "UNRESOLVED", "UNRESOLVED", "UNRESOLVED"]


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
        candidates.append(
            {
                "id": f"{axis.name}-id",
                "axis": axis.name,
                "role": "explorer",
                "change": random_change(rng, policy),
                "runs": [run],
                "effects": {split: random_effect(rng) for split in splits} if scored else {},
                "confirmed": rng.random() < 0.8,
            }
        )
    verdicts = [
        {"outcome": rng.choice(SEEN), "estimand": "selected", "domain": domain, "reason": f"Numbers of {domain}."}
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
    turned = promoted = ruled_out = 0
    for case in range(CASES):
        rng = random.Random(case)
        policy = random_policy(rng)
        evidence = random_evidence(rng, policy)
        following, edits = next_policy(RULES, policy, evidence)
        check_edits(policy, following, edits, evidence)
        turned += following.objective == "external"
        promoted += following.standing != policy.standing
        ruled_out += len(following.dead_ends)

        names = dict(zip(LABELS, rng.sample(LABELS, len(LABELS)), strict=True))
        other_policy = renamed(dumped(policy), names)
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
    assert min(turned, promoted, ruled_out) > CASES // 10, "the cases must reach every rule"


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
        policy = random_policy(rng)
        for _ in range(3):
            following, _ = next_policy(RULES, policy, random_evidence(rng, policy))
            assert following.dead_ends[: len(policy.dead_ends)] == policy.dead_ends
            policy = following
