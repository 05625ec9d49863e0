"""When a run has diverged: a rule on losses and gradient norms alone, stated before any run.

A run diverges at the first step whose loss or gradient norm is not finite, or at the step where the loss has been above
three times its running median (of the last 50 steps before the rise) for 20 steps in a row. A few such steps
are a hard batch or a shaky start, from which runs recover; twenty are a model that is gone. A rise from the first steps
on has no calm time to be compared with and shows as a bad score, not as divergence.
"""

import math
import statistics
from dataclasses import dataclass, replace
from typing import Self

RISE = 3.0
PATIENCE = 20
WINDOW = 50


@dataclass(frozen=True)
class Watch:
    """What the rule has to remember: the losses of calm steps, newest last, and how many risen ones came since."""

    calm: tuple[float, ...] = ()
    risen: int = 0

    def after(self, loss: float) -> Self:
        """The watch after one more step with a finite loss."""
        if len(self.calm) >= PATIENCE and loss > RISE * statistics.median(self.calm):
            return replace(self, risen=self.risen + 1)
        return replace(self, calm=(*self.calm, loss)[-WINDOW:], risen=0)

    def verdict(self, loss: float, grad_norm: float) -> str | None:
        """Why the run has diverged at the step that this watch ends with, or None."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm is {grad_norm}"
        if self.risen >= PATIENCE:
            median = statistics.median(self.calm)
            return f"loss was above {RISE:g} times its running median ({median:.4g}) for {PATIENCE} steps"
        return None
