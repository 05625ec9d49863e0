"""Where a campaign stands, read from its ledger alone: what the report rests on, the same whenever it is asked.

What runs this moment is in `standing`, which adds to it for `status --json`. Keys are added, never renamed. Opening a
campaign for reading takes no lock and starts nothing.
"""

from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.budget import Account
from megatron_evolve.constitution import Budgets
from megatron_evolve.eval.looks import Looks
from megatron_evolve.evidence import Evidence
from megatron_evolve.launch.rundir import read_json
from megatron_evolve.ledger import Event, read_ledger

INTERVENTION_KINDS = ("intervention",)


def status(root: Path) -> dict[str, Any]:
    """The campaign's standing. Raises ValueError when `root` holds no campaign or a corrupt ledger."""
    folder = CampaignFolder(root)
    return status_of(folder, read_ledger(folder.ledger))


def status_of(folder: CampaignFolder, events: list[Event]) -> dict[str, Any]:
    """The same of events that were read."""
    opened = next((event.data for event in events if event.kind == "campaign-opened"), None)
    if opened is None:
        return {"campaign": None, "state": "preparing", "rounds": []}
    budget = opened["plan"]["external_looks"]
    judged = {int(event.key) for event in events if event.kind == "evidence"}
    return {
        "campaign": opened["name"],
        "state": state_of(events),
        "paused": events[-1].data["why"] if events[-1].kind == "paused" else None,
        "claim": opened["claim"],
        "interventions": sum(event.kind in INTERVENTION_KINDS for event in events),
        "looks": Looks(folder.looks, external_budget=budget).summary(),
        "budget": _budget(Budgets(**opened.get("budgets", {})), events),
        "substrate": opened["substrate"],
        "judge": opened["judge"],
        "cpu_seconds": round(sum(event.data["end"]["cpu_seconds"] for event in events if event.kind == "ended"), 3),
        "rounds": [
            _judged_round(folder, int(event.key)) if int(event.key) in judged else _open_round(events, event)
            for event in events
            if event.kind == "round-opened"
        ],
        "survey": next((event.data for event in events if event.kind == "survey"), None),
        "closing": next((event.data for event in events if event.kind == "campaign-closed"), None),
    }


def _budget(budgets: Budgets, events: list[Event]) -> dict[str, dict[str, float | None]]:
    """What is used of the declared budgets by the stages that ended, as of the last event."""
    account = Account.of(budgets, events)
    account.clock = datetime.fromisoformat(events[-1].time).timestamp
    return {name: one for name, one in account.statement().items() if one["budget"] is not None}


def state_of(events: list[Event]) -> str:
    """`paused`, `awaiting external scores`, `awaiting the sealed half`, `closed` or `running`.

    `running` means none of the others, whether or not a controller lives.
    """
    if any(event.kind == "campaign-closed" for event in events):
        return "closed"
    if events[-1].kind == "paused":
        return "paused"
    if awaited(events):
        return "awaiting external scores"
    kinds = {event.kind for event in events}
    return "awaiting the sealed half" if "final-awaited" in kinds and "final-opened" not in kinds else "running"


def awaited(events: list[Event]) -> list[str]:
    """Runs (round/candidate/seed/stage) whose external score somebody has yet to bring, in order of asking."""
    asked = [key for event in events if event.kind == "external-awaited" for key in event.data["runs"]]
    scored = {event.key for event in events if event.kind == "ended"}
    return [key for key in asked if key not in scored]


def opened_rounds(events: list[Event]) -> list[int]:
    """Numbers of the rounds that were opened, in order."""
    return [int(event.key) for event in events if event.kind == "round-opened"]


def _open_round(events: list[Event], opened: Event) -> dict[str, Any]:
    """A round without evidence: what it searches for, and the runs whose training ended."""
    return {
        "round": int(opened.key),
        "objective": opened.data["objective"],
        "policy": opened.data["policy"],
        "verdicts": [],
        "minimum_detectable_effect": None,
        "candidates": _running_candidates(events, int(opened.key)),
    }


def _judged_round(folder: CampaignFolder, number: int) -> dict[str, Any]:
    evidence = Evidence.parse(read_json(folder.evidence(number)), where=str(folder.evidence(number)))
    return {
        "round": number,
        "objective": evidence.objective,
        "policy": evidence.policy,
        "verdicts": list(evidence.verdicts),
        "minimum_detectable_effect": evidence.minimum_detectable_effect.get("dev-b"),
        "candidates": [_candidate(found) for found in evidence.candidates],
    }


def _candidate(found: Any) -> dict[str, Any]:
    return {
        "id": found.id,
        "axis": found.axis,
        "role": found.role,
        "runs": [{"seed": run.seed, "outcome": run.outcome} for run in found.runs],
        "dev": found.dev.model_dump() if found.dev else None,
        "external": found.external.model_dump() if found.external else None,
        "domains": {
            name: {
                "dev": domain.dev.model_dump() if domain.dev else None,
                "external": domain.external.model_dump() if domain.external else None,
            }
            for name, domain in found.domains.items()
        },
    }


def _running_candidates(events: list[Event], number: int) -> list[dict[str, Any]]:
    """What is known of an open round: runs whose training ended, by candidate."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event.kind == "ended" and event.key.startswith(f"{number}/") and event.key.endswith("/train"):
            _, name, seed, _ = event.key.split("/")
            runs.setdefault(name, []).append({"seed": int(seed), "outcome": event.data["end"]["outcome"]})
    axes = {
        event.data["candidate"]: event.data["axis"]
        for event in events
        if event.kind == "proposed" and event.data["round"] == number and event.data["candidate"]
    }
    return [
        {
            "id": name,
            "axis": axes.get(name, "anchor"),
            "role": "explorer" if name in axes else "anchor",
            "runs": found,
            "dev": None,
            "external": None,
            "domains": {},
        }
        for name, found in runs.items()
    ]
