"""Paired differences against oracles: item bootstrap, direct simulation, enumeration; and the laws they keep."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_evolve.eval.paired import (
    Answers,
    Estimate,
    RunItems,
    contrast,
    effect,
    mcnemar_midp,
    probability_better,
    wilson,
)
from megatron_evolve.eval.reported import quantisation_variance
from megatron_evolve.eval.seeds import Replicates, RunReplicates, SeedPool, SeedVariance, seed_variance, weight_vector

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
SIZES = {"a": 60, "b": 120, "c": 90}
FAMILIES = np.repeat(list(SIZES), list(SIZES.values()))


def draw_runs(rng, names, seeds=1, shares=None):
    """Runs on one item set whose answers lean on a common difficulty, so that they are correlated."""
    easy = rng.random(FAMILIES.size)
    return [
        RunItems(name, seed, np.arange(FAMILIES.size), FAMILIES, rng.random(FAMILIES.size) < 0.15 + 0.7 * easy)
        for name in names
        for seed in range(seeds)
    ]


def relabelled(run, mapping):
    return RunItems(run.candidate, run.seed, run.item_ids, [mapping[name] for name in run.families], run.correct)


# A bootstrap of B draws knows a standard error to 1 / sqrt(2 B) = 1.1 %; 5 % is more than four of those.
DRAWS, BOOTSTRAP_TOLERANCE = 4000, 0.05


def bootstrap_se(rng, values_by_family, weights):
    """Standard error of the weighted mean when items are drawn again within each family, once for all runs."""
    w = weight_vector(weights, list(values_by_family))
    total = np.zeros(DRAWS)
    for share, values in zip(w, values_by_family.values(), strict=True):
        total += share * values[rng.integers(0, values.size, (DRAWS, values.size))].mean(1)
    return total.std(ddof=1)


def test_one_candidate_agrees_with_the_item_bootstrap():
    rng = np.random.default_rng(1)
    candidate, anchors = draw_runs(rng, ["x"], 2), draw_runs(rng, ["anchor"], 3)
    difference = np.mean([r.correct for r in candidate], 0) - np.mean([r.correct for r in anchors], 0)
    found = effect(candidate, anchors, WEIGHTS)
    by_family = {name: difference[name == FAMILIES] for name in SIZES}
    assert found.mean == pytest.approx(sum(WEIGHTS[name] * by_family[name].mean() for name in SIZES))
    assert found.se == pytest.approx(bootstrap_se(rng, by_family, WEIGHTS), rel=BOOTSTRAP_TOLERANCE)


def test_mean_over_candidates_agrees_with_a_bootstrap_that_draws_items_once_for_all():
    rng = np.random.default_rng(2)
    runs = draw_runs(rng, ["x", "y", "z", "anchor"])
    difference = np.mean([r.correct for r in runs[:3]], 0) - runs[3].correct
    by_family = {name: difference[name == FAMILIES] for name in SIZES}
    found = effect(runs[:3], runs[3:], WEIGHTS)
    assert found.se == pytest.approx(bootstrap_se(rng, by_family, WEIGHTS), rel=BOOTSTRAP_TOLERANCE)
    alone = [effect([run], runs[3:], WEIGHTS) for run in runs[:3]]
    assert found.mean == pytest.approx(np.mean([one.mean for one in alone]))
    # Three differences to one anchor are not independent: their mean is less sure than that would say.
    assert found.se > math.sqrt(sum(one.se**2 for one in alone)) / 3


def test_items_that_return_in_another_round_are_one_draw():
    rng = np.random.default_rng(3)
    runs = draw_runs(rng, ["x", "anchor"])
    coefficients = {("x", 0): 0.5, ("anchor", 0): -0.5}
    same = contrast([(Answers.of(runs), coefficients), (Answers.of(runs), coefficients)])
    once = contrast([(Answers.of(runs), {key: 2 * value for key, value in coefficients.items()})])
    fresh = [RunItems(run.candidate, run.seed, run.item_ids + 1000, run.families, run.correct) for run in runs]
    apart = contrast([(Answers.of(runs), coefficients), (Answers.of(fresh), coefficients)])
    np.testing.assert_allclose(same.variances_F, once.variances_F)
    np.testing.assert_allclose(apart.variances_F, once.variances_F / 2)
    assert dict(same.coefficients) == dict(once.coefficients), "the runs are the same draws in both rounds"


def test_laws_of_an_effect():
    rng = np.random.default_rng(4)
    runs = draw_runs(rng, ["x", "anchor"], 2)
    x, anchor = runs[:2], runs[2:]
    found = effect(x, anchor, WEIGHTS)
    back = effect(anchor, x, WEIGHTS)
    assert (back.mean, back.se, back.df) == pytest.approx((-found.mean, found.se, found.df)), "antisymmetry"

    order = rng.permutation(FAMILIES.size)
    shuffled = [RunItems(r.candidate, r.seed, r.item_ids[order], r.families[order], r.correct[order]) for r in x]
    moved = effect(shuffled, anchor, WEIGHTS)
    assert (moved.mean, moved.se) == pytest.approx((found.mean, found.se)), "item order"

    for names in itertools.permutations(SIZES):
        mapping = dict(zip(SIZES, names, strict=True))
        weights = {mapping[name]: weight for name, weight in WEIGHTS.items()}
        renamed = effect([relabelled(r, mapping) for r in x], [relabelled(r, mapping) for r in anchor], weights)
        assert renamed == found, "to the bit: sums over families are rounded once"

    twin = [RunItems("twin", run.seed, run.item_ids, run.families, run.correct) for run in x]
    both = effect([*x, *twin], anchor, WEIGHTS)
    assert (both.mean, both.se) == pytest.approx((found.mean, found.se)), "a copy brings no item evidence"
    assert effect(x, anchor, {name: 7 * weight for name, weight in WEIGHTS.items()}).mean == pytest.approx(found.mean)


def test_seed_variance_is_s2_times_one_over_m_plus_one_over_a():
    rng = np.random.default_rng(5)
    seeds = SeedVariance(replicate=5e-4, flips=1e-4, df=9)
    runs = draw_runs(rng, ["x", "y", "anchor"], 3)
    of_y = runs[3:5]
    found = effect([*runs[:3], *of_y], runs[6:], WEIGHTS, seeds)
    assert found.seed_variance == pytest.approx(4e-4 * ((1 / 3 + 1 / 2) / 4 + 1 / 3))
    assert found.df == 9 and found.half_width(0.05) > effect(runs[:3], runs[6:], WEIGHTS).half_width(0.05)
    flat = effect(runs[:3], runs[6:], WEIGHTS, SeedVariance(1e-4, 2e-4, 9))
    assert flat.seed_variance == 0, "less than the flips alone: no excess"


def test_excess_over_flips_is_unbiased_and_df_count_within_candidates():
    """300 draws of 4 + 3 replicates: the mean of s^2 - psi_rep / 2n is the planted variance, to 4 standard errors."""
    rng = np.random.default_rng(6)
    sd, n, excess = 0.03, 120, []
    codes = np.repeat([0, 1], n // 2)
    for _ in range(300):
        groups = []
        for name, k in (("x", 4), ("y", 3)):
            known = rng.random(n) < 0.6
            luck = sd * rng.normal(size=(k, 1))
            right = rng.random((k, n)) < np.where(known, 0.8, 0.3) + luck
            answers = Replicates.of([(name, seed) for seed in range(k)], ("a", "b"), codes, right.astype(float))
            groups.append([(1.0, answers, {"a": 0.5, "b": 0.5})])
        found = seed_variance(groups)
        assert found.df == 5
        excess.append(found.replicate - found.flips)
    assert np.mean(excess) == pytest.approx(sd**2, abs=4 * np.std(excess) / math.sqrt(300))


def test_flips_are_psi_over_two_n():
    rng = np.random.default_rng(7)
    n = 4000
    pair = rng.random((2, n)) < 0.7
    found = Replicates.of([("x", 0), ("x", 1)], ("a",), np.zeros(n, dtype=int), pair.astype(float))
    psi = np.mean(pair[0] != pair[1])
    assert found.flips_F[0] == pytest.approx(psi / (2 * n), rel=0.01)


def test_pool_takes_a_run_once_and_survives_json():
    rng = np.random.default_rng(8)
    answers = Answers.of(draw_runs(rng, ["origin"], 4))
    first = RunReplicates(answers.replicates("origin", (0, 1, 2, 3)))
    again = RunReplicates(answers.replicates("origin", (0, 1, 2)))
    pool = SeedPool((first,)).plus([again])
    found = pool.variance(1.0, WEIGHTS, 0.0, {})
    assert found.df == 3
    assert RunReplicates.from_dict(first.to_dict()).to_dict() == first.to_dict()
    assert SeedPool(()).variance(1.0, WEIGHTS, 0.0, {}) is None
    assert pool.variance(0.5, WEIGHTS, -1.0, WEIGHTS) is None, "no replicate has external answers"


def test_gap_variance_is_that_of_the_combination_per_run():
    """Dev and external share the seed's luck; the gap must see the covariance, not two variances."""
    rng = np.random.default_rng(9)
    answers = Answers.of(draw_runs(rng, ["origin"], 6))
    one = answers.replicates("origin", tuple(range(6)))
    found = SeedPool((RunReplicates(one, one),)).variance(1.0, WEIGHTS, -1.0, WEIGHTS)
    assert found.replicate == pytest.approx(0)


