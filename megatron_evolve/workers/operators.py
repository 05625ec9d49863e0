"""What a worker may do along its axis: each operator turns a brief into moves, the most wanted first.

An operator knows no family by name; labels, styles, weights and accuracies arrive in the brief. Its first argument is
the brief, then the size of the step (1 is the usual one) and whether to go up. A move is changes by path with the
reason, made from the numbers; whether it is allowed, new and worth a run is decided by whoever takes it.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_evolve.delta import Change, Direction
from megatron_evolve.policy import Operator
from megatron_evolve.workers.brief import Brief
from megatron_evolve.workers.profile import Profile, profile_of

SHARE_DIGITS = 4
MOST_OF_THE_WAY = 0.9  # a mix never leaves its old shares altogether
FIRST_RANK, SMALL_RANK, LARGEST_RANK = 16, 8, 512
SMALL_TARGETS = ["attention", "mamba"]
FIRST_DECAY, FIRST_CLIP, FIRST_FLOOR, FIRST_PROMPT_WEIGHT = 0.01, 1.0, 0.1, 0.1
LEAST_CHANGE_OF_STEPS, LEAST_STEP_OF_STEPS = 0.1, 0.25  # shorter ones drown in the noise of seeds


@dataclass(frozen=True)
class Move:
    """Changes and why they should help. `domains` is what the operator expects beyond what shares of rows tell."""

    change: dict[str, Change]
    reason: str
    domains: dict[str, Direction] = field(default_factory=dict)


Operation = Callable[[Brief, float, bool], Iterator[Move]]


def put(value: Any) -> Change:
    """A change that sets a value."""
    return Change(set=value)


def all_up(brief: Brief) -> dict[str, Direction]:
    """A setting that is common to all families is expected to help all of them."""
    return dict.fromkeys(brief.policy.standing.mix.weight, "up")


# --- mix --------------------------------------------------------------------------------------------------------------


def headroom(brief: Brief, magnitude: float, up: bool) -> Iterator[Move]:
    """Rows toward the domains where the objective's weight times what is still wrong is largest, or away from them."""
    profile = profile_of(brief)
    wanted = profile.headroom_shares()
    if wanted:
        now = brief.policy.standing.mix.weight
        target = max(wanted, key=lambda family: wanted[family] - now[family])
        part = min(MOST_OF_THE_WAY, 0.5 * magnitude)
        toward = _blend(now, wanted, part)
        shares = toward if up else _opposite(now, toward)
        told = (
            f"{target} holds {wanted[target]:.0%} of what the {brief.policy.objective} score can still gain "
            f"({profile.told(target)}) and gets {now[target]:.0%} of the rows. Moving the shares {part:.0%} of the way "
            f"{'toward' if up else 'away from'} that headroom gives it {shares[target]:.0%}"
        )
        why = "" if up else ", in case the weakest domain is not the one that pays"
        yield Move(_shares(now, shares), f"{told}{why}.{profile.told_left_out()}")
    yield from _one_family(brief, profile, magnitude, up)


def _one_family(brief: Brief, profile: Profile, magnitude: float, up: bool) -> Iterator[Move]:
    """One family's rows times a factor: what remains to try when headroom says nothing new."""
    now = brief.policy.standing.mix.weight
    usable = [family for family in profile.usable(up) if now[family] > 0]
    for family in _shuffled(brief, usable):
        factor = 2.0 ** (magnitude if up else -magnitude)
        told = f"{family} gets {now[family]:.1%} of the rows ({profile.told(family)}); {factor:.2g} times its weight"
        yield Move({f"mix.weight.{family}": Change(scale=factor)}, f"{told} tests whether its share binds.")


