"""The time of a run: CUDA events where there is a GPU, the process's own CPU time where there is none.

Providers take turns, so that a slow minute of the machine hits all of them alike, and every run starts with new numbers
and, on a GPU, a cold L2: 512 MiB are written in between, ten times the L2 of an H100. That write also takes 0.2 ms, in
which the host gets ahead with its launches, as it would in the middle of a model. A run's median stands beside its 20th
and 80th percentile.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import quantiles
from typing import NamedTuple

import torch
from torch import Tensor

FLUSH_BYTES = 2**29


class Spread(NamedTuple):
    """Milliseconds."""

    median: float
    low: float
    high: float


def spread(times_ms: list[float]) -> Spread:
    """Median, 20th and 80th percentile; of a single time, that time."""
    if len(times_ms) == 1:
        return Spread(*times_ms * 3)
    tenths = quantiles(times_ms, n=10, method="inclusive")
    return Spread(tenths[4], tenths[1], tenths[7])


class Clock:
    """Marks points of a run; the milliseconds between them are read afterwards."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.name = "cuda events" if self.cuda else f"process CPU time, {torch.get_num_threads()} threads"
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.cuda else None

    def mark(self):
        if not self.cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def cold(self) -> None:
        if self.flush is not None:
            self.flush.zero_()

    def between(self, marks: list) -> list[float]:
        if self.cuda:
            marks[-1].synchronize()
            return [a.elapsed_time(b) for a, b in pairwise(marks)]
        return [(b - a) * 1e3 for a, b in pairwise(marks)]


Parts = tuple[Callable[[], Tensor], Callable[[Tensor], object] | None]  # forward, and backward from its output


def interleaved(
    runs: dict[str, Parts], clock: Clock, fresh: tuple[Tensor, ...], *, rounds: int, warm: int
) -> dict[str, dict[str, Spread]]:
    """Forward, backward and both of every run; the first `warm` rounds are not counted."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for turn in range(warm + rounds):
        for name, (forward, backward) in runs.items():
            with torch.no_grad():
                for tensor in fresh:
                    tensor.normal_()
            clock.cold()
            marks = [clock.mark()]
            out = forward()
            marks.append(clock.mark())
            if backward is not None:
                backward(out)
                marks.append(clock.mark())
            del out
            if turn >= warm:
                parts = clock.between(marks)
                named = dict(zip(("forward", "backward"), parts, strict=False))
                named |= {"both": sum(parts)} if backward is not None else {}
                for part, ms in named.items():
                    times[name].setdefault(part, []).append(ms)
    return {name: {part: spread(ms) for part, ms in parts.items()} for name, parts in times.items()}
