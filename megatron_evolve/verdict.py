"""The verdict: what may be said of a round, and what would settle what may not. A pure function of the runs' answers.

The outcome is the transfer-gap test's (`gap.py`); here it gets its bounds, the smallest effect that it could have seen,
and a sentence.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from pydantic import Field

from megatron_evolve.eval.paired import Estimate
from megatron_evolve.eval.power import (
    MOST_TIMES,
    POWER,
    power_of_all,
    times_needed,
    with_items,
    with_rounds,
    with_seeds,
)
from megatron_evolve.eval.reported import WHOLE
from megatron_evolve.eval.seeds import SeedPool, weight_vector
from megatron_evolve.gap import (
    ALARMS,
    OVERALL,
    Decision,
    GapTest,
    Look,
    Outcome,
    Scope,
    check_window,
    decide,
    looks_at,
    smallest_visible,
)
from megatron_evolve.substrate.frozen import Frozen
from megatron_evolve.window import DESCRIPTION_ALPHA, Estimand, RoundItems, ranking_usable, seed_covariance

__all__ = ["OVERALL", "Bounds", "GapTest", "Verdict", "judge"]


class Bounds(Frozen):
    """An estimate with the one-sided bounds its verdict was decided by."""

    mean: float
    se: float = Field(ge=0, description="items and seeds together")
    low: float
    high: float
    level: float = Field(description="level of each bound: the share of alpha after Holm")

    @classmethod
    def of(cls, found: Estimate, level: float) -> Self:
        half = found.half_width(level)
        return cls(mean=found.mean, se=found.se, low=found.mean - half, high=found.mean + half, level=level)


class Verdict(Frozen):
    """What may be said. Accuracy units: 0.01 is one point."""

    outcome: Outcome
    estimand: Estimand
    domain: str = Field(description="a family, or `overall`")
    d_dev: Bounds | None = None
    d_external: Bounds | None = None
    gap: Bounds | None = Field(default=None, description="beta0 x dev gain - external gain")
    transfer_slope: float | None = Field(
        default=None, description="external gain over dev gain; none while the dev gain is not apart from zero at 5 %"
    )
    df: float | None = Field(default=None, description="degrees of freedom of the gap's seed variance")
    alpha_spent: float = Field(ge=0, description="level at which this one was tested; 0 if it could not alarm")
    minimum_detectable_effect: float | None = Field(
        default=None, description="dev gain that, had nothing of it reached the target, would be seen with 80 % power"
    )
    ranking_usable: bool = Field(description="dev still orders the explorers as the target does (one-sided 5 %)")
    attributed_to: tuple[str, ...] = Field(
        default=(),
        description="families that make up an alarm's dev gain, where the target tells none by family; no test of them",
    )
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `parse` reads it back. Without `attributed_to` where nothing is attributed."""
        return self.model_dump(mode="json", exclude=set() if self.attributed_to else {"attributed_to"})

    @property
    def alarm(self) -> bool:
        return self.outcome in ALARMS


def judge(rounds_in_window: Sequence[RoundItems], rule: GapTest, pool: SeedPool) -> tuple[Verdict, ...]:
    """The verdicts of the window's last round: every estimand overall, then every estimand in every domain.

    `rounds_in_window` are at most `rule.window` rounds in order, the pool holds all replicates so far. Raises
    ValueError for rounds out of order or of different suites, and whatever a comparison raises on bad items.
    """
    rounds = tuple(rounds_in_window)
    check_window(rounds, rule)
    found = looks_at(rounds, rule, pool)
    ranks = {look.domain: _ranks(scope, rounds, rule) for scope, looks in found for look in looks if not look.missing}
    own = SeedPool(tuple(replicates for one in rounds for replicates in one.replicates()))
    flips = {look.domain: _flips(scope, own, rule) for scope, looks in found for look in looks if not look.missing}
    verdicts = []
    last = rounds[-1]
    for decision in decide([look for _, looks in found for look in looks], last.number, rule):
        look = decision.look
        if look.missing:
            verdicts.append(_without_number(look))
        else:
            verdicts.append(_verdict(decision, ranks[look.domain], flips[look.domain], last, rule))
    return tuple(verdicts)


def _ranks(scope: Scope, rounds: Sequence[RoundItems], rule: GapTest) -> bool:
    return ranking_usable(rounds, *scope.weights, seed_covariance(scope.seeds, rule.beta0))


def _flips(scope: Scope, own: SeedPool, rule: GapTest) -> tuple[float, ...]:
    """Variance that flips give D, T and G of one run on the window's items; on the pool's, where nobody ran twice."""
    dev, external = scope.weights
    here = (own.variance(a, dev, b, external) for a, b in ((1.0, 0.0), (0.0, 1.0), (rule.beta0, -1.0)))
    return tuple((one or pooled).flips for one, pooled in zip(here, scope.seeds, strict=True))


def _without_number(look: Look) -> Verdict:
    return Verdict(
        outcome="UNRESOLVED",
        estimand=look.estimand,
        domain=look.domain,
        alpha_spent=0.0,
        ranking_usable=False,
        reason=_sentence(look.missing),
    )


def _attributed(look: Look, weights: Mapping[str, float]) -> tuple[str, ...]:
    """The fewest families that together make half of the dev change, the largest first, if the target names none."""
    if not _is_told_alone(look):
        return ()
    dev = look.pair.dev
    shares = weight_vector(weights, dev.families) * dev.means_F * math.copysign(1, look.d.mean)
    found: list[str] = []
    made = 0.0
    for place in np.argsort(-shares, kind="stable"):
        if made < abs(look.d.mean) / 2:
            found.append(dev.families[place])
            made += shares[place]
    return tuple(found)


