"""Paired differences: how far two candidates are apart on the same items, and how sure that is, in closed form.

A score of a split is the weighted mean over families of the mean over items. Everything here is linear in the scores of
single runs, so one value carries it all: a `Contrast`, the weighted sum of runs (anchor negative), kept by family. Its
variance has two parts.

    items   an item is a cluster: it is drawn once for all runs (and rounds) that answer it. Sum the contrast within the
            item, then take the sample variance over items within each family (Miller 2024, arXiv 2411.00640).
    seeds   a training run is a draw too (`seeds.py`). Its excess over item flips is added once per run, times the run's
            squared coefficient: s^2 (1/m + 1/A) for m runs against A anchor runs.

The item variance has hundreds of degrees of freedom (Satterthwaite over families), the seed variance a handful, so a
tail is the items' t averaged over what the seed variance may be. Letters: R runs, n items, F families; `...` stands for
leading axes, of which one campaign has none and the simulator one, over campaigns.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from statistics import NormalDist

import numpy as np

from megatron_evolve.eval.discordant import LEAST_DISCORDANT
from megatron_evolve.eval.seeds import (
    Replicates,
    RunKey,
    SeedVariance,
    family_means,
    sums_by,
    total,
    weight_vector,
    weighted_sum,
)

# Real steps are 1-2 points, so a difference between candidates is believed to be N(0, 2 points) before it is measured.
PRIOR_SD = 0.02
ROUNDING = 1e-12  # what sums of a few hundred runs err by is below 1e-14; one item of a million moves a mean by 1e-6
FEW_ITEMS = 90  # degrees of freedom from which the normal form of Student's t is right to 2 %

_NO_SEEDS = (np.zeros(1), np.ones(1))


@dataclass(frozen=True, eq=False)
class RunItems:
    """What one run answered on one split: per item its id, its family and whether it was right (0..1 if averaged).

    `comparison` is the score's comparison key: runs of different ones are never set against each other.
    """

    candidate: str
    seed: int
    item_ids: np.ndarray
    families: np.ndarray
    correct: np.ndarray
    comparison: str = ""

    def __post_init__(self) -> None:
        for name, dtype in (("item_ids", None), ("families", None), ("correct", float)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))
        sizes = self.item_ids.shape, self.families.shape, self.correct.shape
        if len(set(sizes)) != 1 or self.correct.ndim != 1 or not self.correct.size:
            raise ValueError(
                f"{self}: expected one id, family and answer for each of at least one item, got {sizes}: score it again"
            )
        if not (np.isfinite(self.correct).all() and self.correct.min() >= 0 and self.correct.max() <= 1):
            raise ValueError(f"{self}: expected correctness between 0 and 1, got NaN or beyond: score it again")
        if (found := len(set(self.item_ids.tolist()))) != self.item_ids.size:
            raise ValueError(
                f"{self}: expected every item once, got {self.item_ids.size} rows of {found} items: drop the duplicates"
            )

    def __str__(self) -> str:
        return f"run {self.candidate}/{self.seed}"

    @property
    def key(self) -> RunKey:
        return self.candidate, self.seed


@dataclass(frozen=True, eq=False)
class Answers:
    """Several runs over one set of items: `correct_Rn`, (..., R, n), the items' families as codes into `families`."""

    runs: tuple[RunKey, ...]
    families: tuple[str, ...]
    item_ids: np.ndarray
    codes: np.ndarray
    counts: np.ndarray
    correct_Rn: np.ndarray

    @classmethod
    def of(cls, runs: Sequence[RunItems]) -> "Answers":
        """Stacks runs in the first one's item order.

        Raises ValueError unless all answered the same items, asked by one engine and scored by one metric.
        """
        if not runs:
            raise ValueError("expected at least one run to compare, got none: score one")
        first, keys = runs[0], tuple(run.key for run in runs)
        if len(set(keys)) != len(keys):
            raise ValueError(f"expected every run once, got {max(keys, key=keys.count)} twice: drop one")
        if other := next((run for run in runs if run.comparison != first.comparison), None):
            raise ValueError(
                f"expected {first} and {other} to be scored alike, got the comparison keys {first.comparison[:12]} and "
                f"{other.comparison[:12]}: another engine, version, metric or suite made one of them; score both again"
            )
        names, codes = np.unique(first.families, return_inverse=True)
        counts = np.bincount(codes)
        if counts.min() < 2:
            raise ValueError(
                f"expected at least 2 items of family {names[counts.argmin()]}, got 1, from which no variance comes: "
                "ask more items, or leave the family out"
            )
        rows = np.stack([_in_order_of(first, run) for run in runs])
        return cls(keys, tuple(str(name) for name in names), first.item_ids, codes, counts, rows)

    def family_means_RF(self) -> np.ndarray:
        return family_means(self.correct_Rn, self.codes, self.counts)

    def seeds_of(self, candidate: str) -> tuple[int, ...]:
        return tuple(seed for name, seed in self.runs if name == candidate)

    def replicates(self, candidate: str, seeds: Sequence[int]) -> Replicates:
        """These runs of one candidate, as what their seed variance needs."""
        rows = [self.runs.index((candidate, seed)) for seed in seeds]
        correct_kn = self.correct_Rn[..., rows, :]
        return Replicates.of([self.runs[row] for row in rows], self.families, self.codes, correct_kn)


