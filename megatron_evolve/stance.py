"""The stance of the search: which score it is after, which premises still hold, in what mode, with how many replicates.

Everything here follows from verdicts and noise, never from how many rounds have passed:

    proxy-aware          a premise has been falsified: dev is no longer what is searched for
    stack-and-calibrate  confirmed changes wait to be combined, or a promising one drowns in the noise of seeds
    exploit-proxy        a confirmed dev gain moved the standing settings, and nothing waits
    stabilise            nothing confirmed yet, or most of what was tried could not be scored

A DECOUPLED or INVERSE verdict strikes the premise of its scope (overall or a domain). A premise is taken back by
TRACKING in the same scope, from rounds opened since; the search returns to dev when none is struck.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_evolve.constitution import Constitution
from megatron_evolve.edits import Draft
from megatron_evolve.evidence import Evidence
from megatron_evolve.policy import SearchPolicy, premise, struck
from megatron_evolve.reading import Reading, pointer

ALARMS = ("DECOUPLED", "INVERSE")
OVERALL = "overall"

# Spread between candidates over spread between seeds: below one a single run says more of its seed than of its change;
# from two on, one confirming seed is enough.
DROWNED, CLEAR = 1.0, 2.0


@dataclass(frozen=True)
class Said:
    """What the verdicts of one scope (a domain, or None for overall) say."""

    alarms: tuple[int, ...]
    tracking: tuple[int, ...]


def said_by_scope(evidence: Evidence) -> dict[str | None, Said]:
    """Indices of the alarming and of the TRACKING verdicts by scope.

    A verdict pools no round from before the objective moved or a further premise fell (`review.first_pooled`), so
    TRACKING said under the external objective rests on rounds opened since.
    """
    found: dict[str | None, tuple[list[int], list[int]]] = {}
    for index, verdict in enumerate(evidence.verdicts):
        alarms, tracking = found.setdefault(_scope(verdict), ([], []))
        if verdict["outcome"] in ALARMS:
            alarms.append(index)
        elif verdict["outcome"] == "TRACKING":
            tracking.append(index)
    return {scope: Said(tuple(alarms), tuple(tracking)) for scope, (alarms, tracking) in found.items()}


def _scope(verdict: Mapping[str, Any]) -> str | None:
    domain = verdict.get("domain")
    return None if domain in (None, "", OVERALL) else domain


def edit_premises(draft: Draft, policy: SearchPolicy, evidence: Evidence, said: Mapping[str | None, Said]) -> list[str]:
    """Strikes what was falsified and takes back what tracks again. Returns the premises as they now stand."""
    texts = list(policy.premises)
    for scope, verdicts in said.items():
        held = premise(scope)
        indices = verdicts.alarms or verdicts.tracking
        before, after = (held, struck(held)) if verdicts.alarms else (struck(held), held)
        if not indices or after in texts or (before not in texts and not verdicts.alarms):
            continue
        place = texts.index(before) if before in texts else len(texts)
        texts[place : place + 1] = [after]
        cited = [pointer("verdicts", index) for index in indices]
        draft.write(f"premises.{place}", after, _why(evidence, indices), *cited)
    return texts


def newly_struck(policy: SearchPolicy, premises: Sequence[str]) -> list[str]:
    """Premises that stand falsified now and did not before."""
    return [text for text in premises if text.startswith(struck("")) and text not in policy.premises]


def _why(evidence: Evidence, indices: Sequence[int]) -> str:
    verdict = evidence.verdicts[indices[0]]
    where = "overall" if _scope(verdict) is None else f"in {_scope(verdict)}"
    reason = str(verdict.get("reason", "")).rstrip(".")
    sources = verdict.get("attributed_to") or ()
    told = f"; attributed to {', '.join(sources)}" if sources else ""
    return (
        f"{verdict['outcome']} {where} for the {verdict['estimand']} estimand{f': {reason}' if reason else ''}{told}."
    )


def objective_after(policy: SearchPolicy, premises: Sequence[str], said: Mapping[str | None, Said]) -> tuple[str, str]:
    """The objective of the next round, and why."""
    fallen = [text for text in premises if text.startswith(struck(""))]
    if fallen:
        return (
            "external",
            f"{len(fallen)} premise(s) of the dev score are falsified, and the external score outranks dev.",
        )
    tracks = any(verdicts.tracking for verdicts in said.values())
    if policy.objective == "external" and tracks:
        return "dev", "Dev tracks the external score again, in rounds opened since the search left it."
    return policy.objective, "No verdict moves the objective."


def cited_verdicts(said: Mapping[str | None, Said]) -> tuple[str, ...]:
    """Pointers to the verdicts that moved something; to all of them if none did."""
    moved = [index for verdicts in said.values() for index in verdicts.alarms or verdicts.tracking]
    return tuple(pointer("verdicts", index) for index in moved) or (pointer("verdicts"),)


def mode_after(
    policy: SearchPolicy, objective: str, found: Sequence[Reading], pending: int, moved: bool, noise: float | None
) -> tuple[str, str]:
    """The mode that the evidence calls for, and why. A round that says nothing leaves the mode as it was."""
    dead = sum(reading.kind in ("failed", "refused", "unscored") for reading in found)
    if objective == "external":
        return "proxy-aware", "The search is after the external score; a change may cost dev."
    if found and 2 * dead > len(found):
        return "stabilise", f"{dead} of {len(found)} explorers gave no score."
    if pending:
        return "stack-and-calibrate", f"{pending} confirmed change(s) are not in the standing settings yet."
    if noise is not None and noise < DROWNED and any(reading.kind in ("gain", "promising") for reading in found):
        return (
            "stack-and-calibrate",
            f"Candidates differ by {noise:.2f} times what seeds differ by, so gains need replicates.",
        )
    if moved:
        return "exploit-proxy", "A confirmed dev gain moved the standing settings, and nothing waits to be combined."
    if policy.mode in ("proxy-aware", "stack-and-calibrate"):
        return "stabilise", "Nothing is left to combine, and no new gain is confirmed."
    return policy.mode, "The round changed nothing."


def confirm_seeds_after(policy: SearchPolicy, constitution: Constitution, noise: float | None) -> tuple[int, str]:
    """Further seeds of the leaders, and why: more while seeds drown the differences, one when they are clear."""
    now = policy.replicates.confirm_seeds
    if noise is not None and noise < DROWNED:
        # More runs than the anchor has would not shrink the noise of the difference much.
        most = max(now, constitution.anchor_seeds - policy.replicates.explorer)
        return min(now + 1, most), f"Candidates differ by {noise:.2f} times what seeds differ by."
    if noise is not None and noise >= CLEAR and now > 1:
        return 1, f"Candidates differ by {noise:.2f} times what seeds differ by, so one further seed is enough."
    return now, "Noise is as before."


def ask_external_after(
    policy: SearchPolicy, constitution: Constitution, evidence: Evidence, objective: str
) -> tuple[str, str]:
    """Whose external score is asked next, given the looks that are left: asking less is the only change made here."""
    looks = evidence.looks
    left = looks.get("external_budget", constitution.external_looks) - looks.get("external", 0)
    full = looks_of_a_round(policy, constitution, evidence, objective)
    if policy.ask_external == "all" and left < full:
        return (
            "best",
            f"{left} external look(s) are left, fewer than the {full} that a whole round takes.",
        )
    return policy.ask_external, "The looks suffice."


def looks_of_a_round(policy: SearchPolicy, constitution: Constitution, evidence: Evidence, objective: str) -> int:
    """External looks that the next round takes, at most, where every candidate is asked.

    A candidate is asked on two halves, and so is the origin where it is judged (while external ranks, on the half that
    judges alone). A target that tells scores alone is asked once a candidate; where it ranks them, once more of the
    leaders, for their further seeds.
    """
    ranks = objective == "external"
    if _tells_scores_alone(evidence):
        return constitution.workers + (policy.replicates.confirm_candidates if ranks else 0)
    origin = (1 if ranks else 2) if "cumulative" in constitution.gap.estimands else 0
    return 2 * constitution.workers + origin


def _tells_scores_alone(evidence: Evidence) -> bool:
    """Whether candidates have an external score and no run has one on a half of it."""
    splits = {split for one in evidence.candidates for run in one.runs for split in run.scores}
    in_halves = any(split.startswith("external") for split in splits)
    return not in_halves and any(one.external is not None for one in evidence.candidates)
