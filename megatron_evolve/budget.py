"""The budget: what a campaign may use in all, and what it has used, every attempt counted.

A job is started only if it fits at its worst: what was used, plus what runs and this job up to their time limits, may
not exceed a budget. Once a job has ended, what it took is charged and the rest is free again. So no budget is ever
exceeded, and none is reset: what was used is read from the ledger's ended stages and the attempts of those still open,
whatever a candidate is called and however often the controller starts.

What nobody measured is charged at its worst: all its cores where processor time is not known, and where an end was not
seen all cores and GPUs from the begin to the last sign of life (`launch.starts`), at most up to the job's limit.

Charged is what the campaign starts from its opening on. Its ground (substrate, origin), built once and shared by
campaigns, is not.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_evolve.constitution import Budgets
from megatron_evolve.launch.job import Job, JobOutcome, Resources
from megatron_evolve.launch.rundir import OUTCOME_FILE, DamagedFile, attempt_dir, latest_attempt, read_job, read_outcome
from megatron_evolve.launch.starts import life_s
from megatron_evolve.ledger import Event


@dataclass(frozen=True)
class Spend:
    """What jobs took: seconds of wall time, of processors, and of wall time times GPUs."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0

    @classmethod
    def most(cls, resources: Resources, limit_s: float) -> "Spend":
        """What a job with these resources can take until it is killed."""
        return cls(limit_s, limit_s * resources.cores, limit_s * resources.gpus)

    def __add__(self, other: "Spend") -> "Spend":
        return Spend(
            self.seconds + other.seconds,
            self.cpu_seconds + other.cpu_seconds,
            self.gpu_seconds + other.gpu_seconds,
        )


def most_within(resources: Resources, limit_s: float, grace_s: float) -> Spend:
    """What a stage's job with this time limit and grace can take."""
    return Spend.most(resources, limit_s + grace_s)


def most_of(job: Job) -> Spend:
    """What one attempt at a job can take: all its cores and GPUs until it is killed."""
    return Spend.most(job.resources, job.time_limit_s + job.grace_s)


def spent_by(job: Job, outcome: JobOutcome, folder: Path) -> Spend:
    """What an attempt took whose folder this is. One that never began took nothing, whatever it is called."""
    if outcome.seconds is None:
        return Spend.most(job.resources, min(life_s(folder), most_of(job).seconds))
    most = Spend.most(job.resources, outcome.seconds)
    return most if outcome.cpu_seconds is None else replace(most, cpu_seconds=outcome.cpu_seconds)


def spent_before(job: Job, attempt: int | None = None) -> Spend:
    """What the ended attempts at a job before this one took, all of them without it."""
    latest = latest_attempt(job.run_dir)
    folders = (attempt_dir(job.run_dir, number) for number in range(1, min(latest, (attempt or latest + 1) - 1) + 1))
    return sum((_spent_in(folder) for folder in folders), Spend())


def spent_in_all(job: Job, outcome: JobOutcome) -> Spend:
    """What all attempts at a job took, the last one ended as told."""
    folder = attempt_dir(job.run_dir, outcome.attempt)
    known = (folder / OUTCOME_FILE).exists()
    return spent_before(job, outcome.attempt + known) + (Spend() if known else spent_by(job, outcome, folder))


def _spent_in(folder: Path) -> Spend:
    asked = read_job(folder)
    try:
        outcome = read_outcome(folder)
    except DamagedFile:
        return most_of(asked)
    if outcome is None:  # it runs, or was never begun
        return Spend()
    return spent_by(asked, outcome, folder)


