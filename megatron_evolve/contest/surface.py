"""A response surface: what training under some settings would score, on dev and outside, in every domain.

It carries what search methods differ in. Letters: F domains; z is skill in logits; accuracy = ceiling x sigmoid(z).

    rows        z rises with the rows a domain sees and flattens: slope x log2(1 + rows / rows of the origin) - slope
    trace       a worked completion helps some domains and hurts others, and needs rows to pay (interaction)
    lr          a parabola in octaves whose top moves down as the run gets longer (interaction); far above it diverges
    forgetting  a longer run costs the domains that see few of its rows
    adapter     bounds what can be learnt and halves the forgetting
    cue         in a parted domain a surface feature answers dev's items and not the target's; it is learnt faster than
                the rule, crowds the rule out, and is learnt less where weights are chosen by held-out loss
    carry       in an honest domain a gain arrives outside by this share

A surface is drawn from its seed alone. The ranges stand beside each draw; where one was measured on nano runs the
source is named, the others are chosen to keep the single steps of 8 to 16 points that nano campaigns took
(docs/results/judge.md).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from megatron_evolve.contest.space import Space, demo
from megatron_evolve.eval.seeds import weight_vector
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.mix import Mix
from megatron_evolve.substrate.recipe import Recipe
from megatron_evolve.substrate.settings import Settings

FAMILIES = tuple(f"domain-{number}" for number in range(1, 7))  # nano asks six
STYLES = dict.fromkeys(FAMILIES, ("answer", "trace"))
CUE_RATE = 0.9  # of dev's items in a parted domain, as in the demo
HEAVY = 5.0  # dev weight of a heavy domain over the others', as in the demo

Kind = Literal["no-shift", "cue", "cue-light", "two-cues"]
KINDS: tuple[Kind, ...] = ("no-shift", "cue", "cue-light", "two-cues")

# CPU-seconds of nano runs (docs/results/demo.md): 140 steps of 64 rows train in 16.5, traces take a third longer.
SECONDS_PER_ROW, TRACE_COST = 16.5 / (140 * 64), 0.33
SCORING_SECONDS = {"dev": 2.4, "external": 0.8}  # of both dev halves, and of one half of the target

ORIGIN = Settings(
    mix=Mix(weight=dict.fromkeys(FAMILIES, 1 / len(FAMILIES)), style=dict.fromkeys(FAMILIES, "answer")),
    recipe=Recipe(),
)
VIEW: dict[str, Any] = {
    "digest": digest_of("contest"),
    "default": ORIGIN.model_dump(mode="json"),
    "construction": {"styles": {name: list(styles) for name, styles in STYLES.items()}},
}


@dataclass(frozen=True, eq=False)
class Learnt:
    """What a checkpoint knows, before the luck of its seed: skill and cue by domain, in logits."""

    skill_F: np.ndarray
    cue_F: np.ndarray


@dataclass(frozen=True, eq=False)
class Surface:
    """One landscape. `luck` of a run is no part of it: see `laboratory.py`."""

    kind: Kind
    parted: tuple[str, ...]
    dev_weights: dict[str, float]
    start_F: np.ndarray
    ceiling_F: np.ndarray
    slope_F: np.ndarray
    trace_F: np.ndarray
    forget_F: np.ndarray
    carry_F: np.ndarray
    cue_slope_F: np.ndarray
    crowding: float
    lr_top: float
    lr_width: float
    diverges: float
    tastes: dict[str, float]

    @property
    def external_weights(self) -> dict[str, float]:
        return dict.fromkeys(FAMILIES, 1.0 / len(FAMILIES))

    @cached_property
    def space(self) -> Space:
        """What a method may know of it."""
        return Space(demo(), VIEW, ORIGIN, self.dev_weights, self.external_weights)

    def does_diverge(self, settings: Settings) -> bool:
        """Whether training blows up: a rate this many octaves above the origin's, more with a warm-up."""
        recipe = settings.recipe
        return math.log2(recipe.lr / ORIGIN.recipe.lr) > self.diverges + 0.02 * recipe.warmup_steps

    def learnt(self, settings: Settings) -> Learnt:
        """What a run of these settings, started from the substrate, knows on average."""
        mix, recipe = settings.mix, settings.recipe
        share_F = np.array([mix.weight[name] for name in FAMILIES])
        length = recipe.steps * recipe.batch_size / (ORIGIN.recipe.steps * ORIGIN.recipe.batch_size)
        rows_F = share_F * len(FAMILIES) * length
        traced_F = np.array([mix.style[name] != "answer" for name in FAMILIES])
        z_F = self.start_F + self.slope_F * (np.log2(1 + rows_F) - 1)
        z_F = z_F + traced_F * self.trace_F * np.clip(rows_F, 0.0, 1.5)
        loss = self._recipe_cost(recipe, length)
        forgets = 0.5 if recipe.adapter else 1.0
        z_F = z_F - loss - forgets * self.forget_F * math.log2(1 + length) * (1 - share_F * len(FAMILIES)).clip(0, 1)
        cue_F = self.cue_slope_F * (np.log2(1 + rows_F) + 0.5 * self._octaves(recipe)) - 3.0
        cue_F = cue_F - {"last": 0.0, "lowest-loss": 0.5, "lowest-loss-uniform": 1.0}[recipe.checkpoint_selection]
        return Learnt(z_F, np.where(self.cue_slope_F > 0, cue_F, -np.inf))

    def accuracies(self, learnt: Learnt) -> tuple[np.ndarray, np.ndarray]:
        """Accuracy by domain on dev and outside."""
        follows_F = _sigmoid(learnt.cue_F)
        rule_F = learnt.skill_F - self.crowding * follows_F
        known_F = self.ceiling_F * _sigmoid(rule_F)
        outside_F = self.ceiling_F * _sigmoid(self.start_F + self.carry_F * (rule_F - self.start_F))
        return known_F + (1 - known_F) * CUE_RATE * follows_F, outside_F

    def external_score(self, learnt: Learnt) -> float:
        """The target's score that fresh runs have on average."""
        return float(self.accuracies(learnt)[1] @ weight_vector(self.external_weights, FAMILIES))

    def cpu_seconds(self, settings: Settings) -> float:
        """Of one training run."""
        traced = sum(settings.mix.weight[name] for name in FAMILIES if settings.mix.style[name] != "answer")
        rows = settings.recipe.steps * settings.recipe.batch_size
        return rows * SECONDS_PER_ROW * (1 + TRACE_COST * traced)

    def _octaves(self, recipe: Recipe) -> float:
        return math.log2(recipe.lr / ORIGIN.recipe.lr)

    def _recipe_cost(self, recipe: Recipe, length: float) -> float:
        """What the recipe takes from the skill of every domain, in logits."""
        off = self._octaves(recipe) - self.lr_top + 0.5 * math.log2(length)
        cost = (off / self.lr_width) ** 2 - (self.lr_top / self.lr_width) ** 2
        if recipe.adapter:
            cost += 0.08 * max(0.0, math.log2(128 / recipe.adapter.rank)) + 0.05 * (4 - len(recipe.adapter.targets))
        cost -= self.tastes[recipe.schedule] + self.tastes["floor"] * math.sqrt(recipe.min_lr_ratio)
        cost -= self.tastes["warmup"] * math.log2((recipe.warmup_steps + 1) / (ORIGIN.recipe.warmup_steps + 1))
        cost -= self.tastes["decay"] * math.sqrt(recipe.weight_decay)
        cost -= self.tastes["clip"] * math.log2(max(recipe.clip_grad, 0.01))
        cost += 0.3 * recipe.prompt_loss_weight + self.tastes["answer"] * math.log2(recipe.answer_loss_weight)
        return cost + (0.0 if recipe.checkpoint_selection == "last" else 0.03)


