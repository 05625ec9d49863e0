"""The mirror: a campaign's progress sent to Weights & Biases or trackio, by a process of its own that reads its files.

    DIR/ledger.jsonl --follow--> tally --FIELDS--> tracker

What may leave is written down here, field by field, and a test holds it: counts and hours. No score, for a tracker
outside would show what the judge knows; no answer, path, reason, delta or name of a machine. The trackers' own habit of
sending the command line, the repository and the machine along is switched off. Whatever happens to the mirror, the
campaign hears nothing of it; started again, it goes on.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from megatron_evolve.standing import Now
from megatron_evolve.substrate.digest import digest_of, short
from megatron_evolve.tally import Tally
from megatron_evolve.watch import Watcher

FIELDS: dict[str, Callable[[Now], float]] = {
    "round": lambda now: now.progress.round,
    "rounds_closed": lambda now: now.progress.rounds_closed,
    "runs_trained": lambda now: now.progress.runs_trained,
    "runs_planned": lambda now: now.progress.runs_planned,
    "stages_finished": lambda now: now.jobs.outcomes.get("finished", 0),
    "stages_failed": lambda now: sum(now.jobs.outcomes.values()) - now.jobs.outcomes.get("finished", 0),
    "jobs_running": lambda now: now.jobs.running,
    "jobs_waiting": lambda now: now.jobs.waiting,
    "external_looks": lambda now: _used(now, "external_looks"),
    "cpu_hours": lambda now: _used(now, "cpu_hours"),
    "gpu_hours": lambda now: _used(now, "gpu_hours"),
}


class Tracker(Protocol):
    """Where points go. `step` never falls."""

    def log(self, point: dict[str, float], step: int) -> None:
        """Takes one point."""
        ...

    def finish(self) -> None:
        """Sends what is still held."""
        ...


def mirror(root: Path, open_as: Callable[[str], Tracker], *, every_s: float, once: bool) -> int:
    """Sends a point each time the ledger grew, until the campaign is closed; the number of points sent.

    `open_as` is given the run's name, which is the same each time a campaign is mirrored. Raises ValueError where there
    is no campaign, or, with `once`, none that was opened.
    """
    watcher, tracker, sent, seen = Watcher(root), None, 0, -1
    try:
        while True:
            now, tally = watcher.look(), watcher.tally
            if tally.opened is not None and tally.num_events != seen:
                tracker = tracker or open_as(run_name(tally))
                tracker.log(point_of(now), step=tally.num_events)
                sent, seen = sent + 1, tally.num_events
            if once and tally.opened is None:
                raise ValueError(f"the campaign in {root} was not opened yet: run it first, or leave --once out")
            if once or tally.closing is not None:
                return sent
            time.sleep(every_s)
    finally:
        if tracker is not None:
            tracker.finish()


def point_of(now: Now) -> dict[str, float]:
    """What is sent of this moment."""
    return {name: float(read(now)) for name, read in FIELDS.items()}


def _used(now: Now, budget: str) -> float:
    return now.budget[budget].used if budget in now.budget else 0.0


def run_name(tally: Tally) -> str:
    """The campaign's name, told apart from another of that name by eight digits."""
    return f"{tally.opened['name']}-{short(digest_of(tally.opened))}"


def open_tracker(kind: str, project: str, name: str) -> Tracker:
    """A tracker's run. Raises ValueError for an unknown kind or a package that is not there."""
    if kind not in ("wandb", "trackio"):
        raise ValueError(f"--to takes wandb or trackio, got {kind!r}")
    try:
        return _open_wandb(project, name) if kind == "wandb" else _open_trackio(project, name)
    except ModuleNotFoundError as error:
        if error.name != kind:
            raise
        raise ValueError(f"{kind} is not installed: pip install {kind}") from None


def _open_trackio(project: str, name: str) -> Any:
    import trackio

    return trackio.init(project=project, name=name, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)


def _open_wandb(project: str, name: str) -> Any:
    import wandb

    silent = {"console": "off", "disable_git": True, "disable_code": True, "save_code": False, "host": "campaign"}
    silent |= {"x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True}
    silent |= {"x_save_requirements": False, "disable_job_creation": True, "program": "megatron-evolve"}
    return wandb.init(project=project, id=name, name=name, resume="allow", settings=wandb.Settings(**silent))
