"""One round: proposals, their runs, one artefact of evidence, the next policy.

Every step that happened stands in the ledger under its own key and is never taken twice, so the same code opens a
round, resumes it after a crash at any point, and walks through it again when it is closed.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from megatron_evolve.artefacts import save_json, save_yaml
from megatron_evolve.candidate import Candidate, candidate, run_seed
from megatron_evolve.desk import STOPPED, Desk, Stopped
from megatron_evolve.drift import ask_origin
from megatron_evolve.edits import check_edits
from megatron_evolve.evidence import Evidence
from megatron_evolve.external import ask_scores
from megatron_evolve.jobs import Run, Stage, StageEnd, write_candidate
from megatron_evolve.meta import next_policy
from megatron_evolve.policy import SearchPolicy
from megatron_evolve.proposals import (
    NOBODYS_FAULT,
    Explorer,
    Setback,
    assigned_axes,
    first_failure,
    propose,
    propose_all,
)
from megatron_evolve.review import a_half_means, first_pooled, pooled_rounds, review
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.target import check_scored, check_target

# --- runs ------------------------------------------------------------------------------------------------------------


class RoundRuns:
    """The runs of one round and how each of their stages ended."""

    def __init__(self, desk: Desk, policy: SearchPolicy) -> None:
        self.desk = desk
        self.policy = policy
        self.anchor = candidate(desk.substrate_digest, policy.standing)
        write_candidate(desk.ground.folder, policy.round, self.anchor)
        self.explorers: dict[str, Explorer] = {}
        self.runs: dict[str, list[Run]] = {}
        self.ends: dict[tuple[str, str], StageEnd] = {}
        self.put_off = False  # a repair is due that was not asked, because the campaign is to stop

    def add(self, found: Candidate, seeds: int) -> list[Run]:
        """`seeds` more runs of a candidate; the same candidate from two workers gets both workers' runs."""
        runs = self.runs.setdefault(found.id, [])
        new = [
            Run(
                self.policy.round,
                found,
                run_seed(self.desk.campaign.seed, self.policy.round, found.id, len(runs) + index),
            )
            for index in range(seeds)
        ]
        runs.extend(new)
        return new

    def finished(self, run: Run, stage: Stage) -> bool:
        end = self.ends.get((run.key, stage))
        return end is not None and end.finished

    def scored(self, stage: Stage = "dev") -> list[Run]:
        """Runs whose stage finished, in order."""
        return [run for runs in self.runs.values() for run in runs if self.finished(run, stage)]

    def drive(self, stages: Iterable[tuple[Run, Stage]], follow: bool) -> None:
        """Runs stages to their end. With `follow`, a trained run is scored on dev and a failed explorer is repaired.

        Raises Stopped, Paused. A repair that a stop put off comes before whatever the round decides next.
        """
        todo = []
        for run, stage in stages:
            if known := self._known(run, stage):
                todo.extend(self._after(known) if follow else ())
            else:
                todo.append((run, stage))
        after = self._after if follow else lambda end: ()
        for end in self.desk.drive(todo, after):
            self.ends[end.run.key, end.stage] = end
        if self.put_off:  # where all else had ended before this start, the desk was asked for nothing and says nothing
            raise Stopped(STOPPED)

    def _known(self, run: Run, stage: Stage) -> StageEnd | None:
        event = self.desk.ledger.find("ended", f"{run.key}/{stage}")
        if event is None:
            return None
        end = StageEnd(run=run, stage=stage, **event.data["end"])
        self.ends[run.key, stage] = end
        return end

    def _after(self, end: StageEnd) -> Iterator[tuple[Run, Stage]]:
        """What follows from an end: a score after training, a repair after a failure that is the candidate's own."""
        if end.stage != "train":
            return
        if end.finished:
            if not self._known(end.run, "dev"):
                yield end.run, "dev"
            return
        explorer = self.explorers.get(end.run.candidate.id)
        if explorer is None or end.outcome in NOBODYS_FAULT or self.desk.account.spent is not None:
            return
        yield from self._repair(explorer)

    def _repair(self, explorer: Explorer) -> Iterator[tuple[Run, Stage]]:
        axis = dict(assigned_axes(self.desk.campaign, self.policy))[explorer.worker]
        told = first_failure(self.desk.ledger, self.policy.round, explorer.candidate.id)
        setback = Setback(explorer.delta, told["outcome"], told["reason"])
        try:
            better = propose(self.desk, self.policy, explorer.worker, axis, setback, start=explorer.attempt + 1)
        except Stopped:  # `drive` says so, once what runs has ended
            self.put_off = True
            return
        if better is None or better.candidate.id in self.runs:
            return
        self.explorers[better.candidate.id] = better
        for run in self.add(better.candidate, self.policy.replicates.explorer):
            if known := self._known(run, "train"):
                yield from self._after(known)
            else:
                yield run, "train"


