"""The survey: at the end, what the standing settings can and cannot do, told sub-family by sub-family.

Of a generated target the sealed items are asked; of a CSV every row, sealed and open, once. The open rows are a look
of the external budget: where the rounds have spent all of it they are left out, and the survey says so. A sub-family
that no run can solve stands in the table with its zero and its interval.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.campaign import Campaign, ExternalCsv
from megatron_evolve.eval.looks import Looks
from megatron_evolve.eval.paired import wilson
from megatron_evolve.eval.score import ItemRows, read_rows
from megatron_evolve.jobs import FINAL_STAGE, ROWS_FILE, Run, Stage
from megatron_evolve.origin import ORIGIN_ROUND

OPEN_STAGE: Stage = "open"


def survey_stages(campaign: Campaign) -> tuple[Stage, ...]:
    """What is asked at the end: the sealed items, and of a CSV the others too."""
    return (FINAL_STAGE, OPEN_STAGE) if isinstance(campaign.judge.external, ExternalCsv) else (FINAL_STAGE,)


def affordable(looks: Looks, stages: Sequence[Stage], name: str, number: int) -> tuple[Stage, ...]:
    """The stages that can be asked of a candidate at the end: all that were paid before, or have a look left."""
    left = looks.spent < looks.external_budget
    return tuple(
        stage
        for stage in stages
        if left or stage == FINAL_STAGE or looks.paid(candidate=name, round_number=number, split=stage) is not None
    )


def closing_folder(folder: CampaignFolder, run: Run, stage: Stage) -> Path:
    """Where a run's closing answers lie; the origin's own folder belongs to all campaigns on its ground."""
    if run.round == ORIGIN_ROUND:
        return folder.closing / run.candidate.id / str(run.seed) / stage
    return folder.run(run.round, run.candidate.id, run.seed) / stage


def survey(
    folder: CampaignFolder, runs: Sequence[Run], stages: Sequence[Stage], unasked: Sequence[Stage] = ()
) -> dict[str, Any]:
    """Accuracy of these runs by sub-family over the stages' items; runs that were not scored on all are left out.

    `unasked` names the stages for which no look was left; where all were asked the survey has no such entry.
    """
    whole = [run for run in runs if all((closing_folder(folder, run, one) / ROWS_FILE).exists() for one in stages)]
    rows = [[read_rows(closing_folder(folder, run, stage) / ROWS_FILE) for stage in stages] for run in whole]
    if not rows:
        return {"runs": 0, "items": 0, "subfamilies": {}}
    labels = sorted({(family, sub) for part in rows[0] for family, sub in _labels(part)})
    told = {"unasked": list(unasked)} if unasked else {}
    return told | {
        "candidate": whole[0].candidate.id,
        "runs": len(rows),
        "items": sum(len(part) for part in rows[0]),
        "subfamilies": {f"{family}/{sub}": _one(rows, family, sub) for family, sub in labels},
    }


def _labels(rows: ItemRows) -> set[tuple[str, str]]:
    return set(zip(rows.family.tolist(), rows.subfamily.tolist(), strict=True))


def _one(rows: Sequence[Sequence[ItemRows]], family: str, sub: str) -> dict[str, Any]:
    """One sub-family: means over runs of each share, and the Wilson interval of the official one on these items."""
    shares = {
        name: [_share(run, family, sub, name) for run in rows] for name in ("correct", "exact", "boxed", "truncated")
    }
    count = sum(int(_of(part, family, sub).sum()) for part in rows[0])
    accuracy = statistics.fmean(shares["correct"])
    low, high = wilson(accuracy, count)
    return {
        "items": count,
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "exact": statistics.fmean(shares["exact"]),
        "truncated": statistics.fmean(shares["truncated"]),
        "missing_box": 1 - statistics.fmean(shares["boxed"]),
    }


def _share(run: Sequence[ItemRows], family: str, sub: str, name: str) -> float:
    values = [value for part in run for value in getattr(part, name)[_of(part, family, sub)].tolist()]
    return sum(values) / len(values)


def _of(rows: ItemRows, family: str, sub: str) -> Any:
    return (rows.family == family) & (rows.subfamily == sub)
