"""Simulated campaigns: judged as one campaign is, calibrated as they say, and the figures that must hold.

The statistical tests have fixed seeds, so they pass or fail for ever; each says how often a judge that breaks the rule
would have got through.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_evolve.cli import app
from megatron_evolve.constitution import Constitution
from megatron_evolve.eval.paired import Answers, RunItems
from megatron_evolve.eval.seeds import Replicates, RunReplicates, SeedPool
from megatron_evolve.gap import decide, looks_at, rule_of
from megatron_evolve.simulate.campaigns import PLAN, alarms_of, run_campaigns
from megatron_evolve.simulate.demanded import HARMLESS, few_degrees
from megatron_evolve.simulate.draw import Draw, Plan, State
from megatron_evolve.simulate.exam import EVEN
from megatron_evolve.simulate.figures import figures, simulate, table
from megatron_evolve.simulate.noise import ACCURACY, FAMILIES, MEASURED, SPECIFIED
from megatron_evolve.simulate.scenarios import SCENARIOS
from megatron_evolve.verdict import judge
from megatron_evolve.window import RoundItems

WEIGHTS = EVEN.dev_weights


def start(scenario, noise, campaigns, seed=1, plan=PLAN):
    """Dice and the first state of some campaigns."""
    draw = Draw(np.random.default_rng(seed), noise, scenario, plan, campaigns)
    return draw, State.at_origin(*scenario.draw(draw.rng, campaigns, plan.explorers))


def alone(answers: Answers, campaign: int) -> list[RunItems]:
    """One campaign's answers as runs of its own."""
    families = [FAMILIES[code] for code in answers.codes]
    rows = answers.correct_Rn[campaign]
    return [RunItems(*key, answers.item_ids, families, right) for key, right in zip(answers.runs, rows, strict=True)]


def pool_alone(pool: SeedPool, campaign: int) -> SeedPool:
    def one(found: Replicates | None) -> Replicates | None:
        if found is None:
            return None
        return replace(found, means_kF=found.means_kF[campaign], flips_F=found.flips_F[campaign])

    return SeedPool(tuple(RunReplicates(one(group.dev), one(group.external)) for group in pool.groups))


@pytest.mark.parametrize("name", ["inverse", "few-looks", "slope-at-beta"])
def test_many_campaigns_are_judged_as_each_alone(name):
    """The oracle of the batch is the product: `judge` on every campaign's own runs."""
    campaigns = 6
    draw, state = start(SCENARIOS[name], MEASURED.replace(shared=0.3), campaigns)
    rule, pool, rounds = rule_of(Constitution(), FAMILIES), draw.pool(), []
    for number in (1, 2):
        rounds.append(draw.round(number, state)[0])
        pool = pool.plus(rounds[-1].replicates())
    looks = [look for _, of_scope in looks_at(rounds, rule, pool) for look in of_scope]
    together = decide(looks, 2, rule)
    assert {str(outcome) for one in together for outcome in one.outcome} >= {"UNRESOLVED"}
    for campaign in range(campaigns):
        single = [
            RoundItems(
                one.number,
                one.anchor,
                one.dev_a,
                *(alone(answers, campaign) for answers in (one.dev_answers, one.external_answers)),
                WEIGHTS,
                WEIGHTS,
            )
            for one in rounds
        ]
        for one, verdict in zip(together, judge(single, rule, pool_alone(pool, campaign)), strict=True):
            assert (one.look.estimand, one.look.domain) == (verdict.estimand, verdict.domain)
            assert one.outcome[campaign] == verdict.outcome
            assert one.level[campaign] == verdict.alpha_spent
            for mine, theirs in ((one.look.d, verdict.d_dev), (one.look.g, verdict.gap)):
                assert mine.mean[campaign] == pytest.approx(theirs.mean, abs=1e-12)
                assert mine.se[campaign] == pytest.approx(theirs.se)


def test_cumulative_is_asked_of_campaigns_that_have_left_the_origin():
    """The oracle is the product: the others' standing settings are the origin, so there is no such look."""
    plan, campaigns = PLAN.judging_origin(), 6
    draw, state = start(SCENARIOS["null"], SPECIFIED, campaigns, plan=plan)
    away = np.arange(campaigns) % 2 == 0
    state = replace(state, standing_d_BF=np.where(away[:, None], 0.2, 0.0) + state.standing_d_BF, away_B=away)
    rule, pool = rule_of(plan.rules, ()), draw.pool()
    items, _ = draw.round(1, state)
    looks = [look for _, of_scope in looks_at([items], rule, pool) for look in of_scope]
    found = alarms_of(looks, 1, rule, away)
    assert [look.estimand for look in looks] == ["selected", "mean", "cumulative"]
    assert found[:, 2].tolist() == away.tolist()
    for campaign in range(campaigns):
        splits = (alone(answers, campaign) for answers in (items.dev_answers, items.external_answers))
        origin = items.origin if away[campaign] else items.anchor
        single = RoundItems(1, items.anchor, items.dev_a, *splits, WEIGHTS, WEIGHTS, origin)
        verdicts = judge([single], rule, pool_alone(pool, campaign))
        assert [verdict.alarm for verdict in verdicts] == found[campaign].tolist()
        assert ("still the origin" in verdicts[2].reason) != away[campaign]


