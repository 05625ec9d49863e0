"""The sealed half: the campaign's standing settings against those that a maximiser of dev would have kept.

The maximiser reads dev alone, for ever. Of all anchors and explorers of the campaign it keeps the settings with the
best mean on dev-A, by the runs that selection reads; dev-A's items are the same in every round, so rounds compare. It
chooses among what this campaign tried, it does not search by itself.

Neither side is measured on a run that selected it, or its luck would count as merit. The closing trains fresh runs of
the standing settings; as many are trained here of the maximiser's, under seeds from the same rule. The origin's frozen
runs stand for the origin. Same settings on both sides: the difference is zero and nothing is run. All of this happens
after the campaign is closed and outside its folder. A campaign whose target tells scores alone has no sealed items and
trains nothing at its end: both sides are trained here and asked those of its leaderboard.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.audit import Record
from megatron_evolve.candidate import Candidate, candidate, run_seed
from megatron_evolve.comparisons import Weights
from megatron_evolve.eval.paired import Answers, RunItems, effect
from megatron_evolve.eval.score import overall_score, read_rows
from megatron_evolve.eval.seeds import weight_vector, weighted_sum
from megatron_evolve.facts import RoundFacts
from megatron_evolve.jobs import FINAL_STAGE, SCORES_FILE, Ground, Run, write_candidate
from megatron_evolve.origin import ORIGIN_ROUND
from megatron_evolve.prepare import origin_ground
from megatron_evolve.worlds.truth import read_candidate, truth_ground


@dataclass(frozen=True)
class Side:
    """One side's runs and where they lie."""

    candidate: Candidate
    ground: Ground
    runs: tuple[Run, ...]

    def answers(self) -> list[RunItems]:
        """Sealed answers of the runs that finished."""
        found = []
        for run in self.runs:
            folder = self.ground.stage_dir(run, FINAL_STAGE)
            if (folder / SCORES_FILE).exists():
                rows = read_rows(folder / "scores.parquet")
                found.append(rows.of_run(run.candidate.id, run.seed, FINAL_STAGE))
        return found


def best_on_dev(dev_a: Sequence[tuple[int, dict[str, float]]]) -> tuple[int, str]:
    """Round and name of the candidate with the best dev-A mean; of equals the earliest, then the first by name."""
    found = [(-mean, number, name) for number, means in dev_a for name, mean in means.items()]
    _, number, name = min(found)
    return number, name


def maximiser_of(facts: Sequence[RoundFacts], weights: Weights) -> tuple[int, Candidate]:
    """What a maximiser of dev keeps, and the round that tried it."""
    number, name = best_on_dev([(one.number, dev_a_means(one, weights)) for one in facts])
    return number, read_candidate(next(one for one in facts if one.number == number), name)


def dev_a_means(facts: RoundFacts, weights: Weights) -> dict[str, float]:
    """Mean on dev-A of anchor and explorers, whatever the round searched for, by the runs that selection reads."""
    found = {}
    for name in (facts.anchor, *facts.explorers):
        if runs := facts.first(name, "dev-a"):
            found[name] = statistics.fmean(overall_score(run.rows("dev-a"), weights.dev).mean for run in runs)
    return found


def sides(record: Record, kept: Candidate, place: Path, board: Path | None = None) -> tuple[Side, Side]:
    """The standing settings and the maximiser's, each with its fresh runs (the origin: with its frozen ones).

    `board` is the judge of the campaign's leaderboard, if that is what its target is.
    """
    last, judge = record.policy(len(record.rounds) + 1), board or Path(record.opened["judge_folder"])
    standing = candidate(record.substrate.digest, last.standing)
    closed = [standing.id] if board is None else []  # whose fresh runs the campaign's own end trained
    return tuple(_side(record, one, last.round, place, judge, one.id in closed) for one in (standing, kept))


def _side(record: Record, found: Candidate, number: int, place: Path, judge: Path, in_campaign: bool) -> Side:
    if found.id == record.origin.candidate:
        limit = record.campaign.constitution.limits.run_seconds
        ground = origin_ground(Path(record.opened["substrate_folder"]), judge, limit, place / "sealed")
        return Side(found, ground, tuple(Run(ORIGIN_ROUND, found, seed) for seed in record.origin.seeds))
    indices = range(record.campaign.constitution.anchor_seeds)
    seeds = [run_seed(record.campaign.seed, number, found.id, index) for index in indices]
    ground = replace(truth_ground(record, judge, place), scores=None)
    if not in_campaign:
        ground = replace(ground, folder=CampaignFolder(place / "sealed"))
        write_candidate(ground.folder, number, found)
    return Side(found, ground, tuple(Run(number, found, seed) for seed in seeds))


def compare(standing: Side, kept: Side, weights: Weights) -> dict[str, Any]:
    """Standing minus maximiser on the sealed items; where a side has no score, a reason and no difference."""
    found: dict[str, Any] = {
        "standing": standing.candidate.id,
        "maximiser": kept.candidate.id,
        "same": standing.candidate.id == kept.candidate.id,
        "accuracy": {},
        "difference": None,
        "reason": "",
    }
    if found["same"]:
        return {**found, "difference": {"mean": 0.0, "item_se": 0.0}}
    answers = {"standing": standing.answers(), "maximiser": kept.answers()}
    if empty := [name for name, runs in answers.items() if not runs]:
        return {**found, "reason": f"no run of the settings of {' and '.join(empty)} finished"}
    apart = effect(answers["standing"], answers["maximiser"], weights.external)
    accuracy = {name: mean_accuracy(runs, weights) for name, runs in answers.items()}
    return {**found, "accuracy": accuracy, "difference": {"mean": apart.mean, "item_se": apart.se}}


def mean_accuracy(runs: Sequence[RunItems], weights: Weights) -> float:
    """Mean score over runs."""
    answers = Answers.of(runs)
    w = weight_vector(weights.external, answers.families)
    return statistics.fmean(weighted_sum(means_F, w) for means_F in answers.family_means_RF())