def balance(brief: Brief, magnitude: float, up: bool) -> Iterator[Move]:
    """Shares toward equal (or the external score's) ones; down, the order in which a run sees its shares."""
    profile = profile_of(brief)
    now = brief.policy.standing.mix.weight
    target, name = profile.balanced_shares()
    balanced = all(abs(now[family] - share) < 10**-SHARE_DIGITS for family, share in target.items())
    if up and not balanced:
        part = min(1.0, magnitude)
        told = f"The largest share is {max(now.values()):.0%}, the smallest {min(now.values()):.0%}"
        yield Move(_shares(now, _blend(now, target, part)), f"{told}; moving {part:.0%} of the way to {name} shares.")
    elif up:
        shares = _blend(now, profile.weakness_shares(), min(MOST_OF_THE_WAY, 0.5 * magnitude))
        told = f"Shares are {name} already; this gives more rows to what is still wrong, whatever it weighs in a score"
        yield Move(_shares(now, shares), f"{told}: {profile.told_weakest()}.")
        yield from _one_family(brief, profile, magnitude, up=False)
    elif len(set(now.values())) > 1:  # on equal shares every curriculum is the same
        current = brief.policy.standing.mix.curriculum
        for curriculum in _shuffled(brief, [one for one in ("uniform-first", "uniform-last") if one != current]):
            told = f"Unequal shares all through a run ({current}) may starve small families early or late"
            yield Move({"mix.curriculum": put(curriculum)}, f"{told}; {curriculum} gives each a time of equal shares.")


def style(brief: Brief, magnitude: float, up: bool) -> Iterator[Move]:
    """Form of the completion: the next style each generator offers for all; down, or when all have it, for a part."""
    offered = {
        family: styles for family, styles in brief.substrate["construction"]["styles"].items() if len(styles) > 1
    }
    now = {family: one for family, one in brief.policy.standing.mix.style.items() if family in offered}
    place = {family: list(offered[family]).index(one) for family, one in now.items()}
    step = max(1, round(magnitude))
    behind = [family for family in now if place[family] < len(offered[family]) - 1]
    if up and behind:
        to = {family: offered[family][min(place[family] + step, len(offered[family]) - 1)] for family in behind}
        yield _styled(now, to, "A worked completion spends loss on the steps that lead to the answer")
        return
    order = _shuffled(brief, list(now))
    for start in range(len(order)):
        some = (order[start:] + order[:start])[: max(1, round(0.5 * min(1.0, magnitude) * len(order)))]
        to = {family: offered[family][place[family] + (1 if family in behind else -1)] for family in some}
        yield _styled(now, to, "Families may differ in which form of completion teaches them")


def _styled(now: dict[str, str], to: dict[str, str], reason: str) -> Move:
    told = ", ".join(f"{family} from {now[family]} to {one}" for family, one in to.items())
    directions: dict[str, Direction] = {family: "up" if family in to else "flat" for family in now}
    return Move({f"mix.style.{family}": put(one) for family, one in to.items()}, f"{reason}: {told}.", directions)


# --- recipe -----------------------------------------------------------------------------------------------------------


def lr(brief: Brief, magnitude: float, up: bool) -> Iterator[Move]:
    """Peak learning rate times or over two to the magnitude."""
    recipe = brief.policy.standing.recipe
    factor = 2.0 ** (magnitude if up else -magnitude)
    told = f"The peak learning rate is {recipe.lr:g} over {recipe.steps} steps"
    why = "the run may end before it has learnt what it could" if up else "large steps may undo what was learnt"
    yield Move({"recipe.lr": Change(scale=factor)}, f"{told}; {why}, so it is scaled by {factor:.3g}.", all_up(brief))