def _verdict(decision: Decision, ranks: bool, flips: tuple[float, ...], last: RoundItems, rule: GapTest) -> Verdict:
    look, outcome, level, number = decision.look, decision.outcome, float(decision.level), last.number
    reason = f"round {number} is not a declared look, so it reports the effects and claims nothing"
    if number in rule.rounds and outcome == "UNRESOLVED":
        reason = _unresolved(look, flips, level, rule, number)
    elif number in rule.rounds:
        reason = _reason(outcome, look, ranks, level, rule)
    sure = min(look.d.p_above(), look.d.p_below()) <= DESCRIPTION_ALPHA / 2
    return Verdict(
        outcome=outcome,
        estimand=look.estimand,
        domain=look.domain,
        d_dev=Bounds.of(look.d, level),
        d_external=Bounds.of(look.t, level),
        gap=Bounds.of(look.g, level),
        transfer_slope=look.t.mean / look.d.mean if sure else None,
        df=look.g.df,
        alpha_spent=level if number in rule.rounds else 0.0,
        minimum_detectable_effect=smallest_visible(look, level, rule.beta0),
        ranking_usable=ranks,
        attributed_to=_attributed(look, last.dev_weights) if outcome in ALARMS else (),
        reason=_sentence(reason),
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _points(value: float) -> str:
    return f"{100 * value:+.1f} pt"


def _reason(outcome: Outcome, look: Look, ranks: bool, level: float, rule: GapTest) -> str:
    gained = f"dev changed by {_points(look.d.mean)} and the external target by {_points(look.t.mean)}"
    if outcome == "DECOUPLED":
        order = "; dev still ranks candidates as the target does" if ranks else ""
        return (
            f"{gained}: less than {rule.beta0:g} of the gain arrived (gap at least {_points(look.g.lower(level))})"
            + order
        )
    if outcome == "INVERSE":
        return f"{gained}: they move against each other"
    return f"{gained}: more than {rule.beta0:g} of the gain arrived (gap at most {_points(look.g.upper(level))})"


@dataclass(frozen=True)
class Side:
    """A test of an outcome: its estimate, the variance flips give one run of it, and that which no data takes off."""

    name: str
    now: Estimate
    flips: float
    lasting: float

    @property
    def at_best(self) -> Estimate:
        return replace(self.now, item_variance=self.lasting, squared=0.0, seeds=None)


def _unresolved(look: Look, flips: tuple[float, ...], level: float, rule: GapTest, number: int) -> str:
    """What stands in the way, and how much more of what would settle it if the observed effects were the true ones."""
    # The items of a target that tells scores alone are the same for ever: more of anything leaves their part.
    lasting = look.t.item_variance if _is_told_alone(look) else 0.0
    of_d, of_t, of_g = flips
    if look.d.mean > 0:
        sides = Side("the dev gain", look.d, of_d, 0.0), Side("the gap", look.g, of_g, lasting)
    elif look.t.mean > 0:
        sides = Side("the dev loss", look.d, of_d, 0.0), Side("the external gain", look.t, of_t, lasting)
    else:
        return (
            f"neither dev ({_points(look.d.mean)}) nor the external target ({_points(look.t.mean)}) rose: "
            "without a gain there is no transfer to judge"
        )
    open_sides = [one.name for one in sides if min(one.now.p_above(), one.now.p_below()) > level]
    text = f"{' and '.join(open_sides) or 'the gap'} cannot be told from zero at level {level:.2g}"
    return f"{text}; {_settled_by(look, sides, level, rule, number)}"


def _is_told_alone(look: Look) -> bool:
    return look.pair.external.families == (WHOLE,)


def _settled_by(look: Look, sides: Sequence[Side], level: float, rule: GapTest, number: int) -> str:
    pair, alone = look.pair, _is_told_alone(look)
    runs = pair.dev.coefficients
    ways = []
    if items := times_needed(lambda one, times: with_items(one.now, times, one.lasting), sides, level):
        dev, external = (_count(items, one.num_items) for one in (pair.dev, pair.external))
        ways.append(f"{dev} dev-B items in all" if alone else f"{dev} dev-B and {external} external items in all")
    if seeds := times_needed(lambda one, times: with_seeds(one.now, times, len(runs), one.flips), sides, level):
        mine = sum(coefficient > 0 for coefficient in runs.values())
        ways.append(f"{_count(seeds, mine)} candidate runs with {seeds:.1f} times the anchor's")
    # A verdict pools its window, and none is declared after the last round; the cumulative one reads a single round.
    left = sum(one > number for one in rule.rounds)
    most_rounds = 1 if look.estimand == "cumulative" else min(rule.window, pair.num_rounds + left)
    degrees = len(runs) - len({name for name, _ in runs})
    for rounds in range(pair.num_rounds + 1, most_rounds + 1):
        more = [with_rounds(one.now, rounds / pair.num_rounds, degrees, one.lasting) for one in sides]
        if power_of_all(more, level) >= POWER:
            ways.append(f"{rounds} such rounds pooled")
            break
    if ways:
        return f"at the observed effects about {' or '.join(ways)} would settle it with {100 * POWER:.0f} % power"
    if alone and power_of_all([one.at_best for one in sides], level) < POWER:
        return (
            "at the observed effects nothing would settle it: one score of "
            f"{pair.external.num_items:,} items is too coarse, however many runs are scored"
        )
    return f"at the observed effects no {MOST_TIMES}-fold of items or seeds would settle it, nor a window of rounds"


def _count(times: float, now: int) -> str:
    return f"{math.ceil(times * now):,}"
