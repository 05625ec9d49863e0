"""The figures of simulated campaigns: false alarms, power by round, time to detect, what was reached, what it cost.

Every rate stands with the 95 % interval that the number of simulated campaigns gives it (Wilson), every mean with the
normal one. Power is set beside its bound: the same campaigns judged by somebody who knows the noise of a run, which no
campaign does. Where even the bound is low, no test finds that effect in that many items, runs and rounds.
"""

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_evolve.eval.paired import wilson
from megatron_evolve.gap import OVERALL
from megatron_evolve.simulate.campaigns import PLAN, Told, run_campaigns
from megatron_evolve.simulate.demanded import Condition, demanded
from megatron_evolve.simulate.draw import Plan
from megatron_evolve.simulate.noise import Noise, noise_named
from megatron_evolve.simulate.scenarios import SCENARIOS, Scenario, scenario


def simulate(
    names: Sequence[str], noise: str, campaigns: int, seed: int, plan: Plan = PLAN, shared: float = 0.0
) -> list[dict[str, Any]]:
    """The figures of these scenarios in order; `shared`: flips common to explorers.

    Where none is named: of all, and then of those of which something must hold, under the conditions it is asked for.
    """
    conditions = [Condition(tuple(names or SCENARIOS), noise, plan, shared), *(() if names else demanded())]
    return [row for one in conditions for row in _under(one, campaigns, seed)]


def _under(condition: Condition, campaigns: int, seed: int) -> list[dict[str, Any]]:
    dice = noise_named(condition.noise).replace(shared=condition.shared)
    told = {"noise": condition.noise, "shared_flips": condition.shared}
    chosen = [scenario(name) for name in condition.names]
    return [
        told | {"demand": condition.must(one)} | figures(one, dice, campaigns, seed, condition.plan) for one in chosen
    ]


def figures(one: Scenario, noise: Noise, campaigns: int, seed: int, plan: Plan = PLAN) -> dict[str, Any]:
    """One scenario's figures. Accuracy units: 0.01 is one point."""
    start = time.perf_counter()
    told = run_campaigns(one, noise, campaigns, seed, plan)
    best = None if one.harmless else run_campaigns(one, noise, campaigns, seed, plan, known=True)
    by_round = [rate(told.first_round <= number) for number in range(1, told.alarms.shape[1] + 1)]
    return {
        "scenario": one.name,
        "about": one.about,
        "harmless": one.harmless,
        "items": plan.items,
        "anchor_runs": plan.rules.anchor_seeds,
        "origin_runs": plan.origin_seeds,
        "estimands": list(dict.fromkeys(estimand for estimand, _ in told.looks)),
        "campaigns": campaigns,
        "seed": seed,
        "seconds": time.perf_counter() - start,
        "alarms_per_campaign": by_round[-1],
        "false_alarm_per_campaign": by_round[-1] if one.harmless else None,
        "wrong_scope_per_campaign": rate(_wrong(told, one)),
        "power_by_round": [found["rate"] for found in by_round],
        "power_interval_by_round": [[found["low"], found["high"]] for found in by_round],
        "power_by_round_and_estimand": _by_estimand(told),
        "bound_by_round": None if best is None else _power(best.first_round, best.alarms.shape[1]),
        "rounds_to_detect": None if one.harmless else _time(told),
        "moves_per_round": rate(told.moved.mean(1)),
        "looks_used": {"campaign": told.asked, "to_detect": None if one.harmless else _looks(told)},
        "dev_reached": mean(told.reached_dev),
        "external_reached": mean(told.reached_external),
        "minimum_detectable_effect": told.visible,
    }


def rate(found: np.ndarray) -> dict[str, float]:
    """A share of campaigns with its Wilson interval."""
    share = float(np.mean(found))
    low, high = wilson(share, len(found))
    return {"rate": share, "low": low, "high": high}


def mean(values: np.ndarray) -> dict[str, float]:
    """A mean over campaigns with its normal interval."""
    middle, half = float(np.mean(values)), 1.96 * float(np.std(values)) / math.sqrt(len(values))
    return {"mean": middle, "low": middle - half, "high": middle + half}


def _power(first_round: np.ndarray, rounds: int) -> list[float]:
    return [float(np.mean(first_round <= number)) for number in range(1, rounds + 1)]


