"""Comparisons that few items tell apart: no verdict, in one campaign as in many, and no share of the level for others.

The statistical tests have fixed seeds; each says how often a judge that breaks the rule would have got through.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_evolve.constitution import Constitution
from megatron_evolve.eval.discordant import LEAST_DISCORDANT
from megatron_evolve.eval.paired import Estimate, RunItems, effect
from megatron_evolve.eval.reported import WHOLE_WEIGHT, ReportedScores
from megatron_evolve.eval.seeds import SeedPool
from megatron_evolve.gap import GapTest, decide, looks_at, rule_of
from megatron_evolve.review import claimed_gains
from megatron_evolve.simulate.campaigns import run_campaigns
from megatron_evolve.simulate.draw import Draw, Plan, State
from megatron_evolve.simulate.exam import Exam
from megatron_evolve.simulate.noise import FAMILIES, Noise
from megatron_evolve.simulate.scenarios import SCENARIOS
from megatron_evolve.verdict import judge
from megatron_evolve.window import RoundItems
from tests.megatron_evolve.test_simulate import alone, pool_alone
from tests.megatron_evolve.test_verdict import WEIGHTS, Latent, World, all_at


def rare(accuracy: float, external: int, gain: float, step: float | None = None):
    """Campaigns whose slope is exactly beta0, their anchor at this accuracy, and their plan."""
    even = replace(
        SCENARIOS["slope-at-beta"],
        uneven=0.0,
        external_share=external / 500,
        gains=lambda rng, size: (np.full((*size, len(FAMILIES)), gain), np.full((*size, len(FAMILIES)), gain / 2)),
    )
    return even, Plan(exam=Exam.of(dict.fromkeys(FAMILIES, accuracy), {}, step))


@pytest.mark.parametrize("shared", [0.0, 0.6])
@pytest.mark.parametrize(("accuracy", "external", "gain"), [(0.002, 100, 0.1), (0.01, 100, 0.1), (0.95, 100, 0.04)])
def test_slope_at_beta_alarms_in_at_most_5_per_cent_near_0_and_1(accuracy, external, gain, shared):
    """A judge that alarmed in 10 % would pass with probability .008 (at most 10 of 200); it was up to .35."""
    scenario, plan = rare(accuracy, external, gain)
    noise = Noise(redraw=0.3, seed_sd=0.0, seed_correlation=0.9, shared=shared)
    assert run_campaigns(scenario, noise, 200, 5, plan).alarms.any((1, 2)).mean() <= 0.05


def test_many_campaigns_with_few_items_are_judged_as_each_alone():
    campaigns = 6
    scenario, plan = rare(0.01, 200, 0.1)
    draw = Draw(
        np.random.default_rng(3), Noise(redraw=0.3, seed_sd=0.0, seed_correlation=0.9), scenario, plan, campaigns
    )
    state = State.at_origin(*scenario.draw(draw.rng, campaigns, plan.explorers))
    rule, pool = rule_of(Constitution(), FAMILIES), draw.pool()
    items, _ = draw.round(1, state)
    pool = pool.plus(items.replicates())
    looks = [look for _, of_scope in looks_at([items], rule, pool) for look in of_scope]
    together, few = decide(looks, 1, rule), 0
    for campaign in range(campaigns):
        splits = (alone(answers, campaign) for answers in (items.dev_answers, items.external_answers))
        single = RoundItems(1, items.anchor, items.dev_a, *splits, items.dev_weights, items.external_weights)
        for one, verdict in zip(together, judge([single], rule, pool_alone(pool, campaign)), strict=True):
            assert np.broadcast_to(one.outcome, campaigns)[campaign] == verdict.outcome
            few += verdict.gap is None
            if verdict.gap is not None:
                assert one.level[campaign] == verdict.alpha_spent, "a look with too few keeps its share"
    assert 0 < few < campaigns * len(together)


def flipped(one: RoundItems, domain: str, flips: int) -> RoundItems:
    """The same round; outside all agree in a domain, but for the first explorer on so many of its items."""

    def right(run: RunItems) -> np.ndarray:
        mine = np.flatnonzero(run.families == domain)
        correct = run.correct.copy()
        correct[mine] = 0
        correct[mine[: flips * (run.candidate == "c0")]] = 1
        return correct

    external = [RunItems(run.candidate, run.seed, run.item_ids, run.families, right(run)) for run in one.external]
    return RoundItems(1, one.anchor, {"anchor": 0.5, "c0": 0.6}, one.dev_b, external, WEIGHTS, WEIGHTS)


@pytest.mark.parametrize("flips", [3, LEAST_DISCORDANT - 1, LEAST_DISCORDANT])
def test_too_few_items_give_no_verdict_and_both_counts(flips):
    latent = Latent(np.random.default_rng(61), World())
    pool, one = latent.pool(), latent.round(1, all_at(0.3), all_at(0.3))
    rule = GapTest(rounds=(1,), estimands=("selected",), domains=("domain2", "domain3"))
    _, named, other = judge([flipped(one, "domain2", flips)], rule, pool)
    if flips == LEAST_DISCORDANT:
        assert named.gap is not None
        return
    said = f"Only about {flips} of 100 external items tell the two sides apart, expected {LEAST_DISCORDANT}: ask more"
    assert named.outcome == "UNRESOLVED" and named.gap is None and named.reason.startswith(said)
    assert other.gap.level == rule.level / 2, "two looks share the half, one of them with nothing to say"


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_scores_that_are_all_0_or_all_1_never_alarm(anchor):
    """Half of a gain of 4 points arrives, on a score whose variance would be rounding alone: it alarmed in .16."""
    latent = Latent(np.random.default_rng(67), World(items=2000, flips=0.02))
    one = latent.round(1, all_at(0.04), all_at(0.0))
    for arrived in (0.0, 0.01, 0.02):
        scores = {run.key: abs(anchor - arrived * (run.candidate != "anchor")) for run in one.external}
        told = ReportedScores(scores, 100, 0.01)
        here = RoundItems(1, one.anchor, one.dev_a, one.dev_b, told, WEIGHTS, WHOLE_WEIGHT)
        for verdict in judge([here], GapTest(rounds=(1,)), SeedPool(here.replicates())):
            assert verdict.outcome == "UNRESOLVED" and verdict.gap is None
            assert "none of 100 external answers of one side are right, or are wrong" in verdict.reason.lower()


def test_what_one_of_seven_flips_counts_for_little():
    """Fourteen items that all seven turn right, and 98 that one does: as skew as few items, though 112 differ."""
    ids, families = np.arange(1000), np.repeat("a", 1000)
    right = [ids < 14 for _ in range(7)]
    right = [one | ((ids >= 14 + 14 * place) & (ids < 28 + 14 * place)) for place, one in enumerate(right)]
    runs = [RunItems(f"c{place}", 0, ids, families, one) for place, one in enumerate(right)]
    anchor = RunItems("anchor", 0, ids, families, np.zeros(1000))
    assert effect(runs, [anchor], {"a": 1.0}).discordant == pytest.approx(18, abs=3)
    assert effect(runs[:1], [anchor], {"a": 1.0}).discordant == 28, "the items that flipped"
    both = [RunItems("x", 0, ids, families, ids % 50 == 0), RunItems("y", 0, ids, families, ids % 50 == 1)]
    assert effect(both[:1], both[1:], {"a": 1.0}).discordant == 40, "as many each way: no skew"


def test_no_gain_is_claimed_of_few_items_and_they_keep_their_share_of_the_level():
    facts = SimpleNamespace(policy=SimpleNamespace(objective="dev"), explorers=("x", "y"), anchor="anchor")

    def claimed(**found: Estimate) -> set[str]:
        compared = SimpleNamespace(facts=facts, weights=SimpleNamespace(splits=("dev-b",)))
        compared.estimate = lambda name, split: found.get(name)
        return claimed_gains(compared)

    few, sure = (Estimate(0.1, 1e-4, 400.0, discordant=number) for number in (LEAST_DISCORDANT - 1, LEAST_DISCORDANT))
    nearly = Estimate(0.018, 1e-4, 400.0, discordant=100)
    assert 0.025 < nearly.p_above() < 0.05
    assert claimed(x=sure, y=few) == {"x"}
    assert claimed(x=nearly) == {"x"} and claimed(x=nearly, y=few) == set()
