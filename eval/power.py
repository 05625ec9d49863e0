"""Power: how often a test sees a true effect, the smallest it sees often enough, and how much more data it takes.

A one-sided test sees an effect when the estimate exceeds the half-width of its bound. Both vary: the estimate by its
standard error, the half-width with the variances it was taken from, which have few degrees of freedom where seeds
count. How few, the width itself tells: it is taken for that of a Student's t with the df at which t_df(level) is
half-width / se, so that the power is the noncentral t's,

    P(effect / se + Z > half-width / se x sqrt(W / df)),   Z ~ N(0, 1), W ~ chi^2(df)

which is exact where seeds are all of the variance and where they are none. With sampled variances what is stated to be
seen with 80 % is seen with 79 to 82 %, from 1 to 31 df, at levels .05 to .002 and any share of items, seeds and flips.

More data is asked the same way: an estimate that had it keeps its mean, and its variances shrink (`with_items`,
`with_seeds`, `with_rounds`); `times_needed` is the least factor at which all of a claim's tests hold together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megatron_evolve.eval.paired import Estimate

POWER = 0.8
# Beyond this many times the data of now, the honest advice is that nothing affordable settles it.
MOST_TIMES = 100

MOST_DF = 200  # the power is then the normal's to .002, and the chi^2 still smooth over the steps of Z

_Z = np.linspace(-6, 6, 61)
_DENSITY = np.exp(-(_Z**2) / 2) / np.exp(-(_Z**2) / 2).sum()


@dataclass(frozen=True)
class Bound:
    """How far a one-sided bound at `level` < .5 lies from an estimate of standard error `se`; accuracy units."""

    half_width: float
    se: float
    level: float

    @classmethod
    def of(cls, found: Estimate, level: float) -> "Bound":
        """Of one campaign's estimate."""
        return cls(found.half_width(level), found.se, level)

    @cached_property
    def df(self) -> float:
        """Degrees of freedom of the Student's t that has a bound of this width."""
        from scipy.special import stdtridf

        return min(MOST_DF, float(stdtridf(1 - self.level, self.half_width / self.se)))

    def power(self, effect: float) -> float:
        """Probability that this effect, if true, is seen."""
        from scipy.special import chdtr

        if not self.se:
            return float(effect > 0)
        widest = np.maximum(0.0, effect / self.se + _Z) * self.se / self.half_width
        return float(chdtr(self.df, self.df * widest**2) @ _DENSITY)

    def visible(self, power: float = POWER) -> float:
        """The true effect that is seen with this power; 0 without any variance."""
        return smallest_for_all([(1.0, self)], power)


def minimum_detectable_effect(found: Estimate, level: float, power: float = POWER) -> float:
    """The true effect that a one-sided test at this level sees with the given power."""
    return Bound.of(found, level).visible(power)


def smallest_for_all(shares: Sequence[tuple[float, Bound]], power: float = POWER) -> float:
    """The true effect at which all tests hold with this power; the one of each bound is to see `share x effect`.

    The product of their powers stands for that of all. Of two at 80 % it is a lower bound where the estimates are
    positively correlated; where they are not, the bound that needs no assumption (Bonferroni's) is at most .012 below.
    """
    from scipy.optimize import brentq

    def lacks(effect: float) -> float:
        return math.prod(one.power(share * effect) for share, one in shares) - power

    if not (far := max(one.half_width / share for share, one in shares)):
        return 0.0
    while lacks(far) < 0:
        far *= 2
    return float(brentq(lacks, 0.0, far, rtol=1e-6))


# --- more data -------------------------------------------------------------------------------------------------------


def with_items(found: Estimate, times: float, lasting: float = 0.0) -> Estimate:
    """The estimate on `times` the items, with what a seed is worth known as well as now.

    `lasting` is what of the item variance no further data takes off.
    """
    fresh = lasting + (found.item_variance - lasting) / times
    return replace(found, item_variance=fresh, item_df=found.item_df * times)


def with_seeds(found: Estimate, times: float, degrees: int, flips: float) -> Estimate:
    """The estimate from `times` the runs of every candidate in it, on the same items.

    Averaging runs averages their flips as well as their luck, and leaves the items that the candidates differ on.
    `flips` is the variance that flips give one run on these items. Each time as many runs again add `degrees` to the
    seed variance's: the number of runs where they join the pool it comes from.
    """
    kept = found.item_variance - min(found.item_variance, found.squared * flips) * (1 - 1 / times)
    return replace(_with_runs(found, times, degrees), item_variance=kept)


def with_rounds(found: Estimate, times: float, degrees: int, lasting: float = 0.0) -> Estimate:
    """The estimate over `times` the rounds, on fresh items and runs; as many again add `degrees` to its seeds'."""
    return _with_runs(with_items(found, times, lasting), times, degrees)


def _with_runs(found: Estimate, times: float, degrees: int) -> Estimate:
    seeds = found.seeds and replace(found.seeds, df=found.seeds.df + (times - 1) * degrees)
    return replace(found, squared=found.squared / times, seeds=seeds)


def power_of_all(sides: Sequence[Estimate], level: float) -> float:
    """Probability that every side is told from zero at this level, each on its own side of it, were its mean true."""
    return math.prod(Bound.of(one, level).power(abs(one.mean)) for one in sides)


def times_needed[Side](
    more: Callable[[Side, float], Estimate], sides: Sequence[Side], level: float, power: float = POWER
) -> float | None:
    """The least factor of data at which all sides are told from zero with this power; none up to `MOST_TIMES`.

    `more(side, factor)` is what a side would be with so much data, its mean unchanged.
    """
    from scipy.optimize import brentq

    def lacks(log_times: float) -> float:
        return power_of_all([more(one, math.exp(log_times)) for one in sides], level) - power

    most = math.log(MOST_TIMES)
    if lacks(most) < 0:
        return None
    return 1.0 if lacks(0.0) >= 0 else math.exp(brentq(lacks, 0.0, most, xtol=1e-3))
