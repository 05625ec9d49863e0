"""Where a campaign stands, read from its ledger alone: what the report rests on, the same whenever it is asked.

What runs this moment is in `standing`, which adds to it for `status --json`. Keys are added, never renamed. Opening a
campaign for reading takes no lock and starts nothing.
"""

from pathlib import Path
from typing import Any

from megatron_evolve.artefacts import CampaignFolder
from megatron_evolve.budget import Account
from megatron_evolve.constitution import Budgets
from megatron_evolve.eval.looks import Looks
from megatron_evolve.evidence import Evidence
from megatron_evolve.launch.rundir import read_json
from megatron_evolve.ledger import Event, History
from megatron_evolve.tally import OPERATOR_KINDS, Tally

INTERVENTION_KINDS = ("intervention",)


def status(root: Path) -> dict[str, Any]:
    """The campaign's standing. Raises ValueError when `root` holds no campaign or a corrupt ledger."""
    folder, tally = CampaignFolder(root), Tally()
    return status_of(folder, History(folder.ledger, tally.add), tally)


def status_of(folder: CampaignFolder, history: History, tally: Tally) -> dict[str, Any]:
    """The same of a ledger that was read once, into this tally."""
    opened = tally.opened
    if opened is None:
        return {"campaign": None, "state": "preparing", "rounds": []}
    budget, pause = opened["plan"]["external_looks"], paused(history)
    survey = history.find("survey")
    return {
        "campaign": opened["name"],
        "state": state_of(history),
        "paused": pause.data["why"] if pause else None,
        "claim": opened["claim"],
        "interventions": sum(len(history.keys(kind)) for kind in INTERVENTION_KINDS),
        "looks": Looks(folder.looks, external_budget=budget).summary(),
        "budget": _budget(Budgets(**opened.get("budgets", {})), tally),
        "substrate": opened["substrate"],
        "judge": opened["judge"],
        "cpu_seconds": round(tally.used.cpu_seconds, 3),
        "rounds": [
            _judged_round(folder, int(event.key)) if history.has("evidence", event.key) else _open_round(history, event)
            for event in history.of_kind("round-opened")
        ],
        "survey": survey.data if survey else None,
        "closing": tally.closing,
    }


def _budget(budgets: Budgets, tally: Tally) -> dict[str, dict[str, float | None]]:
    """What is used of the declared budgets by the stages that ended, as of the last event."""
    account = Account(budgets, tally.opened_at, tally.used, clock=tally.last_time.timestamp)
    return {name: one for name, one in account.statement().items() if one["budget"] is not None}


def state_of(history: History) -> str:
    """`paused`, `awaiting external scores`, `awaiting the sealed half`, `closed` or `running`.

    `running` means none of the others, whether or not a controller lives.
    """
    if history.has("campaign-closed"):
        return "closed"
    if paused(history) is not None:
        return "paused"
    if awaited(history):
        return "awaiting external scores"
    awaits = history.keys("final-awaited") and not history.keys("final-opened")
    return "awaiting the sealed half" if awaits else "running"


def paused(history: History) -> Event | None:
    """The pause that the campaign is in, if it is in one."""
    latest = history.latest_but(OPERATOR_KINDS)
    return latest if latest is not None and latest.kind == "paused" else None


def awaited(history: History) -> list[str]:
    """Runs (round/candidate/seed/stage) whose external score somebody has yet to bring, in order of asking."""
    asked = dict.fromkeys(key for event in history.of_kind("external-awaited") for key in event.data["runs"])
    return [key for key in asked if not history.has("ended", key)]


def _open_round(history: History, opened: Event) -> dict[str, Any]:
    """A round without evidence: what it searches for, and the runs whose training ended."""
    return {
        "round": int(opened.key),
        "objective": opened.data["objective"],
        "policy": opened.data["policy"],
        "verdicts": [],
        "minimum_detectable_effect": None,
        "candidates": _running_candidates(history, int(opened.key)),
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


def _running_candidates(history: History, number: int) -> list[dict[str, Any]]:
    """What is known of an open round: runs whose training ended, by candidate."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for event in history.of_round("ended", number):
        if event.key.endswith("/train"):
            _, name, seed, _ = event.key.split("/")
            runs.setdefault(name, []).append({"seed": int(seed), "outcome": event.data["end"]["outcome"]})
    proposed = [event.data for event in history.of_round("proposed", number)]
    axes = {one["candidate"]: one["axis"] for one in proposed if one["candidate"]}
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
