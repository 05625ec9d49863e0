"""Meta: reads the constitution, the policy and the evidence of a round, and writes the next policy. Nothing else.

A pure function: the same three values give the same policy, so anybody can recompute every decision of a campaign. It
knows no domain's name and no round's number beyond what the evidence tells, and it cannot reach substrate, judge,
constitution or a verdict. Each change is an edit with its reason and its pointers into the evidence.
"""

from megatron_evolve.axes import edit_axes, forget_steps, generic_axes, set_open
from megatron_evolve.constitution import Constitution
from megatron_evolve.dead_ends import new_dead_ends
from megatron_evolve.edits import Draft, check_edits
from megatron_evolve.evidence import Evidence
from megatron_evolve.policy import DomainState, Edit, Replicates, SearchPolicy, premise, struck
from megatron_evolve.promotion import best_gain, pending_after, settings_after, standing_edits
from megatron_evolve.reading import Reading, authoritative_split, pointer, readings, told_effect
from megatron_evolve.stance import (
    ask_external_after,
    cited_verdicts,
    confirm_seeds_after,
    edit_premises,
    mode_after,
    objective_after,
    said_by_scope,
)
from megatron_evolve.substrate.settings import Settings

__all__ = ["check_edits", "explain", "initial_policy", "next_policy"]

NOISE = pointer("noise")


def initial_policy(standing: Settings, domains: dict[str, DomainState], constitution: Constitution) -> SearchPolicy:
    """The policy of the first round: the substrate's own settings, every generic axis open, dev as the objective."""
    leaders = min(Replicates().confirm_candidates, constitution.workers - 1)
    return SearchPolicy(
        round=1,
        standing=standing,
        axes=generic_axes(),
        domains=domains,
        replicates=Replicates(confirm_candidates=leaders),
        premises=(premise(), *(premise(domain) for domain in domains)),
    )


def next_policy(
    constitution: Constitution, policy: SearchPolicy, evidence: Evidence
) -> tuple[SearchPolicy, tuple[Edit, ...]]:
    """The policy that follows from a round, and the edits that make it.

    Raises ValueError for evidence of another round or another objective than the policy's.
    """
    _check_belongs(policy, evidence)
    draft = Draft(policy)
    draft.write("round", policy.round + 1, f"Round {policy.round} is judged.", pointer("round"))
    said = said_by_scope(policy, evidence, constitution)
    premises = edit_premises(draft, policy, evidence, said)
    objective, why = objective_after(policy, premises, said)
    found = readings(evidence, objective, constitution)
    moved, pending = _edit_standing(draft, policy, found)
    _edit_axes(draft, policy, found, objective, why, cited_verdicts(said))
    _edit_opened(draft, policy, objective, pending, found, cited_verdicts(said))
    noise = evidence.noise.signal_to_noise
    mode, because = mode_after(policy, objective, found, pending, moved is not None, noise)
    cited = cited_verdicts(said) if mode == "proxy-aware" or policy.mode == "proxy-aware" else ()
    draft.write("mode", mode, because, *cited, NOISE, pointer("candidates"))
    _edit_replicates(draft, policy, constitution, evidence)
    _edit_domains(draft, policy, evidence)
    for place, entry in enumerate(new_dead_ends(policy, evidence), start=len(policy.dead_ends)):
        draft.write(f"dead_ends.{place}", entry.model_dump(mode="json"), entry.reason, *entry.evidence)
    return draft.finished()


def _check_belongs(policy: SearchPolicy, evidence: Evidence) -> None:
    if (evidence.round, evidence.objective) != (policy.round, policy.objective):
        raise ValueError(
            f"expected evidence of round {policy.round} searched for {policy.objective}, got round {evidence.round} "
            f"for {evidence.objective}; hand over the evidence of the policy's own round"
        )


def _edit_standing(draft: Draft, policy: SearchPolicy, found: tuple[Reading, ...]) -> tuple[Reading | None, int]:
    """Moves the best confirmed gain in and lets the others wait. Returns what moved and how many wait."""
    moved = best_gain(found)
    standing = policy.standing
    if moved is not None:
        standing = settings_after(standing, moved.candidate.change)
        for path, value in standing_edits(policy.standing, standing).items():
            draft.write(path, value, f"{moved.sentence}.", *moved.pointers)
    pending = pending_after(policy, standing, found, moved)
    gains = [reading for reading in found if reading.kind == "gain"]
    cited = [cited for reading in gains for cited in reading.pointers] or [pointer("candidates")]
    told = "; ".join(reading.sentence for reading in sorted(gains, key=lambda one: one.rank) if reading is not moved)
    draft.write("pending", list(pending), f"{told or 'What waited was moved in, or did not help together'}.", *cited)
    return moved, len(pending)