def run_candidates(desk: Desk, policy: SearchPolicy) -> RoundRuns:
    """Trains and scores the anchor, the explorers and the confirmations; asks the target as the policy says."""
    explorers = propose_all(desk, policy)
    runs = RoundRuns(desk, policy)
    first = runs.add(runs.anchor, desk.campaign.constitution.anchor_seeds)
    for explorer in explorers:
        runs.explorers.setdefault(explorer.candidate.id, explorer)
        first += runs.add(explorer.candidate, policy.replicates.explorer)
    runs.drive([(run, "train") for run in first], follow=True)
    pay_dev(runs, "dev-a")
    if policy.objective == "external":
        ask_external(runs, "external-a")
    confirm(runs)
    pay_dev(runs, "dev-a")  # again, for what came in place of a candidate that failed when it was confirmed
    if policy.objective == "dev":
        ask_external(runs, "external-a")
    ask_external(runs, "external-b")
    pay_dev(runs, "dev-b")
    ask_origin(desk, policy, runs.runs)
    return runs


def confirm(runs: RoundRuns) -> None:
    """Further seeds for the explorers that lead on the A half of the objective."""
    replicates = runs.policy.replicates
    leaders = ranked(runs)[: replicates.confirm_candidates]
    more = [run for name in leaders for run in runs.add(runs.runs[name][0].candidate, replicates.confirm_seeds)]
    if more:
        runs.drive([(run, "train") for run in more], follow=True)


def ranked(runs: RoundRuns) -> list[str]:
    """Explorers with a score, best mean on the A half of the objective first. Decided once and kept in the ledger."""
    desk, policy = runs.desk, runs.policy
    event = desk.ledger.once(
        "ranked", str(policy.round), lambda: {"means": a_half_means(desk.facts(policy.round), desk.weights)}
    )
    return sorted(event["means"], key=lambda name: (-event["means"][name], name))


def pay_dev(runs: RoundRuns, split: str) -> None:
    """Enters a look at dev for every candidate with a score, before any of it is read: on the A half its first runs."""
    facts = runs.desk.facts(runs.policy.round)
    for name in runs.runs:
        mine = facts.first(name, split) if split == "dev-a" else facts.scored(name, split)
        if mine:
            keys = [f"{runs.policy.round}/{name}/{run.seed}" for run in mine]
            runs.desk.pay(runs.policy.round, name, keys, split)


def ask_external(runs: RoundRuns, stage: Stage) -> None:
    """Pays one look a candidate, then scores its runs; candidates beyond the budget stay unasked.

    A target that tells scores alone has no halves: under dev it is asked once a round, and no run is asked twice.
    Raises Paused where a CSV is not the one that was frozen, before anything is paid, and where every job crashed.
    """
    desk, policy = runs.desk, runs.policy
    if desk.campaign.judge.external is None or policy.ask_external == "none":
        return
    told = desk.campaign.judge.told_scores
    if told and stage == "external-a" and policy.objective == "dev":
        return
    # Where there is nothing to compare with, or nothing would be started, no look is spent.
    if desk.account.spent is not None or not desk.facts(policy.round).has_anchor:
        return
    asked = [runs.anchor.id, *asked_explorers(runs, stage)]
    if stage == "external-b" and policy.objective == "dev" and not told:
        # A verdict under dev reads both halves: the second is not paid for whom no run has the first.
        asked = [name for name in asked if any(runs.finished(run, "external-a") for run in runs.runs[name])]
    if runs.anchor.id not in asked:
        return
    check_target(desk.campaign, desk.ground)
    stages: list[tuple[Run, Stage]] = []
    for name in asked:
        mine = [run for run in runs.runs[name] if runs.finished(run, "dev")]
        if told and stage == "external-b":
            before = desk.looks.paid(candidate=name, round_number=policy.round, split="external-a")
            mine = [run for run in mine if before is None or run.key not in before.runs]
        if not mine or not desk.may_ask(policy.round, name, stage):
            continue
        desk.pay(policy.round, name, [run.key for run in mine], stage)
        stages += [(run, stage) for run in mine]
    if told:
        ask_scores(desk, told, stages)
        return
    runs.drive(stages, follow=False)
    ends = [runs.ends[run.key, stage] for run, stage in stages if (run.key, stage) in runs.ends]
    check_scored(desk.ledger, f"{policy.round}/{stage}", ends)


