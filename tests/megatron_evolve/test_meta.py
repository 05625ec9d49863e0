"""Meta rule by rule: what moves, what waits, and when the search turns to the external score."""

import pytest

from megatron_evolve.edits import apply_edits
from megatron_evolve.evidence import Evidence, ScoreValue
from megatron_evolve.explain import explain
from megatron_evolve.meta import check_edits, next_policy
from megatron_evolve.policy import SearchPolicy, premise, resolve_pointer, struck
from megatron_evolve.reading import readings
from tests.megatron_evolve.invented_rounds import (
    DOWN,
    FAMILIES,
    FLAT,
    RULES,
    UP,
    effect,
    explorer,
    follow,
    round_of,
    start,
    verdict,
)


def test_initial_policy_has_seven_generic_open_axes() -> None:
    policy = start()
    assert len(policy.open_axes()) == 7
    assert (policy.mode, policy.objective) == ("stabilise", "dev")
    assert policy.carries_over()
    assert all(policy.carries_over(name) for name in FAMILIES)


def test_a_confirmed_gain_moves_in_and_the_next_best_apart_waits() -> None:
    policy = start()
    best = explorer(policy, "lr", 0.05)
    other = explorer(policy, "steps", UP)
    following = follow(policy, round_of(policy, other, best))
    assert following.standing.recipe.lr == 2e-3
    assert following.standing.recipe.steps == policy.standing.recipe.steps
    assert [entry["axis"] for entry in following.pending] == ["steps"]
    assert following.mode == "stack-and-calibrate"
    assert following.axes_for(1)[0].operator == "stack"


def test_shares_overlap_so_only_the_better_mix_is_kept() -> None:
    policy = start()
    following = follow(policy, round_of(policy, explorer(policy, "headroom", 0.05), explorer(policy, "balance", UP)))
    assert following.standing.mix.weight["red"] == pytest.approx(6 / 10, abs=0.2)
    assert following.pending == ()
    assert following.mode == "exploit-proxy"


@pytest.mark.parametrize("told", [{"confirmed": False}, {"external": DOWN}])
def test_unconfirmed_or_externally_harmful_gains_stay_out(told: dict) -> None:
    policy = start()
    following = follow(policy, round_of(policy, explorer(policy, "lr", UP, **told)))
    assert following.standing == policy.standing
    assert following.pending == ()


def test_the_a_half_alone_moves_nothing() -> None:
    policy = start()
    lucky = explorer(policy, "lr", UP)
    lucky = lucky.replace(effects={"dev-a": effect(0.1), "dev-b": effect(FLAT)})
    assert follow(policy, round_of(policy, lucky)).standing == policy.standing


def test_a_stack_moves_in_and_takes_what_waited_with_it() -> None:
    policy = start()
    waited = follow(policy, round_of(policy, explorer(policy, "schedule", 0.05), explorer(policy, "lr", UP)))
    assert len(waited.pending) == 1
    stacked = explorer(waited, "stack", UP, change={"recipe.lr": 2e-3})
    following = follow(waited, round_of(waited, stacked))
    assert following.standing.recipe.lr == 2e-3
    assert following.pending == ()
    assert "stack" not in {axis.operator for axis in following.open_axes()}
    lost = follow(waited, round_of(waited, explorer(waited, "stack", FLAT, change={"recipe.lr": 2e-3})))
    assert lost.pending == ()
    assert lost.standing == waited.standing


def pending_edit(policy: SearchPolicy, evidence: Evidence):
    following, edits = next_policy(RULES, policy, evidence)
    check_edits(policy, following, edits, evidence)
    return next(edit for edit in edits if edit.path == "pending")


def test_the_edit_of_what_waits_says_which_of_its_causes_it_was() -> None:
    policy = start()
    first = round_of(policy, explorer(policy, "schedule", 0.05), explorer(policy, "lr", UP))
    edit = pending_edit(policy, first)
    assert edit.reason.startswith("lr moved") and edit.reason.endswith(", and waits.")
    assert set(edit.evidence) == {"/candidates/2/effects/dev-b", "/candidates/2/confirmed"}
    waited = follow(policy, first)
    stack = {"recipe.lr": 2e-3}
    kept = pending_edit(waited, round_of(waited, explorer(waited, "stack", UP, change=stack)))
    assert kept.reason.startswith("stack moved") and kept.reason.endswith("; what waited moved in with it.")
    lost = pending_edit(waited, round_of(waited, explorer(waited, "stack", FLAT, change=stack)))
    assert lost.reason.startswith("stack moved") and lost.reason.endswith("waits no longer.")
    other = pending_edit(waited, round_of(waited, explorer(waited, "lr", UP, change={"recipe.lr": 5e-4})))
    assert other.reason.startswith("lr moved") and other.reason.endswith("starts from other settings now.")
    for edit in (kept, lost, other):
        assert edit.evidence[0] == "/candidates/1/effects/dev-b"


