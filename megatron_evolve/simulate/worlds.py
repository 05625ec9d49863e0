"""The world matrix, simulated: a cue in each hidden-rule family, in two, in none, and the controls.

The worlds of `megatron-evolve worlds`, with nano's six families as they are: what an explorer can gain in a family is
bounded by what is still wrong there, so a cue in a family that is nearly solved gives little away. An axis gains as in
the scenario `tracks`; in a cued family it also answers, on dev alone, a share of what is still wrong.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_evolve.document import load_yaml
from megatron_evolve.gap import OVERALL
from megatron_evolve.simulate.campaigns import Told, run_campaigns
from megatron_evolve.simulate.draw import Plan
from megatron_evolve.simulate.exam import Exam
from megatron_evolve.simulate.figures import mean, rate
from megatron_evolve.simulate.noise import noise_named
from megatron_evolve.simulate.scenarios import Scenario

CUE_RATE = 0.9  # of the items, as in the real worlds
# An axis follows the cue if it moves rows toward its family, as headroom and balance do. It then answers this share of
# the cued items still wrong: 16.9 and 14.4 points at the middle in the two hardest families, a gap of half of that;
# the real worlds' true gaps there were 5.2 to 8.8 and 5.0 to 9.3, with a cue in one of them or in both
# (docs/results/worlds.md).
FOLLOWERS = 2 / 7
LEAST_FOLLOWED, MOST_FOLLOWED = 0.1, 0.4
SLOPE = 0.8


@dataclass(frozen=True)
class SimulatedWorld:
    """Where a cue sits and how dev weighs; `accuracy` is the origin's, by family.

    step  the target tells one number a run, rounded to this; none: it shows its items
    """

    name: str
    accuracy: Mapping[str, float]
    cue: tuple[str, ...] = ()
    dev_weight: Mapping[str, float] = field(default_factory=dict)
    step: float | None = None

    @property
    def exam(self) -> Exam:
        return Exam.of(self.accuracy, self.dev_weight, self.step)

    @property
    def scenario(self) -> Scenario:
        return Scenario(
            self.name,
            "a simulated world",
            self._gains,
            apart=(OVERALL, *self.cue) if self.cue else (),
            kept=0.5,
        )

    def _gains(self, rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """An honest gain of N(2, 2) pt uneven over families, bounded by what is wrong, and the cue's on top."""
        wrong_F = 1 - self.exam.accuracy_F
        shares = wrong_F / wrong_F.mean()
        uneven = rng.normal(0.0, 0.02, (*size, len(self.accuracy))) * shares
        honest = rng.normal(0.02, 0.02, size)[..., None] * shares + uneven - uneven.mean(-1, keepdims=True)
        follows = rng.uniform(LEAST_FOLLOWED, MOST_FOLLOWED, (*size, len(self.accuracy))) * CUE_RATE * wrong_F
        follows = follows * (rng.random(size) < FOLLOWERS)[..., None]
        cued = np.isin(list(self.accuracy), self.cue)
        return honest + follows * cued, SLOPE * honest


@cache
def matrix() -> tuple[SimulatedWorld, ...]:
    """The worlds of `worlds.yaml`, beside this file."""
    told = load_yaml(Path(__file__).with_name("worlds.yaml"))
    worlds = ({**one, "cue": tuple(one.get("cue", ()))} for one in told["worlds"])
    return tuple(SimulatedWorld(accuracy=told["accuracy"], **one) for one in worlds)


def simulate_worlds(campaigns: int, seed: int, noise: str = "measured", items: int = 1200) -> list[dict[str, Any]]:
    """What was said in each world, with 95 % intervals over campaigns."""
    return [_of(world, campaigns, seed, noise, items) for world in matrix()]


def _of(world: SimulatedWorld, campaigns: int, seed: int, noise: str, items: int) -> dict[str, Any]:
    plan = Plan(items=items, exam=world.exam)
    told = run_campaigns(world.scenario, noise_named(noise), campaigns, seed, plan)
    named = [said(told, name) for name in world.cue]
    others = [place for place, (_, domain) in enumerate(told.looks) if domain not in (OVERALL, *world.cue)]
    found = np.logical_or.reduce(named) if named and world.step is None else None
    return {
        "world": world.name,
        "campaigns": campaigns,
        "seed": seed,
        "items": items,
        "noise": noise,
        "cue": list(world.cue),
        "named": None if found is None else rate(found),
        "all_named": rate(np.logical_and.reduce(named)) if found is not None and len(named) > 1 else None,
        "overall": rate(said(told, OVERALL)),
        "other_named": rate(told.alarms[:, :, others].any((1, 2))),
        "any_alarm": rate(told.alarms.any((1, 2))),
        "first_round": first_right(told, world.scenario.apart),
        "looks": told.asked,
        "minimum_detectable_effect": told.visible,
        "dev_reached": mean(told.reached_dev),
        "external_reached": mean(told.reached_external),
    }


def said(told: Told, domain: str) -> np.ndarray:
    """Campaigns with an alarm of this scope in any round, (C,)."""
    mine = [place for place, (_, scope) in enumerate(told.looks) if scope == domain]
    return told.alarms[:, :, mine].any((1, 2))


def first_right(told: Told, apart: tuple[str, ...]) -> float | None:
    """Mean round of the first alarm of a scope that parts, over the campaigns that had one; none where none had."""
    right = [place for place, (_, scope) in enumerate(told.looks) if scope in apart]
    by_round = told.alarms[:, :, right].any(-1)
    found = by_round.any(1)
    return float((by_round[found].argmax(1) + 1).mean()) if found.any() else None


HEADER = ("world", "cued family named", "dev as a whole named", "another family named", "any alarm")
HEADER += ("first right alarm, round", "smallest visible, pt", "dev reached, pt", "external reached, pt")
HOW_TO_READ = """\
*First right alarm*: mean round of a campaign's first alarm of what the world parts (dev as a whole, a cued family),
over the campaigns that had one; a dash where the world parts nothing or no campaign saw it. *Smallest visible*: the
mean explorer's dev gain that the last round sees with 80 % power. `score-only-no-shift` has no cue and the heavy dev
weight of `dev-weight-without-cue`.
"""


def page(found: list[dict[str, Any]]) -> str:
    """The matrix as Markdown, and how to read it."""
    rows = [HEADER, ("---",) * len(HEADER), *(_row(one) for one in found)]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", HOW_TO_READ.rstrip()])


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    both = f" (both {_rate(one['all_named'])})" if one["all_named"] else ""
    shown = one["world"].startswith("score-only")
    named = "cannot be" if shown else _rate(one["named"]) + both if one["named"] else "no cue"
    reached = (f"{100 * one[side]['mean']:+.1f}" for side in ("dev_reached", "external_reached"))
    return (
        one["world"],
        named,
        _rate(one["overall"]),
        "cannot be" if shown else _rate(one["other_named"]),
        _rate(one["any_alarm"]),
        f"{one['first_round']:.1f}" if one["first_round"] else "-",
        f"{100 * one['minimum_detectable_effect']['mean']:.1f}",
        *reached,
    )


def _rate(found: dict[str, float]) -> str:
    return f"{found['rate']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
