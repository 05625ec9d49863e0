"""The constitution: what no round may change. Frozen by its digest in the ledger's first event.

It holds the gap test's fixed numbers, what a delta may reach, and every budget. The search policy may move within it;
meta reads it and cannot write it.
"""

from typing import Literal

from pydantic import Field, model_validator

from megatron_evolve.substrate.frozen import Frozen


class GapRule(Frozen):
    """Numbers of the transfer-gap test; never re-estimated during a campaign."""

    beta0: float = Field(default=0.5, gt=0, le=2, description="least share of a dev gain that must reach the target")
    alpha: float = Field(
        default=0.05, gt=0, lt=0.5, description="false-alarm probability per campaign, all looks together"
    )
    window: int = Field(default=4, ge=1, le=100, description="rounds that a verdict pools")
    estimands: tuple[Literal["selected", "mean", "cumulative"], ...] = Field(
        default=("selected", "mean"),
        min_length=1,
        description="what is judged in every round: the A half's winner, the mean of all explorers, the standing "
        "settings against the origin (which takes a look more on each external half once they have moved)",
    )


class Limits(Frozen):
    """What one candidate may cost; a delta beyond is refused before anything runs."""

    max_steps: int = Field(default=300, ge=1, description="optimizer steps of one run")
    max_rows: int = Field(default=40_000, ge=1, description="training rows of one run: steps x batch size")
    run_seconds: float = Field(default=1800, gt=0, description="wall time after which a job is killed")


class Budgets(Frozen):
    """What the campaign may use in all, every attempt counted, from its opening on. None: as much as it takes."""

    gpu_hours: float | None = Field(default=None, gt=0, description="hours of wall time, times the GPUs of each job")
    cpu_hours: float | None = Field(default=None, gt=0, description="hours of processor time")
    wall_hours: float | None = Field(default=None, gt=0, description="hours since it was opened, pauses included")
    money: float | None = Field(default=None, gt=0, description="in the currency of the prices")
    gpu_hour_price: float = Field(default=0.0, ge=0, description="of one GPU for one hour")
    cpu_hour_price: float = Field(default=0.0, ge=0, description="of one processor for one hour")

    @model_validator(mode="after")
    def _money_has_a_price(self) -> "Budgets":
        if self.money is not None and not (self.gpu_hour_price or self.cpu_hour_price):
            raise ValueError("a budget of money needs a price: add gpu_hour_price or cpu_hour_price")
        return self


class Constitution(Frozen):
    """The frozen rules of one campaign."""

    schema_: Literal["constitution/1"] = Field(default="constitution/1", alias="schema")
    authority: Literal["external"] = Field(default="external", description="the score that outranks dev")
    promotion: Literal["policy-only"] = Field(default="policy-only", description="weights never cross a round")
    rounds: int = Field(default=4, ge=1, le=10_000, description="declared rounds: the looks that share alpha")
    workers: int = Field(default=8, ge=2, le=1024, description="candidates a round, the anchor included")
    anchor_seeds: int = Field(default=3, ge=1, le=64, description="runs of the anchor in every round")
    gap: GapRule = Field(default=GapRule())
    mutation_space: tuple[str, ...] = Field(
        default=("mix.weight.*", "mix.style.*", "mix.curriculum", "mix.repetition_cap", "recipe.*"),
        description="paths that a delta may change; shell-style patterns",
    )
    limits: Limits = Field(default=Limits())
    repairs: int = Field(
        default=2, ge=0, le=10, description="repairs that one worker may try after a refusal or a failure"
    )
    budgets: Budgets = Field(default=Budgets(), description="GPU-hours, CPU-hours, wall time and money, in all")
    external_looks: int = Field(default=64, ge=0, description="candidates whose external score may be asked, in all")
    promote_probability: float = Field(
        default=0.75, gt=0.5, lt=1, description="posterior probability of being better that moves the standing recipe"
    )
