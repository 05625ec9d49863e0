"""The exam of a simulated campaign: which families are asked, how they weigh, and what is known before a round."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_evolve.eval.reported import WHOLE_WEIGHT
from megatron_evolve.eval.seeds import weight_vector
from megatron_evolve.simulate.noise import ACCURACY, FAMILIES


@dataclass(frozen=True, eq=False)
class Exam:
    """Families with the anchor's accuracy in each, which is what a gain can still win there, and their weights.

    `step`: the target tells one number a run, rounded to this, and shows no item; none: it shows its items.
    """

    accuracy: Mapping[str, float]
    dev_weights: Mapping[str, float]
    step: float | None = None

    @classmethod
    def of(cls, accuracy: Mapping[str, float], heavy: Mapping[str, float], step: float | None = None) -> "Exam":
        """Weights of dev are 1 but for `heavy`; outside every family weighs alike."""
        weights = {name: heavy.get(name, 1.0) for name in accuracy}
        total = sum(weights.values())
        return cls(accuracy, {name: weight / total for name, weight in weights.items()}, step)

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(self.accuracy)

    @cached_property
    def accuracy_F(self) -> np.ndarray:
        return np.array(list(self.accuracy.values()))

    @cached_property
    def dev_w(self) -> np.ndarray:
        return weight_vector(self.dev_weights, self.families)

    @cached_property
    def external_w(self) -> np.ndarray:
        return np.full(len(self.families), 1 / len(self.families))

    @property
    def external_weights(self) -> Mapping[str, float]:
        """As the judge is told: by family where the target shows its items."""
        return dict.fromkeys(self.families, 1 / len(self.families)) if self.step is None else WHOLE_WEIGHT

    @property
    def domains(self) -> tuple[str, ...]:
        """Families that can be judged alone."""
        return self.families if self.step is None else ()


EVEN = Exam.of(dict.fromkeys(FAMILIES, ACCURACY), {})