@pytest.mark.parametrize("outcome", ["DECOUPLED", "INVERSE"])
@pytest.mark.parametrize("domain", ["overall", "green"])
def test_a_falsified_premise_turns_the_search_to_the_external_score(outcome: str, domain: str) -> None:
    policy = start()
    trap = explorer(policy, "headroom", 0.08, external=DOWN)
    honest = explorer(policy, "style", FLAT, external=UP, confirmed_off_objective=True)
    following = follow(policy, round_of(policy, trap, honest, verdicts=[verdict(outcome, domain)]))
    scope = None if domain == "overall" else domain
    assert (following.objective, following.mode) == ("external", "proxy-aware")
    assert following.objective_since == policy.round + 1
    assert struck(premise(scope)) in following.premises
    assert not following.carries_over(scope)
    assert following.standing.mix.style["red"] == "trace", "what the external score confirms moves in at once"
    assert following.standing.mix.weight == policy.standing.mix.weight
    assert following.axes_for(1)[0].operator == "selection"


@pytest.mark.parametrize("objective", ["dev", "external"])
def test_what_further_seeds_say_of_one_score_confirms_nothing_on_the_other(objective: str) -> None:
    """In the round that moves the objective both ways: by the score that judges now, and its own further seeds."""
    turn = {"dev": [verdict("DECOUPLED")], "external": [verdict("TRACKING")]}[objective]
    policy = start(objective, premises=(struck(premise()),) if objective == "external" else (premise(),))
    other = {"dev": "external", "external": "dev"}[objective]
    for confirmed, off, kept in ((True, False, True), (False, True, False)):
        one = explorer(policy, "lr", UP, external=UP, confirmed=confirmed, confirmed_off_objective=off)
        one = one.replace(effects={**one.effects, f"{other}-a": effect(UP), f"{other}-b": effect(UP)})
        evidence = round_of(policy, one, verdicts=turn)
        following, edits = next_policy(RULES, policy, evidence)
        check_edits(policy, following, edits, evidence)
        assert following.objective == other
        assert (following.standing == policy.standing) == kept
        cited = {place for edit in edits if edit.path.startswith("standing.") for place in edit.evidence}
        assert kept or "/candidates/1/confirmed_off_objective" in cited
        assert "/candidates/1/confirmed" not in cited


def test_evidence_from_before_confirmation_was_told_by_objective_still_parses() -> None:
    policy = start()
    document = round_of(policy, explorer(policy, "lr", UP)).model_dump(mode="json", by_alias=True)
    for one in document["candidates"]:
        del one["confirmed_off_objective"]
    evidence = Evidence.parse(document, where="evidence")
    assert [one.kind for one in readings(evidence, "dev", RULES)] == ["gain"]
    assert follow(policy, evidence).standing.recipe.lr == 2e-3


def test_return_to_dev_needs_tracking_from_rounds_since() -> None:
    policy = start()
    away = follow(policy, round_of(policy, verdicts=[verdict("DECOUPLED", "green"), verdict("UNRESOLVED")]))
    assert away.objective == "external"
    quiet = follow(away, round_of(away, verdicts=[verdict("UNRESOLVED", "green")]))
    assert quiet.objective == "external"
    elsewhere = follow(quiet, round_of(quiet, verdicts=[verdict("TRACKING", "blue")]))
    assert elsewhere.objective == "external"
    back = follow(quiet, round_of(quiet, verdicts=[verdict("TRACKING", "green")]))
    assert (back.objective, back.carries_over("green")) == ("dev", True)
    assert back.mode != "proxy-aware"


def test_a_further_premise_that_falls_is_held_against_later_rounds_alone() -> None:
    policy = start()
    away = follow(policy, round_of(policy, verdicts=[verdict("DECOUPLED", "green")]))
    again = follow(away, round_of(away, verdicts=[verdict("DECOUPLED", "green")]))
    assert again.objective_since == away.objective_since, "it had fallen already"
    further = follow(again, round_of(again, verdicts=[verdict("DECOUPLED", "green"), verdict("INVERSE", "blue")]))
    assert further.objective == "external"
    assert further.objective_since == again.round + 1 > away.objective_since


def test_under_the_external_objective_dev_no_longer_counts() -> None:
    policy = start("external", premises=(struck(premise()),))
    one = explorer(policy, "lr", UP)
    one = one.replace(effects={**one.effects, "dev-a": effect(DOWN), "dev-b": effect(DOWN)})
    following = follow(policy, round_of(policy, one))
    assert following.standing.recipe.lr == 2e-3
    assert [entry.way_back for entry in following.dead_ends] == [True], "what dev lost is none"