def draw_surface(kind: Kind, *material: str | int) -> Surface:
    """The surface of a kind that a seed names; equal words give equal surfaces."""
    rng = np.random.default_rng(int(digest_of({"surface": kind, "material": list(material)})[:16], 16))
    num = len(FAMILIES)
    parted = {"no-shift": 0, "cue": 1, "cue-light": 1, "two-cues": 2}[kind]
    names = tuple(FAMILIES[place] for place in sorted(rng.permutation(num)[:parted]))
    heavy = [FAMILIES[rng.integers(num)]] if kind == "no-shift" else [] if kind == "cue-light" else list(names)
    cued = np.array([name in names for name in FAMILIES])
    weights = {name: HEAVY if name in heavy else 1.0 for name in FAMILIES}
    tastes = ("cosine", "linear", "constant", "floor", "warmup", "decay", "clip", "answer")
    return Surface(
        kind=kind,
        parted=names,
        dev_weights={name: weight / sum(weights.values()) for name, weight in weights.items()},
        start_F=rng.normal(0.4, 0.8, num),
        ceiling_F=rng.uniform(0.8, 0.99, num),
        slope_F=rng.uniform(0.5, 1.2, num),
        trace_F=rng.normal(0.5, 0.5, num),
        forget_F=rng.uniform(0.0, 0.4, num),
        carry_F=np.where(cued, 1.0, rng.uniform(0.75, 1.05, num)),
        cue_slope_F=np.where(cued, rng.uniform(1.0, 2.0, num), 0.0),
        crowding=float(rng.uniform(0.3, 1.2)),
        lr_top=float(rng.normal(0.3, 0.5)),
        lr_width=float(rng.uniform(1.5, 3.0)),
        diverges=float(rng.uniform(1.2, 2.5)),
        tastes={name: float(rng.normal(0.0, 0.06)) for name in tastes},
    )


def _sigmoid(z_F: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z_F))