def _in_order_of(first: RunItems, run: RunItems) -> np.ndarray:
    same_ids = run.item_ids is first.item_ids or np.array_equal(run.item_ids, first.item_ids)
    if same_ids and (run.families is first.families or np.array_equal(run.families, first.families)):
        return run.correct
    place = {item: position for position, item in enumerate(run.item_ids.tolist())}
    missing = [item for item in first.item_ids.tolist() if item not in place]
    if missing or run.item_ids.size != first.item_ids.size:
        raise ValueError(
            f"expected {first} and {run} on the same items, got {first.item_ids.size} and {run.item_ids.size} with "
            f"{len(missing)} of the first missing in the second: score both on one draw of the suite"
        )
    order = np.array([place[item] for item in first.item_ids.tolist()])
    if not np.array_equal(run.families[order], first.families):
        raise ValueError(f"expected {first} and {run} to name the same family for each item: score both with one suite")
    return run.correct[order]


@dataclass(frozen=True, eq=False)
class Contrast:
    """A weighted sum of runs, by family: its mean, its item variance and the degrees of freedom of that variance.

    thirds_F sums the third power of what the variance sums the squares of; discordant_F counts the items that tell the
    two sides apart, where the sum is not zero.
    """

    families: tuple[str, ...]
    means_F: np.ndarray
    variances_F: np.ndarray
    dfs_F: np.ndarray
    thirds_F: np.ndarray
    discordant_F: np.ndarray
    num_items: int
    coefficients: Mapping[RunKey, float]

    def items_of(self, weights: Mapping[str, float]) -> int:
        """Items of the families that weigh; a family's variance has one degree of freedom less."""
        return int(np.sum(self.dfs_F[weight_vector(weights, self.families) > 0] + 1))


def contrast(parts: Sequence[tuple[Answers, Mapping[RunKey, float]]]) -> Contrast:
    """Sums `coefficient x run` over the runs of every part; a part is one round's items.

    An item or a run that returns in a later part is one draw, not two: its shares are added before they are squared.
    Raises ValueError if the parts ask different families or an item changes its family.
    """
    families = parts[0][0].families
    means, influences, apart, totals = np.zeros(len(families)), [], [], {}
    for answers, coefficients in parts:
        if answers.families != families:
            raise ValueError(
                f"expected the same families in all rounds, got {', '.join(families)} and "
                f"{', '.join(answers.families)}: pool only rounds of one suite"
            )
        row = np.array([coefficients.get(key, 0.0) for key in answers.runs])
        value = row @ answers.correct_Rn
        mean = sums_by(answers.codes, value, len(families)) / answers.counts
        scale = 1 / np.sqrt(answers.counts * (answers.counts - 1.0))
        means = means + mean
        influences.append((value - mean[..., answers.codes]) * scale[answers.codes])
        apart.append(np.abs(value) > ROUNDING)
        for key, coefficient in coefficients.items():
            totals[key] = totals.get(key, 0.0) + coefficient
    (influence, times_apart), codes = _by_item([answers for answers, _ in parts], influences, apart)
    squares = influence**2
    of_each = squares, squares * influence, times_apart > 0
    variances, thirds, discordant = (sums_by(codes, one, len(families)) for one in of_each)
    dfs = np.bincount(codes, minlength=len(families)) - 1.0
    return Contrast(families, means, variances, dfs, thirds, discordant, codes.size, totals)