def test_tail_is_students_t_without_items_and_normal_without_seeds():
    stdtr = pytest.importorskip("scipy.special").stdtr
    for df in (1, 2, 7):
        alone = Estimate(3.0, 1e-12, math.inf, 1.0, SeedVariance(1.0, 0.0, df))
        assert alone.p_above() == pytest.approx(stdtr(df, -3.0), rel=1e-5)
        assert alone.p_above() + alone.p_below() == pytest.approx(1)
    one_df = Estimate(0.0, 1e-12, math.inf, 1.0, SeedVariance(1.0, 0.0, 1))
    assert one_df.upper(0.05) == pytest.approx(6.314, abs=1e-3)
    none = Estimate(0.0, 1.0, math.inf, 1.0, SeedVariance(1e-12, 1.0, 1))
    assert none.upper(0.05) == pytest.approx(1.645, abs=1e-3)


def test_answers_that_never_differ_leave_the_seeds_alone():
    same = [RunItems(name, 0, np.arange(FAMILIES.size), FAMILIES, np.ones(FAMILIES.size)) for name in ("x", "anchor")]
    assert effect(same[:1], same[1:], WEIGHTS).half_width(0.05) == 0
    found = effect(same[:1], same[1:], WEIGHTS, SeedVariance(1e-4, 0.0, 7))
    assert found.mean == 0 and found.half_width(0.05) > 0.02 and found.p_above() == pytest.approx(0.5)


