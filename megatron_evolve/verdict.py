"""The verdict: does a gain on dev still reach the external target? A pure function of what the rounds' runs answered.

Let D be the dev gain over the same-round anchor, T the external gain, and G = beta0 x D - T the transfer gap: what dev
promised, at the least carry-over beta0, and the target did not get. For each estimand (`window.py`):

    DECOUPLED   lower(D) > 0 and lower(G) > 0
    INVERSE     D > 0 and T < 0, or D < 0 and T > 0, both significant
    TRACKING    lower(D) > 0 and upper(G) < 0
    UNRESOLVED  otherwise, with what would settle it

Each outcome is an intersection-union test (Berger 1982), so its p-value is the larger of its two. DECOUPLED and INVERSE
alarm. All alarms of a campaign together are false with probability alpha at most, whatever their dependence: every
declared round has an equal share, half of it for the overall estimands and half for the domains, each half by Holm
(1979). TRACKING claims are held to the same levels among themselves. The null includes T = beta0 x D exactly.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field

from megatron_evolve.eval.paired import Estimate, estimate, minimum_detectable_effect
from megatron_evolve.eval.seeds import SeedPool, SeedVariance
from megatron_evolve.substrate.frozen import Frozen
from megatron_evolve.window import (
    DESCRIPTION_ALPHA,
    Estimand,
    Pair,
    RoundItems,
    pair_of,
    ranking_usable,
    seed_covariance,
)

OVERALL = "overall"
Outcome = Literal["TRACKING", "DECOUPLED", "INVERSE", "UNRESOLVED"]

# Beyond this many times the data of now, the honest advice is that nothing affordable settles it.
MOST_TIMES = 100


class GapTest(Frozen):
    """The rule, from the constitution: never changed and never re-estimated during a campaign."""

    rounds: tuple[int, ...] = Field(description="numbers of the rounds at which a look is declared; they share alpha")
    domains: tuple[str, ...] = Field(default=(), description="families judged one by one, in addition")
    estimands: tuple[Estimand, ...] = Field(default=("selected", "mean", "cumulative"), min_length=1)
    beta0: float = Field(default=0.5, gt=0, description="least share of a dev gain that must reach the target")
    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="false-alarm probability per campaign")
    window: int = Field(default=2, ge=1, description="rounds that a verdict pools")

    @property
    def level(self) -> float:
        """Share of one look at one half (overall, or domains), before Holm."""
        return self.alpha / 2 / max(1, len(self.rounds))


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
    """What may be said. Accuracy units: 0.01 is one point. JSON by `model_dump`, back by `parse`."""

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
    reason: str

    @property
    def alarm(self) -> bool:
        return self.outcome in ("DECOUPLED", "INVERSE")


@dataclass(frozen=True, eq=False)
class _Look:
    """One estimand in one domain, estimated; `missing` says why there is no number.

    `asked` is false where nothing was compared, which is known before this round's answers are: such a look takes no
    share of the level. One that was asked and shows no variance keeps its share.
    """

    estimand: Estimand
    domain: str
    pair: Pair
    d: Estimate | None = None
    t: Estimate | None = None
    g: Estimate | None = None
    ranking_usable: bool = False
    missing: str = ""
    asked: bool = True

    @property
    def decoupled_p(self) -> float:
        return max(self.d.p_above(), self.g.p_above())

    @property
    def inverse_p(self) -> float:
        return min(max(self.d.p_above(), self.t.p_below()), max(self.d.p_below(), self.t.p_above()))

    @property
    def alarm_p(self) -> float:
        return 1.0 if self.missing else min(self.decoupled_p, self.inverse_p)

    @property
    def tracking_p(self) -> float:
        return 1.0 if self.missing else max(self.d.p_above(), self.g.p_below())


@dataclass(frozen=True, eq=False)
class _Scope:
    """Overall or one domain: its weights on both splits, and the seed variance of D, T and G under them."""

    domain: str
    weights: tuple[Mapping[str, float], Mapping[str, float]]
    seeds: tuple[SeedVariance | None, ...]
    ranking_usable: bool


def _scope(domain: str, rounds: Sequence[RoundItems], rule: GapTest, pool: SeedPool) -> _Scope | str:
    dev, external = rounds[-1].dev_weights, rounds[-1].external_weights
    if domain != OVERALL:
        if absent := [split for split, weights in (("dev", dev), ("external", external)) if domain not in weights]:
            return f"{' and '.join(absent)} asked nothing of {domain}, so it cannot be judged alone"
        dev, external = ({name: float(name == domain) for name in weights} for weights in (dev, external))
    seeds = tuple(pool.variance(a, dev, b, external) for a, b in ((1.0, 0.0), (0.0, 1.0), (rule.beta0, -1.0)))
    if any(one is None for one in seeds):
        return "no candidate was run twice on dev and external, so the noise of a seed is unknown: run the anchor twice"
    luck = seed_covariance(seeds, rule.beta0)
    return _Scope(domain, (dev, external), seeds, ranking_usable(rounds, dev, external, luck))


def _look(estimand: Estimand, pair: Pair, domain: str, scope: _Scope | str, rule: GapTest) -> _Look:
    if pair.missing or isinstance(scope, str):
        return _Look(estimand, domain, pair, missing=pair.missing or scope, asked=False)
    dev, external = ((one, weights) for one, weights in zip((pair.dev, pair.external), scope.weights, strict=True))
    d = estimate([(1.0, *dev)], scope.seeds[0])
    t = estimate([(1.0, *external)], scope.seeds[1])
    g = estimate([(rule.beta0, *dev), (-1.0, *external)], scope.seeds[2])
    flat = [name for name, one in (("dev-B", d), ("external", t)) if not one.item_variance]
    if flat:
        missing = (
            f"no item of {' and of '.join(flat)} tells the two sides apart, so no variance can be had: ask more items"
        )
        return _Look(estimand, domain, pair, missing=missing)
    return _Look(estimand, domain, pair, d, t, g, scope.ranking_usable)


def judge(rounds_in_window: Sequence[RoundItems], rule: GapTest, pool: SeedPool) -> tuple[Verdict, ...]:
    """The verdicts of the window's last round: every estimand overall, then every estimand in every domain.

    `rounds_in_window` are at most `rule.window` rounds in order, the pool holds all replicates so far. Raises
    ValueError for rounds out of order or of different suites, and whatever a comparison raises on bad items.
    """
    rounds = tuple(rounds_in_window)
    _check_window(rounds, rule)
    pairs = {estimand: pair_of(estimand, rounds) for estimand in rule.estimands}
    verdicts: list[Verdict] = []
    for domains in ((OVERALL,), rule.domains):
        looks = []
        for domain in domains:
            # Without a target there is nothing to weigh: no pair, no scope.
            scope = "" if all(pair.missing for pair in pairs.values()) else _scope(domain, rounds, rule, pool)
            looks += [_look(estimand, pairs[estimand], domain, scope, rule) for estimand in rule.estimands]
        alarm = holm_levels([look.alarm_p for look in looks if look.asked], rule.level)
        tracking = holm_levels([look.tracking_p for look in looks if look.asked], rule.level)
        for look in looks:
            if look.missing:
                verdicts.append(_without_number(look))
            else:
                levels = alarm[look.alarm_p], tracking[look.tracking_p]
                verdicts.append(_verdict(look, levels, rounds[-1].number, rule))
    return tuple(verdicts)


def _check_window(rounds: Sequence[RoundItems], rule: GapTest) -> None:
    numbers = [one.number for one in rounds]
    if not 1 <= len(rounds) <= rule.window or numbers != sorted(set(numbers)):
        raise ValueError(f"expected 1 to {rule.window} rounds in order, got {numbers}: hand over the window's rounds")
    for one in rounds[1:]:
        for ours, theirs in (
            (rounds[0].dev_weights, one.dev_weights),
            (rounds[0].external_weights, one.external_weights),
        ):
            if ours.keys() != theirs.keys() or any(not math.isclose(ours[name], theirs[name]) for name in ours):
                raise ValueError(
                    f"expected one weighting of families in rounds {numbers}, got {dict(ours)} and {dict(theirs)}: "
                    "pool only rounds of one suite"
                )


def holm_levels(p_values: Sequence[float], alpha: float) -> dict[float, float]:
    """The level at which Holm's step-down tests each p-value; it rejects where p <= level.

    From the smallest on, the k-th of m meets alpha / (m - k + 1); the first to fail keeps its level for all after it.
    Equal p-values meet one level, so that their order does not matter.
    """
    level_of: dict[float, float] = {}
    level = alpha
    for place, p in enumerate(sorted(p_values)):
        if not level_of or max(level_of) <= level:
            level = alpha / (len(p_values) - place)
        level_of.setdefault(p, level)
    return level_of


def _without_number(look: _Look) -> Verdict:
    return Verdict(
        outcome="UNRESOLVED",
        estimand=look.estimand,
        domain=look.domain,
        alpha_spent=0.0,
        ranking_usable=False,
        reason=_sentence(look.missing),
    )


def _verdict(look: _Look, levels: tuple[float, float], number: int, rule: GapTest) -> Verdict:
    level = levels[0] if look.alarm_p <= look.tracking_p else levels[1]
    outcome, declared = "UNRESOLVED", number in rule.rounds
    if declared and min(look.alarm_p, look.tracking_p) <= level:
        outcome = "TRACKING" if look.tracking_p < look.alarm_p else "DECOUPLED"
        outcome = "INVERSE" if look.inverse_p <= level else outcome
    reason = f"round {number} is not a declared look, so it reports the effects and claims nothing"
    if declared:
        reason = _reason(outcome, look, level, rule)
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
        alpha_spent=level if declared else 0.0,
        minimum_detectable_effect=max(
            minimum_detectable_effect(look.d, level), minimum_detectable_effect(look.g, level) / rule.beta0
        ),
        ranking_usable=look.ranking_usable,
        reason=_sentence(reason),
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _points(value: float) -> str:
    return f"{100 * value:+.1f} pt"


def _reason(outcome: Outcome, look: _Look, level: float, rule: GapTest) -> str:
    gained = f"dev changed by {_points(look.d.mean)} and the external target by {_points(look.t.mean)}"
    if outcome == "DECOUPLED":
        order = "; dev still ranks candidates as the target does" if look.ranking_usable else ""
        return (
            f"{gained}: less than {rule.beta0:g} of the gain arrived (gap at least {_points(look.g.lower(level))})"
            + order
        )
    if outcome == "INVERSE":
        return f"{gained}: they move against each other"
    if outcome == "TRACKING":
        return f"{gained}: more than {rule.beta0:g} of the gain arrived (gap at most {_points(look.g.upper(level))})"
    return _unresolved(look, level)


def _unresolved(look: _Look, level: float) -> str:
    """What stands in the way, and how much more of what would settle it if the observed effects were the true ones."""
    if look.d.mean > 0:
        sides = {"the dev gain": look.d, "the gap": look.g}
    elif look.t.mean > 0:
        sides = {"the dev loss": look.d, "the external gain": look.t}
    else:
        return (
            f"neither dev ({_points(look.d.mean)}) nor the external target ({_points(look.t.mean)}) rose: "
            "without a gain there is no transfer to judge"
        )
    open_sides = [name for name, one in sides.items() if min(one.p_above(), one.p_below()) > level]
    text = f"{' and '.join(open_sides) or 'the gap'} cannot be told from zero at level {level:.2g}"
    return f"{text}; {_settled_by(look, sides.values(), level)}"


def _settled_by(look: _Look, sides: Iterable[Estimate], level: float) -> str:
    items, seeds, looks = 1.0, 1.0, 1.0
    for one in sides:
        target = one.se**2 * (one.mean / minimum_detectable_effect(one, level)) ** 2
        items = max(items, _times(one.item_variance, target - one.seed_variance))
        seeds = max(seeds, _times(one.seed_variance, target - one.item_variance))
        looks = max(looks, _times(one.se**2, target))
    pair = look.pair
    runs = sum(coefficient > 0 for coefficient in pair.dev.coefficients.values())
    ways = []
    if 1 < items <= MOST_TIMES:
        dev, external = (_count(items, one.num_items) for one in (pair.dev, pair.external))
        ways.append(f"{dev} dev-B and {external} external items in all")
    if 1 < seeds <= MOST_TIMES:
        ways.append(f"{_count(seeds, runs)} candidate runs with {seeds:.1f} times the anchor's")
    if 1 < looks <= MOST_TIMES:
        ways.append(f"{_count(looks, pair.num_rounds)} such rounds pooled")
    if not ways:
        return f"at the observed effects no {MOST_TIMES}-fold of items, seeds or looks would settle it"
    return f"at the observed effects about {' or '.join(ways)} would settle it"


def _times(part: float, room: float) -> float:
    """By how much data of one kind must grow for its part of the variance to fit into `room`."""
    if part <= room:
        return 1.0
    return part / room if room > 0 else math.inf


def _count(times: float, now: int) -> str:
    return f"{math.ceil(times * now):,}"