@pytest.mark.parametrize(
    "noise", [MEASURED, SPECIFIED, SPECIFIED.replace(shared=0.6)], ids=["measured", "12", "shared"]
)
def test_the_dice_are_as_calibrated(noise):
    """Means, flips and luck of 200 campaigns' runs, each within four of its standard errors."""
    scenario = replace(SCENARIOS["decoupled"], gains=SCENARIOS["inverse"].gains)
    draw, state = start(scenario, noise, 200)
    items, order = draw.round(1, state)
    dev, external = items.dev_answers.correct_Rn, items.external_answers.correct_Rn
    assert dev[:, 0].mean() == pytest.approx(ACCURACY, abs=4 * np.sqrt(0.24 / 1e5 + noise.seed_sd**2 / 200))
    flips = (dev[:, 0] != dev[:, 1]).mean()
    assert flips == pytest.approx(noise.flips + (0.02 if noise.seed_sd else 0), abs=0.01), "luck flips some too"
    leader = np.take_along_axis(state.d_BKF.mean(-1), order, axis=1)[:, 0]
    gained = dev[:, 4].mean(-1) - dev[:, :3].mean((1, 2))  # the second seed, which nothing selected
    error = np.sqrt(noise.flips / 500 + 1.4 * noise.seed_sd**2) / np.sqrt(200)
    assert gained.mean() == pytest.approx(leader.mean(), abs=4 * error)
    luck = [split.mean(-1) - split.mean(-1).mean(1, keepdims=True) for split in (dev[:, :3], external[:, :3])]
    seen = [float((one**2).sum() / 400) for one in luck]
    assert seen == pytest.approx([noise.seed_sd**2 + noise.flips / 1000] * 2, rel=4 * np.sqrt(2 / 400))
    shared = ((dev[:, 7] == dev[:, 8]).mean() - (dev[:, 7] == dev[:, 0]).mean()) > 0.01
    assert shared == (noise.shared > 0)


def test_the_same_seed_gives_the_same_figures():
    first, again, other = (figures(SCENARIOS["offset"], SPECIFIED, 30, seed) for seed in (3, 3, 4))
    del first["seconds"], again["seconds"], other["seconds"]
    assert first == again and first["power_by_round"] != other["power_by_round"]
    assert first["power_by_round"] == sorted(first["power_by_round"])
    assert first["bound_by_round"][-1] >= first["power_by_round"][-1]


def alarms(name, noise, campaigns, plan=PLAN, seed=1):
    return float((run_campaigns(SCENARIOS[name], noise, campaigns, seed, plan).first_round <= 4).mean())


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_campaigns_alarm_in_at_most_5_per_cent(name):
    """A judge that alarmed in 10 % would pass with probability .014 (at most 7 of 150). Measured: at most .03."""
    assert alarms(name, MEASURED, 150) <= 0.05


HARD = [
    pytest.param(MEASURED.replace(shared=0.6), Plan(), id="shared-flips"),
    pytest.param(SPECIFIED.replace(shared=0.6), Plan(), id="shared-flips-no-luck"),
    pytest.param(MEASURED, few_degrees(Plan()), id="few-degrees-of-freedom"),
    pytest.param(MEASURED, Plan().judging_origin(), id="three-estimands"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "plan"), HARD)
def test_harmless_campaigns_alarm_in_at_most_5_per_cent_where_it_is_hard(noise, plan):
    """For each scenario, a judge that alarmed in 10 % would pass with probability .014 (at most 7 of 150)."""
    found = {name: alarms(name, noise, 150, plan) for name in HARMLESS if name != "slope-at-beta"}
    assert max(found.values()) <= 0.05, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "plan"), [*HARD, pytest.param(MEASURED.replace(seed_sd=0.03), Plan(), id="loud-seeds")]
)
def test_slope_at_beta_alarms_in_at_most_5_per_cent_where_it_is_hard(noise, plan):
    """The hardest of them. A judge that alarmed in 8 % would pass with probability .013 (at most 20 of 400)."""
    assert alarms("slope-at-beta", noise, 400, plan) <= 0.05


@pytest.mark.slow
def test_power_with_three_anchor_runs_and_500_items_a_split():
    """All seven at +3 / 0, alpha paid, domains judged too: at least .8 within four rounds.

    Measured .84 and .85, of 2,000 each. At 800 campaigns a power of .76 would pass with probability .005.
    """
    told = figures(SCENARIOS["decoupled"], SPECIFIED, 800, 1)
    assert told["power_by_round"][-1] >= 0.8
    assert told["bound_by_round"][-1] >= 0.88, "with the noise known; .95 was specified for it"


