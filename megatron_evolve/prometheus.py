"""Where a campaign stands as Prometheus reads it: the text format, for node_exporter's textfile collector.

    megatron-evolve watch DIR --prometheus /var/lib/node_exporter/campaign.prom

The watcher writes it, not the controller: nothing that goes wrong with it touches the campaign. Format: "Text-based
format" of https://prometheus.io/docs/instrumenting/exposition_formats/; no time stamps, which the collector refuses.
"""

from collections.abc import Iterable
from typing import get_args

from megatron_evolve.standing import Now, State
from megatron_evolve.tally import Tally

PREFIX = "megatron_evolve"
Sample = tuple[dict[str, str], float]


def exposition(found: Now, tally: Tally) -> str:
    """The whole file."""
    families: list[tuple[str, str, str, Iterable[Sample]]] = [
        ("state", "gauge", "1 for the state the campaign is in.", _states(found)),
        ("round", "gauge", "Latest round that was opened.", [({}, found.progress.round)]),
        ("rounds", "gauge", "Declared rounds.", [({}, found.progress.rounds)]),
        ("rounds_closed_total", "counter", "Rounds closed.", [({}, found.progress.rounds_closed)]),
        ("runs_trained_total", "counter", "Trainings that ended.", [({}, found.progress.runs_trained)]),
        ("runs_planned", "gauge", "Trainings planned in all, at most.", [({}, found.progress.runs_planned)]),
        ("stages_ended_total", "counter", "Stages that ended, by how.", _outcomes(found)),
        ("jobs", "gauge", "Jobs now, by state.", _jobs(found)),
        ("job_progress_ratio", "gauge", "Done of one whole, by its own word.", _progress(found)),
        ("job_told_seconds", "gauge", "Seconds since a running job last said how far it is.", _told(found)),
        ("budget_used", "gauge", "Spent of a budget.", _budget(found, "used")),
        ("budget_limit", "gauge", "What a budget allows.", _budget(found, "budget")),
        ("left_seconds", "gauge", "Estimated time to the end of the last round.", _left(found)),
        ("ledger_events_total", "counter", "Events in the ledger.", [({}, tally.num_events)]),
        ("last_event_timestamp_seconds", "gauge", "When the last event happened.", _last(tally)),
    ]
    name = tally.opened["name"] if tally.opened else ""
    return "".join(_family(*family, campaign=name) for family in families)


def _family(name: str, kind: str, told: str, samples: Iterable[Sample], campaign: str) -> str:
    samples = list(samples)
    if not samples:
        return ""
    lines = [f"# HELP {PREFIX}_{name} {told}", f"# TYPE {PREFIX}_{name} {kind}"]
    for labels, value in samples:
        shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in {"campaign": campaign, **labels}.items())
        lines.append(f"{PREFIX}_{name}{{{shown}}} {value:.17g}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _states(found: Now) -> list[Sample]:
    return [({"state": state}, float(state == found.state)) for state in get_args(State)]


def _outcomes(found: Now) -> list[Sample]:
    return [({"outcome": outcome}, count) for outcome, count in found.jobs.outcomes.items()]


def _jobs(found: Now) -> list[Sample]:
    return [({"state": "running"}, found.jobs.running), ({"state": "waiting"}, found.jobs.waiting)]


def _progress(found: Now) -> list[Sample]:
    return [({"job": job.key}, job.step / job.steps) for job in found.jobs.now if job.state == "running" and job.steps]


def _told(found: Now) -> list[Sample]:
    running = [job for job in found.jobs.now if job.state == "running"]
    return [({"job": job.key}, job.told_seconds_ago) for job in running if job.told_seconds_ago is not None]


def _budget(found: Now, field: str) -> list[Sample]:
    spent = [(name, getattr(one, field)) for name, one in found.budget.items()]
    return [({"budget": name}, value) for name, value in spent if value is not None]


def _left(found: Now) -> list[Sample]:
    return [] if found.progress.seconds_left is None else [({}, found.progress.seconds_left)]


def _last(tally: Tally) -> list[Sample]:
    return [] if tally.last_time is None else [({}, tally.last_time.timestamp())]
