"""A grid of worlds: where a surface cue sits, how families weigh on dev and outside, and the campaigns run there.

A world is the base campaign with nothing changed but that. Its cue lies in the pool of training rows and in dev, never
in the external target. Nobody picks a campaign's seed or its judge's secret: both are hashes of the code that opened
the grid, the world's name and the campaign's number.

Where a world has `score_only`, its campaigns meet the external suite through a leaderboard alone: a judge of its own,
under a secret of its own, that a program asks (`leaderboard`).
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator

from megatron_evolve.campaign import (
    Campaign,
    ExternalScores,
    JudgeSpec,
    SubstrateSpec,
    find_campaign,
    load_campaign,
)
from megatron_evolve.document import find_yaml, load_yaml
from megatron_evolve.eval.suite import GeneratedSuite
from megatron_evolve.substrate.digest import digest_of
from megatron_evolve.substrate.frozen import Frozen, nearest
from megatron_evolve.worlds.leaderboard import SPLIT, argv_of

SHIPPED = Path(__file__).resolve().parent

Rate = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(gt=0)]


class ScoreOnly(Frozen):
    """What a leaderboard tells of a run: one number."""

    step: float = Field(ge=0, lt=1, description="what it is rounded to; 0 where it is not")


class World(Frozen):
    """Where dev and the external target part, if they do, and whether the target shows its items."""

    name: str = Field(min_length=1, max_length=48, pattern=r"^[A-Za-z0-9._-]+$")
    cue: dict[str, Rate] = Field(
        default_factory=dict, description="families where a cue gives the rule away, with how often it does"
    )
    dev_weight: dict[str, Weight] = Field(default_factory=dict, description="weight of a family on dev; 1 if not named")
    external_weight: dict[str, Weight] = Field(
        default_factory=dict, description="weight of a family in the external score; 1 if not named"
    )
    preset: str | None = Field(default=None, description="another substrate preset than the base campaign's")
    score_only: ScoreOnly | None = Field(
        default=None, description="the external target tells one number a run; none: its items are asked as usual"
    )

    @model_validator(mode="after")
    def _a_mean_of_all_items(self) -> "World":
        if self.score_only and self.external_weight:
            raise ValueError("a score-only target tells the mean of its items: leave external_weight out")
        return self

    @model_serializer(mode="wrap")
    def _as_opened(self, write: Any) -> dict[str, Any]:
        """Without `score_only` where there is none, so that a grid that was opened before there was any is the same."""
        told = write(self)
        return told if self.score_only else {name: value for name, value in told.items() if name != "score_only"}


class TruthSize(Frozen):
    """Fresh items that every judged run answers once its campaign is closed; shared out evenly over families."""

    dev: int = Field(default=10_000, ge=1)
    external: int = Field(default=10_000, ge=1)


class Grid(Frozen):
    """The whole of a grid file."""

    schema_: Literal["worlds/1"] = Field(default="worlds/1", alias="schema")
    campaign: str = Field(description="base campaign: a file, or a shipped name")
    rounds: int = Field(ge=1, description="rounds of every campaign")
    seeds: int = Field(ge=1, le=1000, description="campaigns in every world")
    truth: TruthSize = Field(default=TruthSize())
    worlds: tuple[World, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_name_per_world(self) -> "Grid":
        names = [world.name for world in self.worlds]
        if len(set(names)) != len(names):
            raise ValueError(f"worlds need different names, got {', '.join(names)}; rename one")
        return self


def load_grid(spec: Path) -> tuple[Grid, Campaign]:
    """The grid of a file (or shipped name) and its base campaign. Raises ValueError in one sentence."""
    path = find_yaml(str(spec), SHIPPED, "grid of worlds")
    grid = Grid.parse(load_yaml(path), where=str(path))
    beside = path.parent / grid.campaign
    base = load_campaign(beside if beside.is_file() else find_campaign(grid.campaign))
    if not isinstance(base.judge.external, GeneratedSuite):
        raise ValueError(
            f"{path}: the base campaign {base.name!r} has no generated external target, so no truth can be drawn; "
            "name a campaign that has one"
        )
    for world in grid.worlds:
        judge_of(base, world, secret=base.judge.secret)
        if world.score_only and "cumulative" in base.constitution.gap.estimands:
            raise ValueError(
                f"{path}: world {world.name} has a target that tells scores alone, which is never asked "
                "for the origin's runs: name a base campaign without the cumulative estimand"
            )
    return grid, base


def drawn(code: str, world: World, index: int | None, purpose: str) -> str:
    """What nobody picks: 64 hexadecimal digits from the code, the world's name and the campaign's number."""
    return digest_of({"code": code, "world": world.name, "campaign": index, "purpose": purpose})


def judge_of(base: Campaign, world: World, secret: str) -> JudgeSpec:
    """The base campaign's judge, moved into the world. Raises ValueError for a family that is not asked there."""
    dev = _suite(base.judge.dev, world.dev_weight, world.cue, f"world {world.name}: dev")
    external = _suite(base.judge.external, world.external_weight, {}, f"world {world.name}: external")
    return base.judge.replace(dev=dev, external=external, secret=secret)