@pytest.mark.parametrize("runs", [1, 3, 7])
def test_a_copy_is_neither_better_nor_worse(runs):
    """Answers that agree item by item, some right and some wrong, leave rounding of either sign behind."""
    anchors = draw_runs(np.random.default_rng(12), ["anchor"], runs)
    copies = [replace(run, candidate="copy") for run in anchors]
    for seeds in (SeedVariance(1e-4, 0.0, 7), SeedVariance(1e-4, 9e-5, 7), SeedVariance(1e-4, 2e-4, 7)):
        found = effect(copies, anchors, WEIGHTS, seeds)
        assert (found.mean, found.item_variance) == (0.0, 0.0)
        assert probability_better(found) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("df", [2, 7])
@pytest.mark.parametrize("seed_over_items", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("flips", [0.3, 1.0])
def test_size_with_few_degrees_of_freedom(df, seed_over_items, flips):
    """Of 3,000 draws under the null the 1 % test is false in at most 1 %, plus three Monte-Carlo errors (.55 %)."""
    rng = np.random.default_rng([10, df, int(seed_over_items)])
    s2 = (seed_over_items + flips) * rng.chisquare(df, 3000) / df
    found = rng.normal(size=3000) * math.sqrt(1 + seed_over_items)
    false = sum(
        Estimate(mean, 1.0, math.inf, 1.0, SeedVariance(replicate, flips, df)).p_above() <= 0.01
        for mean, replicate in zip(found, s2, strict=True)
    )
    assert false / 3000 <= 0.0155


def enumerated_midp(b, c):
    """Two-sided mid-p from all ways the discordant items could have fallen."""
    n, least = b + c, min(b, c)
    falls = [sum(way) for way in itertools.product((0, 1), repeat=n)]
    below, at = sum(f < least for f in falls), sum(f == least for f in falls)
    return min(1.0, 2 * (below + at / 2) / len(falls))


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (3, 3), (7, 2), (0, 9), (5, 6)])
def test_mcnemar_midp_by_enumeration(b, c):
    assert mcnemar_midp(b, c) == pytest.approx(enumerated_midp(b, c))
    assert mcnemar_midp(b, c) == mcnemar_midp(c, b)


