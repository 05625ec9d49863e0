"""Everything one GPU can tell about the kernels, in one command and under eight minutes.

    python kernels/gpu_check.py --out docs/results/kernels-h100.jsonl

Needs this checkout, torch and triton; nothing is installed, nothing is fetched. First whether every kernel is right,
then the rows of the benchmark, each of which is right or has no time, and how they stand to the targets (a missed one
is a row). Status 1 where a kernel of ours is wrong or fails in either, 2 without a GPU.

All of it runs in processes that may fail, hang or be killed: lines are written as they come, what a process was at when
it ended is a row, and another goes on after it. The checks have half of the time, and most of theirs is compiling, an
estimated 600 to 1,300 CPU seconds: on fewer than eight usable cores some of them may not be reached.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SECONDS = 420  # for all: then the benchmark starts no new case
CHECKS = 0.5  # of them for the checks, whatever hangs there; on an H100 they took 50 s
GRACE_S = 40  # for the case that runs then: the longest took 8 s, with its kernels compiled
SILENT_S = 100  # of a benchmark's process, then it hangs: a layer of which nothing is compiled takes half a minute


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the JSON lines there too")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"start no case after it ({SECONDS})")
    parser.add_argument("--checks-only", action="store_true", help="correctness alone")
    # what follows is for the processes that this one starts
    parser.add_argument("--share", help=argparse.SUPPRESS)  # i/n: this share of the checks, and of what to compile
    parser.add_argument("--benchmark", action="store_true", help=argparse.SUPPRESS)  # a share is of that, not of checks
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # by time.monotonic, which they share
    parser.add_argument("--after", type=int, default=-1, help=argparse.SUPPRESS)  # its piece that ended another process
    options = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("gpu_check: needs a CUDA device, and torch finds none: run it on a machine with one", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("gpu_check: TRITON_INTERPRET is set, so nothing would be compiled: unset it", file=sys.stderr)
        return 2
    from megatron_evolve.kernels.bench.lines import line_of

    if options.share:
        part = benchmark(options.until, options.after) if options.benchmark else share(options)
        for row in part:
            print(line_of(row), flush=True)
        return 0  # also where a check fails, which its row says: any other status means that rows are missing
    ok = True
    with (options.out or Path(os.devnull)).open("w", encoding="utf-8") as file:
        for row in report(time.monotonic() + options.seconds, checks_only=options.checks_only):
            ok = ok and is_right(row)
            for sink in (file, sys.stdout):
                sink.write(line_of(row) + "\n")
                sink.flush()
    return 0 if ok else 1


def is_right(row: dict) -> bool:
    """Whether a row says nothing against these kernels: no failed check, and no time of theirs refused."""
    return row.get("ok", True) and not (row.get("provider") == "triton" and row.get("kind"))


def share(options: argparse.Namespace) -> Iterator[dict]:
    """One process's part: its checks, then one untimed run of its part of the benchmark."""
    from megatron_evolve.kernels.bench import checks, targets
    from megatron_evolve.kernels.bench.shares import begin, turn

    mine = turn(options.share, options.after, begin)
    yield from checks.checks("cuda", checks.Sizes(), mine)
    if not options.checks_only:
        targets.warm("cuda", mine)


def benchmark(until: float, after: int) -> Iterator[dict]:
    """The process that takes times; alone on the GPU but for the one that reads it."""
    from megatron_evolve.kernels.bench import targets
    from megatron_evolve.kernels.bench.shares import begin

    yield from targets.rows("cuda", until, after=after, begun=begin)


def report(until: float, *, checks_only: bool) -> Iterator[dict]:
    """The machine, the checks, the ceilings, the benchmark, the targets."""
    import torch
    import triton

    from megatron_evolve.kernels.bench import checks, shares, targets
    from megatron_evolve.kernels.bench.rows import commit, device_name

    start = time.monotonic()
    yield {
        "device": device_name("cuda"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
        "cores": shares.usable_cores(),
        "shares": shares.num_shares(),
        "tolerances": checks.tolerances(),
    }
    right, own = True, str(Path(__file__).resolve())
    for row in shares.run(
        [own, *(["--checks-only"] if checks_only else [])],
        shares.num_shares(),
        until if checks_only else start + CHECKS * (until - start),
    ):
        right = right and is_right(row)
        yield row
    yield {"checks_s": round(time.monotonic() - start, 1), "all_right": right}
    if checks_only:
        return
    found, steps = [], targets.steps("cuda")
    for row in shares.run([own, "--benchmark", "--until", str(until)], 1, until + GRACE_S, SILENT_S):
        if "failed" in row and "step" in row:
            step = steps[row["step"]]
            row |= {"left_out": step.name, "ok": not step.ours}
        found.append(row)
        yield row
    yield from targets.judged(found)
    yield {"seconds": round(time.monotonic() - start, 1)}


if __name__ == "__main__":
    # This folder comes first in the path of a script, and its files must not be taken for other people's modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it ends what it started
    sys.exit(main())
