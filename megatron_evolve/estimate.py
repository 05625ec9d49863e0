"""What a campaign will use, at most, before any of it is used: runs, scoring jobs, GPU-hours, looks.

Training has two figures. *Assumed*: the plan's operations a token, times the tokens of the opening recipe with every
row at its full length, at the share of the peak that the site assumes. *Limit*: the time after which a job is killed,
times its GPUs; it assumes nothing. Decoding has the limit alone, for an engine's speed is not known here.
"""

from dataclasses import asdict, dataclass
from typing import Any

from megatron_evolve.budget import WORDS, amount
from megatron_evolve.campaign import Campaign, ExternalCsv, looks_a_round, plan_of
from megatron_evolve.eval.suite import GeneratedSuite
from megatron_evolve.preflight import Preflight
from megatron_evolve.reuse import reuse_words, rounds_anew
from megatron_evolve.substrate.plan.flops import token_flops
from megatron_evolve.survey import survey_stages

SAFE_WORKERS = 8  # at 6 points between seeds 1 % of harmless campaigns alarm with them unconfirmed, 8 % with 32


@dataclass(frozen=True)
class Phase:
    """Jobs of one part of a campaign, at most. A run that failed and was repaired comes on top."""

    name: str
    training_runs: int
    scoring_jobs: int


def phases(campaign: Campaign) -> tuple[Phase, ...]:
    """The origin before round 1, the rounds, and the comparison at the end."""
    counts, rules = plan_of(campaign), campaign.constitution
    outside = campaign.judge.target_suite is not None
    a_run = 1 + 2 * outside  # dev, and each half of the target
    anchors, origins = rules.anchor_seeds, campaign.judge.origin_seeds
    asked_at_end = len(survey_stages(campaign)) * anchors + origins if outside else 0
    return (
        Phase("origin", origins, origins * a_run),
        Phase("rounds", counts["runs"], counts["runs"] * a_run),
        Phase("end", anchors * outside, asked_at_end),
    )


def estimate(found: Preflight) -> dict[str, Any]:
    """The account, as JSON holds it. GPU-hours are None where ranks compute on cores."""
    campaign, limits = found.campaign, found.campaign.constitution.limits
    run_hours, limit_hours = found.gpu_hours(found.opening_rows), limits.run_seconds / 3600
    placement, recipe = found.placement, found.expected.default.recipe
    training_cores, scoring_cores = (placement.resources(trains=trains).cores for trains in (True, False))
    rows = [
        {
            **asdict(phase),
            "training_gpu_hours_assumed": _hours(run_hours, phase.training_runs),
            "gpu_hours_limit": limit_hours
            * (phase.training_runs * placement.training_gpus + phase.scoring_jobs * placement.scoring_gpus)
            if found.job
            else None,
            "cpu_hours_limit": limit_hours
            * (phase.training_runs * training_cores + phase.scoring_jobs * scoring_cores),
        }
        for phase in phases(campaign)
    ]
    return {
        **plan_of(campaign),
        "phases": rows,
        "total": {key: _sum(row[key] for row in rows) for key in rows[0] if key != "name"},
        "run": {
            "rows": found.opening_rows,
            "tokens": found.opening_rows * recipe.sequence_length,
            "longest_rows": found.most_rows,
            "gflop_a_token": token_flops(found.expected.architecture, found.job).executed / 1e9 if found.job else None,
            "gpus": placement.training_gpus,
            "gpu_hours_assumed": run_hours,
            "hours_assumed": run_hours / placement.training_gpus if run_hours else None,
            "hours_limit": limit_hours,
        },
        "scoring": {
            "gpus": placement.scoring_gpus,
            "items": items_of(campaign),
            "max_new_tokens": campaign.judge.engine.max_new_tokens,
        },
        "looks_a_round": looks_a_round(campaign),
        "rounds_anew": rounds_anew(campaign),
        "warnings": seed_luck(campaign),
    }


def use_words(use: dict[str, Any], budget: dict[str, dict[str, float | None]]) -> list[str]:
    """What a campaign will use, at most, beside what is used of its budgets; for the moment before it starts."""
    total = use["total"]
    lines = [
        f"at most {total['training_runs']} training runs and {total['scoring_jobs']} scoring jobs, with the origin's"
    ]
    limits = {"gpu_hours": total["gpu_hours_limit"], "cpu_hours": total["cpu_hours_limit"]}
    assumed = total["training_gpu_hours_assumed"]
    for name, one in budget.items():
        limit, most = one["budget"], limits.get(name)
        if limit is None and not most:
            continue
        parts = [] if most is None else [f"{amount(most)} if every job ran to its time limit"]
        parts += [f"{amount(assumed)} assumed for training"] if name == "gpu_hours" and assumed is not None else []
        parts.append(f"{amount(one['used'])} used of a budget of {amount(limit)}" if limit is not None else "no budget")
        lines.append(f"  {WORDS[name]}: {', '.join(parts)}")
    return [*lines, *reuse_words(use["rounds_anew"], use["rounds"]), *use["warnings"]]


def seed_luck(campaign: Campaign) -> list[str]:
    """One sentence where many explorers run, the target is asked and no leader gets a further seed; see `gap.py`."""
    rules, replicates = campaign.constitution, campaign.search.replicates
    confirmed = replicates.confirm_candidates * replicates.confirm_seeds
    if confirmed or rules.workers <= SAFE_WORKERS or not (looks_a_round(campaign) and rules.external_looks):
        return []
    return [
        f"no leader is confirmed: the best of {rules.workers - 1} explorers carries its seed's luck into dev-B, so "
        "that more than 5 % of harmless campaigns may alarm (set search.replicates.confirm_candidates to 2 and "
        "confirm_seeds to 1)"
    ]


def items_of(campaign: Campaign) -> dict[str, int | None]:
    """Items of each split in one scoring job; None where only the external file tells."""
    found: dict[str, int | None] = {}
    for suite in (campaign.judge.dev, campaign.judge.external):
        if isinstance(suite, GeneratedSuite):
            found |= {split: number * len(suite.families) for split, number in suite.items_per_family.items()}
        elif isinstance(suite, ExternalCsv):
            found |= {**suite.items, **dict.fromkeys(survey_stages(campaign))}
    return found


def _hours(a_run: float | None, runs: int) -> float | None:
    return None if a_run is None else a_run * runs


def _sum(values: Any) -> float | None:
    known = list(values)
    return None if None in known else sum(known)
