"""TensorBoard's event files of one run, written by rank 0 as it trains, where they are asked for.

    RUNDIR/tensorboard/events.out.tfevents.*     loss, grad_norm, lr, step_seconds, tokens_per_second, memory_bytes,
                                                 expert_bias_spread where the routing bias moves

A resumed run writes a file of its own that begins with the step it goes on from; TensorBoard then forgets what the
attempt before wrote of later steps (`purge_step`), so that no step stands twice. Nothing is read from these files.
"""

import logging
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CURVES_FOLDER = "tensorboard"
FLUSH_S = 10  # what a kill may cost

log = logging.getLogger(__name__)


class Curves:
    """The open event file of one attempt."""

    def __init__(self, writer: Any, chunks: Sequence[Any]) -> None:
        self._writer = writer
        self._biases_E = routing_biases(chunks)

    @classmethod
    def open(cls, folder: Path, start: int, chunks: Sequence[Any]) -> "Curves | None":
        """Event files under `folder` from step `start` on; None, said once, where the package is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.warning("no event files: tensorboard is not installed (pip install 'megatron-evolve[track]')")
            return None
        place = str(folder / CURVES_FOLDER)
        return cls(SummaryWriter(place, purge_step=start, flush_secs=FLUSH_S), chunks)

    def add(self, step: int, seconds: float, tokens: int, **measured: float) -> None:
        """One step that took `seconds` for `tokens` tokens of the global batch."""
        values = {**measured, "step_seconds": seconds, "tokens_per_second": tokens / seconds}
        values["memory_bytes"] = peak_memory_bytes()
        if self._biases_E:
            values["expert_bias_spread"] = widest(self._biases_E)
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        """Writes what is held and closes the file."""
        self._writer.close()


def routing_biases(chunks: Sequence[Any]) -> "list[Tensor]":
    """The routing bias (E,) of each layer of experts on this rank, where training moves it: not under an adapter."""
    frozen = all(not parameter.requires_grad for chunk in chunks for parameter in _router_weights(chunk))
    named = [one for chunk in chunks for one in chunk.named_buffers()]
    return [] if frozen else [buffer for name, buffer in named if name.endswith("expert_bias")]


def _router_weights(chunk: Any) -> "list[Tensor]":
    return [parameter for name, parameter in chunk.named_parameters() if name.endswith("router.weight")]


def widest(biases_E: "list[Tensor]") -> float:
    """The largest difference between two experts' biases within one layer; one wait for the device."""
    import torch

    return float(torch.stack([bias.max() - bias.min() for bias in biases_E]).max())


def peak_memory_bytes() -> int:
    """The most that this process held so far: of its GPU where it has one, else of the machine's memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
