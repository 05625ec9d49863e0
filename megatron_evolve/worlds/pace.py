"""What a person sees while a grid runs: the campaigns' own lines, with the time left of the whole grid.

Before anything is measured the estimate stands on the nano preset's figures; from the first job on, the same amounts of
work are priced by the time they really took.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_evolve.campaign import Campaign, plan_of
from megatron_evolve.origin import ORIGIN_ROUND
from megatron_evolve.terminal import Narrator
from megatron_evolve.worlds.grid import Grid

# CPU-seconds on one slow core: a run of 140 steps with its 3,600 items; one item of 10,000 asked at once.
RUN_SECONDS = 30.0
ITEM_SECONDS = 0.001


class Pace(Narrator):
    """Progress of one start of a grid; work is counted in the CPU-seconds it was expected to take."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, 0)
        self.expected = 0.0
        self.done = 0.0
        self.items: dict[str, int] = {}

    def expect(self, grid: Grid, base: Campaign, places: Sequence[Path]) -> None:
        """Says how much is to be done in the folders of the campaigns."""
        self.items = {"dev-b": grid.truth.dev, "external-b": grid.truth.external}
        rules = base.constitution.replace(rounds=grid.rounds)
        runs = plan_of(base.replace(constitution=rules))["runs"] + 2 * rules.anchor_seeds
        asked = grid.rounds * (rules.anchor_seeds + rules.workers - 1)
        left = [place for place in places if not (place / "result.json").exists()]
        self.expected = sum(self._work(place, runs, asked) for place in left)
        cores = base.launch.cores or len(os.sched_getaffinity(0))
        self.console.print(
            f"{len(places)} campaigns, {len(places) - len(left)} of them finished; to do: about "
            f"{told(self.expected)} of processor time, {told(self.expected / cores)} on {cores} cores"
        )

    def _work(self, place: Path, runs: int, asked: int) -> float:
        trained = len(list(place.glob("campaign/rounds/*/*/runs/*/train/result.json")))
        scored = len(list(place.glob("truth/*/*/*/scores.json")))
        items = sum(self.items.values()) * max(0.0, asked - scored / len(self.items))
        return max(0, runs - trained) * RUN_SECONDS + items * ITEM_SECONDS

    def _use(self, facts: dict[str, Any]) -> None:
        """The grid's own estimate stands for that of each campaign."""

    def opening(self, what: str) -> None:
        """Says which campaign comes next."""
        self.started = self.started or time.monotonic()
        self.console.print(f"\n[bold]{what}[/]{self._left()}")

    def _ended(self, facts: dict[str, Any]) -> None:
        if facts["end"].stage == "train":
            self.done += RUN_SECONDS
            # How many of the origin's runs lie in the store is not known beforehand: each is counted as it ends.
            self.expected += RUN_SECONDS * (facts["round"] == ORIGIN_ROUND)
        super()._ended(facts)

    def _truth(self, facts: dict[str, Any]) -> None:
        self.done += self.items[facts["split"]] * ITEM_SECONDS
        _, name, seed = facts["run"].split("/")
        self.console.print(f"  {name} seed {seed:<10} truth in {facts['seconds']:5.1f} CPU-s{self._left()}")

    def _left(self) -> str:
        if not self.started or not self.done:
            return ""
        seconds = (time.monotonic() - self.started) / self.done * max(0.0, self.expected - self.done)
        return f"   about {told(seconds)} left in all"


def told(seconds: float) -> str:
    """A time as a person says it."""
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
