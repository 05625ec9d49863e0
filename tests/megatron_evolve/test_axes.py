"""Axes and dead ends after a round: what is searched along, what rests until the ground moves, what is ruled out."""

import pytest

from megatron_evolve.dead_ends import MOST_DEAD_ENDS, dead_end_of
from megatron_evolve.evidence import CandidateEvidence
from megatron_evolve.meta import check_edits
from megatron_evolve.policy import SearchPolicy, resolve_pointer
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.settings import read, write_all
from tests.megatron_evolve.invented_rounds import (
    CHANGES,
    DOWN,
    FLAT,
    UP,
    effect,
    explorer,
    follow,
    round_of,
    start,
    verdict,
)


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


def test_a_part_of_a_way_back_that_is_no_settings_is_repeated_by_none() -> None:
    """A long warm-up was shortened with its run, and cannot come back without it."""
    policy = start()
    policy = policy.replace(standing=write_all(policy.standing, {"recipe.warmup_steps": 100}))
    both = {"recipe.steps": 70, "recipe.warmup_steps": 50}
    moved = follow(policy, round_of(policy, explorer(policy, "steps", UP, change=both)))
    assert moved.dead_ends[0].way_back
    assert dead_end_of(moved, write_all(moved.standing, {"recipe.warmup_steps": 25})) is None


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


def test_a_stack_that_shuts_keeps_no_search_going() -> None:
    policy = start()
    waited = follow(policy, round_of(policy, explorer(policy, "schedule", 0.05), explorer(policy, "lr", UP)))
    worn = waited.replace(
        axes=tuple(
            axis.replace(misses_up=2, misses_down=1, direction="down")
            for axis in waited.axes
            if axis.name in ("lr", "stack")
        )
    )
    lost = explorer(worn, "stack", FLAT, change={"recipe.lr": 2e-3})
    following = follow(worn, round_of(worn, explorer(worn, "lr", FLAT, change={"recipe.lr": 5e-4}), lost))
    assert [axis.name for axis in following.open_axes()] == ["lr"]


def test_an_axis_is_not_retired_while_another_worker_of_it_had_a_move() -> None:
    policy = start()
    lost = explorer(policy, "lr", None, outcome="lost")
    stuck = CandidateEvidence(
        id="none-7", axis="lr", role="explorer", change={}, runs=(), refused="No move.", nothing=True
    )
    for found in ((lost, stuck), (stuck, lost)):
        assert "lr" in {axis.name for axis in follow(policy, round_of(policy, *found)).open_axes()}
