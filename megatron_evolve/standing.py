"""Where a campaign stands this moment: its status, and what runs, how far it is, how long it may take, what is spent.

The status (`status.py`) follows from the ledger alone and is the same for ever; what is added here is true now. All of
it together is the document of `status --json`, which `megatron-evolve schema status` describes field by field. Keys are
added, never renamed.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.budget import Account
from megatron_evolve.constitution import Budgets
from megatron_evolve.ledger import History
from megatron_evolve.live import Controller, JobNow, controller_of, jobs_now
from megatron_evolve.status import status_of
from megatron_evolve.substrate.frozen import Frozen
from megatron_evolve.tally import Tally

QUIET_S = 600.0  # a controller of another machine counts as running while something was written this long ago
State = Literal["preparing", "running", "paused", "stopped", "closed"]


class JobView(Frozen):
    """One job that has an attempt and has not been entered in the ledger as ended."""

    key: str = Field(description="ROUND/CANDIDATE/SEED/STAGE, as in the ledger")
    round: int = Field(ge=0, description="0: the origin's")
    candidate: str
    axis: str = Field(description="axis that it was proposed on; `anchor` where it is the standing settings")
    seed: int
    stage: str = Field(description="train, dev, external-a, external-b, final or open")
    state: Literal["waiting", "running", "gone", "ended"] = Field(
        description="gone: its supervisor died; ended: over, not yet in the ledger"
    )
    attempt: int = Field(ge=1)
    step: int | None = Field(description="optimizer steps or items done, by its own word; none: it has said nothing")
    steps: int | None = Field(description="of how many")
    told_seconds_ago: float | None = Field(description="seconds since it said so")
    running_seconds: float | None = Field(description="seconds since its attempt began")
    waits_for: str | None = Field(
        default=None,
        description="why its scheduler has not started it, in its own words; none: it has, or says nothing",
    )


class JobsView(Frozen):
    """Jobs now, and how the stages that ended did."""

    running: int = Field(ge=0)
    waiting: int = Field(ge=0, description="asked for and not begun")
    outcomes: dict[str, int] = Field(description="stages that ended, by how")
    now: tuple[JobView, ...]


class ProgressView(Frozen):
    """How far the campaign is."""

    round: int = Field(ge=0, description="the latest that was opened; 0: none")
    rounds: int = Field(ge=0, description="declared")
    rounds_closed: int = Field(ge=0)
    runs_trained: int = Field(ge=0, description="trainings that ended in declared rounds, failed ones too")
    runs_planned: int = Field(ge=0, description="trained and still planned, at most: a repeated candidate is not")
    seconds_left: float | None = Field(
        description="estimate to the end of the last round, while it runs: active time for each run so far, times the "
        "runs left; none before the first run was trained and after the last round"
    )


class Spent(Frozen):
    """One budget."""

    used: float = Field(ge=0)
    budget: float | None = Field(description="none: counted, not limited")


class ControllerView(Frozen):
    """Who holds the campaign, or held it last."""

    pid: int
    host: str
    alive: bool | None = Field(description="none: a process of another machine, which cannot be seen from here")


class Now(Frozen):
    """What is true this moment."""

    state: State = Field(
        description="preparing: substrate, judge, origin; running: a controller lives; paused: it paused by itself; "
        "stopped: none lives, the same command goes on; closed"
    )
    paused: str | None = Field(description="why it paused by itself; none: it did not")
    stop_asked: bool = Field(description="a stop file is there; what runs is waited for")
    controller: ControllerView | None = Field(description="none: never started, or closed")
    progress: ProgressView
    jobs: JobsView
    budget: dict[str, Spent] = Field(
        description="external_looks, and of gpu_hours, cpu_hours, wall_hours, money those used or declared"
    )


class ScoreView(Frozen):
    """A mean with its standard error and count."""

    mean: float
    se: float
    n: int


class RunView(Frozen):
    """One run of a candidate."""

    seed: int
    outcome: str


class DomainView(Frozen):
    """A candidate's scores in one domain."""

    dev: ScoreView | None
    external: ScoreView | None


class CandidateView(Frozen):
    """One candidate of a round."""

    id: str
    axis: str
    role: Literal["anchor", "explorer"]
    runs: tuple[RunView, ...]
    dev: ScoreView | None
    external: ScoreView | None
    domains: dict[str, DomainView]


class RoundView(Frozen):
    """One round. Before its evidence: the runs whose training ended."""

    round: int
    objective: str
    policy: str = Field(description="digest")
    verdicts: tuple[dict[str, Any], ...] = Field(
        description="as in the round's evidence: outcome, estimand, domain, gap and reason among them"
    )
    minimum_detectable_effect: float | None = Field(description="on dev-b, in accuracy")
    candidates: tuple[CandidateView, ...]


class SubfamilyView(Frozen):
    """One sub-family of the target, as means over the surveyed runs."""

    items: int
    accuracy: float = Field(description="by the target's own metric")
    low: float = Field(description="Wilson's 95 % interval of the accuracy, on these items")
    high: float
    exact: float = Field(description="share of answers that are the reference, letter by letter")
    truncated: float = Field(description="share of answers that were cut off")
    missing_box: float = Field(description="share of answers without a box")


class SurveyView(Frozen):
    """What the standing settings can and cannot do at the end."""

    candidate: str | None = Field(default=None, description="whose runs; no entry where none was scored")
    runs: int
    items: int
    subfamilies: dict[str, SubfamilyView] = Field(description="by FAMILY/SUBFAMILY")
    unasked: tuple[str, ...] = Field(
        default=(), description="stages without a look left; no entry where all were asked"
    )


