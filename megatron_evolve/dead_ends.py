"""Dead ends: what was tried from the standing settings and lost, and the way back from what won.

The registry grows up to `MOST_DEAD_ENDS` and never shrinks. An entry holds for the ground it was tried on and the score
it lost on: after the standing settings or the objective have moved, the same change is a new question. A run that
failed for its own fault (diverged, out of memory) failed on every score. In a full registry a new entry takes the place
of one that holds for another ground, and else of the oldest; what it said stays in that round's edits.

When a change that surely helped moves the standing settings, its inverse is a dead end on the new ground: of 322
proposals of real campaigns 24 undid, whole or in part, what the round before had shown to pay; 21 lost, none gained.
"""

from typing import Any

from megatron_evolve.delta import canonical_change, same_settings
from megatron_evolve.evidence import CandidateEvidence, Evidence
from megatron_evolve.policy import DeadEnd, Objective, SearchPolicy
from megatron_evolve.promotion import settings_after
from megatron_evolve.reading import Reading, authoritative_split, external_effect, own_fault, pointer, points
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.settings import Settings, write_all

# Every worker of every round is told them all, 0.7 kB each: a registry without end made a round of a long campaign cost
# ten times the first. 256 is the losses of some sixty rounds of eight.
MOST_DEAD_ENDS = 256


def places_for_more(policy: SearchPolicy) -> list[int]:
    """Where new entries go, in order: behind the last one, and in a full registry over what matters least."""
    ground, size = digest_of(policy.standing), len(policy.dead_ends)
    worth = [(one.ground == ground, one.round, place) for place, one in enumerate(policy.dead_ends)]
    return [*range(size, MOST_DEAD_ENDS), *(place for *_, place in sorted(worth))]


def dead_end_of(policy: SearchPolicy, resolved: Settings) -> DeadEnd | None:
    """The dead end that these settings repeat, from the same ground and on the same score, or none."""
    ground = digest_of(policy.standing)
    for one in policy.dead_ends:
        if one.ground == ground and one.objective in (policy.objective, "any"):
            # Of a way back a part is ruled out as well: the leaves that these settings change, as far as it has them.
            moved = canonical_change(policy.standing, resolved) if one.way_back else one.change
            back = {path: one.change[path]["to"] for path in moved if path in one.change}
            if _makes(policy.standing, back, resolved):
                return one
    return None


def _makes(standing: Settings, change: dict[str, Any], resolved: Settings) -> bool:
    try:
        return same_settings(write_all(standing, change), resolved)
    except ValueError:  # a part of a way back need not be settings: nobody repeats it
        return False


def way_back(policy: SearchPolicy, objective: Objective, moved: Reading | None) -> tuple[DeadEnd, ...]:
    """The inverse of a change that moved in and surely helped, as a dead end of the settings that it made."""
    if moved is None or moved.effect.low <= 0:
        return ()
    one = moved.candidate
    entry = DeadEnd(
        axis=one.axis,
        change={path: {"from": both["to"], "to": both["from"]} for path, both in one.change.items()},
        ground=digest_of(settings_after(policy.standing, one.change)),
        objective=objective,
        candidate=one.id,
        round=policy.round,
        way_back=True,
        reason=f"It undoes what was just shown to pay ({moved.sentence}), or a part, which nobody measured by itself.",
        evidence=moved.pointers,
    )
    unlike = {"round", "reason", "evidence"}
    known = [other.model_dump(exclude=unlike) for other in policy.dead_ends if other.way_back]
    return () if entry.model_dump(exclude=unlike) in known else (entry,)


def new_dead_ends(policy: SearchPolicy, evidence: Evidence) -> tuple[DeadEnd, ...]:
    """What this round ruled out and the registry does not hold yet; in an order that knows no domain."""
    ground = digest_of(policy.standing)
    found: dict[str, DeadEnd] = {}
    for index, one in enumerate(evidence.candidates):
        lost = _loss(index, one, evidence.objective) if one.role == "explorer" and one.change else None
        if lost is None or one.id in found:
            continue
        objective, reason, cited = lost
        entry = DeadEnd(
            axis=one.axis,
            change=one.change,
            ground=ground,
            objective=objective,
            candidate=one.id,
            round=evidence.round,
            reason=reason,
            evidence=cited,
        )
        if not any(_covers(known, entry) for known in policy.dead_ends):
            found[one.id] = entry
    return tuple(sorted(found.values(), key=lambda entry: (entry.axis, entry.reason)))


def _covers(known: DeadEnd, entry: DeadEnd) -> bool:
    same = known.ground == entry.ground and known.candidate == entry.candidate
    return same and known.objective in (entry.objective, "any")


def _loss(index: int, one: CandidateEvidence, objective: str) -> tuple[str, str, tuple[str, ...]] | None:
    """The score a candidate lost on, why, and where that stands; none if it did not lose."""
    here = pointer("candidates", index)
    fault = own_fault(one)
    if fault is not None:
        run = one.runs[fault]
        told = f"The run ended as {run.outcome.replace('_', ' ')}: {(run.reason or 'no reason given').rstrip('.')}."
        return "any", told, (f"{here}/runs/{fault}/outcome",)
    split = authoritative_split(objective, one.effects)
    if split is None or one.effects[split].high >= 0:
        return None
    effect, outside = one.effects[split], external_effect(one)
    everywhere = objective == "dev" and outside is not None and outside.high < 0
    told = f"{split} changed by {points(effect.mean)}, at most {points(effect.high)}"
    told += ", and the external score fell too." if everywhere else "."
    return "any" if everywhere else objective, told, (f"{here}/effects/{split}",)
