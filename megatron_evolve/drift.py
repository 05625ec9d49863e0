"""Drift: the origin's frozen runs are asked a round's items, so that slow drift of the standing settings is seen.

A window of rounds compares explorers with the anchor and cannot see what the anchor itself has accumulated. Where the
constitution declares the cumulative estimand, the runs that were frozen with the judge answer the same fresh items as
everybody else: scored anew, trained by nobody.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_evolve.candidate import candidate
from megatron_evolve.closing import finish
from megatron_evolve.desk import Desk
from megatron_evolve.jobs import SPLITS_OF, Ground, Run, Stage
from megatron_evolve.origin import EXTERNAL_SPLITS, ORIGIN_ROUND
from megatron_evolve.policy import SearchPolicy
from megatron_evolve.prepare import origin_ground
from megatron_evolve.target import check_target


@dataclass(frozen=True)
class AskedAgain(Ground):
    """A campaign's ground whose runs were trained on another, in the origin's round."""

    trained: Ground | None = None

    def stage_dir(self, run: Run, stage: Stage) -> Path:
        """Where a stage of a run works, or worked when it was trained."""
        if stage == "train" and self.trained is not None:
            return self.trained.stage_dir(replace(run, round=ORIGIN_ROUND), stage)
        return super().stage_dir(run, stage)


def ask_origin(desk: Desk, policy: SearchPolicy, taken: Collection[str]) -> None:
    """Scores the origin's runs on the round's items, if it is judged and is none of the candidates `taken`.

    Looks are paid as any candidate's, after theirs: where the external budget is spent, the origin stays unasked.
    """
    origin = candidate(desk.substrate_digest, desk.origin_settings)
    if "cumulative" not in desk.campaign.constitution.gap.estimands or origin.id in taken:
        return
    facts = desk.facts(policy.round)
    if desk.account.spent is not None or not facts.has_anchor:
        return
    trained = origin_ground(desk.ground.substrate, desk.ground.judge, desk.ground.time_limit_s)
    ground = AskedAgain(**vars(desk.ground), trained=trained)
    runs = [Run(policy.round, origin, seed) for seed in desk.origin.seeds]
    halves = EXTERNAL_SPLITS[1:] if policy.objective == "external" else EXTERNAL_SPLITS
    # Where the anchor has no score of the target there is nothing to compare with, and no look is spent.
    external = policy.ask_external != "none" and bool(facts.scored(facts.anchor, halves[-1]))
    for stage in ("dev", *(halves if external else ())):
        keys = [run.key for run in runs]
        if stage != "dev":
            if not desk.may_ask(policy.round, origin.id, stage):
                return
            check_target(desk.campaign, desk.ground)
        for split in SPLITS_OF.get(stage, (stage,)):
            desk.pay(policy.round, origin.id, keys, split)
        runs = finish(desk, ground, runs, stage)
        if not runs:
            return