def steps(brief: Brief, magnitude: float, up: bool) -> Iterator[Move]:
    """Length of a run times or over two to the magnitude, within the limits."""
    recipe = brief.policy.standing.recipe
    most = min(brief.limits.max_steps, brief.limits.max_rows // recipe.batch_size)
    size = max(LEAST_STEP_OF_STEPS, magnitude)
    wanted = round(recipe.steps * 2.0 ** (size if up else -size))
    number = max(1, min(wanted, most))
    if abs(number - recipe.steps) < LEAST_CHANGE_OF_STEPS * recipe.steps:
        return
    change = {"recipe.steps": put(number)}
    if recipe.warmup_steps >= number:  # a warm-up that no longer fits is shortened with the run
        change["recipe.warmup_steps"] = put(recipe.warmup_steps * number // recipe.steps)
    why = (
        "accuracy may still be rising at the end"
        if up
        else "training longer than needed forgets what the substrate knew"
    )
    told = f"Runs take {recipe.steps} steps of at most {most}; {why}, so this one takes {number}"
    yield Move(change, f"{told}.")


def schedule(brief: Brief, magnitude: float, up: bool) -> Iterator[Move]:
    """Schedule shape and optimizer hygiene: up is gentler, down holds the rate; the seed says which comes first."""
    recipe = brief.policy.standing.recipe
    factor = 2.0**magnitude
    options: list[tuple[str, Change, str]] = []
    if up:
        other = "linear" if recipe.schedule == "cosine" else "cosine"
        options.append(("schedule", put(other), "another decay spends more of the run at a low rate"))
        longer = max(recipe.warmup_steps + 1, round(recipe.warmup_steps * factor))
        options.append(("warmup_steps", put(longer), "a longer warm-up meets the first gradients gently"))
        decay = min(1.0, recipe.weight_decay * factor) if recipe.weight_decay else FIRST_DECAY * magnitude
        options.append(("weight_decay", put(decay), "decay keeps weights near the substrate's scale"))
        clip = recipe.clip_grad / factor if recipe.clip_grad else FIRST_CLIP
        options.append(("clip_grad", put(clip), "a tighter clip damps rare large gradients"))
    else:
        if recipe.schedule != "constant":  # a constant rate has no end to hold up
            floor = min(1.0, max(recipe.min_lr_ratio * factor, FIRST_FLOOR * magnitude))
            options.append(("min_lr_ratio", put(floor), "a rate above zero at the end keeps the last steps useful"))
            options.append(("schedule", put("constant"), "a constant rate wastes no step on decay"))
        options.append(
            ("warmup_steps", put(int(recipe.warmup_steps / factor)), "a shorter warm-up leaves more full steps")
        )
        if recipe.weight_decay:
            options.append(("weight_decay", put(recipe.weight_decay / factor), "less decay leaves more to learn with"))
        if recipe.clip_grad:
            options.append(("clip_grad", Change(scale=factor), "a looser clip keeps the size of informative gradients"))
    for name, change, reason in _rotated(brief, options):
        told = f"{name} is {getattr(recipe, name)}"
        yield Move({f"recipe.{name}": change}, f"{told}; {reason}.", all_up(brief))


def adapter(brief: Brief, magnitude: float, up: bool) -> Iterator[Move]:
    """Full fine-tuning or a low-rank adapter, its rank and its targets; up has more capacity."""
    current = brief.policy.standing.recipe.adapter
    factor = 2.0**magnitude
    full = Move(
        {"recipe.adapter": put(None)}, "A low-rank adapter may bind; full fine-tuning has no such bound.", all_up(brief)
    )
    if current is None:
        rank = round(min(LARGEST_RANK, FIRST_RANK * factor)) if up else max(1, round(SMALL_RANK * factor / 2))
        narrow = {} if up else {"targets": SMALL_TARGETS}
        yield _adapted(brief, {"rank": rank, "alpha": float(rank), **narrow})
        return
    rank = min(LARGEST_RANK, round(current.rank * factor)) if up else max(1, round(current.rank / factor))
    scaled = {"rank": rank, "alpha": current.alpha * rank / current.rank, "targets": list(current.targets)}
    if rank != current.rank:
        yield _adapted(brief, scaled)
    if up:
        yield full
    elif len(current.targets) > 1:
        yield _adapted(brief, {**current.model_dump(), "targets": list(current.targets[:-1])})


def _adapted(brief: Brief, wanted: dict[str, Any]) -> Move:
    current = brief.policy.standing.recipe.adapter
    before = f"rank {current.rank} on {', '.join(current.targets)}" if current else "full fine-tuning"
    targets = ", ".join(wanted["targets"]) if "targets" in wanted else "its default targets"
    told = f"Training is {before}; an adapter of rank {wanted['rank']} on {targets} changes how far it can go"
    return Move({"recipe.adapter": put(wanted)}, f"{told} from the substrate.", all_up(brief))


def stack(brief: Brief, magnitude: float, up: bool) -> Iterator[Move]:
    """Waiting changes together on the standing settings; if that is ruled out, each alone."""
    waiting = list(brief.policy.pending)
    groups = [waiting, *([one] for one in waiting if len(waiting) > 1)]
    for group in groups if waiting else []:
        change = {path: put(both["to"]) for entry in group for path, both in entry["change"].items()}
        names = ", ".join(sorted(str(entry.get("axis", "a change")) for entry in group))
        told = "helped, each tried alone; this tries them together" if len(group) > 1 else "helped; this tries it"
        yield Move(change, f"{names} {told} on what stands now.", all_up(brief))


def selection(brief: Brief, magnitude: float, up: bool) -> Iterator[Move]:
    """Which weights a run hands on; down, what its loss counts."""
    recipe = brief.policy.standing.recipe
    mix = brief.policy.standing.mix
    equal = len(set(mix.weight.values())) == 1
    rules = ["lowest-loss-uniform", "lowest-loss", "last"]
    if equal and recipe.checkpoint_selection != "last":
        rules = ["last"]  # with equal shares both rules of lowest loss are one
    rules = [rule for rule in rules if rule != recipe.checkpoint_selection]
    first = [
        Move(
            {"recipe.checkpoint_selection": put(rule)},
            f"A run hands on its {recipe.checkpoint_selection} weights; {rule} {why}.",
        )
        for rule in rules
        for why in [
            "may hand on weights from before a fitted cue took over" if rule != "last" else "spends no rows on choosing"
        ]
    ]
    factor = 2.0**magnitude
    second = [
        Move(
            {"recipe.answer_loss_weight": Change(scale=factor)},
            "The answer's tokens are what is scored; their loss counts more.",
        )
    ]
    if any(one != "answer" for one in mix.style.values()):
        second.append(
            Move(
                {"recipe.trace_loss_weight": Change(scale=1 / factor)},
                "Traces are learnt for the answer's sake; their loss counts less.",
            )
        )
    prompt = min(1.0, max(recipe.prompt_loss_weight * factor, FIRST_PROMPT_WEIGHT * magnitude))
    second.append(
        Move(
            {"recipe.prompt_loss_weight": put(prompt)},
            "Loss on the prompt keeps the model reading it, not only its surface.",
        )
    )
    yield from first + _rotated(brief, second) if up else _rotated(brief, second) + first


OPERATIONS: dict[Operator, Operation] = {
    "headroom": headroom,
    "balance": balance,
    "style": style,
    "lr": lr,
    "steps": steps,
    "schedule": schedule,
    "adapter": adapter,
    "stack": stack,
    "selection": selection,
}


def _blend(now: dict[str, float], target: dict[str, float], part: float) -> dict[str, float]:
    return {family: (1 - part) * now[family] + part * target[family] for family in now}


def _opposite(now: dict[str, float], toward: dict[str, float]) -> dict[str, float]:
    """The mix as far from `now` as `toward` is, in ratios, on the other side; sums to one."""
    mirrored = {family: now[family] ** 2 / toward[family] if toward[family] else 0.0 for family in now}
    total = sum(sorted(mirrored.values()))
    return {family: share / total for family, share in mirrored.items()}


def _shares(now: dict[str, float], shares: dict[str, float]) -> dict[str, Change]:
    """Changes that give these shares; a family that stays where it is within rounding is left out."""
    rounded = {family: round(share, SHARE_DIGITS) for family, share in shares.items()}
    moved = {family: share for family, share in rounded.items() if abs(share - now[family]) >= 10**-SHARE_DIGITS}
    return {f"mix.weight.{family}": put(share) for family, share in moved.items()}


def _shuffled[T](brief: Brief, values: Sequence[T]) -> list[T]:
    """The seed's order of the values; it depends on their places, not on what they are called."""
    order = list(values)
    random.Random(brief.seed).shuffle(order)
    return order


def _rotated[T](brief: Brief, values: Sequence[T]) -> list[T]:
    start = brief.seed % len(values) if values else 0
    return [*values[start:], *values[:start]]
