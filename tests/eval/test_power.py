"""Power against sampled variances: what is stated to be seen with 80 % is, and what more data is said to bring."""

import math

import numpy as np
import pytest

from megatron_evolve.eval.paired import Estimate
from megatron_evolve.eval.power import (
    POWER,
    Bound,
    minimum_detectable_effect,
    power_of_all,
    smallest_for_all,
    times_needed,
    with_items,
    with_rounds,
    with_seeds,
)
from megatron_evolve.eval.seeds import SeedVariance

DRAWS = 8000  # the standard error of a share of .8 is .0045
SQUARED = 1 / 7 + 1 / 3


def known(share: float, flips: float, df: float, mean: float = 0.0) -> Estimate:
    """An estimate whose variances are the true ones: of 1, `share` is luck of seeds, and `flips` of the rest flips."""
    luck, flipped = share / SQUARED, flips * (1 - share) / SQUARED
    return Estimate(mean, max(1 - share, 1e-9), 800.0, SQUARED, SeedVariance(luck + flipped, flipped, df))


def seen(rng: np.random.Generator, true: Estimate, effect: float, level: float) -> float:
    """Share of draws of an effect that its one-sided test sees; each draws its mean and its replicates."""
    replicate = true.seeds.replicate * rng.chisquare(true.seeds.df, DRAWS) / true.seeds.df
    seeds = SeedVariance(replicate, np.full(DRAWS, true.seeds.flips), true.seeds.df)
    items = np.full(DRAWS, true.item_variance), np.full(DRAWS, true.item_df)
    drawn = Estimate(effect + true.se * rng.normal(size=DRAWS), *items, true.squared, seeds)
    return float(np.mean(drawn.p_above() <= level))


@pytest.mark.parametrize("df", [1, 2, 7, 9, 31])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_the_smallest_visible_effect_is_seen_in_four_of_five(share: float, df: float) -> None:
    """Within .03: four standard errors, and .01 of the closed form. A normal error for the mean gave .67 at 2 df."""
    rng = np.random.default_rng([1, df, int(10 * share)])
    for level in (0.05, 0.00625):
        true = known(share, 0.8, df)
        assert seen(rng, true, minimum_detectable_effect(true, level), level) == pytest.approx(POWER, abs=0.03)


def test_power_is_the_noncentral_ts_where_seeds_are_all_and_the_normals_where_items_are() -> None:
    special = pytest.importorskip("scipy.special")
    for df in (1, 3, 9, 40):
        bound = Bound.of(known(1.0, 0.0, df), 0.01)
        for effect in (2.0, 5.0, 20.0):
            assert bound.power(effect) == pytest.approx(1 - special.nctdtr(df, effect, bound.half_width), abs=2e-3)
        assert bound.power(bound.visible(0.9)) == pytest.approx(0.9)
    # Independent items of .12 discordance, n = 500: the published one-sided figure of 3.9 points at 80 % power.
    assert minimum_detectable_effect(Estimate(0.0, 0.12 / 500, math.inf), 0.05) == pytest.approx(0.0385, abs=1e-4)
    assert minimum_detectable_effect(Estimate(0.0, 0.0, math.inf), 0.05) == 0


def test_all_tests_need_more_than_the_hardest_of_them() -> None:
    one = Bound.of(known(0.5, 0.5, 9), 0.01)
    alone, both = one.visible(), smallest_for_all([(1.0, one), (1.0, one)])
    assert one.power(both) == pytest.approx(POWER**0.5) and both > alone
    assert smallest_for_all([(1.0, one), (0.1, one)]) == pytest.approx(10 * alone, rel=1e-3), "the hard one decides"


def test_more_data_settles_in_four_of_five_and_where_it_cannot_there_is_no_number() -> None:
    """Each way to more, against draws with so much of it: within .03, as above."""
    rng = np.random.default_rng(2)
    now, level = known(0.3, 0.9, 31, mean=2.8), 0.00625
    ways = {
        "items": lambda one, times: with_items(one, times),
        "seeds": lambda one, times: with_seeds(one, times, 10, one.seeds.flips),
        "rounds": lambda one, times: with_rounds(one, times, 2),
    }
    for name, more in ways.items():
        times = times_needed(more, [now], level)
        assert times is not None and 1 < times < 100, name
        assert seen(rng, more(now, times), now.mean, level) == pytest.approx(POWER, abs=0.03), name
        assert power_of_all([more(now, times)], level) == pytest.approx(POWER, abs=0.01)
    few = known(0.9, 0.9, 2, mean=1.0)
    assert times_needed(ways["items"], [few], level) is None, "seeds of 2 df are most of the variance"
    assert times_needed(lambda one, times: with_items(one, times, 0.2), [known(0.0, 0.0, 31, 1.0)], level) is None
    steady = known(0.0, 0.0, 1e5, mean=1.0)
    assert times_needed(lambda one, times: with_seeds(one, times, 10, 0.0), [steady], level) is None, (
        "no flips, no luck"
    )
