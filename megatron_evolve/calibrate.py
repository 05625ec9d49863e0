"""Calibration: the anchor against itself with other seeds, through the gates that every explorer meets.

Nothing differs but the seed, so whatever a gate lets through is false. Measured twice:

    on runs    the origin's frozen runs, every way of setting some of them as an explorer (its further seed included)
               against as many others as a round has anchors; the noise of a seed from the campaign's other runs
    simulated  campaigns in which nothing changes anything, under the noise that those runs show

Runs are few and their pairings share them, so the first has a wide interval, by jackknife over runs (a U-statistic;
Arvesen 1969); the second has a narrow one and rests on the noise model. A copy of the anchor, bit for bit, must be
neither better nor worse: that is asked too, since gates are known that reject one.
"""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_evolve.audit import Record, open_record
from megatron_evolve.comparisons import Weights, seeds_of
from megatron_evolve.eval.paired import RunItems, effect, probability_better, wilson
from megatron_evolve.eval.seeds import RunReplicates, SeedPool
from megatron_evolve.facts import RunFacts
from megatron_evolve.origin import EXTERNAL_SPLITS
from megatron_evolve.prepare import origin_ground
from megatron_evolve.simulate.campaigns import run_campaigns
from megatron_evolve.simulate.draw import Plan, of_families
from megatron_evolve.simulate.exam import EVEN
from megatron_evolve.simulate.noise import Noise
from megatron_evolve.simulate.scenarios import SCENARIOS

GAIN_ALPHA = 0.05
MOST_FLIPS = 0.47  # two runs that answer all by chance disagree on .48
MOST_TRIALS = 400  # pairings that are looked at; where there are more, a sample in which the runs share every place

Gate = Callable[[Sequence[RunItems], Sequence[RunItems]], bool]


