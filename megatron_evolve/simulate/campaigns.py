"""Runs thousands of simulated campaigns through the product's own test, a hundred at a time.

What judges is `gap.decide` on `gap.looks_at`, with the seed pool and the window of a real campaign. What moves the
standing settings is the product's rule too: the best leader whose P(better) on the B half reaches the constitution's
bar, whose further seed alone agrees, and which the external score does not veto. After an alarm the search goes by the
external score to the end; a real campaign may return to dev after TRACKING.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from megatron_evolve.constitution import Constitution
from megatron_evolve.eval.paired import Answers, Estimate, contrast, difference, estimate, probability_better
from megatron_evolve.eval.reported import ReportedScores, reported_contrast
from megatron_evolve.eval.seeds import RunReplicates, SeedPool, SeedVariance, weight_vector
from megatron_evolve.gap import ALARMS, OVERALL, GapTest, Look, decide, looks_at, rule_of, smallest_visible
from megatron_evolve.simulate.draw import ANCHOR, Draw, Plan, State, name_of
from megatron_evolve.simulate.noise import Noise, true_variance
from megatron_evolve.simulate.scenarios import Scenario
from megatron_evolve.window import RoundItems

AT_ONCE = 100  # a round's answers of one split are then .6 MB, which stays in a core's cache
KNOWN_DF = 1e6
VETO_ALPHA = 0.025  # a gain is vetoed where the 95 % interval of its external effect lies below zero
PLAN = Plan()


@dataclass(frozen=True, eq=False)
class Told:
    """What C campaigns told: which looks (estimand, domain) alarmed in which round, and what was reached."""

    looks: tuple[tuple[str, str], ...]
    alarms: np.ndarray  # (C, rounds, looks)
    moved: np.ndarray  # (C, rounds): whether an explorer moved into the standing settings
    reached_dev: np.ndarray  # (C,): true gain of the final standing settings over the origin
    reached_external: np.ndarray
    asked: int  # looks at the external target in one campaign
    visible: dict[str, float]  # smallest dev gain seen overall, by estimand, in the last round of one campaign

    @property
    def first_round(self) -> np.ndarray:
        """Round of the first alarm by campaign; one more than there are where none came."""
        any_by_round = self.alarms.any(-1)
        return np.where(any_by_round.any(1), any_by_round.argmax(1), any_by_round.shape[1]) + 1


@dataclass(frozen=True, eq=False)
class KnownNoise(SeedPool):
    """A pool that knows what no campaign does, the true variance of a run: what the test could see at best."""

    noise: Noise
    families: tuple[str, ...]

    def plus(self, groups: Iterable[RunReplicates]) -> "KnownNoise":
        return self

    def variance(
        self, dev: float, dev_weights: Mapping[str, float], external: float, external_weights: Mapping[str, float]
    ) -> SeedVariance:
        if not set(external_weights) <= set(self.families):  # one number for all families, which weigh alike in it
            external_weights = dict.fromkeys(self.families, 1.0)
        sides = (weight_vector(one, self.families) for one in (dev_weights, external_weights))
        return SeedVariance(true_variance(self.noise, dev, external, *sides), 0.0, KNOWN_DF)


def run_campaigns(
    scenario: Scenario, noise: Noise, campaigns: int, seed: int, plan: Plan = PLAN, known: bool = False
) -> Told:
    """Runs `campaigns` campaigns; the same scenario and seed give the same ones. `known`: the noise is told."""
    if campaigns < 1 or seed < 0:
        raise ValueError(f"expected at least one campaign and a seed from 0 on, got {campaigns} and {seed}: mend them")
    parts, plan = [], plan.judging_origin() if scenario.drift else plan
    for start in range(0, campaigns, AT_ONCE):
        rng = np.random.default_rng([seed, start, *scenario.name.encode()])
        parts.append(
            _together(Draw(rng, noise, scenario, plan, min(AT_ONCE, campaigns - start)), plan, known, not parts)
        )
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("alarms", "moved", "reached_dev", "reached_external")
    }
    return replace(parts[0], **joined)


def _together(draw: Draw, plan: Plan, known: bool, first: bool) -> Told:
    """B campaigns from their first round to their last; the first of all tells what it could see."""
    scenario, rule = draw.scenario, rule_of(plan.rules, plan.exam.domains)
    state = State.at_origin(*scenario.draw(draw.rng, draw.campaigns, plan.explorers))
    pool, rounds, alarms, moves, looks, asked = draw.pool(), [], [], [], [], 0
    pool = KnownNoise((), draw.noise, plan.exam.families) if known else pool
    for number in rule.rounds:
        items, order = draw.round(number, state)
        rounds = [*rounds, items][-rule.window :]
        pool = pool.plus(items.replicates())
        looks = [look for _, of_scope in looks_at(rounds, rule, pool) for look in of_scope]
        found = alarms_of(looks, number, rule, state.away_B)
        alarms.append(found)
        halves = 2 if plan.exam.step is None else 1
        asked += halves * len({name for name, _ in items.external_answers.runs})
        moves.append(_promoted(items, pool, state.external_B, plan))
        state = _after(state, moves[-1], order, found.any(-1), scenario)
    reached = state.standing_d_BF @ plan.exam.dev_w, state.standing_t_BF @ plan.exam.external_w
    names = tuple((look.estimand, look.domain) for look in looks)
    visible = {
        look.estimand: smallest_visible(_first(look), rule.level / len(rule.estimands), rule.beta0)
        for look in looks
        if first and look.domain == OVERALL and not look.missing
    }
    moved = np.stack(moves, axis=1) >= 0
    return Told(names, np.stack(alarms, axis=1), moved, *reached, asked, visible)


def alarms_of(looks: list[Look], number: int, rule: GapTest, away_B: np.ndarray) -> np.ndarray:
    """Which looks alarm, (B, looks). A campaign that still stands at the origin does not ask the cumulative one."""
    found = _alarms(looks, number, rule, len(away_B))
    if away_B.all() or "cumulative" not in rule.estimands:
        return found
    at_home = [
        replace(look, missing="still the origin", asked=False) if look.estimand == "cumulative" else look
        for look in looks
    ]
    return np.where(away_B[:, None], found, _alarms(at_home, number, rule, len(away_B)))


def _alarms(looks: list[Look], number: int, rule: GapTest, campaigns: int) -> np.ndarray:
    decided = decide(looks, number, rule)
    return np.stack([np.broadcast_to(np.isin(one.outcome, ALARMS), campaigns) for one in decided], axis=1)


def _first(look: Look) -> Look:
    """The look in the first of the campaigns."""
    one = {name: _of_first(getattr(look, name)) for name in ("d", "t", "g")}
    return replace(look, **one)


def _of_first(found: Estimate) -> Estimate:
    seeds = found.seeds
    luck = SeedVariance(*(float(np.ravel(one)[0]) for one in (seeds.replicate, seeds.flips)), seeds.df)
    mean, variance, df, discordant = (
        float(np.ravel(one)[0]) for one in (found.mean, found.item_variance, found.item_df, found.discordant)
    )
    return Estimate(mean, variance, df, found.squared, luck, discordant)


def _after(state: State, moves: np.ndarray, order: np.ndarray, alarmed: np.ndarray, scenario: Scenario) -> State:
    """The state after a round: the axis at rank `moves` is in the standing settings, and drift where there is any."""
    campaigns = np.arange(len(order))
    axis = order[campaigns, np.maximum(moves, 0)]
    moved = (moves >= 0)[:, None]
    gained = [gains[campaigns, axis] * moved for gains in (state.d_BKF, state.t_BKF)]
    left = np.ones(order.shape)
    left[campaigns, axis] = np.where(moves >= 0, scenario.kept, 1.0)
    return State(
        d_BKF=state.d_BKF * left[..., None],
        t_BKF=state.t_BKF * left[..., None],
        standing_d_BF=state.standing_d_BF + gained[0] + scenario.drift,
        standing_t_BF=state.standing_t_BF + gained[1],
        external_B=state.external_B | alarmed,
        away_B=state.away_B | (moves >= 0) | bool(scenario.drift),
    )


def _promoted(items: RoundItems, pool: SeedPool, external_B: np.ndarray, plan: Plan) -> np.ndarray:
    """Rank of the explorer that moves into the standing settings, (B,); -1 where none does."""
    weights = items.dev_weights, items.external_weights
    dev_seeds = pool.variance(1.0, weights[0], 0.0, weights[1])
    outside_seeds = pool.variance(0.0, weights[0], 1.0, weights[1])
    sides = items.dev_answers, items.external_answers
    chosen = np.full(len(external_B), -1)
    for rank in reversed(range(plan.replicates.confirm_candidates)):
        name = name_of(rank, items.number)
        first = plan.replicates.explorer
        dev, outside = (
            _effect(answers, one, name, 0, seeds)
            for answers, one, seeds in zip(sides, weights, (dev_seeds, outside_seeds), strict=True)
        )
        later = [_effect(answers, one, name, first, None) for answers, one in zip(sides, weights, strict=True)]
        gains = _gain(dev, later[0], plan.rules) & ~_vetoed(outside)
        by_external = _gain(outside, later[1], plan.rules)
        chosen = np.where(np.where(external_B, by_external, gains), rank, chosen)
    return chosen


def _effect(
    answers: Answers | ReportedScores, weights: Mapping[str, float], name: str, first: int, seeds: SeedVariance | None
) -> Estimate | None:
    """A candidate's runs from `first` on against the anchor's; none where it was not asked."""
    mine = answers.seeds_of(name)[first:]
    if not mine:
        return None
    coefficients = difference({name: mine}, 1.0) | difference({ANCHOR: answers.seeds_of(ANCHOR)}, -1.0)
    summed = reported_contrast if isinstance(answers, ReportedScores) else contrast
    return estimate([(1.0, summed([(answers, coefficients)]), weights)], seeds)


def _gain(found: Estimate | None, later: Estimate | None, rules: Constitution) -> np.ndarray | bool:
    if found is None or later is None:
        return False
    return (probability_better(found) >= rules.promote_probability) & (later.mean > 0)


def _vetoed(outside: Estimate | None) -> np.ndarray | bool:
    return False if outside is None else outside.p_below() < VETO_ALPHA
