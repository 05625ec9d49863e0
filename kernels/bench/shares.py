"""Work cut into shares for several processes on one GPU, so that compiling, which is most of it, fills the cores.

A share is every n-th piece of a list that all processes make alike; nothing is timed beside another share. A process
that dies (a kernel that reads where it must not takes its whole process along) costs the piece it was at: where it says
what it begins, by a line {"step": NUMBER} before each piece, another goes on after that one.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_evolve.kernels.bench.children import Child, Children, Ended
from megatron_evolve.kernels.bench.lines import line_of, row_of

MOST = 12  # each holds a CUDA context of half a gigabyte and a layer's tensors
START_S = 15  # no process is started anew for less: it takes some 10 s to import torch and to open the device
Turn = Callable[[], bool]


def everything() -> bool:
    """The turn of a process that does all the work."""
    return True


def begin(number: int) -> None:
    """What a process says before its piece of that number."""
    print(line_of({"step": number}), flush=True)


def turn(share: str | None, after: int = -1, begun: Callable[[int], None] = lambda _: None) -> Turn:
    """`i/n` as a function that says, piece after piece, whether it belongs to share i; None is everything.

    Of its own pieces, numbered from 0, those up to `after` are passed over; `begun` hears the number of every other.
    """
    if share is None:
        return everything
    index, count = (int(part) for part in share.split("/"))
    if not 0 <= index < count:
        raise ValueError(f"a share is i/n with 0 <= i < n; got {share}: number the shares from 0")
    asked = -1

    def mine() -> bool:
        nonlocal asked
        asked += 1
        own = asked % count == index and asked // count > after
        if own:
            begun(asked // count)
        return own

    return mine


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: a container or a batch system often gives fewer than the machine has."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):  # no second version of cgroups, so no limit of that kind
        return cores
    return cores if quota == "max" else max(1, min(cores, math.floor(int(quota) / int(period))))


def num_shares() -> int:
    return max(1, min(MOST, usable_cores() - 2))


def run(command: list[str], count: int, until: float = float("inf"), silent_s: float = float("inf")) -> Iterator[dict]:
    """Rows of `python command --share i/count` for every i, side by side and as they come.

    A process that ended badly is a row with `failed`; one that had said what it was at is followed by another, with
    `--after` that number. One that still runs at `until` (by time.monotonic), or says nothing for `silent_s`, is ended.
    """
    names: dict[Child, str] = {}
    at: dict[Child, int] = {}
    last: dict[Child, dict] = {}

    def start(children: Children, name: str, *more: str) -> None:
        child = children.start([*command, "--share", name, *more], until, silent_s)
        names[child] = name

    with Children() as children:
        for i in range(count):
            start(children, f"{i}/{count}")
        for child, told in children.told():
            if isinstance(told, Ended):
                if told.reason is not None:
                    yield failed(names[child], told, at.get(child), last.get(child))
                    if child in at and until - time.monotonic() > START_S:
                        start(children, names[child], "--after", str(at[child]))
                continue
            row = row_of(told)
            if row is None:
                continue
            if row.keys() == {"step"}:
                at[child] = row["step"]
            else:
                last[child] = row
                yield row


def failed(share: str, ended: Ended, step: int | None, last: dict | None) -> dict:
    """The row of a process that ended badly: at which of its pieces, and the last that it had told."""
    row = {"failed": f"share {share}", "ok": False, "reason": ended.reason, "complaint": ended.complaint}
    row |= {} if step is None else {"step": step}
    return row | ({} if last is None else {"after": last.get("check") or last.get("op")})