class GainView(Frozen):
    """Standing settings minus origin on the sealed items, in accuracy."""

    mean: float
    se: float
    low: float = Field(description="95 % interval")
    high: float
    p_better: float
    minimum_detectable_effect: float = Field(description="true gain that is seen with 80 % power")


class FinalView(Frozen):
    """The standing settings against the origin on the sealed items."""

    standing: str = Field(description="candidate")
    origin: str = Field(description="candidate")
    same: bool = Field(description="the standing settings are still the origin: nothing was compared")
    accuracy: dict[str, float] | None = Field(default=None, description="of `standing` and `origin`")
    items: int | None = None
    runs: dict[str, int] | None = Field(default=None, description="of `standing` and `origin`")
    gain: GainView | None = Field(default=None, description="no entry where nothing could be compared")
    failed: str | None = Field(default=None, description="why nothing could be compared; no entry where it was")


class ClosingView(Frozen):
    """The ledger's last event."""

    claim: Literal["performance", "infrastructure"]
    final: FinalView | None = Field(description="none: no target, or a budget was spent before")
    finding: str = Field(description="one sentence")
    looks: str = Field(description="digest of all looks")


class Standing(Now):
    """The document of `status --json`."""

    campaign: str | None = Field(description="name; none while it is being prepared")
    claim: Literal["performance", "infrastructure"] | None = None
    interventions: int = Field(default=0, description="events entered by people")
    looks: dict[str, int] | None = Field(default=None, description="dev, external, external_budget")
    substrate: str | None = Field(default=None, description="digest")
    judge: str | None = Field(default=None, description="digest")
    cpu_seconds: float = Field(default=0.0, description="of the jobs that ended")
    rounds: tuple[RoundView, ...]
    survey: SurveyView | None = Field(default=None, description="none: not yet, or no target to survey")
    closing: ClosingView | None = Field(default=None, description="none: still open")


def standing(root: Path) -> dict[str, Any]:
    """The document of `status --json`. Raises ValueError when `root` holds no campaign or a corrupt ledger."""
    folder, tally = CampaignFolder(root), Tally()
    found = status_of(folder, History(folder.ledger, tally.add), tally)
    external = found["looks"]["external"] if "looks" in found else 0
    return {**found, **now(folder, tally, external).model_dump(mode="json")}


def now(folder: CampaignFolder, tally: Tally, external_looks: int) -> Now:
    """What is added to the status. `external_looks` are those paid so far."""
    moment = time.time()
    controller = None if tally.closing is not None else controller_of(folder)
    jobs = jobs_now(folder, tally)
    is_alive = controller is not None and _is_alive(controller, tally, jobs, moment)
    running = sum(job.share for job in jobs if job.state == "running" and job.key.endswith("/train"))
    left = tally.seconds_left(running) if is_alive else None
    return Now(
        state=_state(tally, is_alive),
        paused=tally.pause,
        stop_asked=tally.closing is None and folder.stop_file.exists(),
        controller=None if controller is None else ControllerView(**vars(controller)),
        progress=ProgressView(
            round=min(tally.round, tally.rounds),
            rounds=tally.rounds,
            rounds_closed=tally.rounds_closed,
            runs_trained=tally.trained,
            runs_planned=tally.trained + tally.runs_left,
            seconds_left=None if left is None else round(left, 1),
        ),
        jobs=JobsView(
            running=sum(job.state == "running" for job in jobs),
            waiting=sum(job.state == "waiting" for job in jobs),
            outcomes=dict(sorted(tally.outcomes.items())),
            now=tuple(_view(job, tally, moment) for job in jobs),
        ),
        budget=_budget(tally, external_looks, moment),
    )


def _state(tally: Tally, is_alive: bool) -> State:
    if tally.closing is not None:
        return "closed"
    if not is_alive:
        return "stopped" if tally.pause is None else "paused"
    return "preparing" if tally.opened is None else "running"


def _is_alive(controller: Controller, tally: Tally, jobs: Sequence[JobNow], moment: float) -> bool:
    if controller.alive is not None:
        return controller.alive
    told = [job.told_at or job.since or 0.0 for job in jobs]
    last = max([0.0 if tally.last_time is None else tally.last_time.timestamp(), *told])
    return moment - last < QUIET_S


def _budget(tally: Tally, external_looks: int, moment: float) -> dict[str, Spent]:
    """Looks, and of the other budgets those that are declared or used; of a closed campaign as of its last event."""
    if tally.opened is None:
        return {}
    clock = tally.last_time.timestamp() if tally.closing is not None else moment
    budgets = Budgets(**tally.opened.get("budgets", {}))
    told = Account(budgets, tally.opened_at, tally.used, clock=lambda: clock).statement()
    looks = Spent(used=external_looks, budget=tally.opened["plan"]["external_looks"])
    used = {name: Spent(**one) for name, one in told.items() if one["used"] or one["budget"] is not None}
    return {"external_looks": looks, **used}


def _view(job: JobNow, tally: Tally, moment: float) -> JobView:
    number, candidate, seed, stage = job.key.split("/")
    return JobView(
        key=job.key,
        round=int(number),
        candidate=candidate,
        axis=tally.axes.get(candidate, "anchor"),
        seed=int(seed),
        stage=stage,
        state=job.state,
        attempt=job.attempt,
        step=job.step,
        steps=job.steps,
        told_seconds_ago=None if job.told_at is None else round(max(0.0, moment - job.told_at), 1),
        running_seconds=None if job.since is None else round(max(0.0, moment - job.since), 1),
        waits_for=job.waits_for or None,
    )
