"""Released scores: what selection and the next policy may read of a target that asks the same items again.

One that tells scores alone does so in every round, a CSV once its rows come round again (`reuse.py`), so whoever reads
it closely enough and often enough learns the items and not the skill. The Ladder's rule (Blum & Hardt 2015) against the
round's anchor: a difference within its standard error is released as none, one beyond it rounded to what one item is
worth, or to the target's own step. Verdicts are computed on the exact numbers. A generated target needs none of this:
its items are fresh in every round. Nor does dev-A, though its items stay: it only selects, and what a search has learnt
of them is no gain on dev-B's fresh ones, which alone judge.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from megatron_evolve.eval.looks import round_to
from megatron_evolve.eval.paired import Contrast, Estimate, difference, effect, estimate
from megatron_evolve.eval.reported import WHOLE_WEIGHT, ReportedScores, reported_contrast
from megatron_evolve.eval.score import overall_score
from megatron_evolve.evidence import ScoreValue
from megatron_evolve.facts import RoundFacts, RunFacts


def told_runs(facts: RoundFacts, name: str) -> list[RunFacts]:
    """Runs of a candidate whose score the target told, in order of replicate."""
    return [run for run in facts.runs.get(name, ()) if run.reported is not None]


def told_scores(facts: RoundFacts, names: Sequence[str]) -> ReportedScores | tuple[()]:
    """The exact scores of these candidates' runs; empty where none was asked."""
    runs = [run for name in names for run in told_runs(facts, name)]
    if not runs:
        return ()
    first = runs[0].reported
    return ReportedScores(
        {(run.candidate, run.seed): run.reported["score"] for run in runs}, first["items"], first["step"]
    )


def told_contrast(facts: RoundFacts, name: str, runs: Sequence[RunFacts] | None = None) -> Contrast | None:
    """Candidate minus anchor by the exact scores, of these runs or all; none where one of the two was not asked."""
    mine, anchors = told_runs(facts, name) if runs is None else runs, told_runs(facts, facts.anchor)
    if not mine or not anchors or name == facts.anchor:
        return None
    coefficients = difference({name: [run.seed for run in mine]}, 1.0)
    coefficients |= difference({facts.anchor: [run.seed for run in anchors]}, -1.0)
    return reported_contrast([(told_scores(facts, (name, facts.anchor)), coefficients)])


def released(found: Estimate, step: float) -> Estimate:
    """A difference to the anchor as it may be read; `step` is what one item is worth."""
    mean = 0.0 if abs(found.mean) <= found.se else round_to(found.mean, step)
    return replace(found, mean=mean)


def released_mean(facts: RoundFacts, name: str, runs: Sequence[RunFacts] | None = None) -> float | None:
    """A candidate's score as it may be read: the anchor's, rounded, and the released difference to it."""
    anchors = told_scores(facts, (facts.anchor,))
    if not anchors:
        return None
    base = round_to(sum(anchors.scores.values()) / len(anchors.scores), step_of(anchors))
    if name == facts.anchor:
        return base
    contrast = told_contrast(facts, name, runs)
    if contrast is None:
        return None
    return base + released(estimate([(1.0, contrast, WHOLE_WEIGHT)]), step_of(anchors)).mean


def released_value(facts: RoundFacts, name: str) -> ScoreValue | None:
    """The same with its standard error, the items' alone, and its count."""
    mean = released_mean(facts, name)
    if mean is None:
        return None
    n = told_scores(facts, (facts.anchor,)).items
    mean = min(1.0, max(0.0, mean))
    return ScoreValue(mean=mean, se=(mean * (1 - mean) / n) ** 0.5, n=n)


def released_half(facts: RoundFacts, name: str, split: str, weights: Mapping[str, float]) -> float | None:
    """A candidate's mean score on rows that an earlier round asked, by the same rule; none without the anchor's."""
    mine, anchors = (facts.first(one, split) for one in (name, facts.anchor))
    if not mine or not anchors:
        return None
    step = 1.0 / len(anchors[0].items((split,)).item_ids)
    base = round_to(fmean(overall_score(run.rows(split), weights).mean for run in anchors), step)
    if name == facts.anchor:
        return base
    answers = [[run.items((split,)) for run in runs] for runs in (mine, anchors)]
    return base + released(effect(*answers, weights), step).mean


def step_of(scores: ReportedScores) -> float:
    """What one item of such a target is worth, or its own step where that is coarser."""
    return max(scores.step, 1.0 / scores.items)