def _by_estimand(told: Told) -> dict[str, list[float]]:
    """Share of campaigns with an alarm so far, by what raised it: an estimand overall, or any of them in a domain."""
    kinds = [estimand if domain == OVERALL else "domains" for estimand, domain in told.looks]
    found = {}
    for kind in dict.fromkeys(kinds):
        mine = told.alarms[:, :, [place for place, name in enumerate(kinds) if name == kind]].any(-1)
        found[kind] = np.logical_or.accumulate(mine, axis=1).mean(0).tolist()
    return found


def _wrong(told: Told, one: Scenario) -> np.ndarray:
    """Campaigns that alarmed somewhere in a scope in which nothing parted."""
    wrong = [place for place, (_, domain) in enumerate(told.looks) if domain not in one.apart]
    return told.alarms[:, :, wrong].any((1, 2))


def _time(told: Told) -> dict[str, float | None]:
    """Rounds to the first alarm: the median over all campaigns, none if most saw none, and the mean where one came."""
    rounds = told.alarms.shape[1]
    seen = told.first_round <= rounds
    median = float(np.median(told.first_round))
    return {
        "median": median if median <= rounds else None,
        "mean_of_found": float(told.first_round[seen].mean()) if seen.any() else None,
        "never": float(1 - seen.mean()),
    }


def _looks(told: Told) -> float | None:
    rounds = told.alarms.shape[1]
    seen = told.first_round <= rounds
    return float((told.first_round[seen] * told.asked / rounds).mean()) if seen.any() else None


HEADER = ("scenario", "alarms per campaign", "wrong scope", "power by round", "bound", "rounds", "looks")
HEADER += ("visible, pt", "external, pt")


SAME = ("items", "anchor_runs", "origin_runs", "estimands", "noise", "shared_flips", "demand")


def table(found: Sequence[dict[str, Any]]) -> str:
    """The figures as a page of text, the rows of one condition together."""
    parts = [_part(list(rows)) for _, rows in itertools.groupby(found, lambda one: [one[name] for name in SAME])]
    told = (
        f"{found[0]['campaigns']} campaigns a scenario, seed {found[0]['seed']}. Brackets are 95 % intervals over "
        "campaigns.\nbound: the last power, had the noise of a run been known.\n"
        "visible: dev gain, of the mean (of the standing settings where they are judged), that the last round sees "
        "with 80 % power."
    )
    return "\n\n".join([*parts, told])


def _part(found: Sequence[dict[str, Any]]) -> str:
    first = found[0]
    told = (
        f"{first['items']} dev-B items, {first['anchor_runs']} anchor runs a round, {first['origin_runs']} of the "
        f"origin; noise {first['noise']}, {100 * first['shared_flips']:.0f} % of flips common to all explorers; "
        f"judged: {', '.join(first['estimands'])}"
    )
    rows = [HEADER, *(_row(one) for one in found)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([told, *([f"must hold: {first['demand']}"] if first["demand"] else []), *lines])


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    bound, time_to, looks, reached = (
        one["bound_by_round"],
        one["rounds_to_detect"],
        one["looks_used"],
        one["external_reached"],
    )
    spent = looks["to_detect"]
    return (
        one["scenario"],
        _rate(one["alarms_per_campaign"]),
        "-" if one["harmless"] else _rate(one["wrong_scope_per_campaign"]),
        " ".join(_share(power) for power in one["power_by_round"]),
        _share(bound[-1]) if bound else "-",
        f"{time_to['mean_of_found']:.1f}" if time_to and time_to["mean_of_found"] else "-",
        f"{spent:.0f} of {looks['campaign']}" if spent else str(looks["campaign"]),
        f"{100 * list(one['minimum_detectable_effect'].values())[-1]:.1f}",
        f"{100 * reached['mean']:+.1f} [{100 * reached['low']:+.1f}, {100 * reached['high']:+.1f}]",
    )


def _rate(found: dict[str, float]) -> str:
    return f"{_share(found['rate'])} [{_share(found['low'])}, {_share(found['high'])}]"


def _share(value: float) -> str:
    text = f"{value:.3f}"
    return "1.00" if text == "1.000" else text.lstrip("0")
