"""The simulated world matrix: cues where they are said, ceilings, and a score-only target judged as one is."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_evolve.cli import app
from megatron_evolve.eval.reported import ReportedScores
from megatron_evolve.eval.seeds import RunReplicates
from megatron_evolve.gap import OVERALL, decide, looks_at, rule_of
from megatron_evolve.simulate.campaigns import Told
from megatron_evolve.simulate.draw import Draw, Plan, State
from megatron_evolve.simulate.noise import MEASURED
from megatron_evolve.simulate.worlds import first_right, matrix, page, simulate_worlds
from megatron_evolve.substrate.puzzles import families
from megatron_evolve.verdict import judge
from megatron_evolve.window import RoundItems
from tests.megatron_evolve.test_simulate import pool_alone

WORLDS = matrix()
WORLD = {world.name: world for world in WORLDS}


def test_the_matrix_is_the_one_asked_for():
    assert all(set(world.accuracy) == set(families.FAMILIES) for world in WORLDS)
    single = {world.cue for world in WORLDS if len(world.cue) == 1 and not world.step and world.dev_weight}
    assert single == {(name,) for name in families.CUED_FAMILIES}
    assert WORLD["cue-in-two"].cue and not WORLD["no-shift"].cue and not WORLD["dev-weight-without-cue"].cue
    assert WORLD["cue-without-dev-weight"].dev_weight == {} and WORLD["score-only"].step == 0.01
    weights = WORLD["cue-in-equation"].exam.dev_weights
    assert weights["equation"] == pytest.approx(5 / 10) and sum(weights.values()) == pytest.approx(1)


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_a_cue_answers_dev_alone_and_only_what_is_still_wrong(world):
    d, t = world.scenario.draw(np.random.default_rng(1), 200, 7)
    for place, (name, accuracy) in enumerate(world.accuracy.items()):
        parted = (d - t / 0.8)[..., place]
        assert parted.max() <= 0.4 * 0.9 * (1 - accuracy) + 1e-12
        assert (parted.max() > 1e-9) == (name in world.cue)


def test_a_score_only_target_is_judged_as_one_campaign_is():
    """The oracle of the batch is `judge` on each campaign's own reported scores."""
    world, campaigns = WORLD["score-only"], 5
    plan = Plan(items=120, exam=world.exam)
    draw = Draw(np.random.default_rng(3), MEASURED, world.scenario, plan, campaigns)
    d, t = world.scenario.draw(draw.rng, campaigns, plan.explorers)
    state = State.at_origin(5 * d, t)
    rule, pool, rounds = rule_of(plan.rules, world.exam.domains), draw.pool(), []
    for number in (1, 2):
        rounds.append(draw.round(number, state)[0])
        pool = pool.plus(rounds[-1].replicates())
    together = decide([look for _, of_scope in looks_at(rounds, rule, pool) for look in of_scope], 2, rule)
    for campaign in range(campaigns):
        single = [
            RoundItems(
                one.number,
                one.anchor,
                one.dev_a,
                replaced(one.dev_answers, campaign),
                ReportedScores(
                    {run: float(score[campaign]) for run, score in one.external_answers.scores.items()},
                    one.external_answers.items,
                    one.external_answers.step,
                ),
                one.dev_weights,
                one.external_weights,
            )
            for one in rounds
        ]
        for one, verdict in zip(together, judge(single, rule, reported_pool(pool, campaign)), strict=True):
            assert one.outcome[campaign] == verdict.outcome and verdict.domain == "overall"
            assert one.look.t.mean[campaign] == pytest.approx(verdict.d_external.mean, abs=1e-12)
            assert one.look.g.se[campaign] == pytest.approx(verdict.gap.se)


def replaced(answers, campaign):
    from dataclasses import replace

    return replace(answers, correct_Rn=answers.correct_Rn[campaign])


def reported_pool(pool, campaign):
    """One campaign's pool; a reported score shows no flips, so theirs is one number for all."""
    from dataclasses import replace

    def flat(group):
        outside = group.external
        if outside is None or outside.flips_F.ndim > 1:
            return group
        return RunReplicates(group.dev, replace(outside, flips_F=np.zeros((campaign + 1, 1))))

    return pool_alone(type(pool)(tuple(flat(group) for group in pool.groups)), campaign)


def test_the_first_right_alarm_is_of_what_parts():
    """By hand: a wrong name in round 1 is no right one, and a campaign without a right one is not counted."""
    looks = (("mean", OVERALL), ("mean", "cued"), ("mean", "honest"))
    alarms = np.zeros((4, 4, 3), dtype=bool)
    alarms[0, 0, 2] = alarms[0, 2, 1] = True  # a wrong family in round 1, the cued one in round 3
    alarms[1, 1, 0] = alarms[1, 3, 1] = True  # dev as a whole in round 2, the cued family in round 4
    alarms[2, 0, 2] = True  # a wrong family alone
    told = Told(looks, alarms, np.zeros((4, 4), dtype=bool), np.zeros(4), np.zeros(4), 64, {})
    assert first_right(told, (OVERALL, "cued")) == 2.5
    assert first_right(told, ()) is None and first_right(told, ("elsewhere",)) is None


@pytest.mark.slow
def test_worlds_without_a_cue_alarm_in_at_most_5_per_cent():
    """Measured 0, 8 and 0 of 500; a judge that alarmed in 10 % of one world would pass it with probability .008.

    (At most 3 of 100.)
    """
    found = {one["world"]: one for one in simulate_worlds(100, 1, items=300)}
    for name in ("no-shift", "dev-weight-without-cue", "score-only-no-shift"):
        assert found[name]["any_alarm"]["rate"] <= 0.03
    assert all(one["other_named"]["rate"] <= 0.03 for one in found.values())
    assert found["cue-in-equation"]["any_alarm"]["rate"] > found["cue-in-gravity"]["any_alarm"]["rate"]
    assert found["score-only"]["looks"] < found["cue-in-equation"]["looks"]


def test_worlds_command():
    done = CliRunner().invoke(app, ["simulate", "--worlds", "--campaigns", "2", "--json"])
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["world"] for one in found] == [world.name for world in WORLDS]
    assert "*First right alarm*: mean round" in page(found)


@pytest.mark.parametrize(
    "idle", ["null", "--items 100", "--anchors 3", "--origin 8", "--rounds 4", "--shared .3", "--cumulative"]
)
def test_worlds_refuse_what_they_do_not_read(idle):
    done = CliRunner().invoke(app, ["simulate", "--worlds", "--campaigns", "2", *idle.split()])
    name = idle.split()[0] if idle.startswith("--") else "scenario"
    assert done.exit_code == 1 and f"expected no {name} with --worlds" in done.stderr and "leave one" in done.stderr


def test_worlds_name_the_noises_there_are():
    done = CliRunner().invoke(app, ["simulate", "--worlds", "--campaigns", "2", "--noise", "nosuch"])
    assert done.exit_code == 1 and "expected one of the noises measured, specified, got 'nosuch'" in done.stderr
