"""The data mix of a candidate: what share of the training rows each family gets, and in what form.

Megatron calls such a value a blend. Families are whatever the substrate's data construction offers; a weight of zero is
a family that is not trained. Weights are normalised when the mix is made, so equal mixes have equal digests.
"""

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from megatron_evolve.substrate.frozen import Frozen

Curriculum = Literal["constant", "uniform-first", "uniform-last"]

# Weights are rounded to this many digits after normalisation, so that scaling by 2 and by 0.5 gives back the same mix.
WEIGHT_DIGITS = 9


class Mix(Frozen):
    """Shares and forms of the training rows."""

    weight: dict[str, float] = Field(description="share of training rows per family, >= 0, normalised to sum to 1")
    style: dict[str, str] = Field(description="form of the completion per family: `answer` or a worked trace's name")
    difficulty: Literal["nano", "challenge"] = Field(
        default="nano", description="which rule spaces and texts the row generators use"
    )
    curriculum: Curriculum = Field(
        default="constant",
        description="how shares move over a run: constant, or linearly from (`uniform-first`) or to (`uniform-last`) "
        "equal shares",
    )
    repetition_cap: int = Field(
        default=4, ge=1, le=1000, description="how often one and the same prompt may be trained on in a run"
    )

    @field_validator("weight")
    @classmethod
    def _normalised(cls, weight: dict[str, float]) -> dict[str, float]:
        if any(not math.isfinite(value) or value < 0 for value in weight.values()):
            raise ValueError(f"family weights must be finite and >= 0, got {weight}; give such")
        total = math.fsum(weight.values())
        if total <= 0:
            raise ValueError("family weights sum to zero, so there is nothing to train on; give a family a weight > 0")
        # Rounded weights miss 1 by the last digit; normalising them again would move it, and the digest with it.
        if abs(total - 1) <= len(weight) * 10**-WEIGHT_DIGITS:
            total = 1.0
        return {family: round(value / total, WEIGHT_DIGITS) for family, value in weight.items()}

    @model_validator(mode="after")
    def _one_style_per_family(self) -> "Mix":
        if set(self.style) != set(self.weight):
            odd = sorted(set(self.style) ^ set(self.weight))
            raise ValueError(f"mix.style and mix.weight must name the same families; only one of them has {odd}")
        return self

    def shares_at(self, progress: float) -> dict[str, float]:
        """Share per family at `progress` in [0, 1] of the run, following the curriculum."""
        if self.curriculum == "constant":
            return dict(self.weight)
        toward = progress if self.curriculum == "uniform-first" else 1.0 - progress
        uniform = 1.0 / len(self.weight)
        return {family: (1 - toward) * uniform + toward * value for family, value in self.weight.items()}