def test_mcnemar_midp_against_statsmodels():
    mcnemar = pytest.importorskip("statsmodels.stats.contingency_tables", reason="statsmodels is not installed").mcnemar
    binom = pytest.importorskip("scipy.stats").binom
    for b, c in ((3, 11), (40, 61)):
        exact = mcnemar([[0, b], [c, 0]], exact=True).pvalue
        assert mcnemar_midp(b, c) == pytest.approx(exact - binom.pmf(min(b, c), b + c, 0.5))


def test_wilson_known_values_and_ends():
    assert wilson(0.81, 263) == pytest.approx((0.7583, 0.8528), abs=2e-4)
    assert wilson(0.0, 20)[0] == 0 and wilson(1.0, 20)[1] == 1
    assert wilson(0.0, 20)[1] > 0.1, "no item right does not mean that none can be"
    with pytest.raises(ValueError, match="at least one item"):
        wilson(0.0, 0)


def test_what_is_said_of_an_estimate():
    found = Estimate(0.021, 0.0128**2, math.inf)
    assert probability_better(found, prior_sd=1e9) == pytest.approx(1 - found.p_above())
    assert 0.5 < probability_better(found) < probability_better(found, prior_sd=1e9)
    assert probability_better(Estimate(0.0, 0.0, math.inf)) == 0.5
    assert found.lower(0.025) < found.mean < found.upper(0.025)
    assert found.p_above() + found.p_below() == pytest.approx(1)
    # A rounded uniform error has variance step^2 / 12.
    values = np.random.default_rng(11).random(200_000)
    assert np.var(values - np.round(values, 1)) == pytest.approx(quantisation_variance(0.1), rel=0.01)
    with pytest.raises(ValueError, match="varies over items"):
        Estimate(0.1, 0.0, math.inf).p_above()


def run(name="x", seed=0, ids=(1, 2, 3, 4), families=("a",) * 4, correct=(1, 0, 1, 1)):
    return RunItems(name, seed, ids, families, correct)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: run(correct=(1, 0, math.nan, 1)), "NaN"),
        (lambda: run(correct=(1, 0, 2, 1)), "between 0 and 1"),
        (lambda: run(ids=(1, 2, 2, 4)), "every item once"),
        (lambda: run(ids=(), families=(), correct=()), "at least one item"),
        (lambda: run(ids=(1, 2)), "one id, family and answer"),
        (lambda: effect([run()], [run("anchor", ids=(1, 2, 3, 5))], {"a": 1}), "same items"),
        (
            lambda: effect([run()], [run("anchor", ids=(1, 2, 3), families=list("aaa"), correct=(1, 1, 1))], {"a": 1}),
            "same it",
        ),
        (lambda: effect([run()], [run("anchor", families=list("aabb"))], {"a": 1, "b": 1}), "same family"),
        (lambda: effect([run()], [run("anchor")], {"b": 1}), "a weight for every family, got none for a"),
        (lambda: effect([run()], [run("anchor")], {"a": 1, "b": 1}), "got none of b"),
        (lambda: effect([run()], [run("anchor")], {"a": math.nan}), "finite weights"),
        (lambda: effect([run(), run()], [run("anchor")], {"a": 1}), "every run once"),
        (lambda: effect([], [run("anchor")], {"a": 1}), "one side empty"),
        (
            lambda: effect([run(families=list("aaab"))], [run("anchor", families=list("aaab"))], {"a": 1, "b": 1}),
            "2 items of family b",
        ),
    ],
)
def test_bad_input_is_one_sentence(make, says):
    with pytest.raises(ValueError, match=says) as error:
        make()
    assert "expected" in str(error.value) and "\n" not in str(error.value)


def test_runs_that_were_scored_otherwise_are_never_paired():
    x, anchor = (
        RunItems(name, 0, np.arange(FAMILIES.size), FAMILIES, np.zeros(FAMILIES.size), comparison=key)
        for name, key in (("x", "a" * 64), ("anchor", "b" * 64))
    )
    with pytest.raises(ValueError, match="scored alike, got the comparison keys aaaaaaaaaaaa and bbbbbbbbbbbb"):
        Answers.of([x, anchor])
    assert Answers.of([x, replace(anchor, comparison="a" * 64)]).runs == (("x", 0), ("anchor", 0))
