"""The default worker: `python -m megatron_evolve.workers.propose BRIEF.json PROPOSAL.json`.

A deterministic program: a brief in, a proposal out, and no other access. It takes the first move of its axis that is
allowed, changes something and is no dead end: the axis' own step and direction first, then half the step, then the
other direction. To mend a failed delta it keeps the idea and relieves what broke it.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_evolve.delta import Base, Change, Delta, Direction, Prediction, same_settings
from megatron_evolve.substrate.settings import Settings
from megatron_evolve.workers.brief import Brief, Proposal, document
from megatron_evolve.workers.operators import OPERATIONS, Move
from megatron_evolve.workers.validate import standing_name, validate

# What relieves a failed run, by how it ended: the setting that is halved.
RELIEF = {"diverged": "recipe.lr", "out_of_memory": "recipe.batch_size", "timed_out": "recipe.steps"}

# Error falls as a power of the rows seen, with exponents of 0.07 to 0.35 by task (Hestness et al. 2017,
# arXiv 1712.00409): the two ends give the interval that is predicted for a change of shares or of length.
LEAST_EXPONENT, LARGEST_EXPONENT = 0.07, 0.35
FLAT_RATIO = 0.1  # rows within 10 % of what they were are predicted to change nothing
MOST_WORDS = 2000


def propose(brief: Brief) -> Proposal:
    """The answer to a brief: a delta, or nothing with the reason. Deterministic in the brief."""
    failed = _resolved(brief, brief.failed) if brief.failed else None
    refusals: list[str] = []
    for move in _moves(brief):
        if not move.change:
            continue
        delta = _delta(brief, move)
        found = validate(delta, brief.policy, brief, brief.substrate)
        if isinstance(found, str):
            refusals.append(found)
        elif failed is not None and same_settings(found, failed):
            refusals.append("the delta is the one that failed")
        else:
            predicted = delta.replace(predict=_prediction(brief, move, found))
            return Proposal(brief=brief.digest, delta=predicted)
    told = (
        f"{len(refusals)} move(s) tried, the last refused: {refusals[-1]}" if refusals else "there is nothing to vary"
    )
    return Proposal(brief=brief.digest, nothing=f"Axis {brief.axis.name} has no open move: {told}")


def _moves(brief: Brief) -> Iterator[Move]:
    if brief.failed is not None and brief.ending in RELIEF:
        path = RELIEF[brief.ending]
        before = brief.failed.change.get(path)
        eased = {**brief.failed.change, path: _halved(before)}
        told = f"{brief.failed.hypothesis} The run ended as {brief.ending.replace('_', ' ')}, so {path} is halved."
        yield Move(eased, told[:MOST_WORDS], dict(brief.failed.predict.domains))
    operate, up = OPERATIONS[brief.axis.operator], brief.axis.direction == "up"
    for direction in (up, not up):
        for magnitude in (brief.axis.magnitude, brief.axis.magnitude / 2):
            yield from operate(brief, magnitude, direction)


def _halved(change: Change | None) -> Change:
    """Half of what a change gives; half of what stands where there is no change."""
    if change is None:
        return Change(scale=0.5)
    if change.scale is not None:
        return Change(scale=change.scale / 2)
    return Change(set=max(1, change.set // 2) if isinstance(change.set, int) else change.set / 2)


def _resolved(brief: Brief, delta: Delta) -> Settings | None:
    found = validate(delta, brief.policy, brief, brief.substrate)
    return found if isinstance(found, Settings) else None


def _delta(brief: Brief, move: Move) -> Delta:
    base = Base(substrate=brief.substrate["digest"], recipe=standing_name(brief.policy))
    return Delta(base=base, hypothesis=move.reason, change=move.change)


# --- prediction -------------------------------------------------------------------------------------------------------


def _prediction(brief: Brief, move: Move, resolved: Settings) -> Prediction:
    """What the move should do: by the rows each family sees where that changes, else the operator's own directions."""
    ratios = rows_ratios(brief.policy.standing, resolved)
    if all(abs(ratio - 1) < FLAT_RATIO for ratio in ratios.values()):
        return Prediction(domains=move.domains)
    domains = {name: move.domains.get(name, _direction(ratio)) for name, ratio in ratios.items()}
    states = brief.policy.domains
    dev = _interval(ratios, {name: (one.dev_weight, one.dev) for name, one in states.items()})
    outside = {
        name: (one.external_weight, one.external) for name, one in states.items() if brief.policy.carries_over(name)
    }
    return Prediction(dev=dev, external=_interval(ratios, outside), domains=domains)


def rows_ratios(before: Settings, after: Settings) -> dict[str, float]:
    """Rows that each family gets over a run, after over before; families that had none are left out."""
    rows = after.recipe.steps * after.recipe.batch_size / (before.recipe.steps * before.recipe.batch_size)
    return {name: rows * after.mix.weight[name] / share for name, share in before.mix.weight.items() if share > 0}


def _direction(ratio: float) -> Direction:
    if abs(ratio - 1) < FLAT_RATIO:
        return "flat"
    return "up" if ratio > 1 else "down"


def _interval(
    ratios: dict[str, float], score: dict[str, tuple[float | None, float | None]]
) -> tuple[float, float] | None:
    """The change of a score between the two exponents; none where a weight or an accuracy is unknown."""
    known = [(weight, accuracy, ratios.get(name, 1.0)) for name, (weight, accuracy) in score.items()]
    if not known or any(weight is None or accuracy is None for weight, accuracy, _ in known):
        return None
    ends = sorted(
        sum(weight * ((1 - accuracy) - _error(1 - accuracy, ratio, exponent)) for weight, accuracy, ratio in known)
        for exponent in (LEAST_EXPONENT, LARGEST_EXPONENT)
    )
    return round(ends[0], 4), round(ends[1], 4)


def _error(error: float, ratio: float, exponent: float) -> float:
    return min(1.0, error * ratio**-exponent) if ratio > 0 else 1.0


def main(argv: list[str]) -> int:
    """Reads the brief, writes the proposal. Exit status 2 and a sentence for a brief that is none."""
    if len(argv) != 2:
        print("usage: python -m megatron_evolve.workers.propose BRIEF.json PROPOSAL.json", file=sys.stderr)
        return 2
    try:
        brief = Brief.parse(json.loads(Path(argv[0]).read_text(encoding="utf-8")), where=argv[0])
    except (OSError, ValueError) as error:
        print(f"{argv[0]}: expected a brief: {error}", file=sys.stderr)
        return 2
    Path(argv[1]).write_text(json.dumps(document(propose(brief)), ensure_ascii=False), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
