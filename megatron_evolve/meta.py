"""Meta: reads the constitution, the policy and the evidence of a round, and writes the next policy. Nothing else.

A pure function: the same three values give the same policy, so anybody can recompute every decision of a campaign. It
knows no domain's name and no round's number beyond what the evidence tells, and it cannot reach substrate, judge,
constitution or a verdict. Each change is an edit with its reason and its pointers into the evidence.
"""

from megatron_evolve.axes import edit_axes, forget_steps, generic_axes, set_open
from megatron_evolve.constitution import Constitution
from megatron_evolve.dead_ends import new_dead_ends, places_for_more, way_back
from megatron_evolve.edits import Draft, check_edits
from megatron_evolve.evidence import Evidence
from megatron_evolve.explain import explain
from megatron_evolve.policy import DomainState, Edit, Replicates, SearchPolicy, premise
from megatron_evolve.promotion import best_gain, pending_after, settings_after, standing_edits, told_of_waiting
from megatron_evolve.reading import Reading, pointer, readings
from megatron_evolve.stance import (
    ask_external_after,
    cited_verdicts,
    confirm_seeds_after,
    edit_premises,
    mode_after,
    newly_struck,
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
    said = said_by_scope(evidence)
    premises = edit_premises(draft, policy, evidence, said)
    objective, why = objective_after(policy, premises, said)
    found = readings(evidence, objective, constitution)
    moved, pending, waits = _edit_standing(draft, policy, found)
    if objective == policy.objective:
        edit_axes(draft, policy, found, moved)
        _edit_since(draft, policy, premises, cited_verdicts(said))
    else:
        _edit_objective(draft, policy, objective, why, cited_verdicts(said))
    _edit_opened(draft, policy, objective, pending, waits or (pointer("candidates"),), cited_verdicts(said))
    noise = evidence.noise.signal_to_noise
    mode, because = mode_after(policy, objective, found, pending, moved is not None, noise)
    cited = cited_verdicts(said) if mode == "proxy-aware" or policy.mode == "proxy-aware" else ()
    draft.write("mode", mode, because, *cited, NOISE, pointer("candidates"))
    _edit_replicates(draft, policy, constitution, evidence, objective)
    _edit_domains(draft, policy, evidence)
    # More in one round than the registry has places: the first are kept.
    ruled_out = (*way_back(policy, objective, moved), *new_dead_ends(policy, evidence))
    for place, entry in zip(places_for_more(policy), ruled_out, strict=False):
        draft.write(f"dead_ends.{place}", entry.model_dump(mode="json"), entry.reason, *entry.evidence)
    return draft.finished()


def _check_belongs(policy: SearchPolicy, evidence: Evidence) -> None:
    if (evidence.round, evidence.objective) != (policy.round, policy.objective):
        raise ValueError(
            f"expected evidence of round {policy.round} searched for {policy.objective}, got round {evidence.round} "
            f"for {evidence.objective}; hand over the evidence of the policy's own round"
        )


def _edit_standing(
    draft: Draft, policy: SearchPolicy, found: tuple[Reading, ...]
) -> tuple[Reading | None, int, tuple[str, ...]]:
    """Moves the best confirmed gain in, lets the others wait. Returns what moved, how many wait, and what says so."""
    moved = best_gain(found)
    standing = policy.standing
    if moved is not None:
        standing = settings_after(standing, moved.candidate.change)
        for path, value in standing_edits(policy.standing, standing).items():
            draft.write(path, value, f"{moved.sentence}.", *moved.pointers)
    pending = pending_after(policy, standing, found, moved)
    told, cited = told_of_waiting(policy, standing, found, moved, pending)
    draft.write("pending", list(pending), f"{told}.", *cited)
    return moved, len(pending), cited


def _edit_objective(draft: Draft, policy: SearchPolicy, objective: str, why: str, cited: tuple[str, ...]) -> None:
    draft.write("objective", objective, why, *cited)
    draft.write("objective_since", policy.round + 1, why, *cited)
    forget_steps(draft, policy, f"The objective moved to {objective}, and steps were learnt on the other score.", cited)


def _edit_since(draft: Draft, policy: SearchPolicy, premises: list[str], cited: tuple[str, ...]) -> None:
    """A premise that falls while the search is off dev already is taken back by later rounds alone, like the first."""
    if policy.objective == "external" and newly_struck(policy, premises):
        told = f"A further premise fell in round {policy.round}: rounds opened since are held against it."
        draft.write("objective_since", policy.round + 1, told, *cited)


def _edit_opened(
    draft: Draft,
    policy: SearchPolicy,
    objective: str,
    pending: int,
    waits: tuple[str, ...],
    cited: tuple[str, ...],
) -> None:
    told = f"{pending} confirmed change(s) wait to be tried together." if pending else "No change waits to be combined."
    set_open(draft, policy, "stack", pending > 0, told, *waits)
    aware = objective == "external"
    known = any(axis.operator == "selection" for axis in policy.axes)
    if objective != policy.objective or (aware and not known):  # else it adapts and retires as any axis
        told = "Dev misleads, so the weights that a run hands on are chosen and its loss is weighted anew."
        set_open(draft, policy, "selection", aware, told if aware else "Dev tracks the external score.", *cited)


def _edit_replicates(
    draft: Draft, policy: SearchPolicy, constitution: Constitution, evidence: Evidence, objective: str
) -> None:
    seeds, why = confirm_seeds_after(policy, constitution, evidence.noise.signal_to_noise)
    draft.write("replicates.confirm_seeds", seeds, why, NOISE)
    asked, why = ask_external_after(policy, constitution, evidence, objective)
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