def test_more_confirming_seeds_while_seeds_drown_the_differences() -> None:
    policy = start()
    noisy = follow(policy, round_of(policy, explorer(policy, "lr", UP, confirmed=False), noise=0.5))
    assert noisy.replicates.confirm_seeds == 2
    assert noisy.mode == "stack-and-calibrate"
    assert follow(noisy, round_of(noisy, noise=0.5)).replicates.confirm_seeds == 2, (
        "never more runs than the anchor has"
    )
    assert follow(noisy, round_of(noisy, noise=3.0)).replicates.confirm_seeds == 1


def test_domains_follow_the_anchor_and_looks_are_kept_for_the_best() -> None:
    policy = start()
    following = follow(policy, round_of(policy, looks={"external": 60, "external_budget": 64}))
    assert {state.dev for state in following.domains.values()} == {0.45}
    assert {state.external for state in following.domains.values()} == {None}
    assert following.ask_external == "best"


@pytest.mark.parametrize(
    ("objective", "halves", "cumulative", "full"),
    [
        ("dev", True, False, 16),
        ("dev", True, True, 18),  # the origin's two halves
        ("external", True, True, 17),  # of which the one that ranks is not asked
        ("dev", False, False, 8),
        ("external", False, False, 10),  # the leaders' further seeds are another question
    ],
)
def test_a_round_that_the_looks_suffice_for_is_asked_whole(objective, halves, cumulative, full) -> None:
    rules = RULES.replace(gap=RULES.gap.replace(estimands=("selected", "mean", *["cumulative"] * cumulative)))
    policy = start(objective, premises=(struck(premise()),) if objective == "external" else ())
    score = ScoreValue(mean=0.5, se=0.01, n=500)
    one = explorer(policy, "lr", FLAT, external=FLAT).replace(external=score)
    if halves:
        one = one.replace(runs=(one.runs[0].replace(scores={"dev-b": score, "external-a": score}),))
    for left, asked in ((full, "all"), (full - 1, "best")):
        evidence = round_of(policy, one, looks={"external": 64 - left, "external_budget": 64})
        assert follow(policy, evidence, rules).ask_external == asked


def test_evidence_of_another_round_is_refused() -> None:
    policy = start()
    with pytest.raises(ValueError, match="evidence of round 1"):
        next_policy(RULES, policy, round_of(policy.replace(round=2)))


def test_check_edits_finds_what_does_not_add_up() -> None:
    policy = start()
    evidence = round_of(policy, explorer(policy, "lr", UP), verdicts=[verdict("DECOUPLED")])
    following, edits = next_policy(RULES, policy, evidence)
    assert apply_edits(policy, edits) == following
    with pytest.raises(ValueError, match="without an edit"):
        check_edits(policy, following.replace(mode="stabilise"), edits, evidence)
    with pytest.raises(ValueError, match="without an edit"):
        check_edits(policy, following, edits[1:], evidence)
    with pytest.raises(ValueError, match="does not resolve"):
        check_edits(policy, following, (edits[0].replace(evidence=("/candidates/99",)), *edits[1:]), evidence)
    with pytest.raises(ValueError, match="as `from`, got 7: write what stands there"):
        check_edits(policy, following, (edits[0].replace(before=7), *edits[1:]), evidence)
    with pytest.raises(ValueError, match="one edit per path"):
        check_edits(policy, following, (*edits, edits[0]), evidence)


def test_every_edit_cites_what_is_there_and_the_argument_can_be_read() -> None:
    policy = start()
    explorers = [explorer(policy, "lr", UP, external=UP), explorer(policy, "headroom", DOWN)]
    told = verdict("DECOUPLED", "green") | {"minimum_detectable_effect": 0.03}
    sizes = {"dev-b": 0.04, "external": 0.051}
    evidence = round_of(policy, *explorers, verdicts=[told], minimum_detectable_effect=sizes)
    following, edits = next_policy(RULES, policy, evidence)
    document = evidence.model_dump(mode="json", by_alias=True)
    for edit in edits:
        assert [resolve_pointer(document, cited) for cited in edit.evidence]
    text = explain(policy, evidence, following, edits)
    for said in (
        "DECOUPLED",
        "objective goes from dev to external",
        "lr moved dev-b by +3.0 pt",
        struck(premise("green")),
        "The smallest effect of a candidate that it would see (80 % power, one-sided 5 %): dev-b 4.0 pt, external 5.1",
        "Told by numbers. It would see a dev gain of 3.0 pt of which nothing arrives.",
    ):
        assert said in text
    text = explain(policy, evidence.replace(minimum_detectable_effect={}), following, ())
    assert "The smallest effect that it could see is unknown" in text
