"""Everything one GPU can tell about the kernels, in one command and under eight minutes.

    python kernels/gpu_check.py --out docs/results/kernels-h100.jsonl

Needs this checkout, torch and triton; nothing is installed, nothing is fetched. First whether every kernel is right,
then the rows of the benchmark, each of which is right or has no time, and how they stand to the targets (a missed one
is a row). Status 1 where a kernel of ours is wrong or fails in either, 2 without a GPU. Lines are written as they come,
so that a run cut short leaves what it had.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

SECONDS = 420  # for all: checks that still run then are ended, and the benchmark starts no new case


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the JSON lines there too")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"start no case after it ({SECONDS})")
    parser.add_argument("--checks-only", action="store_true", help="correctness alone")
    parser.add_argument("--share", help=argparse.SUPPRESS)  # i/n: this share of the checks, and of what to compile
    options = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("gpu_check: needs a CUDA device, and torch finds none: run it on a machine with one", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("gpu_check: TRITON_INTERPRET is set, so nothing would be compiled: unset it", file=sys.stderr)
        return 2
    if options.share:
        return share(options.share, checks_only=options.checks_only)
    ok = True
    file = options.out.open("w", encoding="utf-8") if options.out else None
    try:
        for row in report(time.monotonic() + options.seconds, checks_only=options.checks_only):
            ok = ok and is_right(row)
            line = json.dumps(row)
            print(line, flush=True)
            if file:
                file.write(line + "\n")
                file.flush()
    finally:
        if file:
            file.close()
    return 0 if ok else 1


def is_right(row: dict) -> bool:
    """Whether a row says nothing against these kernels: no failed check, no time refused because they are wrong."""
    from megatron_evolve.kernels.bench.rows import FAILED, WRONG

    return row.get("ok", True) and not (row.get("provider") == "triton" and row.get("kind") in (FAILED, WRONG))


def share(name: str, *, checks_only: bool) -> int:
    """One process's part: its checks, then one untimed run of its part of the benchmark.

    Status 0 also where a check fails, which its row says: any other status means that rows are missing.
    """
    from megatron_evolve.kernels.bench import checks, targets
    from megatron_evolve.kernels.bench.shares import turn

    for row in checks.checks("cuda", checks.Sizes(), turn(name)):
        print(json.dumps(row), flush=True)
    if not checks_only:
        targets.warm("cuda", turn(name))
    return 0


def report(until: float, *, checks_only: bool) -> Iterator[dict]:
    """The machine, the checks, the ceilings, the benchmark, the targets."""
    import torch
    import triton

    from megatron_evolve.kernels.bench import checks, shares, targets
    from megatron_evolve.kernels.bench.rows import commit, device_name

    device = "cuda"
    yield {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
        "tolerances": checks.tolerances(),
    }
    start, right = time.monotonic(), True
    own = [str(Path(__file__).resolve()), *(["--checks-only"] if checks_only else [])]
    for row in chain(shares.run(own, shares.num_shares(), until), checks.check_graph(device, checks.Sizes(), until)):
        right = right and row["ok"]
        yield row
    yield {"checks_s": round(time.monotonic() - start, 1), "all_right": right}
    if checks_only:
        return
    chip = targets.ceilings(device)
    yield {"ceiling": "measured", "tflops": chip.tflops, "tb_per_s": chip.tb_per_s}
    found = []
    for row in targets.rows(device, chip, until):
        found.append(row)
        yield row
    yield from targets.judged(found)
    yield {"seconds": round(time.monotonic() - start, 1)}


if __name__ == "__main__":
    # This folder comes first in the path of a script, and its files must not be taken for other people's modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main())
