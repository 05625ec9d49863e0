"""The transfer-gap test: does a gain on dev still reach the external target?

Let D be the dev gain over the same-round anchor, T the external gain, and G = beta0 x D - T the transfer gap: what dev
promised, at the least carry-over beta0, and the target did not get. For each estimand (`window.py`):

    DECOUPLED   lower(D) > 0 and lower(G) > 0
    INVERSE     D > 0 and T < 0, or D < 0 and T > 0, both significant
    TRACKING    lower(D) > 0 and upper(G) < 0
    UNRESOLVED  otherwise

Each outcome is an intersection-union test (Berger 1982), so its p-value is the larger of its two. DECOUPLED and INVERSE
alarm. Alpha of a campaign is shared so that nothing hangs on how its looks depend on each other: every declared round
has an equal share, half of it for the overall estimands and half for the domains, each half by Holm (1979). TRACKING
claims are held to the same levels among themselves. The null includes T = beta0 x D exactly. Four things keep this
short of a proof that false alarms stay below alpha: where D = T = 0 the two alarms are disjoint and their levels add; a
bound with few degrees of freedom is false up to 1.15 times as often as it says (`SeedVariance.draws`); dev-A's winner
is also the run with the luckiest seed, which dev-B's fresh items do not take off; and a variance made of few items that
tell the two sides apart is small just where the mean is, so that its bounds are false more often: below 15 such items,
on either split, there is no verdict (`eval/discordant.py`). The third passes alpha only where many explorers run, no
leader gets a further seed and a seed's luck on dev says nothing of the target (`estimate` warns of it). What simulated
campaigns of the defaults do is far below alpha (docs/results/judge.md).

One campaign is decided, or thousands at once (`megatron-evolve simulate`): a number of one is an array over the others,
by the same lines, so that what is simulated is what judges.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from pydantic import Field

from megatron_evolve.constitution import Constitution, GapRule
from megatron_evolve.eval.discordant import too_few
from megatron_evolve.eval.paired import Contrast, Estimate, estimate
from megatron_evolve.eval.power import Bound, smallest_for_all
from megatron_evolve.eval.reported import WHOLE
from megatron_evolve.eval.seeds import SeedPool, SeedVariance
from megatron_evolve.window import Estimand, Pair, RoundItems, pair_of

OVERALL = "overall"
Outcome = Literal["TRACKING", "DECOUPLED", "INVERSE", "UNRESOLVED"]
ALARMS = ("DECOUPLED", "INVERSE")


class GapTest(GapRule):
    """The constitution's numbers with what is judged: never changed and never re-estimated during a campaign."""

    rounds: tuple[int, ...] = Field(description="numbers of the rounds at which a look is declared; they share alpha")
    domains: tuple[str, ...] = Field(default=(), description="families judged one by one, in addition")

    @property
    def level(self) -> float:
        """Share of one look at one half (overall, or domains), before Holm."""
        return self.alpha / 2 / max(1, len(self.rounds))


def rule_of(rules: Constitution, domains: Sequence[str]) -> GapTest:
    """The rule that a constitution sets, with every declared round a look."""
    return GapTest(rounds=tuple(range(1, rules.rounds + 1)), domains=tuple(domains), **rules.gap.model_dump())


@dataclass(frozen=True, eq=False)
class Look:
    """One estimand in one domain, estimated; `missing` says why there is no number.

    `asked` is false where nothing was compared, which is known before this round's answers are: such a look takes no
    share of the level. One that was asked, and which too few items tell apart, keeps its share with a p-value of 1: how
    many they are is part of the answers (near an accuracy of 0 it is T itself), so the others would get that share by
    the outcome. As it is no look gets a higher level for it.
    """

    estimand: Estimand
    domain: str
    pair: Pair
    d: Estimate | None = None
    t: Estimate | None = None
    g: Estimate | None = None
    missing: str = ""
    asked: bool = True

    @cached_property
    def inverse_p(self) -> float | np.ndarray:
        return np.minimum(
            np.maximum(self.d.p_above(), self.t.p_below()), np.maximum(self.d.p_below(), self.t.p_above())
        )

    @cached_property
    def alarm_p(self) -> float | np.ndarray:
        return self._of_some(lambda: np.minimum(np.maximum(self.d.p_above(), self.g.p_above()), self.inverse_p))

    @cached_property
    def tracking_p(self) -> float | np.ndarray:
        return self._of_some(lambda: np.maximum(self.d.p_above(), self.g.p_below()))

    def _of_some(self, p: Callable[[], float | np.ndarray]) -> float | np.ndarray:
        """The p-value, 1 where too few items tell the two sides apart."""
        return 1.0 if self.missing else np.where(self.d.enough & self.t.enough, p(), 1.0)[()]


@dataclass(frozen=True, eq=False)
class Decision:
    """What a look says, and the level at which it was allowed to."""

    look: Look
    outcome: Outcome | np.ndarray
    level: float | np.ndarray


@dataclass(frozen=True, eq=False)
class Scope:
    """Overall or one domain: its weights on both splits, and the seed variance of D, T and G under them."""

    domain: str
    weights: tuple[Mapping[str, float], Mapping[str, float]]
    seeds: tuple[SeedVariance, ...]