@dataclass(frozen=True)
class Sides:
    """How many of K runs stand in for an explorer and for the anchor."""

    explorer: int
    anchor: int

    def trials(self, runs: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Ordered explorer runs (the first is the one that was selected on) and anchor runs: all, or a seeded sample.

        The runs go round: a pairing is taken with every shift of its runs or not at all, so each run stands equally
        often on each side.
        """
        others = range(1, runs)
        found = [
            ((0, *mine), theirs)
            for mine in itertools.permutations(others, self.explorer - 1)
            for theirs in itertools.combinations(sorted(set(others) - set(mine)), self.anchor)
        ]
        drawn = random.Random(0).sample(found, min(len(found), MOST_TRIALS // runs))
        return [
            (tuple((run + shift) % runs for run in mine), tuple(sorted((run + shift) % runs for run in theirs)))
            for mine, theirs in drawn
            for shift in range(runs)
        ]


def calibrate(root: Path, campaigns: int, seed: int) -> dict[str, Any]:
    """Measured false-accept rates of a campaign's gates. Raises ValueError where the origin has too few runs."""
    record = open_record(root)
    rules = record.campaign.constitution
    replicates = record.campaign.search.replicates
    sides = Sides(replicates.explorer + replicates.confirm_seeds, rules.anchor_seeds)
    splits = {"dev": ("dev-b",)} | ({"external": EXTERNAL_SPLITS} if record.campaign.judge.target_suite else {})
    noise = measured_noise(record)
    return {
        "schema": "calibrate/1",
        "judge": record.opened["judge"],
        "runs": {split: on_runs(record, parts, sides) for split, parts in splits.items()},
        "noise": None if isinstance(noise, str) else noise.model_dump(),
        "simulated": None if isinstance(noise, str) else simulated(record, noise, campaigns, seed),
        "not_simulated": noise if isinstance(noise, str) else None,
    }


def on_runs(record: Record, splits: Sequence[str], sides: Sides) -> dict[str, Any]:
    """False-accept rates over pairings of the origin's runs on one score."""
    answers = origin_answers(record, splits)
    if len(answers) < sides.explorer + sides.anchor:
        raise ValueError(
            f"expected at least {sides.explorer + sides.anchor} scored runs of the origin to set some against others, "
            f"got {len(answers)}: prepare the campaign with more origin_seeds"
        )
    weights, side = Weights(**record.suites["weights"]), splits[0]
    seeds = seeds_of(independent_pool(record), weights, side)
    bar = record.campaign.constitution.promote_probability

    def moves(mine: Sequence[RunItems], anchors: Sequence[RunItems]) -> bool:
        later = effect(mine[1:], anchors, weights.of(side)).mean > 0 if len(mine) > 1 else False
        return later and probability_better(effect(mine, anchors, weights.of(side), seeds)) >= bar

    def gains(mine: Sequence[RunItems], anchors: Sequence[RunItems]) -> bool:
        found = effect(mine, anchors, weights.of(side), seeds)
        return bool(found.se) and found.p_above() <= GAIN_ALPHA

    copies = [replace(run, candidate="copy") for run in answers[: sides.anchor]]
    same = probability_better(effect(copies, answers[: sides.anchor], weights.of(side), seeds))
    return {
        "runs": len(answers),
        "items": len(answers[0].item_ids),
        "explorer_runs": sides.explorer,
        "anchor_runs": sides.anchor,
        "seed_df": seeds.df if seeds else 0,
        "moves": false_accepts(answers, sides, moves),
        "gain_at_5_per_cent": false_accepts(answers, sides, gains),
        "copy_of_the_anchor": {"p_better": same, "ok": math.isclose(same, 0.5, abs_tol=1e-9)},
    }


def origin_answers(record: Record, splits: Sequence[str]) -> list[RunItems]:
    """The origin's scored runs, as the paired comparison wants them."""
    judge, substrate = Path(record.opened["judge_folder"]), Path(record.opened["substrate_folder"])
    ground = origin_ground(substrate, judge, record.campaign.constitution.limits.run_seconds)
    stages = {"dev": {"outcome": "finished"}} | {split: {"outcome": "finished"} for split in EXTERNAL_SPLITS}
    origin = record.origin.candidate
    places = {seed: ground.scores / origin / str(seed) for seed in record.origin.seeds}
    facts = [RunFacts(origin, seed, place, stages) for seed, place in places.items()]
    return [run.items(splits) for run in facts]


def independent_pool(record: Record) -> SeedPool:
    """Replicates of the campaign's rounds; of the origin itself only where no round has any."""
    earlier = [RunReplicates.from_dict(one) for number in record.rounds for one in record.evidence(number).replicates]
    return SeedPool(tuple(earlier) or record.origin.pooled())


def false_accepts(answers: Sequence[RunItems], sides: Sides, gate: Gate) -> dict[str, float]:
    """Share of pairings that pass the gate, with its 95 % interval."""
    trials = sides.trials(len(answers))
    passed = np.array(
        [
            gate([_as(answers[run], "explorer") for run in mine], [_as(answers[run], "anchor") for run in theirs])
            for mine, theirs in trials
        ]
    )
    used = np.array([[run in (*mine, *theirs) for run in range(len(answers))] for mine, theirs in trials])
    share = float(passed.mean())
    low, high = wilson(share, _worth(passed, used, sides))
    return {"rate": share, "low": low, "high": high, "pairings": len(trials)}


def _as(run: RunItems, name: str) -> RunItems:
    return replace(run, candidate=name)


def _worth(passed: np.ndarray, used: np.ndarray, sides: Sides) -> float:
    """How many independent pairings these are worth: by the jackknife over runs, and at least those without overlap."""
    runs, share = used.shape[1], passed.mean()
    without = np.array([passed[~used[:, run]].mean() if (~used[:, run]).any() else share for run in range(runs)])
    variance = (runs - 1) / runs * float(((without - without.mean()) ** 2).sum())
    apart = runs // (sides.explorer + sides.anchor)
    return max(apart, share * (1 - share) / variance) if variance else apart


# --- simulated -------------------------------------------------------------------------------------------------------


def measured_noise(record: Record) -> Noise | str:
    """The noise of the campaign's runs on its own scores, or in words why it is unknown."""
    if record.campaign.judge.external is None:
        return "the campaign has no external target, so the noise of one is unknown"
    if record.campaign.judge.told_scores:
        return "the target tells scores alone, so flips of its items and luck by family are unknown"
    weights = Weights(**record.suites["weights"])
    pool = SeedPool((*record.origin.pooled(), *independent_pool(record).groups))
    d, t, sum_ = (pool.variance(a, weights.dev, b, weights.external) for a, b in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)))
    if d is None or t is None or sum_ is None:
        return "no candidate has two runs that answered both dev and the target, so the noise of a seed is unknown"
    variance = (d.excess + t.excess) / 2
    correlation = (sum_.excess - d.excess - t.excess) / (2 * variance) if variance else 0.0
    flips = [2 * equal_items(record, side) * found.flips for side, found in (("dev", d), ("external", t))]
    return Noise.of_flips(min(MOST_FLIPS, sum(flips) / 2), math.sqrt(variance), max(-1.0, min(1.0, correlation)))


