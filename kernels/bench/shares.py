"""Work cut into shares for several processes on one GPU, so that compiling, which is most of it, fills the cores.

Nothing is timed in a share. A share is every n-th piece of a list that all processes make alike; a process that dies
(a kernel that reads where it must not takes its whole process along) costs its share and nothing else.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MOST = 12  # each holds a CUDA context of half a gigabyte and a layer's tensors
Turn = Callable[[], bool]


def everything() -> bool:
    """The turn of a process that does all the work."""
    return True


def turn(share: str | None) -> Turn:
    """`i/n` as a function that says, piece after piece, whether it belongs to share i; None is everything."""
    if share is None:
        return everything
    index, count = (int(part) for part in share.split("/"))
    if not 0 <= index < count:
        raise ValueError(f"a share is i/n with 0 <= i < n; got {share}: number the shares from 0")
    asked = -1

    def mine() -> bool:
        nonlocal asked
        asked += 1
        return asked % count == index

    return mine


def num_shares() -> int:
    return max(1, min(MOST, (os.cpu_count() or 1) - 2))


def run(command: list[str], count: int, until: float = float("inf")) -> Iterator[dict]:
    """Rows of `command --share i/count` for every i, side by side; a row with `failed` for each that ended badly.

    One that still runs at `until` (by time.monotonic) is ended, with the rows that it had printed.
    """
    root = str(Path(__file__).resolve().parents[2])
    running = [
        subprocess.Popen(
            [sys.executable, *command, "--share", f"{i}/{count}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        for i in range(count)
    ]
    for i, process in enumerate(running):
        try:
            left_s = None if until == float("inf") else max(0.0, until - time.monotonic())
            told, complaint = process.communicate(timeout=left_s)
        except subprocess.TimeoutExpired:
            process.kill()
            told = process.communicate()[0].rpartition("\n")[0]  # its last line may be half a line
            complaint = "it had not ended when the time of this check was used up"
        yield from (json.loads(line) for line in told.splitlines() if line.startswith("{"))
        if process.returncode:
            lines = complaint.strip().splitlines() or ["no message"]
            yield {"failed": f"share {i}/{count}", "ok": False, "reason": f"status {process.returncode}: {lines[-1]}"}
