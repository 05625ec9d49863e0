"""Promotion: which change moves into the standing settings, and which wait for a stack.

Only settings are promoted, never weights. One candidate moves a round, the best on the A half among those that the B
half and a further seed confirm; other confirmed changes that touch nothing it touches wait in `pending`, to be tried
together on the new ground.
"""

from collections.abc import Sequence
from typing import Any

from megatron_evolve.delta import canonical_change, same_settings
from megatron_evolve.policy import SearchPolicy
from megatron_evolve.reading import Reading
from megatron_evolve.substrate.settings import Settings, write_all

Change = dict[str, Any]

# Shares sum to one, so no two changes of them are apart.
SHARES = "mix.weight."


def best_gain(found: Sequence[Reading]) -> Reading | None:
    """The confirmed gain that moves the standing settings."""
    return min((reading for reading in found if reading.kind == "gain"), key=lambda one: one.rank, default=None)


def settings_after(standing: Settings, change: Change) -> Settings:
    """The settings with a canonical change made."""
    return write_all(standing, {path: both["to"] for path, both in change.items()})


def standing_edits(before: Settings, after: Settings) -> dict[str, Any]:
    """Path within the policy to the new value, for each leaf that moved."""
    return {f"standing.{path}": both["to"] for path, both in canonical_change(before, after).items()}


def pending_after(
    policy: SearchPolicy, standing: Settings, found: Sequence[Reading], moved: Reading | None
) -> tuple[Change, ...]:
    """Changes that helped and wait: apart from each other, and from the standing settings as they now are.

    What a failed stack combined is dropped: together it did not help.
    """
    waiting = [] if _lost_stack(policy, found) else [dict(entry) for entry in policy.pending]
    for reading in sorted((one for one in found if one.kind == "gain" and one is not moved), key=lambda one: one.rank):
        one = reading.candidate
        waiting.append({"axis": one.axis, "candidate": one.id, "change": one.change})
    kept: list[Change] = []
    for entry in waiting:
        change = entry["change"]
        if moved is not None and overlap(change, moved.candidate.change):
            continue
        if any(overlap(change, other["change"]) for other in kept) or not _still_open(standing, change):
            continue
        kept.append(entry)
    return tuple(kept)


def told_of_waiting(
    policy: SearchPolicy,
    standing: Settings,
    found: Sequence[Reading],
    moved: Reading | None,
    pending: Sequence[Change],
) -> tuple[str, tuple[str, ...]]:
    """Why other changes wait than before, and where that stands in the evidence; nothing where the same ones do."""
    new = [entry["candidate"] for entry in pending if entry not in policy.pending]
    said = [(f"{one.sentence}, and waits", one) for one in found if one.candidate.id in new]
    said.sort(key=lambda one: one[1].rank)
    gone = [entry["change"] for entry in policy.pending if entry not in pending]
    lost = _lost_stack(policy, found)
    if gone and lost is not None:
        said.append((f"{lost.sentence}, so what it was to combine waits no longer", lost))
    elif gone:  # only a move of the standing settings takes away what waited
        within = all(_stands(standing, change) for change in gone)
        told = "what waited moved in with it" if within else "what waited there starts from other settings now"
        said.append((f"{moved.sentence}; {told}", moved))
    return "; ".join(told for told, _ in said), tuple(place for _, one in said for place in one.pointers)


def _lost_stack(policy: SearchPolicy, found: Sequence[Reading]) -> Reading | None:
    """A stack that did not help, or that its worker could not make."""
    stacks = {axis.name for axis in policy.axes if axis.operator == "stack"}
    lost = (one for one in found if one.kind in ("loss", "flat", "failed") or one.candidate.nothing)
    return min((one for one in lost if one.candidate.axis in stacks), key=lambda one: one.rank, default=None)


def overlap(first: Change, second: Change) -> bool:
    """Whether two canonical changes touch the same setting; all shares of the mix are one setting."""
    return any(_same_place(one, other) for one in first for other in second)


def _same_place(one: str, other: str) -> bool:
    if one.startswith(SHARES) and other.startswith(SHARES):
        return True
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _still_open(standing: Settings, change: Change) -> bool:
    """Whether a waiting change starts from what stands, fits it and would move it."""
    try:
        untouched = settings_after(standing, {path: {"to": both["from"]} for path, both in change.items()})
        moved = settings_after(standing, change)
    except ValueError:
        return False
    return same_settings(untouched, standing) and not same_settings(moved, standing)


def _stands(standing: Settings, change: Change) -> bool:
    """Whether the settings hold a change already."""
    try:
        return same_settings(settings_after(standing, change), standing)
    except ValueError:
        return False
