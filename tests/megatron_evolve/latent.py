"""A latent-item simulator for the verdict's tests: right and wrong answers of runs with known true effects.

An item is known (share KNOWN) or not. Every run flips `flips` of its answers, as many from right to wrong as back, so two
runs of one candidate disagree on about 2 x flips. A gain turns unknown items right and a loss known ones wrong, for all
runs of the candidate alike; a run's seed moves its dev and external scores together by `seed_sd`. Of an explorer's flips
the share `shared` is common to all explorers of the round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_evolve.eval.paired import RunItems
from megatron_evolve.eval.seeds import SeedPool
from megatron_evolve.window import RoundItems

KNOWN = 0.6
FAMILIES = tuple(f"domain{number}" for number in range(5))
WEIGHTS = dict.fromkeys(FAMILIES, 0.2)


@dataclass(frozen=True)
class World:
    """Size and noise of a simulated campaign."""

    items: int = 500
    anchors: int = 3
    flips: float = 0.05
    shared: float = 0.0
    seed_sd: float = 0.0
    origin_seeds: int = 8
    origin_items: int = 500


class Latent:
    """Draws rounds of one campaign."""

    def __init__(self, rng: np.random.Generator, world: World) -> None:
        self.rng, self.world = rng, world
        self.drawn = 0

    def _split(
        self, runs: Sequence[tuple[str, int]], gains: Mapping[str, np.ndarray | float], luck: np.ndarray, items: int
    ) -> list[RunItems]:
        rng, n = self.rng, items
        families = np.repeat(FAMILIES, n // len(FAMILIES))
        ids = np.arange(self.drawn, self.drawn + n)
        self.drawn += n
        known = rng.random(n) < KNOWN
        change_at = {name: rng.random(n) for name, _ in runs}
        common = rng.random(n)
        own = rng.random((len(runs), n))
        use_common = rng.random((len(runs), n)) < self.world.shared
        answers = []
        for row, (name, seed) in enumerate(runs):
            gain = np.asarray(gains.get(name, 0.0)) / (1 - self.world.flips / 2 / KNOWN / (1 - KNOWN))  # flips dilute it
            hit = change_at[name] < np.where(known, -gain / KNOWN, gain / (1 - KNOWN))
            state = known ^ hit
            draw = (
                own[row] if name == "anchor" or not self.world.shared else np.where(use_common[row], common, own[row])
            )
            up = self.world.flips / 2 / (1 - KNOWN) + max(luck[row], 0) / (1 - KNOWN)
            down = self.world.flips / 2 / KNOWN + max(-luck[row], 0) / KNOWN
            answers.append(RunItems(name, seed, ids, families, state ^ (draw < np.where(state, down, up))))
        return answers

    def round(self, number: int, dev: Mapping[str, float], external: Mapping[str, float]) -> RoundItems:
        """One round on fresh items; `dev` and `external` are the true gains of the explorers."""
        runs = [("anchor", 100 * number + seed) for seed in range(self.world.anchors)]
        runs += [(name, 100 * number) for name in dev]
        luck = self.world.seed_sd * self.rng.normal(size=len(runs))
        split_sd = np.sqrt(2 * self.world.flips * (1 - self.world.flips) / 2 / self.world.items)
        dev_a = {name: float(np.mean(gain)) + split_sd * self.rng.normal() for name, gain in dev.items()}
        dev_b, outside = (self._split(runs, gains, luck, self.world.items) for gains in (dev, external))
        return RoundItems(number, "anchor", dev_a, dev_b, outside, WEIGHTS, WEIGHTS)

    def pool(self) -> SeedPool:
        """The origin's replicates."""
        runs = [("origin", seed) for seed in range(self.world.origin_seeds)]
        luck = self.world.seed_sd * self.rng.normal(size=len(runs))
        dev, outside = (self._split(runs, {}, luck, self.world.origin_items) for _ in range(2))
        one = RoundItems(0, "origin", {}, dev, outside, WEIGHTS, WEIGHTS)
        return SeedPool(one.replicates())