def scope_of(
    domain: str, weights: tuple[Mapping[str, float], Mapping[str, float]], rule: GapTest, pool: SeedPool
) -> Scope | str:
    """The scope's weights and noise, from the whole weights of dev and of the target; or why there is none."""
    dev, external = weights
    if domain != OVERALL:
        if absent := [split for split, weights in (("dev", dev), ("external", external)) if domain not in weights]:
            return f"{' and '.join(absent)} asked nothing of {domain}, so it cannot be judged alone"
        dev, external = ({name: float(name == domain) for name in weights} for weights in (dev, external))
    seeds = tuple(pool.variance(a, dev, b, external) for a, b in ((1.0, 0.0), (0.0, 1.0), (rule.beta0, -1.0)))
    if any(one is None for one in seeds):
        return "no candidate was run twice on dev and external, so the noise of a seed is unknown: run the anchor twice"
    return Scope(domain, (dev, external), seeds)


def look_at(estimand: Estimand, pair: Pair, domain: str, scope: Scope | str, rule: GapTest) -> Look:
    """One estimand in one scope, estimated; or why it cannot be."""
    if pair.missing or isinstance(scope, str):
        return Look(estimand, domain, pair, missing=pair.missing or scope, asked=False)
    dev, external = ((one, weights) for one, weights in zip((pair.dev, pair.external), scope.weights, strict=True))
    d = estimate([(1.0, *dev)], scope.seeds[0])
    t = estimate([(1.0, *external)], scope.seeds[1])
    g = estimate([(rule.beta0, *dev), (-1.0, *external)], scope.seeds[2])
    if not np.any(d.enough & t.enough):
        sides = ((d, *dev, "dev-B"), (t, *external, "external"))
        why = [_too_few(*side) for side in sides if not np.all(side[0].enough)]
        return Look(estimand, domain, pair, missing=f"{' and '.join(why)}: ask more items")
    return Look(estimand, domain, pair, d, t, g)


def _too_few(found: Estimate, side: Contrast, weights: Mapping[str, float], split: str) -> str:
    if side.families == (WHOLE,):
        return too_few(found.discordant, side.num_items, split, "answers of one side are right, or are wrong")
    return too_few(found.discordant, side.items_of(weights), split)


def looks_at(rounds: Sequence[RoundItems], rule: GapTest, pool: SeedPool) -> list[tuple[Scope | str, list[Look]]]:
    """Every estimand overall, then in every domain, of the window's last round."""
    pairs = {estimand: pair_of(estimand, rounds) for estimand in rule.estimands}
    found = []
    for domain in (OVERALL, *rule.domains):
        # Without a target there is nothing to weigh: no pair, no scope.
        weights = rounds[-1].dev_weights, rounds[-1].external_weights
        scope = "" if all(pair.missing for pair in pairs.values()) else scope_of(domain, weights, rule, pool)
        found.append((scope, [look_at(estimand, pairs[estimand], domain, scope, rule) for estimand in rule.estimands]))
    return found


def decide(looks: Sequence[Look], number: int, rule: GapTest) -> list[Decision]:
    """What each look of round `number` says: those overall share one half of its level, those in domains the other."""
    decided = []
    for half in (True, False):
        mine = [look for look in looks if (look.domain == OVERALL) == half]
        asked = [look for look in mine if look.asked]
        if asked:
            alarm = holm_levels(np.stack(np.broadcast_arrays(*(look.alarm_p for look in asked))), rule.level)
            tracking = holm_levels(np.stack(np.broadcast_arrays(*(look.tracking_p for look in asked))), rule.level)
            levels = {id(look): both for look, *both in zip(asked, alarm, tracking, strict=True)}
        for look in mine:
            if look.missing:
                decided.append(Decision(look, "UNRESOLVED", 0.0))
            else:
                decided.append(_decision(look, *levels[id(look)], number in rule.rounds))
    return decided


def _decision(
    look: Look, alarm_level: float | np.ndarray, tracking_level: float | np.ndarray, declared: bool
) -> Decision:
    level = np.where(look.alarm_p <= look.tracking_p, alarm_level, tracking_level)[()]
    outcome = np.where(look.tracking_p < look.alarm_p, "TRACKING", "DECOUPLED")
    outcome = np.where(look.inverse_p <= level, "INVERSE", outcome)
    outcome = np.where(declared & (np.minimum(look.alarm_p, look.tracking_p) <= level), outcome, "UNRESOLVED")
    return Decision(look, outcome if outcome.ndim else str(outcome), level)


def smallest_visible(look: Look, level: float, beta0: float) -> float:
    """Dev gain that, had nothing of it reached the target, would be called DECOUPLED with 80 % power at this level.

    Looks simulated at this gain alarm in 79 to 80 %, at 2, 7, 9 and 31 df, one candidate or seven.
    """
    return smallest_for_all([(1.0, Bound.of(look.d, level)), (beta0, Bound.of(look.g, level))])


def holm_levels(p: np.ndarray, alpha: float) -> np.ndarray:
    """The level at which Holm's step-down tests each p-value, (m, ...) to (m, ...); it rejects where p <= level.

    From the smallest on, the k-th of m meets alpha / (m - k + 1); the first to fail keeps its level for all after it.
    Equal p-values meet one level, so that their order does not matter.
    """
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, axis=0, kind="stable")
    ranked, levels = np.take_along_axis(p, order, axis=0), np.empty_like(p)
    level = np.full(p.shape[1:], alpha / max(1, len(p)))
    for place in range(len(p)):
        if place:
            level = np.where(ranked[place - 1] <= level, alpha / (len(p) - place), level)
        tied = ranked[place] == ranked[place - 1] if place else np.zeros(p.shape[1:], dtype=bool)
        levels[place] = np.where(tied, levels[place - 1], level)
    back = np.empty_like(p)
    np.put_along_axis(back, order, levels, axis=0)
    return back


def check_window(rounds: Sequence[RoundItems], rule: GapTest) -> None:
    """Raises ValueError for rounds out of order or of different suites."""
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