def asked_explorers(runs: RoundRuns, stage: Stage) -> list[str]:
    """Which explorers' external score is asked: all, or the one that leads on the A half of the objective.

    Where external itself is the objective, its A half is asked first of as many as can be: it is what ranks them.
    """
    policy, looks = runs.policy, runs.desk.looks
    explorers = [name for name in runs.runs if name != runs.anchor.id]
    if policy.ask_external == "all":
        return explorers
    if policy.objective == "external" and stage == "external-a":
        return explorers[: looks_for_ranking(looks.external_budget - looks.spent_before(policy.round))]
    return ranked(runs)[:1]


def looks_for_ranking(left: int) -> int:
    """Explorers whose A half can be asked of `left` looks, the anchor's two and the leader's B half set aside."""
    return max(0, left - 3)


# --- the round -------------------------------------------------------------------------------------------------------


def run_campaign_rounds(desk: Desk) -> SearchPolicy:
    """Takes the campaign from its first open round to the policy after the last one, or until a budget is spent."""
    rounds = desk.campaign.constitution.rounds
    first = next((one for one in range(1, rounds + 1) if not desk.ledger.has("round-closed", str(one))), rounds)
    policy = desk.policy(first)
    for number in range(first, rounds + 1):
        if desk.account.spent is not None and not desk.ledger.has("round-opened", str(number)):
            break
        policy = run_round(desk, policy)
    return policy


def run_round(desk: Desk, policy: SearchPolicy) -> SearchPolicy:
    """Takes a round from its policy to the next one. Returns at once what the ledger already holds."""
    number, ledger = policy.round, desk.ledger
    closed = ledger.find("round-closed", str(number))
    if closed is None:
        if desk.stop() and not ledger.has("round-opened", str(number)):
            raise Stopped(STOPPED)
        ledger.once("round-opened", str(number), lambda: {"policy": digest_of(policy), "objective": policy.objective})
        desk.on_progress("round", {"round": number, "policy": policy})
        run_candidates(desk, policy)
        ledger.once("evidence", str(number), lambda: _write_evidence(desk, number))
        ledger.once("policy", str(number + 1), lambda: _write_policy(desk, policy, desk.evidence(number)))
        ledger.once("round-closed", str(number), dict)
        desk.on_progress("closed", {"round": number, "evidence": desk.evidence(number)})
    return desk.policy(number + 1)


def _write_evidence(desk: Desk, number: int) -> dict[str, Any]:
    rules = desk.campaign.constitution
    window = [desk.facts(one) for one in range(first_pooled(desk.policy(number), rules), number + 1)]
    earlier = [one for past in pooled_rounds(number) for one in desk.evidence(past).replicates]
    evidence = review(window, rules, desk.origin, desk.weights, earlier, desk.looks.summary())
    return {"digest": save_json(desk.ground.folder.evidence(number), evidence), "looks": desk.looks.digest}


def _write_policy(desk: Desk, policy: SearchPolicy, evidence: Evidence) -> dict[str, Any]:
    following, edits = next_policy(desk.campaign.constitution, policy, evidence)
    check_edits(policy, following, edits, evidence)
    folder = desk.ground.folder
    return {
        "digest": save_yaml(folder.policy(following.round), following),
        "edits": save_json(
            folder.edits(following.round), [edit.model_dump(mode="json", by_alias=True) for edit in edits]
        ),
    }
