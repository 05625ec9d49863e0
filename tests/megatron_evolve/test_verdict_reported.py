"""Verdicts on a target that reports one number a run: rarely, rightly, and with the families that dev blames."""

import re
from dataclasses import replace

import numpy as np
import pytest

from megatron_evolve.eval.power import minimum_detectable_effect
from megatron_evolve.eval.reported import WHOLE_WEIGHT, ReportedScores
from megatron_evolve.eval.seeds import SeedPool
from megatron_evolve.gap import GapTest, Look, decide, looks_at
from megatron_evolve.verdict import Verdict, judge
from megatron_evolve.window import RoundItems
from tests.megatron_evolve.test_verdict import ALL, FAMILIES, WEIGHTS, Latent, World, all_at, in_one_domain

ITEMS = 2000


def reported(one: RoundItems, items: int = ITEMS, step: float = 0.01) -> RoundItems:
    """The same round, its target telling a rounded mean of each run."""
    scores = {run.key: round(float(np.mean(run.correct)) / step) * step for run in one.external}
    outside = ReportedScores(scores, items, step)
    return RoundItems(one.number, one.anchor, one.dev_a, one.dev_b, outside, WEIGHTS, WHOLE_WEIGHT, one.origin)


def campaign(seed, dev, external, rounds=4, seed_sd=0.0, domains=()):
    rule = GapTest(estimands=ALL, rounds=tuple(range(1, rounds + 1)), window=4, domains=domains)
    latent = Latent(np.random.default_rng(seed), World(items=ITEMS, origin_items=ITEMS, seed_sd=seed_sd))
    pool, drawn, verdicts = SeedPool(()), [], []
    for number in rule.rounds:
        drawn.append(reported(latent.round(number, dev, external)))
        pool = pool.plus(drawn[-1].replicates())
        verdicts.append(judge(drawn, rule, pool))
    return verdicts


def test_a_large_gap_is_found_and_its_family_told():
    """Dev +10 pt, all from one family at +50: rounded scores of 2,000 items show nothing of it outside."""
    dev = dict.fromkeys(all_at(0.0), in_one_domain(3, 0.4))
    selected, mean, _, *of_domains = campaign(1, dev, all_at(-0.02), domains=FAMILIES)[-1]
    assert mean.outcome in ("DECOUPLED", "INVERSE") and mean.attributed_to == (FAMILIES[3],)
    assert Verdict.parse(mean.to_dict(), where="verdict") == mean
    assert {one.outcome for one in of_domains} == {"UNRESOLVED"}
    assert "external asked nothing of domain0" in of_domains[0].reason.lower()
    assert selected.d_external.se > 0.01, "two binomials of 2,000 items, no pairing"


def test_what_is_not_an_alarm_is_attributed_to_nobody():
    for verdict in campaign(2, all_at(0.02), all_at(0.02), rounds=1)[0]:
        assert not verdict.alarm and verdict.attributed_to == () and "attributed_to" not in verdict.to_dict()


def mean_of_one_round(dev_items: int, told_items: int) -> tuple[Verdict, Look, float]:
    """The mean over seven at +3 / 0 after one round, told as a score, and the look and level that decided it.

    What a seed is worth is known from 30 runs on many items, so that more items can help.
    """

    def told(number: int, world: World) -> RoundItems:
        one = Latent(np.random.default_rng(5), world).round(number, all_at(0.03), all_at(0.0))
        scores = {run.key: 0.6 + 0.002 * (place % 3 - 1) for place, run in enumerate(one.external)}
        outside = ReportedScores(scores, told_items, 0.002)
        return RoundItems(number, one.anchor, one.dev_a, one.dev_b, outside, WEIGHTS, WHOLE_WEIGHT)

    one, many = told(1, World(items=dev_items)), told(9, World(items=20_000, anchors=30))
    rule, pool = GapTest(rounds=(1, 2, 3, 4)), SeedPool((*many.replicates(), *one.replicates()))
    (_, looks), *_ = looks_at([one], rule, pool)
    decision = decide(looks, 1, rule)[1]
    return judge([one], rule, pool)[1], decision.look, float(decision.level)


def test_no_data_that_cannot_be_had_is_advised():
    """Nobody enlarges a leaderboard, and its items are the same in every round: the bound on their part stays."""
    verdict, look, _ = mean_of_one_round(500, 500)
    assert verdict.outcome == "UNRESOLVED" and look.t.item_variance > look.d.item_variance
    assert "nothing would settle it: one score of 500 items is too coarse" in verdict.reason

    verdict, look, level = mean_of_one_round(500, 200_000)
    assert verdict.outcome == "UNRESOLVED" and "external items" not in verdict.reason
    items = int(re.search(r"about ([\d,]+) dev-B items in all", verdict.reason)[1].replace(",", ""))
    for one, stays in ((look.d, 0.0), (look.g, look.t.item_variance)):
        more = replace(one, item_variance=stays + (one.item_variance - stays) * 500 / items, seeds=None)
        assert minimum_detectable_effect(more, level) <= one.mean, "so many are enough where a seed's noise is known"


def test_without_replicates_outside_nothing_is_said():
    latent = Latent(np.random.default_rng(3), World(items=ITEMS, anchors=1))
    one = reported(latent.round(1, all_at(0.1), all_at(0.0)))
    for verdict in judge([one], GapTest(estimands=ALL, rounds=(1,)), SeedPool(one.replicates()))[:2]:
        assert verdict.outcome == "UNRESOLVED" and "run the anchor twice" in verdict.reason


@pytest.mark.slow
def test_slope_at_beta_alarms_in_at_most_5_per_cent():
    """A judge that alarmed in 15 % would pass with probability .02 (at most 3 of 60)."""
    alarms = sum(
        any(
            verdict.alarm
            for of_round in campaign([4, seed], all_at(0.1), all_at(0.05), seed_sd=0.012)
            for verdict in of_round
        )
        for seed in range(60)
    )
    assert alarms <= 3
