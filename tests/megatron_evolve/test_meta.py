"""Meta rule by rule: what moves, what waits, what is ruled out, and when the search turns to the external score."""

import pytest

from megatron_evolve.constitution import Constitution
from megatron_evolve.dead_ends import MOST_DEAD_ENDS, dead_end_of
from megatron_evolve.delta import canonical_change
from megatron_evolve.edits import apply_edits
from megatron_evolve.evidence import (
    CandidateEvidence,
    DomainEffect,
    EffectValue,
    Evidence,
    Noise,
    RunRecord,
    ScoreValue,
)
from megatron_evolve.explain import explain
from megatron_evolve.meta import check_edits, initial_policy, next_policy
from megatron_evolve.policy import DomainState, SearchPolicy, premise, resolve_pointer, struck
from megatron_evolve.reading import readings
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.recipe import Recipe
from megatron_evolve.substrate.settings import Settings, read, write_all

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


def test_a_full_registry_gives_up_what_holds_for_another_ground_first() -> None:
    """So that the brief of round 1,000 is no longer than that of round 100; the edit keeps what it replaced."""
    policy = start()
    policy = follow(policy, round_of(policy, explorer(policy, "lr", DOWN)))
    (entry,) = policy.dead_ends
    old = [entry.model_copy(update={"candidate": f"old-{place}"}) for place in range(MOST_DEAD_ENDS)]
    old[7] = old[7].model_copy(update={"ground": "another"})
    full = policy.replace(dead_ends=tuple(old))
    evidence = round_of(full, explorer(full, "lr", DOWN), explorer(full, "steps", None, outcome="diverged"))
    following = follow(full, evidence)  # which checks the edits
    assert len(following.dead_ends) == MOST_DEAD_ENDS
    replaced = [place for place in range(MOST_DEAD_ENDS) if following.dead_ends[place] != full.dead_ends[place]]
    assert replaced == [0, 7], "the other ground's, then the oldest"
    assert following.dead_ends[7].axis == "lr"
    short = full.replace(dead_ends=full.dead_ends[1:])
    with pytest.raises(ValueError, match="may only be added"):
        check_edits(full, short, (), evidence)


def test_losses_and_own_faults_become_dead_ends_and_never_leave() -> None:
    policy = start()
    faults = [explorer(policy, "lr", DOWN), explorer(policy, "steps", None, outcome="diverged")]
    others = [explorer(policy, "style", None, outcome="lost"), explorer(policy, "schedule", FLAT)]
    following = follow(policy, round_of(policy, *faults, *others))
    assert [entry.axis for entry in following.dead_ends] == ["lr", "steps"]
    assert [entry.objective for entry in following.dead_ends] == ["dev", "any"]
    again = follow(following, round_of(following, *[explorer(following, "lr", DOWN)]))
    assert again.dead_ends == following.dead_ends
    tried = write_all(policy.standing, CHANGES["lr"])
    assert dead_end_of(following, tried) is not None
    assert dead_end_of(following.replace(objective="external"), tried) is None, "a loss on dev is none on the target"
    moved = following.replace(standing=write_all(policy.standing, {"recipe.steps": 100}))
    assert dead_end_of(moved, write_all(moved.standing, CHANGES["lr"])) is None, "another ground is another question"


def test_the_way_back_from_a_sure_gain_is_a_dead_end_whole_or_in_part() -> None:
    policy = start()
    both = {"mix.style.red": "trace", "recipe.lr": 2e-3}
    evidence = round_of(policy, explorer(policy, "style", UP, change=both))
    following = follow(policy, evidence)
    (entry,) = following.dead_ends
    assert entry.way_back and (entry.ground, entry.objective) == (digest_of(following.standing), "dev")
    assert [resolve_pointer(evidence.model_dump(mode="json"), cited) for cited in entry.evidence][1] is True
    old = {path: read(policy.standing, path) for path in both}

    def known(then: SearchPolicy, values: dict) -> bool:
        return dead_end_of(then, write_all(then.standing, values)) is not None

    assert known(following, old), "the whole"
    assert all(known(following, {path: value}) for path, value in old.items()), "and each part"
    assert not known(following, {**old, "recipe.steps": 200}), "with something else it is another question"
    assert not known(following, {"recipe.lr": 1.5e-3}) and not known(following, {"mix.style.green": "trace"})
    assert not known(following.replace(objective="external"), old), "it paid on dev"
    elsewhere = following.replace(standing=write_all(following.standing, {"recipe.steps": 100}))
    assert not known(elsewhere, old), "another ground is another question"
    ordinary = following.replace(dead_ends=(entry.replace(way_back=False),))
    assert known(ordinary, old) and not known(ordinary, {"recipe.lr": 1e-3}), "of a loss the whole alone is known"
    unsure = explorer(policy, "style", UP, change=both)
    unsure = unsure.replace(effects={**unsure.effects, "dev-b": effect(UP).replace(low=-0.001)})
    moved = follow(policy, round_of(policy, unsure))
    assert moved.standing == following.standing and moved.dead_ends == ()


def test_an_axis_without_a_move_gives_its_worker_away_until_the_ground_moves() -> None:
    policy = start()
    told = CandidateEvidence(id="none-3", axis="style", role="explorer", change={}, runs=(), refused="No move.")
    missed = follow(policy, round_of(policy, told))
    assert len(missed.open_axes()) == 7, "a worker that was refused may do better"
    following = follow(policy, round_of(policy, told.replace(nothing=True)))
    assert "style" not in {axis.name for axis in following.axes_for(8)}
    assert follow(following, round_of(following)).axes == following.axes
    moved = follow(following, round_of(following, explorer(following, "lr", UP)))
    assert len(moved.open_axes()) == 7
    waiting = follow(policy, round_of(policy, explorer(policy, "schedule", 0.05), explorer(policy, "lr", UP)))
    stuck = told.replace(axis="stack", nothing=True)
    assert follow(waiting, round_of(waiting, stuck)).pending == (), "what cannot be combined waits no longer"


