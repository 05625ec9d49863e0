"""Which weights of a run are handed on: the last, or of four points of its last half those of lowest held-out loss.

Held-out rows come from the run's own pool, cue and all, and from no step. `lowest-loss` weighs families as the mix
does, `lowest-loss-uniform` equally. The points are 5/8, 6/8, 7/8 and all of the steps.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_evolve.substrate.packing import Batch, Packer

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_evolve.substrate.train.step import Trainer

# 256 rows tell the mean loss to about 3 %; one evaluation costs about as much as 1.5 training steps.
NUM_HELD_OUT = 256


class Selector:
    """The best point so far: its step, its held-out loss and a copy of its tensors. All None for the rule `last`."""

    def __init__(self, packer: Packer) -> None:
        recipe = packer.recipe
        self.step: int | None = None
        self.loss: float | None = None
        self.tensors: dict[str, Tensor] = {}
        self._batch: Batch | None = None
        self._points: frozenset[int] = frozenset()
        if recipe.checkpoint_selection != "last":
            uniform = recipe.checkpoint_selection == "lowest-loss-uniform"
            self._batch = packer.held_out(NUM_HELD_OUT, uniform=uniform)
            self._points = frozenset(max(1, round(recipe.steps * eighths / 8)) for eighths in (5, 6, 7, 8))

    def consider(self, trainer: "Trainer", steps_taken: int, tensors: Callable[[], dict[str, "Tensor"]]) -> None:
        """Look at the weights after `steps_taken` steps, which `tensors` gives. Ties keep the earlier point."""
        if self._batch is None or steps_taken not in self._points:
            return
        loss = trainer.held_out_loss(self._batch)
        if self.loss is None or loss < self.loss:
            self.step, self.loss = steps_taken, loss
            self.tensors = {name: value.detach().clone() for name, value in tensors().items()}

    def restore(self, step: int | None, loss: float | None, tensors: dict[str, "Tensor"]) -> None:
        """Back to what an earlier attempt had found."""
        self.step, self.loss, self.tensors = step, loss, tensors