@dataclass
class Account:
    """What was used and what is reserved. The default has no budget and refuses nothing.

    opened_at  unix time at which the campaign was opened, for its wall time; None: not yet
    spent      why nothing is started any more, once a budget is spent: then it stays so
    """

    budgets: Budgets = field(default_factory=Budgets)
    opened_at: float | None = None
    used: Spend = field(default_factory=Spend)
    spent: str | None = None
    clock: Callable[[], float] = time.time
    _open: dict[str, Spend] = field(default_factory=dict)  # earlier attempts of stages that have not ended
    _reserved: dict[str, Spend] = field(default_factory=dict)  # of what was submitted

    @classmethod
    def of(cls, budgets: Budgets, events: Iterable[Event]) -> "Account":
        """The account of a campaign with this ledger, as it stands before any stage is taken up again."""
        account = cls(budgets)
        for event in events:
            account.enter(event)
        return account

    def enter(self, event: Event) -> None:
        """Take in one event of the ledger, of before any stage is taken up again."""
        if event.kind == "campaign-opened":
            self.opened_at = datetime.fromisoformat(event.time).timestamp()
        elif event.kind == "ended":
            self.used += of_end(event.data["end"])
        elif event.kind == "budget-spent":
            self.spent = event.data["why"]

    def hold(self, key: str, earlier: Spend) -> None:
        """Charge what a stage that has not ended took so far; nothing of it is submitted now."""
        self._reserved.pop(key, None)
        self._open[key] = earlier

    def reserve(self, job: Job) -> None:
        """Set aside what an attempt that was submitted can take."""
        self._reserved[job.key] = most_of(job)

    def settle(self, key: str, total: Spend) -> None:
        """Charge all that a stage took, now that it has ended."""
        self._reserved.pop(key, None)
        self._open.pop(key, None)
        self.used += total

    def refusal(self, job: Job) -> str | None:
        """Which budget one more job could exceed, in words; None if it fits them all."""
        limits = limits_of(self.budgets)
        if self.spent is not None or not limits:
            return self.spent
        more = most_of(job)
        taken = sum((*self._open.values(), *self._reserved.values()), self.used)
        now, then = figures(self.budgets, taken), figures(self.budgets, taken + more)
        now["wall_hours"] = self._wall_hours()
        then["wall_hours"] = now["wall_hours"] + more.seconds / 3600
        for name, limit in limits.items():
            if then[name] > limit:
                return (
                    f"{amount(now[name])} of {amount(limit)} {WORDS[name]} are used, and the next job could take "
                    f"{amount(then[name] - now[name])}"
                )
        return None

    def statement(self) -> dict[str, dict[str, float | None]]:
        """What is used and what may be, by budget. None: unlimited."""
        taken = sum(self._open.values(), self.used)
        told = figures(self.budgets, taken) | {"wall_hours": self._wall_hours()}
        limits = limits_of(self.budgets)
        return {name: {"used": round(value, 6), "budget": limits.get(name)} for name, value in told.items()}

    def _wall_hours(self) -> float:
        return 0.0 if self.opened_at is None else (self.clock() - self.opened_at) / 3600


WORDS = {"gpu_hours": "GPU-hours", "cpu_hours": "CPU-hours", "wall_hours": "hours", "money": "units of money"}


def amount(value: float) -> str:
    """A figure as people write it: whole from 1,000 on and never with an exponent there, to four digits below."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4g}"


def figures(budgets: Budgets, spend: Spend) -> dict[str, float]:
    """A spend in the units of the budgets."""
    gpu_hours, cpu_hours = spend.gpu_seconds / 3600, spend.cpu_seconds / 3600
    money = gpu_hours * budgets.gpu_hour_price + cpu_hours * budgets.cpu_hour_price
    return {"gpu_hours": gpu_hours, "cpu_hours": cpu_hours, "money": money}


def limits_of(budgets: Budgets) -> dict[str, float]:
    """The budgets that are declared."""
    named = {name: getattr(budgets, name) for name in WORDS}
    return {name: limit for name, limit in named.items() if limit is not None}


def of_end(end: dict[str, Any]) -> Spend:
    """What the ledger says that a stage took. Ledgers of before GPUs were charged have none."""
    return Spend(end.get("seconds", 0.0), end["cpu_seconds"], end.get("gpu_seconds", 0.0))