def test_an_axis_turns_round_then_halves_then_retires() -> None:
    policy = start()
    seen = []
    for mean in (DOWN, DOWN, FLAT, FLAT):
        policy = follow(policy, round_of(policy, explorer(policy, "lr", mean)))
        axis = next(axis for axis in policy.axes if axis.name == "lr")
        seen.append((axis.direction, axis.magnitude, bool(axis.retired)))
    assert seen == [("down", 1.0, False), ("up", 0.5, False), ("down", 0.5, False), ("up", 0.5, True)]
    # A worker without a move upward goes down all the same, so no direction is said to have been tried.
    assert axis.retired == "Plateau: no gain in 4 rounds, 2 up first and 2 down first."
    assert "lr" not in {axis.name for axis in policy.open_axes()}


def test_an_axis_goes_on_after_a_gain_and_without_a_score() -> None:
    policy = start()
    for one in (explorer(policy, "lr", UP), explorer(policy, "lr", None, outcome="lost")):
        following = follow(policy, round_of(policy, one))
        assert following.axes == policy.axes


def test_a_plateau_is_another_question_on_other_ground() -> None:
    policy = start()
    retired = tuple(
        axis.replace(retired="Plateau.", misses_up=2, misses_down=2) if axis.name == "style" else axis
        for axis in policy.axes
    )
    policy = policy.replace(axes=retired)
    assert follow(policy, round_of(policy)).axes == policy.axes
    moved = follow(policy, round_of(policy, explorer(policy, "lr", UP)))
    assert moved.axes == start().axes


def test_a_plateau_of_the_round_that_moves_the_ground_holds_for_the_ground_it_left() -> None:
    policy = start()
    tired = tuple(
        axis.replace(misses_up=1, misses_down=2, magnitude=0.5) if axis.name == "style" else axis
        for axis in policy.axes
    )
    policy = policy.replace(axes=tired)
    flat = explorer(policy, "style", FLAT)
    shut = {axis.name: axis for axis in follow(policy, round_of(policy, flat)).axes}["style"]
    assert shut.retired
    following = follow(policy, round_of(policy, flat, explorer(policy, "lr", UP)))
    assert following.standing != policy.standing
    opened = {axis.name: axis for axis in following.axes}["style"]
    assert opened == shut.replace(retired="", misses_up=0, misses_down=0)
    assert opened.direction == "down", "it turns round all the same"


def test_selection_adapts_and_retires_until_the_ground_or_the_objective_moves() -> None:
    """So that one flat rule of choosing weights does not keep a worker for ever."""
    policy = start()
    aware = follow(policy, round_of(policy, verdicts=[verdict("DECOUPLED")]))
    seen = []
    for _ in range(5):
        assert seen[-1:] == ["retired"] or aware.axes_for(1)[0].operator == "selection"
        explorers = [explorer(aware, "selection", FLAT)] if seen[-1:] != ["retired"] else []
        aware = follow(aware, round_of(aware, *explorers))
        axis = next(axis for axis in aware.axes if axis.operator == "selection")
        seen.append("retired" if axis.retired else axis.direction)
    assert seen == ["down", "up", "down", "retired", "retired"]
    assert aware.objective == "external", "which opens no plateau by itself"
    moved = follow(aware, round_of(aware, explorer(aware, "lr", UP)))
    back = follow(aware, round_of(aware, verdicts=[verdict("TRACKING")]))
    again = follow(back, round_of(back, verdicts=[verdict("INVERSE")]))
    still = follow(aware, round_of(aware, verdicts=[verdict("INVERSE", "green")]))
    is_open = ["selection" in {axis.operator for axis in one.open_axes()} for one in (moved, back, again, still)]
    assert is_open == [True, False, True, False]
    calm = back.replace(axes=(*back.axes[:-1], back.axes[-1].replace(retired="Plateau.")))
    moved = follow(calm, round_of(calm, explorer(calm, calm.axes[1].name, UP)))
    opened = {axis.operator for axis in moved.open_axes()}
    assert calm.axes[-1].operator in opened and "selection" not in opened, "dev is searched for"


def test_the_last_open_axis_is_never_retired() -> None:
    policy = start()
    only = tuple(
        axis.replace(misses_up=2, misses_down=1, direction="down") for axis in policy.axes if axis.name == "lr"
    )
    following = follow(policy.replace(axes=only), round_of(policy, explorer(policy, "lr", FLAT)))
    assert len(following.open_axes()) == 1


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
        "objective from dev to external",
        "lr moved dev-b by +3.0 pt",
        struck(premise("green")),
        "The smallest effect of a candidate that it would see (80 % power, one-sided 5 %): dev-b 4.0 pt, external 5.1",
        "Told by numbers. It would see a dev gain of 3.0 pt of which nothing arrives.",
    ):
        assert said in text
    unsettled = [verdict("UNRESOLVED") | {"minimum_detectable_effect": size} for size in (0.09, 0.04, None)]
    text = explain(policy, evidence.replace(verdicts=unsettled, minimum_detectable_effect={}), following, ())
    assert "; at best it would see a dev gain of 4.0 pt of which nothing arrives, at worst one of 9.0 pt." in text
    assert "The smallest effect that it could see is unknown" in text
