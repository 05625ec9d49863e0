"""The sealed half of a real contest: what a method ships, trained afresh, on items that no search could ask.

Neither a run that the search chose nor an item that it saw counts here: the shipped settings get new runs, under seeds
that no search draws, and a second judge, frozen under a secret of its own, asks its final split and fresh dev items.
The origin's frozen runs answer the same items.
"""

from dataclasses import dataclass
from typing import Any

from megatron_evolve.contest.shared_runs import SHIPPED, SharedRuns
from megatron_evolve.contest.space import Space
from megatron_evolve.contest.workshop import TrainedRun, items_of, weighted
from megatron_evolve.eval.paired import RunItems, effect
from megatron_evolve.jobs import FINAL_STAGE, Run, Stage
from megatron_evolve.origin import ORIGIN_ROUND
from megatron_evolve.substrate.settings import Settings

# Whose items the second judge draws. Not the origin's: a launcher knows a job by round, run and stage, and the first
# judge has asked the origin's runs in that one.
ROUND = 1
ASKED: dict[str, tuple[Stage, tuple[str, ...]]] = {
    "external": (FINAL_STAGE, ("final",)),
    "dev": ("dev", ("dev-a", "dev-b")),
}


@dataclass(frozen=True, eq=False)
class SealedHalf:
    """The second judge of one campaign, over the shared runs and over the origin's."""

    space: Space
    shared: SharedRuns
    frozen: SharedRuns
    frozen_seeds: tuple[int, ...]
    count: int

    def measure(self, settings: Settings) -> dict[str, Any]:
        """True gain over the origin outside and on dev, with the standard error of the items, and each run's score."""
        runs = [self.shared.run_of(settings, SHIPPED, index) for index in range(self.count)]
        mine = [TrainedRun(settings, run, self.shared) for run in runs if self.shared.train(run).finished]
        if not mine:
            raise ValueError(
                f"no fresh run of the shipped settings {runs[0].candidate.id} finished, so there is nothing to measure"
            )
        origin = self.frozen.run_of(self.space.origin, SHIPPED, 0).candidate
        theirs = [
            TrainedRun(self.space.origin, Run(ORIGIN_ROUND, origin, seed), self.frozen) for seed in self.frozen_seeds
        ]
        found: dict[str, Any] = {"fresh_runs": len(mine)}
        for side, weights in (("external", self.space.external_weights), ("dev", self.space.dev_weights)):
            answers = [
                [_answers(one, side, name) for one in runs] for runs, name in ((mine, "shipped"), (theirs, "origin"))
            ]
            apart = effect(*answers, weights)
            scores = [[weighted(one.correct, one.families, weights) for one in runs] for runs in answers]
            found[side] = {"gain": apart.mean, "item_se": apart.se, "shipped": scores[0], "origin": scores[1]}
        return found


def _answers(one: TrainedRun, side: str, name: str) -> RunItems:
    """Under the name of its part: a method may ship the origin's own settings."""
    stage, splits = ASKED[side]
    found = items_of(one, stage, ROUND, *splits)
    return RunItems(name, found.seed, found.item_ids, found.families, found.correct)