def _edit_axes(
    draft: Draft, policy: SearchPolicy, found: tuple[Reading, ...], objective: str, why: str, cited: tuple[str, ...]
) -> None:
    if objective == policy.objective:
        edit_axes(draft, policy, found)
        return
    draft.write("objective", objective, why, *cited)
    draft.write("objective_since", policy.round + 1, why, *cited)
    forget_steps(draft, policy, f"The objective moved to {objective}, and steps were learnt on the other score.", cited)


def _edit_opened(
    draft: Draft,
    policy: SearchPolicy,
    objective: str,
    pending: int,
    found: tuple[Reading, ...],
    cited: tuple[str, ...],
) -> None:
    gains = [place for reading in found if reading.kind == "gain" for place in reading.pointers]
    told = f"{pending} confirmed change(s) wait to be tried together." if pending else "No change waits to be combined."
    set_open(draft, policy, "stack", pending > 0, told, *(gains or [pointer("candidates")]))
    aware = objective == "external"
    told = "Dev misleads, so the weights that a run hands on are chosen and its loss is weighted anew."
    set_open(draft, policy, "selection", aware, told if aware else "Dev tracks the external score.", *cited)


def _edit_replicates(draft: Draft, policy: SearchPolicy, constitution: Constitution, evidence: Evidence) -> None:
    seeds, why = confirm_seeds_after(policy, constitution, evidence.noise.signal_to_noise)
    draft.write("replicates.confirm_seeds", seeds, why, NOISE)
    asked, why = ask_external_after(policy, constitution, evidence.looks)
    draft.write("ask_external", asked, why, pointer("looks"))


def _edit_domains(draft: Draft, policy: SearchPolicy, evidence: Evidence) -> None:
    """The anchor's accuracies by domain become what is known; what was not asked leaves the last one standing."""
    for index, one in enumerate(evidence.candidates):
        if one.role != "anchor":
            continue
        for name in policy.domains:
            effect = one.domains.get(name)
            for split in ("dev", "external"):
                score = getattr(effect, split) if effect else None
                if score is not None:
                    here = pointer("candidates", index, "domains", name, split)
                    draft.write(
                        f"domains.{name}.{split}", score.mean, f"The anchor's {split} accuracy in {name}.", here
                    )


def explain(policy: SearchPolicy, evidence: Evidence, following: SearchPolicy, edits: tuple[Edit, ...]) -> str:
    """The argument of a round in plain sentences: what was searched, found, said, and done about it."""
    lines = [
        f"Round {policy.round} searched in mode {policy.mode} for the {policy.objective} score, "
        f"from standing settings with {len(policy.pending)} change(s) waiting.",
        *_told_candidates(evidence),
        *_told_verdicts(evidence),
    ]
    reasons: dict[str, list[str]] = {}
    for edit in edits:
        if edit.path != "round" and not edit.path.startswith("domains."):
            reasons.setdefault(edit.reason, []).append(
                f"{edit.path} from {_short(edit.before)} to {_short(edit.after)}"
            )
    lines += [f"Because: {reason} So: {'; '.join(changes)}." for reason, changes in reasons.items()]
    fallen = [text for text in following.premises if text.startswith(struck(""))]
    lines.append(f"Premises: {' '.join(fallen) if fallen else 'none is falsified.'}")
    lines.append(
        f"Round {following.round} searches in mode {following.mode} for the {following.objective} score along "
        f"{', '.join(axis.name for axis in following.open_axes())}."
    )
    return "\n".join(lines)


def _told_candidates(evidence: Evidence) -> list[str]:
    explorers = [one for one in evidence.candidates if one.role == "explorer"]
    told = []
    for one in sorted(explorers, key=lambda one: one.axis):
        splits = [authoritative_split(objective, one.effects) for objective in ("dev", "external")]
        effects = " and ".join(f"{split} by {told_effect(one.effects[split])}" for split in splits if split)
        runs = ", ".join(sorted({run.outcome.replace("_", " ") for run in one.runs}))
        if one.refused:
            told.append(f"{one.axis} had no candidate: {one.refused.rstrip('.')}.")
        elif effects:
            told.append(f"{one.axis} moved {effects}{', confirmed by further seeds' * one.confirmed}.")
        else:
            told.append(f"{one.axis} has no score ({runs or 'no run'}).")
    return told or ["No explorer ran."]


def _told_verdicts(evidence: Evidence) -> list[str]:
    resolved = [verdict for verdict in evidence.verdicts if verdict["outcome"] != "UNRESOLVED"]
    if not resolved:
        return ["No verdict was resolved."]
    return [
        f"Verdict for the {verdict['estimand']} estimand, {verdict.get('domain') or 'overall'}: {verdict['outcome']}. "
        f"{verdict.get('reason', '')}".strip()
        for verdict in resolved
    ]


def _short(value: object) -> str:
    text = repr(value) if value not in (None, "") else "nothing"
    return text if len(text) <= 60 else text[:57] + "..."
