"""What a run writes about itself while it trains: one line a step, and now and then how far it is.

`metrics.jsonl` holds nothing that depends on time, so two runs of one seed write the same bytes; `progress.json` holds
the time.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

from megatron_evolve.launch.fence import check_fence
from megatron_evolve.launch.rundir import write_json, write_whole

METRICS_FILE = "metrics.jsonl"
PROGRESS_FILE = "progress.json"
PROGRESS_EVERY_S = 2.0  # each one is an fsync


class Record:
    """The open record of one attempt. Lines of an earlier attempt from step `start` on are forgotten."""

    def __init__(self, folder: Path, start: int) -> None:
        self._folder = folder
        self._told_at = 0.0
        path = folder / METRICS_FILE
        write_whole(path, "".join(_line(entry) for entry in read_metrics(path) if entry["step"] < start))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 -- closed by `close`, one write a line

    def add(self, **entry: Any) -> None:
        """One step's line."""
        self._file.write(_line({name: finite(value) for name, value in entry.items()}))

    def progress(self, step: int, of: int, seconds: float) -> None:
        """How far the run is: at most every two seconds, and at the end."""
        now = time.monotonic()
        if step == of or now - self._told_at >= PROGRESS_EVERY_S:
            self._told_at = now
            check_fence()  # an older copy of this run, which its scheduler lost sight of, ends here
            write_json(self._folder / PROGRESS_FILE, {"step": step, "of": of, "seconds": round(seconds, 1)})

    def close(self) -> None:
        self._file.close()


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
