"""Reported scores: a bound on what one number is worth that holds, and bad numbers refused."""

import math

import numpy as np
import pytest

from megatron_evolve.eval.paired import difference
from megatron_evolve.eval.reported import WHOLE_WEIGHT, ReportedScores, reported_contrast
from megatron_evolve.eval.seeds import RunReplicates, SeedPool

ITEMS, STEP = 400, 0.01


def board(rng, rounds, explorers=7, anchors=3, alike=0.6):
    """Scores of some rounds' runs on one set of items; a share `alike` of an item's answer is common to all."""
    known = rng.random(ITEMS) < 0.6
    found = []
    for number in range(rounds):
        runs = [("anchor", 10 * number + seed) for seed in range(anchors)] + [
            (f"c{n}", number) for n in range(explorers)
        ]
        own = rng.random((len(runs), ITEMS)) < 0.6
        right = np.where(rng.random((len(runs), ITEMS)) < alike, known, own)
        scores = {key: round(score / STEP) * STEP for key, score in zip(runs, right.mean(1).tolist(), strict=True)}
        found.append(ReportedScores(scores, ITEMS, STEP))
    return found


def mean_of_explorers(one, share):
    names = sorted({name for name, _ in one.runs} - {"anchor"})
    return difference({name: one.seeds_of(name) for name in names}, share) | difference(
        {"anchor": one.seeds_of("anchor")}, -share
    )


@pytest.mark.parametrize("alike", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_variance_bounds_what_is_drawn(alike, rounds):
    """The mean of seven explorers on one board, in 400 draws: no more spread than said (a variance is known to 7 %)."""
    rng, means, said = np.random.default_rng([1, rounds, int(10 * alike)]), [], []
    for _ in range(400):
        one = reported_contrast(
            [(part, mean_of_explorers(part, 1 / rounds)) for part in board(rng, rounds, alike=alike)]
        )
        means.append(one.means_F[0])
        said.append(one.variances_F[0])
    assert np.var(means) <= np.mean(said) * 1.2


def test_one_against_one_is_two_binomials_and_the_rounding():
    one = ReportedScores({("x", 0): 0.7, ("anchor", 0): 0.6}, ITEMS, STEP)
    found = reported_contrast([(one, {("x", 0): 1.0, ("anchor", 0): -1.0})])
    assert found.means_F[0] == pytest.approx(0.1)
    assert found.variances_F[0] == pytest.approx((0.7 * 0.3 + 0.6 * 0.4) / ITEMS + 2 * STEP**2 / 12)
    assert (found.num_items, found.dfs_F[0]) == (ITEMS, ITEMS - 1)
    twice = reported_contrast([(one, {("x", 0): 0.5, ("anchor", 0): -0.5})] * 2)
    assert twice.variances_F[0] == pytest.approx(found.variances_F[0] - STEP**2 / 12), "the items are the same again"


def test_replicates_tell_the_seeds_variance():
    one = ReportedScores({("anchor", seed): score for seed, score in enumerate((0.60, 0.62, 0.64))}, ITEMS)
    dev = one.replicates("anchor", (0, 1, 2))
    pool = SeedPool((RunReplicates(dev, dev),))
    found = pool.variance(0.0, WHOLE_WEIGHT, 1.0, WHOLE_WEIGHT)
    assert (found.replicate, found.flips, found.df) == (pytest.approx(4e-4), 0.0, 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (({}, ITEMS), "at least one run, got none"),
        (({("x", 0): 1.2}, ITEMS), "run x/0: expected a score between 0 and 1, got 1.2"),
        (({("x", 0): math.nan}, ITEMS), "between 0 and 1, got nan"),
        (({("x", 0): 0.5}, 1), "at least 2 items"),
        (({("x", 0): 0.5}, ITEMS, 1.0), "rounded to a step below 1"),
    ],
)
def test_bad_numbers_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        ReportedScores(*arguments)


def test_two_targets_are_not_pooled():
    one, other = (ReportedScores({("x", 0): 0.5, ("anchor", 0): 0.5}, n) for n in (ITEMS, 2 * ITEMS))
    with pytest.raises(ValueError, match="one target in all rounds"):
        reported_contrast([(part, {("x", 0): 1.0, ("anchor", 0): -1.0}) for part in (one, other)])