def _suite(suite: GeneratedSuite, weight: dict[str, float], cue: dict[str, float], where: str) -> GeneratedSuite:
    for name in (*weight, *cue):
        if name not in suite.families:
            raise ValueError(f"{where} asks nothing of family {name!r}{nearest(name, list(suite.families))}")
    shares = {name: {"weight": weight.get(name, 1.0), "cue_rate": cue.get(name, 0.0)} for name in suite.families}
    return GeneratedSuite.parse({**suite.model_dump(mode="json"), "families": shares}, where=where)


def pool_of(base: Campaign, world: World) -> tuple[SubstrateSpec, dict[str, float]]:
    """The substrate whose weights the world takes, and the cue rates of its pool."""
    named = {} if world.preset is None else {"preset": world.preset, "path": None}
    return base.substrate.replace(cue_rate={}, **named), dict(world.cue)


def campaign_of(
    grid: Grid, base: Campaign, world: World, index: int, code: str, substrate: Path, board: Path | None = None
) -> Campaign:
    """One campaign of a world, on its frozen substrate; `board` is the judge of its leaderboard, if it has one."""
    campaign = base.replace(
        name=f"{world.name}-{index + 1}",
        seed=int(drawn(code, world, index, "seed")[:8], 16),
        substrate=SubstrateSpec(path=str(substrate)),
        judge=judge_of(base, world, secret=drawn(code, world, index, "judge")),
        constitution=base.constitution.replace(rounds=grid.rounds),
        open_final="at-end",  # nobody watches over hundreds of campaigns
    )
    if world.score_only is None:
        return campaign
    assert board is not None, "a score-only world has its leaderboard before its campaign"
    suite, step = board_judge_of(base, world, index, code).external, world.score_only.step
    target = ExternalScores(
        kind="command",
        items=suite.items_per_family[SPLIT] * len(suite.families),
        step=step,
        command=argv_of(board, substrate, step),
    )
    # There are no sealed items that a claim of performance could be measured on.
    return campaign.replace(judge=campaign.judge.replace(external=target), claim="infrastructure", comparator=None)


def board_judge_of(base: Campaign, world: World, index: int, code: str) -> JudgeSpec:
    """The judge of a campaign's leaderboard: both halves of the world's external suite as one, under another secret."""
    judge = judge_of(base, world, secret=drawn(code, world, index, "leaderboard"))
    sizes = judge.external.items_per_family
    asked = sum(count for split, count in sizes.items() if split != "final")
    sizes = {SPLIT: asked} | {split: count for split, count in sizes.items() if split == "final"}
    return judge.replace(external=judge.external.replace(items_per_family=sizes))


def truth_judge_of(grid: Grid, base: Campaign, world: World, code: str) -> JudgeSpec:
    """The judge that knows the truth of a world: the same suites with many more items, under a secret of its own."""
    judge = judge_of(base, world, secret=drawn(code, world, None, "truth"))
    sizes: dict[str, Any] = {"dev-b": grid.truth.dev, "external-b": grid.truth.external}
    dev, external = (
        suite.replace(items_per_family={split: max(2, math.ceil(sizes[split] / len(suite.families)))})
        for suite, split in ((judge.dev, "dev-b"), (judge.external, "external-b"))
    )
    return judge.replace(dev=dev, external=external)