def equal_items(record: Record, side: str) -> float:
    """How many equally weighted items a score's own are worth (Kish 1965); families are taken to be of one size."""
    weights = Weights(**record.suites["weights"]).of(side)
    items, splits = record.suites["items"], ("dev-b",) if side == "dev" else EXTERNAL_SPLITS
    return sum(items[split] for split in splits) / (len(weights) * sum(weight**2 for weight in weights.values()))


def simulated(record: Record, noise: Noise, campaigns: int, seed: int) -> dict[str, Any]:
    """False accepts in campaigns in which nothing changes anything: a move per round, an alarm per campaign."""
    constitution, replicates = record.campaign.constitution, record.campaign.search.replicates
    dev, external = (equal_items(record, side) for side in ("dev", "external"))
    plan = Plan(constitution, replicates, len(record.origin.seeds), of_families(dev, len(EVEN.families)))
    nothing = replace(SCENARIOS["null"], external_share=external / plan.items)
    told = run_campaigns(nothing, noise, campaigns, seed, plan)
    return {
        "campaigns": campaigns,
        "moves_per_round": _rate(told.moved.mean(1)),
        "alarms_per_campaign": _rate(told.alarms.any((1, 2))),
    }


def _rate(found: np.ndarray) -> dict[str, float]:
    share = float(np.mean(found))
    low, high = wilson(share, len(found))
    return {"rate": share, "low": low, "high": high}


def words(found: dict[str, Any]) -> str:
    """The rates as lines of text."""
    lines = []
    for split, one in found["runs"].items():
        lines.append(
            f"{split}: {one['runs']} runs of the anchor's own settings, {one['items']:,} items, "
            f"{one['explorer_runs']} against {one['anchor_runs']}, noise of a seed from {one['seed_df']:.0f} df"
        )
        for gate, told in (("would move the standing settings", "moves"), ("gain at 5 %", "gain_at_5_per_cent")):
            lines.append(f"  {gate}: {_told(one[told])} over {one[told]['pairings']} pairings that share runs")
        copy = one["copy_of_the_anchor"]
        lines.append(f"  a copy of the anchor: P(better) {copy['p_better']:.2f}{'' if copy['ok'] else ', WRONG'}")
    if found["simulated"]:
        noise, told = found["noise"], found["simulated"]
        lines.append(
            f"simulated: {told['campaigns']} campaigns without any effect, luck of a seed "
            f"{100 * noise['seed_sd']:.1f} pt"
        )
        lines.append(f"  rounds that moved the standing settings: {_told(told['moves_per_round'])}")
        lines.append(f"  campaigns with an alarm: {_told(told['alarms_per_campaign'])}")
    else:
        lines.append(f"not simulated: {found['not_simulated']}")
    return "\n".join(lines)


def _told(rate: Mapping[str, float]) -> str:
    return f"{rate['rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"