def test_selected_finds_one_exploiter_of_seven():
    """At least 95 % of first rounds, specified noise; a mean over seven hides it. A power of .9 would pass at .014."""
    told = figures(SCENARIOS["one-exploiter"], SPECIFIED, 150, 1)["power_by_round_and_estimand"]
    assert told["selected"][0] >= 0.95 and told["mean"][0] < 0.2


def test_the_parted_family_is_named_and_no_other():
    told = figures(SCENARIOS["decoupled-domain"], SPECIFIED, 100, 1)
    assert told["power_by_round"][1] >= 0.9 and told["wrong_scope_per_campaign"]["rate"] <= 0.05


def test_cumulative_sees_drift_that_the_window_does_not():
    told = figures(SCENARIOS["drift"], SPECIFIED, 100, 1)["power_by_round_and_estimand"]
    assert told["cumulative"][-1] >= 0.35 and told["selected"][-1] == told["mean"][-1] == 0


def test_every_harmless_row_says_that_at_most_5_per_cent_may_alarm():
    """Under whatever conditions, and of the page the harmless ones stand together under it."""
    found = simulate(["null", "tracks", "decoupled"], "specified", 2, 1)
    assert [one["demand"] for one in found] == ["at most .05 of campaigns alarm"] * 2 + [""]
    assert table(found).count("must hold: at most .05 of campaigns alarm") == 1


@pytest.mark.slow
def test_simulate_without_a_scenario_prints_all_that_must_hold():
    """Every figure that was demanded is a row: what it was simulated under, its interval, and what must hold."""
    done = CliRunner().invoke(app, ["simulate", "--campaigns", "2", "--json"])
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["scenario"] for one in found[: len(SCENARIOS)]] == list(SCENARIOS)
    rest = found[len(SCENARIOS) :]
    assert all(one["demand"] for one in rest)

    def told(**same):
        return [one["scenario"] for one in rest if all(one[name] == value for name, value in same.items())]

    for hard in ({"shared_flips": 0.6}, {"anchor_runs": 2, "origin_runs": 2}):
        assert told(**hard, noise="measured", estimands=["selected", "mean"]) == list(HARMLESS)
    assert told(estimands=["selected", "mean", "cumulative"], shared_flips=0.0, anchor_runs=3) == list(HARMLESS)
    same = {"noise": "specified", "items": 500, "anchor_runs": 3, "shared_flips": 0.0}
    assert told(**same) == ["decoupled", "one-exploiter"]
    assert {"low", "high"} < set(rest[0]["false_alarm_per_campaign"]) and len(rest[-1]["power_interval_by_round"]) == 4


@pytest.mark.parametrize(
    "words",
    [
        ("simulate", "--items", "999999999995"),
        ("simulate", "--campaigns", "100001"),
        ("simulate", "--origin", "65"),
        ("calibrate", "nowhere", "--campaigns", "100001"),
    ],
)
def test_more_than_can_be_simulated_is_refused(words):
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit) and words[-2] in done.stderr


def timeless(one):
    return {**one, "seconds": 0}


def test_simulate_command():
    runner = CliRunner()
    done = runner.invoke(app, ["simulate", "null", "inverse", "--campaigns", "20", "--json"])
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["scenario"] for one in found] == ["null", "inverse"]
    named = runner.invoke(app, ["simulate", "--scenario", "inverse", "--campaigns", "20", "--json"])
    assert timeless(json.loads(named.stdout)) == timeless(found[1])
    for one in found:
        assert {"campaigns", "seconds", "power_by_round", "rounds_to_detect", "external_reached"} <= set(one)
    assert found[0]["false_alarm_per_campaign"] == {"rate": 0.0, "low": 0.0, "high": pytest.approx(0.161, abs=1e-3)}
    assert found[0]["looks_used"] == {"campaign": 64, "to_detect": None}
    text = runner.invoke(app, ["simulate", "inverse", "--campaigns", "20"]).stdout
    assert re.search(r"^inverse +\S+ \[", text, re.MULTILINE) and "20 campaigns a scenario" in text
    sized = [
        "simulate",
        "inverse",
        "--campaigns",
        "20",
        "--items",
        "100",
        "--anchors",
        "2",
        "--shared",
        "0.6",
        "--json",
    ]
    one = json.loads(runner.invoke(app, sized).stdout)
    assert (one["items"], one["anchor_runs"], one["shared_flips"]) == (100, 2, 0.6)
    assert one["power_by_round"][0] < found[1]["power_by_round"][0]
    assert "expected a multiple of 5 items" in runner.invoke(app, ["simulate", "--items", "101"]).stderr
    wrong = runner.invoke(app, ["simulate", "nul"])
    assert wrong.exit_code == 1 and "expected a scenario, got 'nul'" in wrong.stderr
    assert "expected one of the noises" in runner.invoke(app, ["simulate", "--noise", "loud"]).stderr