def _by_item(answers: Sequence[Answers], *shares: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Each of `shares`, an array (..., n) a part, summed by item over the parts, and the items' families."""
    joined = [np.concatenate(one, axis=-1) for one in shares]
    codes_each = np.concatenate([part.codes for part in answers])
    ids, place = np.unique(np.concatenate([part.item_ids for part in answers]), return_inverse=True)
    if ids.size == codes_each.size:  # fresh items in every part: each is its own sum
        return joined, codes_each
    codes = np.empty(ids.size, dtype=int)
    codes[place] = codes_each
    if not np.array_equal(codes[place], codes_each):
        raise ValueError(
            "expected an item to keep its family over the rounds, got one that changed: give it another id"
        )
    return [sums_by(place, one, ids.size) for one in joined], codes


@dataclass(frozen=True)
class Estimate:
    """A difference and what is known of its error; accuracy units (0.01 is a point).

    `squared` is the sum of the squared run coefficients: how often one run's variance counts. `discordant` is the
    number of items that tell the two sides apart, and no more of them than would, all telling the same way, make the
    difference as skew as it is: k such rare items have a skewness of 1 / sqrt(k).
    """

    mean: float | np.ndarray
    item_variance: float | np.ndarray
    item_df: float | np.ndarray
    squared: float = 0.0
    seeds: SeedVariance | None = None
    discordant: float | np.ndarray = math.inf

    @property
    def enough(self) -> bool | np.ndarray:
        """Whether enough items tell the two sides apart for anything to be claimed of the difference."""
        return self.discordant >= LEAST_DISCORDANT

    @property
    def seed_variance(self) -> float | np.ndarray:
        return self.squared * self.seeds.excess if self.seeds else 0.0

    @property
    def se(self) -> float | np.ndarray:
        return np.sqrt(self.item_variance + self.seed_variance)

    @property
    def df(self) -> float:
        """Of the seed variance, the scarcer of the two; of the items' where seeds are not counted."""
        return self.seeds.df if self.seeds else self.item_df

    @lru_cache(maxsize=4096)  # noqa: B019 (keyed by value: a verdict asks for the same few widths again)
    def half_width(self, alpha: float) -> float:
        """How far a one-sided bound at level alpha < .5 lies from the mean of one campaign; 0 without any variance."""
        if not self.se:
            return 0.0
        from scipy.optimize import brentq

        far = 4 * self.se
        while self._tail(far) > alpha:
            far *= 4
        return float(brentq(lambda x: math.log(self._tail(x) / alpha), 0.0, far, rtol=1e-6))

    def lower(self, alpha: float) -> float:
        """One-sided lower bound at level alpha."""
        return self.mean - self.half_width(alpha)

    def upper(self, alpha: float) -> float:
        return self.mean + self.half_width(alpha)

    @cached_property
    def _above(self) -> float | np.ndarray:
        if not np.any(self.se):
            raise ValueError(
                f"expected a difference that varies over items, got {self.mean} on each: no p-value comes from that"
            )
        upper = self._tail(np.abs(self.mean))
        return np.where(np.asarray(self.mean) > 0, upper, 1 - upper)[()]

    def p_above(self) -> float | np.ndarray:
        """p of "not above zero", one-sided. Raises ValueError where no variance was seen."""
        return self._above

    def p_below(self) -> float | np.ndarray:
        return 1 - self.p_above()

    def _tail(self, deviation: float | np.ndarray) -> float | np.ndarray:
        """P(estimate - truth > deviation), averaged over what the seed variance may be (`SeedVariance.draws`)."""
        from scipy.special import ndtr, stdtr

        excess, probability = self.seeds.draws() if self.seeds else _NO_SEEDS
        far, items, df = (np.asarray(one)[..., None] for one in (deviation, self.item_variance, self.item_df))
        t = far / np.sqrt(np.maximum(items + self.squared * excess, 1e-300))
        # Student's t as a normal (Abramowitz & Stegun 26.7.8), 20 times faster than the exact tail in the simulator's
        # inner loop: equal to 2 % from 90 df on, and too wide, never too narrow, below.
        tail = ndtr(-t * (1 - 1 / (4 * df)) / np.sqrt(1 + t * t / (2 * df)))
        few = (
            df < FEW_ITEMS
        )  # the normal form never falls below ndtr(-sqrt(2 df)), which no search for a bound would end
        if few.any():
            tail = np.where(few, stdtr(df, -t), tail)
        return tail @ probability


def estimate(
    terms: Sequence[tuple[float, Contrast, Mapping[str, float]]], seeds: SeedVariance | None = None
) -> Estimate:
    """The sum of `factor x contrast`, each weighted over its families; the terms' item sets are apart (dev, external).

    All terms must sum the same runs. `seeds` is the variance of the same sum per run; without it only items count.
    """
    mean, parts, dfs, thirds, counted = 0.0, [], [], [], []
    for factor, one, weights in terms:
        w = weight_vector(weights, one.families)
        mean += factor * weighted_sum(one.means_F, w)
        parts.append((factor * w) ** 2 * one.variances_F)
        dfs.append(one.dfs_F)
        thirds.append((factor * w) ** 3 * one.thirds_F)
        counted.append((w > 0) * one.discordant_F)
    part, df = np.concatenate(parts, axis=-1), np.concatenate(dfs)
    items, spread = total(part), total(part**2 / df)
    third, count = (total(np.concatenate(one, axis=-1)) for one in (thirds, counted))
    # Sides that agree on every item differ by rounding alone, which has a sign and a spread and means nothing.
    nothing = np.asarray(items) < ROUNDING**2
    mean, items = (np.where(nothing, 0.0, one)[()] for one in (mean, items))
    squared = math.fsum(coefficient**2 for coefficient in terms[0][1].coefficients.values())
    with np.errstate(divide="ignore", invalid="ignore"):
        item_df = np.where(nothing, math.inf, np.divide(items**2, spread))[()]
        discordant = np.where(nothing, 0.0, np.minimum(count, np.divide(items**3, np.square(third))))[()]
    return Estimate(mean, items, item_df, squared, seeds, discordant)


def effect(
    candidate_runs: Sequence[RunItems],
    anchor_runs: Sequence[RunItems],
    weights: Mapping[str, float],
    seeds: SeedVariance | None = None,
) -> Estimate:
    """Candidate minus anchor on the same items; over several candidates the mean, each counted once.

    Raises ValueError for no runs, a run twice, unequal item sets or a family without a weight.
    """
    candidates = {run.candidate for run in candidate_runs}
    if not (candidates and anchor_runs) or candidates & {run.candidate for run in anchor_runs}:
        raise ValueError(
            "expected runs of a candidate and of another as anchor, got one side empty or shared: name both"
        )
    answers = Answers.of([*candidate_runs, *anchor_runs])
    anchors = sorted({run.candidate for run in anchor_runs})
    coefficients = difference({name: answers.seeds_of(name) for name in candidates}, 1.0)
    coefficients |= difference({name: answers.seeds_of(name) for name in anchors}, -1.0)
    return estimate([(1.0, contrast([(answers, coefficients)]), weights)], seeds)


def difference(seeds: Mapping[str, Sequence[int]], factor: float) -> dict[RunKey, float]:
    """Coefficients of `factor x` the mean over candidates of the mean over their runs."""
    return {
        (name, seed): factor / len(seeds) / len(of_candidate)
        for name, of_candidate in sorted(seeds.items())
        for seed in of_candidate
    }


def probability_better(found: Estimate, prior_sd: float = PRIOR_SD) -> float | np.ndarray:
    """Posterior probability that the true difference is above 0, before measuring N(0, prior_sd^2).

    Normal shrinkage of the mean, the estimate's own tail for its error. For acting and display; never inside a test.
    .5 where nothing was learnt, which is also the answer where no item tells the two apart.
    """
    if not np.any(found.se):
        return 0.5
    kept = prior_sd**2 / (prior_sd**2 + found.se**2)
    shrunk = replace(found, mean=np.sqrt(kept) * found.mean)
    return 1 - shrunk.p_above()


def wilson(mean: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share (Wilson 1927); n may be an effective, fractional count."""
    if not (n > 0 and 0 <= mean <= 1):
        raise ValueError(f"expected a share between 0 and 1 of at least one item, got {mean} of {n}: score some items")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_midp(only_first: int, only_second: int) -> float:
    """Two-sided mid-p of McNemar's test (Fagerland et al. 2013), from the two discordant counts.

    Says whether two checkpoints differ. With seed noise it rejects 11-27 % of pairs that differ in nothing but the
    seed, so it describes single runs and promotes nothing.
    """
    n, least = only_first + only_second, min(only_first, only_second)
    if min(only_first, only_second) < 0:
        raise ValueError(f"expected counts, got {only_first} and {only_second}: count discordant items")
    tail = sum(math.comb(n, count) for count in range(least + 1))
    return min(1.0, (2 * tail - math.comb(n, least)) / 2**n)
