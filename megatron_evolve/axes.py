"""The axes of search: the generic seven at the start, and how each adapts to what its worker found.

After a gain an axis goes on as it went. After a miss it turns round; when both directions have been missed equally
often and the last one was a loss, its step was too large and is halved. A direction is the one that a worker tries
first: where it has no move that way (runs at their limit, every style at its last form) the worker takes another, so a
miss counts a round and says of no direction that it was tried. An axis without a gain after two misses each way first
is retired as a plateau, and one whose worker has no move left at once, until the standing settings move: other ground
is another question. Steps were learnt on one score: when the objective moves, they are forgotten. An axis that evidence
opened adapts as any other, but for the stack, which is open while something waits to be combined.
"""

from collections.abc import Sequence

from megatron_evolve.edits import Draft
from megatron_evolve.policy import OPENED_BY_EVIDENCE, Axis, Operator, SearchPolicy
from megatron_evolve.reading import Reading

GENERIC: tuple[Operator, ...] = ("headroom", "balance", "style", "lr", "steps", "schedule", "adapter")

PLATEAU = 2  # misses of each direction first
LEAST_STEP = 0.125
LARGEST_STEP = 2.0
GROWTH = 1.5  # of the step after a gain, while gains on dev are being exploited

STEPS = ("direction", "magnitude", "misses_up", "misses_down", "retired")  # what an axis learns

# Best first: the reading that an axis is judged by when its worker had to repair, or several had it.
_ORDER = ("gain", "promising", "flat", "loss", "failed", "unscored", "refused")


def generic_axes() -> tuple[Axis, ...]:
    """Seven directions that any mix and recipe offer; all open."""
    return tuple(Axis(name=operator, operator=operator) for operator in GENERIC)


def edit_axes(draft: Draft, policy: SearchPolicy, found: Sequence[Reading], moved: Reading | None) -> None:
    """Adapts every axis that had a worker to its best reading; retires plateaus, never the last axis.

    Where the standing settings `moved` no plateau stays shut, this round's own no more than an older one.
    """
    by_axis: dict[str, Reading] = {}
    for reading in sorted(found, key=lambda one: (_ORDER.index(one.kind), one.rank)):
        by_axis.setdefault(reading.candidate.axis, reading)
    worked = [axis for axis in policy.open_axes() if axis.name in by_axis and axis.operator != "stack"]
    after = {axis.name: _adapted(policy, axis, by_axis[axis.name]) for axis in worked}
    # The stack is shut as soon as nothing waits, so it keeps no search going.
    rest = [axis.name for axis in policy.open_axes() if axis.operator != "stack"]
    still_open = [name for name in rest if name not in after or not after[name].retired]
    for axis in worked:
        adapted, reading = after[axis.name], by_axis[axis.name]
        if adapted.retired and moved is not None:
            _write(draft, axis, adapted, ("direction", "magnitude"), f"{reading.sentence}.", reading.pointers)
            _open_anew(draft, axis, moved)
            continue
        if not still_open:
            adapted = adapted.replace(retired="")
        _write(draft, axis, adapted, STEPS, f"{reading.sentence}.", reading.pointers)
    # Stack waits for what to combine, and while dev is searched for so does selection: neither is a plateau.
    shut = ("stack",) if policy.objective == "external" else OPENED_BY_EVIDENCE
    for axis in policy.axes if moved is not None else ():
        if axis.retired and axis.operator not in shut:
            _open_anew(draft, axis, moved)


def _write(draft: Draft, axis: Axis, after: Axis, names: Sequence[str], reason: str, cited: Sequence[str]) -> None:
    for name in names:
        draft.write(f"axes.{axis.name}.{name}", getattr(after, name), reason, *cited)


def _open_anew(draft: Draft, axis: Axis, moved: Reading) -> None:
    """Opens an axis whose plateau was found on ground that the standing settings left; its misses are forgotten."""
    told = f"The standing settings moved, and a plateau holds for its ground: {moved.sentence}."
    fresh = axis.replace(retired="", misses_up=0, misses_down=0)
    _write(draft, axis, fresh, ("retired", "misses_up", "misses_down"), told, moved.pointers)


def _adapted(policy: SearchPolicy, axis: Axis, reading: Reading) -> Axis:
    if reading.kind in ("promising", "unscored"):
        return axis
    if reading.kind == "gain":
        larger = min(LARGEST_STEP, axis.magnitude * GROWTH) if policy.mode == "exploit-proxy" else axis.magnitude
        return axis.replace(magnitude=max(axis.magnitude, larger), misses_up=0, misses_down=0)
    if reading.candidate.nothing:
        return axis.replace(retired="No open move from these settings.")
    up = axis.misses_up + (axis.direction == "up")
    down = axis.misses_down + (axis.direction == "down")
    level = up == down
    turned = "down" if axis.direction == "up" else "up"
    too_large = level and reading.kind in ("loss", "failed")
    return axis.replace(
        direction=turned,
        magnitude=max(LEAST_STEP, axis.magnitude / 2) if too_large else axis.magnitude,
        misses_up=up,
        misses_down=down,
        retired=f"Plateau: no gain in {up + down} rounds, {up} up first and {down} down first."
        if min(up, down) >= PLATEAU
        else "",
    )


def forget_steps(draft: Draft, policy: SearchPolicy, reason: str, cited: Sequence[str]) -> None:
    """Every axis as it was at the start: open, with the usual step, its misses forgotten."""
    for axis in policy.axes:
        fresh = Axis(name=axis.name, operator=axis.operator)
        names = [name for name in STEPS if name != "retired" or axis.operator not in OPENED_BY_EVIDENCE]
        _write(draft, axis, fresh, names, reason, cited)


def set_open(draft: Draft, policy: SearchPolicy, operator: Operator, wanted: bool, reason: str, *cited: str) -> None:
    """Opens or closes the axis of an operator that evidence calls for; adds it when there is none."""
    known = [axis for axis in policy.axes if axis.operator == operator]
    for axis in known:
        if bool(axis.retired) == wanted:
            draft.write(f"axes.{axis.name}.retired", "" if wanted else reason, reason, *cited)
    if wanted and not known:
        draft.write(f"axes.{operator}", Axis(name=operator, operator=operator).model_dump(mode="json"), reason, *cited)
