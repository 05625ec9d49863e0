"""Proposals: each explorer's worker is asked for a delta through the process seam, and refused or accepted.

A worker sees its brief and nothing else. A refused delta comes back to its worker with the reason, a bounded number of
times; so does one whose run failed by its own fault. Every call is one event of the ledger.
"""

import sys
from dataclasses import dataclass
from typing import Any

from megatron_evolve.artefacts import save_yaml
from megatron_evolve.campaign import Campaign
from megatron_evolve.candidate import Candidate, candidate, run_seed
from megatron_evolve.delta import Delta
from megatron_evolve.desk import STOPPED, Desk, Stopped, Unavailable
from megatron_evolve.jobs import write_candidate
from megatron_evolve.launch.job import INFRASTRUCTURE_KINDS
from megatron_evolve.ledger import History
from megatron_evolve.policy import Axis, SearchPolicy
from megatron_evolve.workers.brief import Brief, delta_document
from megatron_evolve.workers.seam import Call, call_worker
from megatron_evolve.workers.validate import validate

DEFAULT_WORKER = (sys.executable, "-m", "megatron_evolve.workers.propose")
WORKER_SECONDS = 120.0
WORKER_ATTEMPTS = 3  # at a program that says it is unavailable, before the campaign waits for it

# Endings of a run that its candidate did not cause, so that its worker is not asked to mend anything.
NOBODYS_FAULT = ("cancelled", *(kind.value for kind in INFRASTRUCTURE_KINDS))


@dataclass(frozen=True)
class Setback:
    """Why a worker is asked again: its delta, how its run ended (empty if it was refused before), and the reason."""

    delta: Delta | None
    ending: str
    reason: str


@dataclass(frozen=True)
class Explorer:
    """A worker's accepted proposal."""

    worker: int
    attempt: int
    axis: str
    candidate: Candidate
    delta: Delta


def propose_all(desk: Desk, policy: SearchPolicy) -> list[Explorer]:
    """One accepted proposal, or an honest refusal, for every explorer of the round."""
    found = [propose(desk, policy, worker, axis) for worker, axis in assigned_axes(desk.campaign, policy)]
    return [explorer for explorer in found if explorer is not None]


def assigned_axes(campaign: Campaign, policy: SearchPolicy) -> list[tuple[int, Axis]]:
    """Workers 1..N-1 in order over the open axes; with fewer axes than workers some axis gets two, with other seeds."""
    axes = policy.axes_for(campaign.constitution.workers - 1)
    return list(enumerate(axes, start=1))


def propose(
    desk: Desk, policy: SearchPolicy, worker: int, axis: Axis, setback: Setback | None = None, start: int = 0
) -> Explorer | None:
    """Asks a worker until its delta is accepted or its repairs are used up. Raises Stopped rather than ask."""
    for attempt in range(start, desk.campaign.constitution.repairs + 1):
        brief = brief_of(desk.campaign, desk.substrate_view, policy, worker, axis, attempt, setback)
        event = desk.ledger.once(
            "proposed",
            f"{policy.round}/{worker}/{attempt}",
            lambda brief=brief, attempt=attempt: _ask(desk, policy, worker, attempt, brief),
        )
        if event["candidate"]:
            return _explorer(desk, policy.round, worker, attempt, axis.name, event)
        setback = Setback(Delta.parse(event["delta"], where="delta") if event["delta"] else None, "", event["refused"])
    return None


def first_failure(history: History, round_number: int, candidate_name: str) -> dict[str, Any] | None:
    """How the first run of a candidate that failed by its own fault ended: what its worker is told."""
    for event in history.of_round("ended", round_number):
        _, name, _, stage = event.key.split("/")
        end = event.data["end"]
        if (name, stage) == (candidate_name, "train") and end["outcome"] not in ("finished", *NOBODYS_FAULT):
            return end
    return None


def brief_of(
    campaign: Campaign,
    substrate_view: dict[str, Any],
    policy: SearchPolicy,
    worker: int,
    axis: Axis,
    attempt: int,
    setback: Setback | None,
) -> Brief:
    """All that a worker is told, and nothing else. It holds no digest of the judge and no path."""
    rules = campaign.constitution
    return Brief(
        verb="repair" if setback else "propose",
        substrate=substrate_view,
        policy=policy,
        axis=axis,
        seed=run_seed(campaign.seed, policy.round, f"worker-{worker}", attempt),
        mutation_space=rules.mutation_space,
        limits=rules.limits,
        failed=setback.delta if setback else None,
        ending=setback.ending if setback else "",
        reason=setback.reason if setback else "",
    )


def _ask(desk: Desk, policy: SearchPolicy, worker: int, attempt: int, brief: Brief) -> dict[str, Any]:
    if desk.stop():
        raise Stopped(STOPPED)
    folder = desk.ground.folder.worker(policy.round, worker) / str(attempt)
    argv = desk.campaign.worker or DEFAULT_WORKER
    for _ in range(WORKER_ATTEMPTS):
        call, proposal = call_worker(argv, brief, folder, time_limit_s=WORKER_SECONDS)
        if call.ending != "unavailable":
            break
    else:
        raise Unavailable(
            f"worker {worker}'s program is unavailable ({call.reason}): mend that and run the same command again"
        )
    delta = proposal.delta if proposal else None
    record: dict[str, Any] = {
        "round": policy.round,
        "worker": worker,
        "axis": brief.axis.name,
        "delta": delta_document(delta),
        "candidate": "",
        "refused": "",
    }
    if delta is None:
        return {**record, "refused": (proposal.nothing if proposal else "") or call.reason, "call": _plain(call)}
    resolved = validate(delta, policy, desk.campaign.constitution, desk.substrate_view)
    if isinstance(resolved, str):
        return {**record, "refused": resolved, "call": _plain(call.refused(resolved))}
    found = candidate(desk.substrate_digest, resolved)
    write_candidate(desk.ground.folder, policy.round, found)
    save_yaml(desk.ground.folder.candidate(policy.round, found.id) / "delta.yaml", record["delta"])
    return {**record, "candidate": found.id, "settings": resolved.model_dump(mode="json"), "call": _plain(call)}


def _plain(call: Call) -> dict[str, Any]:
    return call.model_dump(mode="json")


def _explorer(desk: Desk, round_number: int, worker: int, attempt: int, axis: str, event: dict[str, Any]) -> Explorer:
    found = Candidate.parse(
        {"id": event["candidate"], "substrate": desk.substrate_digest, "settings": event["settings"]}, where="candidate"
    )
    write_candidate(desk.ground.folder, round_number, found)
    return Explorer(worker, attempt, axis, found, Delta.parse(event["delta"], where="delta"))
