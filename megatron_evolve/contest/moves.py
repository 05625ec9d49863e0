"""Moves of the rivals: one step of the product's own operators, or a point of the whole space of settings.

Rivals that mutate take the steps that this project's workers take, so that methods differ in how they choose, not in
what they may try. Rivals that sample draw from one space, whose ranges hold every step that a campaign can reach.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megatron_evolve.axes import generic_axes
from megatron_evolve.contest.space import Space
from megatron_evolve.policy import DomainState, Operator, SearchPolicy
from megatron_evolve.proposals import brief_of
from megatron_evolve.substrate.mix import WEIGHT_DIGITS, Mix
from megatron_evolve.substrate.recipe import Adapter
from megatron_evolve.substrate.settings import Settings
from megatron_evolve.workers.propose import propose
from megatron_evolve.workers.validate import validate

MIX_OPERATORS: tuple[Operator, ...] = ("headroom", "balance", "style")
RECIPE_OPERATORS: tuple[Operator, ...] = ("lr", "steps", "schedule", "adapter")
CHECKPOINT_OPERATORS: tuple[Operator, ...] = ("selection", "schedule")
ANY_OPERATOR = MIX_OPERATORS + RECIPE_OPERATORS


class Mutation:
    """Steps from some settings along a random axis, in a random direction and size."""

    def __init__(self, space: Space, rng: np.random.Generator) -> None:
        self.space, self.rng = space, rng
        self.campaign = space.campaign.replace(seed=int(rng.integers(1 << 30)))
        states = {
            name: DomainState(dev=None, external=None, dev_weight=weight, external_weight=None)
            for name, weight in space.dev_weights.items()
        }
        self.policy = SearchPolicy(round=1, standing=space.origin, axes=generic_axes(), domains=states)
        self.num_asked = 0

    def __call__(self, settings: Settings, operators: Sequence[Operator] = ANY_OPERATOR) -> Settings:
        """The settings one step on; themselves where no step is open."""
        self.num_asked += 1
        operator = operators[self.rng.integers(len(operators))]
        axis = self.policy.axes[0].replace(
            name=operator,
            operator=operator,
            magnitude=float(self.rng.choice([0.5, 1.0])),
            direction=str(self.rng.choice(["up", "down"])),
        )
        policy = self.policy.replace(standing=settings)
        answer = propose(brief_of(self.campaign, self.space.view, policy, self.num_asked, axis, 0, None))
        if answer.delta is None:
            return settings
        found = validate(answer.delta, policy, self.campaign.constitution, self.space.view)
        return found if isinstance(found, Settings) else settings


class Suggests(Protocol):
    """What names a value of each setting: `SamplesUniformly`, or an Optuna trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str: ...


class SamplesUniformly:
    """A point drawn uniformly; of a range on a log scale, uniformly in the logarithm."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high)))) if log else float(self.rng.uniform(low, high))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        return str(choices[self.rng.integers(len(choices))])


def point(trial: Suggests, space: Space) -> Settings:
    """The settings that a trial names."""
    max_steps = space.campaign.constitution.limits.max_steps
    weight = {name: trial.suggest_float(f"weight.{name}", 0.25, 4.0, log=True) for name in space.families}
    style = {name: trial.suggest_categorical(f"style.{name}", space.styles[name]) for name in space.families}
    steps = trial.suggest_int("steps", max(1, max_steps // 4), max_steps)
    rank = trial.suggest_categorical("adapter", ["none", "16", "64"])
    recipe = space.origin.recipe.replace(
        lr=trial.suggest_float("lr", 5e-4, 1.2e-2, log=True),
        steps=steps,
        schedule=trial.suggest_categorical("schedule", ["cosine", "linear", "constant"]),
        min_lr_ratio=trial.suggest_float("min_lr_ratio", 0.0, 0.5),
        warmup_steps=trial.suggest_int("warmup_steps", 0, max_steps // 5),
        weight_decay=trial.suggest_float("weight_decay", 0.0, 0.1),
        clip_grad=trial.suggest_float("clip_grad", 0.25, 4.0, log=True),
        adapter=None if rank == "none" else Adapter(rank=int(rank), alpha=float(rank)),
        checkpoint_selection=trial.suggest_categorical("selection", ["last", "lowest-loss", "lowest-loss-uniform"]),
        answer_loss_weight=trial.suggest_float("answer_loss_weight", 0.5, 4.0, log=True),
    )
    return Settings(mix=Mix(weight=weight, style=style), recipe=recipe)


def origin_point(space: Space) -> dict[str, float | int | str]:
    """What a trial must name for `point` to give the origin's settings."""
    mix, recipe = space.origin.mix, space.origin.recipe
    return {
        **{
            f"weight.{name}": round(mix.weight[name] * len(space.families), WEIGHT_DIGITS - 1)
            for name in space.families
        },
        **{f"style.{name}": mix.style[name] for name in space.families},
        "steps": recipe.steps,
        "adapter": "none" if recipe.adapter is None else str(recipe.adapter.rank),
        "lr": recipe.lr,
        "schedule": recipe.schedule,
        "min_lr_ratio": recipe.min_lr_ratio,
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "clip_grad": recipe.clip_grad,
        "selection": recipe.checkpoint_selection,
        "answer_loss_weight": recipe.answer_loss_weight,
    }
