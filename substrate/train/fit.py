"""From a model and a packer to trained weights, resumable at any moment: the loop that runs and substrate builds share.

State that a step needs is all in the model, the optimizer, the generators and `_State`; a `resume` checkpoint holds
these (see `resume`), and rows are drawn again from the seed. So an interrupted run goes on bit for bit.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_evolve.substrate.packing import Packer, Tally
from megatron_evolve.substrate.train.curves import Curves
from megatron_evolve.substrate.train.divergence import Watch
from megatron_evolve.substrate.train.record import Record
from megatron_evolve.substrate.train.resume import restore_resume, save_resume
from megatron_evolve.substrate.train.selection import Selector
from megatron_evolve.substrate.train.step import Trainer
from megatron_evolve.substrate.train.stopping import Interrupted
from megatron_evolve.substrate.train.trained import put_trained_tensors, trained_tensors

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

RESUME_FOLDER = "resume"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """How a run ended. `diverged` is the 0-based step and the reason; then the weights are not to be used."""

    steps: int
    diverged: tuple[int, str] | None
    first_loss: float
    last_loss: float
    chosen_step: int
    held_out_loss: float | None
    tally: Tally
    seconds: float
    cpu_seconds: float


@dataclass
class _State:
    """What the loop itself carries from step to step."""

    steps_taken: int = 0
    first_loss: float = 0.0
    last_loss: float = 0.0
    watch: Watch = field(default_factory=Watch)
    seconds: float = 0.0  # of earlier attempts
    cpu_seconds: float = 0.0

    def count(self, loss: float) -> None:
        """One more step, with this loss."""
        self.first_loss = self.first_loss if self.steps_taken else loss
        self.last_loss, self.watch = loss, self.watch.after(loss)
        self.steps_taken += 1


class _Clock:
    def __init__(self, state: _State) -> None:
        self._before = (state.seconds, state.cpu_seconds)
        self._start = time.monotonic()

    def read(self) -> tuple[float, float]:
        """Wall seconds of the loop and CPU-seconds of the process, earlier attempts included."""
        seconds, cpu_seconds = self._before
        return seconds + time.monotonic() - self._start, cpu_seconds + time.process_time()


def fit(
    chunks: "Sequence[HybridModel]",
    packer: Packer,
    folder: Path,
    *,
    run: str,
    save_every: int,
    micro_rows: int | None = None,
    packed: bool = False,
    tensorboard: bool = False,
    tell: Callable[[int, float], None] = lambda step, loss: None,
    stop: Callable[[], bool] = lambda: False,
) -> Fit:
    """Train the model in place as `packer.recipe` says; afterwards it holds the weights that the selection rule chose.

    `chunks` is this rank's part of the model, and all ranks call this. `run` is the digest of everything that decides
    the bits: an unfinished run with the same digest under `folder` is gone on with. A `resume` checkpoint is written
    every `save_every` steps (0: never). `micro_rows` and `packed` as in `Trainer`; `tensorboard`: see `Curves`.
    `tell` hears of every step. Once `stop` is true on any rank all save after the same step and raise Interrupted.
    """
    recipe, tally = packer.recipe, Tally()
    trainer, selector = Trainer(chunks, recipe, micro_rows=micro_rows, packed=packed), Selector(packer)
    state = _restore(trainer, selector, folder / RESUME_FOLDER, run)
    clock, record = _Clock(state), _record(trainer, folder, state.steps_taken, tensorboard)
    diverged = None
    for batch in packer.batches(tally, start=state.steps_taken):
        step, began = state.steps_taken, time.monotonic()
        measured = trainer.step(batch, step)
        state.count(measured.loss)
        if record:
            record.add(time.monotonic() - began, step=step, tokens=batch.num_tokens, **vars(measured))
            record.progress(state.steps_taken, recipe.steps)
        tell(step, measured.loss)
        if reason := state.watch.verdict(measured.loss, measured.grad_norm):
            diverged = (step, reason)
            break
        selector.consider(trainer, state.steps_taken, lambda: trained_tensors(chunks, recipe.adapter is not None))
        if state.steps_taken < recipe.steps:
            stopped = trainer.on_any_rank(stop())
            if stopped or (save_every and state.steps_taken % save_every == 0):
                _save(trainer, selector, folder / RESUME_FOLDER, run, state, clock)
            if stopped:
                raise Interrupted(state.steps_taken)
    if record:
        record.close()
    if selector.tensors and diverged is None:
        put_trained_tensors(chunks, selector.tensors, recipe.adapter is not None)
    seconds, cpu_seconds = clock.read()
    return Fit(
        steps=state.steps_taken,
        diverged=diverged,
        first_loss=state.first_loss,
        last_loss=state.last_loss,
        chosen_step=selector.step or state.steps_taken,
        held_out_loss=selector.loss,
        tally=tally,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
    )


def _record(trainer: Trainer, folder: Path, start: int, tensorboard: bool) -> Record | None:
    """The record of this attempt, on the rank that writes."""
    if not trainer.writes:
        return None
    log.info("training from step %d to %d on %d ranks", start, trainer.recipe.steps, trainer.world)
    return Record(folder, start, Curves.open(folder, start, trainer.chunks) if tensorboard else None)


def _save(trainer: Trainer, selector: Selector, folder: Path, run: str, state: _State, clock: _Clock) -> None:
    seconds, cpu_seconds = clock.read()
    own: dict[str, Any] = {
        "losses": [state.first_loss, state.last_loss],
        "watch": {"calm": state.watch.calm, "risen": state.watch.risen},
        "selected": {"step": selector.step, "loss": selector.loss},
        "seconds": [seconds, cpu_seconds],
    }
    save_resume(folder, run, state.steps_taken, trainer, selector, own)


def _restore(trainer: Trainer, selector: Selector, folder: Path, run: str) -> _State:
    checkpoint = restore_resume(folder, run, trainer, selector)
    if checkpoint is None:
        return _State()
    own = checkpoint.state
    watch = Watch(calm=tuple(own["watch"]["calm"]), risen=own["watch"]["risen"])
    return _State(checkpoint.step, *own["losses"], watch, *own["seconds"])
