"""The rivals: other ways to spend the same runs. Each takes a laboratory and returns what it would ship.

All start from the origin's settings, may train `lab.budget` runs, and see dev on one fixed set of items, as most such
loops do; only Optuna on the external score asks the target at all. A run that diverged has no score and is never best.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_evolve.contest.moves import (
    CHECKPOINT_OPERATORS,
    MIX_OPERATORS,
    RECIPE_OPERATORS,
    Mutation,
    SamplesUniformly,
    origin_point,
    point,
)
from megatron_evolve.contest.space import Lab, Sheet, Trained
from megatron_evolve.substrate.settings import Settings

A_ROUND = 12  # runs: the anchor's, the explorers' and the confirmations of one round of the product
PARENTS = 4  # the best so far that may have children
OPTIONS = 4  # what one specialist tries before it hands on


@dataclass(frozen=True, eq=False)
class Scored:
    """A run and its score."""

    run: Trained
    score: float


def _try(lab: Lab, sheet: Sheet, settings: Settings, start: Trained | None = None) -> Scored | None:
    run = lab.train(settings, start)
    return Scored(run, lab.score(run, sheet)) if run else None


def _best(found: Sequence[Scored]) -> Scored | None:
    return max(found, key=lambda one: one.score, default=None)


def greedy(lab: Lab) -> Trained:
    """Rounds of explorers from the standing settings; the best dev score so far moves in. No anchor, no second seed."""
    sheet, mutate = lab.sheet("dev"), Mutation(lab.space, lab.rng)
    best = _try(lab, sheet, lab.space.origin)
    while lab.left:
        standing = best.run.settings
        found = [_try(lab, sheet, mutate(standing)) for _ in range(min(A_ROUND, lab.left))]
        best = _best([best, *filter(None, found)])
    return lab.ship(best.run.settings)


def keep_best(lab: Lab) -> Trained:
    """Evolution with parents: each child is one step from one of the best so far, whatever their luck was."""
    sheet, mutate = lab.sheet("dev"), Mutation(lab.space, lab.rng)
    alive = [_try(lab, sheet, lab.space.origin)]
    while lab.left:
        parent = alive[lab.rng.integers(len(alive))]
        child = _try(lab, sheet, mutate(parent.run.settings))
        alive = sorted([*alive, *filter(None, [child])], key=lambda one: -one.score)[:PARENTS]
    return lab.ship(alive[0].run.settings)


def random_search(lab: Lab) -> Trained:
    """Points drawn from the whole space; the best dev score."""
    sheet, dice = lab.sheet("dev"), SamplesUniformly(lab.rng)
    found = [_try(lab, sheet, lab.space.origin)]
    while lab.left:
        found.append(_try(lab, sheet, point(dice, lab.space)))
    return lab.ship(_best([one for one in found if one]).run.settings)


def optuna_on(split: str) -> Callable[[Lab], Trained]:
    """Optuna's TPE (Bergstra et al. 2011) on a score, the origin's settings as its first trial."""

    def search(lab: Lab) -> Trained:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(seed=int(lab.rng.integers(1 << 31)))
        study = optuna.create_study(sampler=sampler, direction="maximize")
        study.enqueue_trial(origin_point(lab.space))
        sheet = lab.sheet(split)
        tried: dict[int, Settings] = {}
        while lab.left:
            trial: Any = study.ask()
            tried[trial.number] = point(trial, lab.space)
            found = _try(lab, sheet, tried[trial.number])
            if found is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, found.score)
        return lab.ship(tried[study.best_trial.number])

    return search


def fork_from_winner(lab: Lab) -> Trained:
    """As greedy, but each explorer starts from the winner's weights and not from the substrate."""
    sheet, mutate = lab.sheet("dev"), Mutation(lab.space, lab.rng)
    best = _try(lab, sheet, lab.space.origin)
    while lab.left:
        now = best.run
        found = [_try(lab, sheet, mutate(now.settings), now) for _ in range(min(A_ROUND, lab.left))]
        best = _best([best, *filter(None, found)])
    return best.run


def hand_off(lab: Lab) -> Trained:
    """Specialists in a row: one tries mixes, one recipes, one what is handed on; each starts from the other's weights.

    The best of a specialist's tries goes on to the next, whether or not it beats what came in: a mid-state is passed
    along, as in the first design of the paper that this project follows (arXiv 2606.20657).
    """
    sheet, mutate = lab.sheet("dev"), Mutation(lab.space, lab.rng)
    state = _try(lab, sheet, lab.space.origin)
    specialists = (MIX_OPERATORS, RECIPE_OPERATORS, CHECKPOINT_OPERATORS)
    turn = 0
    while lab.left:
        operators, now = specialists[turn % len(specialists)], state.run
        found = [_try(lab, sheet, mutate(now.settings, operators), now) for _ in range(min(OPTIONS, lab.left))]
        state = _best([one for one in found if one]) or state
        turn += 1
    return state.run


RIVALS: dict[str, Callable[[Lab], Trained]] = {
    "greedy on dev": greedy,
    "random search": random_search,
    "TPE on dev": optuna_on("dev"),
    "TPE on external": optuna_on("external-a"),
    "keep-best with parents": keep_best,
    "fork from winner": fork_from_winner,
    "hand-off specialists": hand_off,
}

# They ship a checkpoint that other weights led to, so real training from the frozen substrate cannot run them.
HAND_ON = ("fork from winner", "hand-off specialists")
