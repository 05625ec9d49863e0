"""What a run writes about itself while it trains: one line a step, and now and then how far it is.

`metrics.jsonl` holds nothing that depends on time, so two runs of one seed write the same bytes. How far it is goes to
whoever started the run (`Pulse`), into a folder of each attempt's own.
"""

import json
import math
from pathlib import Path
from typing import Any

from megatron_evolve.launch.fence import check_fence
from megatron_evolve.launch.rundir import Pulse, write_whole
from megatron_evolve.substrate.train.curves import Curves

METRICS_FILE = "metrics.jsonl"


class Record:
    """The open record of one attempt. Lines of an earlier attempt from step `start` on are forgotten."""

    def __init__(self, folder: Path, start: int, curves: Curves | None = None) -> None:
        self._curves = curves
        self._pulse = Pulse("train")
        path = folder / METRICS_FILE
        write_whole(path, "".join(_line(entry) for entry in read_metrics(path) if entry["step"] < start))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 -- closed by `close`, one write a line

    def add(self, seconds: float, **entry: Any) -> None:
        """One step's line. `seconds` that it took go to the curves alone."""
        self._file.write(_line({name: finite(value) for name, value in entry.items()}))
        if self._curves:
            self._curves.add(seconds=seconds, **entry)

    def progress(self, step: int, steps: int) -> None:
        """`step` of `steps` are done. Raises Fenced in an older copy of this run, which its scheduler lost sight of."""
        if self._pulse.tell(step, steps):
            check_fence()

    def close(self) -> None:
        self._file.close()
        if self._curves:
            self._curves.close()


def finite(number: float) -> float | None:
    """The number, or None for what JSON has no form for; a diverged run's reason tells what it was."""
    return number if math.isfinite(number) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file. What a kill tore off the end is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True) + "\n"
