"""From a problem to the rows of the benchmark: right first, then the time.

A provider whose output or gradients are off by more than the tolerance gets no time, but a reason. So does one that
cannot run. What can be told without a clock is told too: the error against the oracle, the bytes kept for the backward
pass, synchronisations of the host, whether a second run gives the same bits.
"""

import shutil
import subprocess
import traceback
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from megatron_evolve.kernels.bench.clock import Clock, Parts, Spread, interleaved
from megatron_evolve.kernels.bench.problem import Prepared, Problem, error
from megatron_evolve.kernels.roofline import CHIPS, Chip, Pass, ms

# Largest ||got - want|| / ||want|| of a tensor. float32: sums of up to 5,120 terms of eps 1.2e-7, in any order.
# bfloat16: half an ulp is 2e-3, a chain of five roundings and a token's 22 rows added in bfloat16 stay below 1e-2;
# something wrong is off by a whole order. Megatron's own tests and Transformer Engine's allow 2e-2.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Memory, CUDA, a compiler that is not there or fails, Triton's own assertions, another's package: whatever is raised is
# told by a row, and costs the other rows nothing.
FAILURES = Exception
# Why a row has no time, beside its reason: a result beyond the tolerance, a package that is not there, a problem that
# the provider does not take (adapters, this GPU), anything else that it raised.
WRONG, MISSING, REFUSED, FAILED = "wrong", "missing", "refused", "failed"
MOST_TOLD = 3000  # characters of a traceback, its end: ptxas's own words are there


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


def chip_of(device: str) -> Chip | None:
    """The ceilings of the GPU that is here, by its name; none for another."""
    name = device_name(device).lower()
    return next((chip for key, chip in CHIPS.items() if key in name), None)


@lru_cache(maxsize=1)
def commit() -> str | None:
    """Of the checkout this file lies in, marked where it has changes; none outside a checkout, or without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    told = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return told.stdout.strip() or None


def parts_of(run: Prepared, problem: Problem) -> Parts:
    leaves = list(problem.leaves.values())
    if problem.dout is None:
        return run, None
    return run, lambda out: torch.autograd.grad(out, leaves, problem.dout)


def outcome(parts: Parts, problem: Problem) -> dict[str, Tensor]:
    forward, backward = parts
    out = forward()
    if backward is None:
        return {"out": out}
    grads = backward(out)
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(problem.leaves, grads, strict=True)}


def saved_bytes(forward: Prepared, problem: Problem) -> int:
    """Memory that autograd keeps besides the problem's own tensors, every storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*problem.leaves.values(), *problem.given, out)}
    return sum(size for pointer, size in kept.items() if pointer not in own)


def num_syncs(parts: Parts, problem: Problem, device: str) -> int | None:
    """How often the host waits for the GPU in one run, as torch's own debug mode tells; none on a CPU."""
    if not device.startswith("cuda"):
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            outcome(parts, problem)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def examined(run: Prepared, problem: Problem, want: dict[str, Tensor], device: str) -> tuple[dict, dict[str, Tensor]]:
    """What a row tells before any time, and the outcome; `reason` where the outcome is wrong."""
    parts = parts_of(run, problem)
    got = outcome(parts, problem)
    errors = {name: error(got[name], value) for name, value in want.items()}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    # a float32 loss of bfloat16 logits is as good as its logits; whole numbers are equal or wrong
    kinds = {tensor.dtype for tensor in (got["out"], *problem.leaves.values())}
    allowed = max((TOLERANCE[dtype] for dtype in kinds if dtype in TOLERANCE), default=0.0)
    found: dict = {"error": errors[worst], "errors": errors}
    if not errors[worst] <= allowed:
        reason = f"wrong: {worst} is off by {errors[worst]:.2g} of its norm; at most {allowed:g} is allowed"
        return found | {"kind": WRONG, "reason": reason}, got
    again = outcome(parts, problem)
    found["bitwise_repeat"] = all(torch.equal(got[name], again[name]) for name in got)
    found["saved_bytes"] = saved_bytes(run, problem) if problem.dout is not None else 0
    found["syncs"] = num_syncs(parts, problem, device)
    return found, got


def settle(device: str) -> None:
    """Give back memory that is not used; raises what a kernel before did to the GPU.

    After an illegal access nothing that this process says is worth anything: it is to end, and another to go on.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def first_line(failure: BaseException) -> str:
    text = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {text[0] if text else 'no message'}"


def stopped(failure: BaseException) -> dict:
    """What stopped something, and where: a failure on a machine that is lent for minutes is not easily seen again."""
    told = "".join(traceback.format_exception(failure))
    return {"reason": first_line(failure), "traceback": told[-MOST_TOLD:]}


def untimed(failure: Exception) -> dict:
    """What a row tells instead of a time."""
    if isinstance(failure, ImportError):
        return {"kind": MISSING, "reason": first_line(failure)}
    if isinstance(failure, ValueError | NotImplementedError):
        return {"kind": REFUSED, "reason": first_line(failure)}
    return {"kind": FAILED} | stopped(failure)


def measure(
    problem: Problem,
    prepare: dict[str, tuple[str, Callable[[], Prepared]]],
    device: str,
    *,
    clock: Clock | None = None,
    rounds: int = 20,
    warm: int = 3,
    chip: Chip | None = None,
) -> list[dict]:
    """A row for each provider and each of forward, backward and both.

    `prepare` gives, by name, a version and what makes the run. Ratios are to every other provider that got a time:
    how many times as long the other took.
    """
    want = problem.want()
    told: dict[str, dict] = {}
    runs: dict[str, Parts] = {}
    for name, (_, make) in prepare.items():
        try:
            run = make()
            told[name], _ = examined(run, problem, want, device)
        except Exception as failure:  # noqa: BLE001 - whatever another's package raises is what its row tells
            told[name] = untimed(failure)
        if "reason" not in told[name]:
            runs[name] = parts_of(run, problem)
    del want
    clock = clock or Clock(device)
    times = interleaved(runs, clock, problem.fresh, rounds=rounds, warm=warm) if runs else {}
    rows = []
    base = {"device": device_name(device), "commit": commit(), "clock": clock.name}
    for name, (version, _) in prepare.items():
        for part in times.get(name, {"both" if problem.dout is not None else "forward": None}):
            row = {"op": problem.op, "pass": part, "provider": name, "version": version, "shape": problem.shape}
            row |= {"median_ms": None, "error": None, "ratio_to": {}} | told[name]
            if name in times:
                others = {other: t[part].median / times[name][part].median for other, t in times.items()}
                row["ratio_to"] = {other: round(ratio, 4) for other, ratio in others.items() if other != name}
                row |= timed(times[name][part], predicted_of(problem, name, part), chip or chip_of(device))
            rows.append(row | base)
    return rows


def predicted_of(problem: Problem, provider: str, part: str) -> tuple[Pass, ...]:
    by_part = problem.predicted.get(provider, {})
    if part == "both" and len(by_part) == 2:
        return by_part["forward"] + by_part["backward"]
    return by_part.get(part, ())


def counted(passes: tuple[Pass, ...], chip: Chip | None) -> dict:
    """FLOP and bytes of the passes, and the least time on the chip; no bytes where the passes tell of none."""
    flops, moved = sum(p.flops for p in passes), sum(p.bytes_moved for p in passes)
    return {"flops": flops, "bytes": moved or None, "predicted_ms": ms(passes, chip) if chip and passes else None}


def timed(spread: Spread, passes: tuple[Pass, ...], chip: Chip | None) -> dict:
    row = {"median_ms": spread.median, "spread_ms": [spread.low, spread.high]} | counted(passes, chip)
    row["tflops"] = row["flops"] / spread.median * 1e-9 if passes else None
    row["gb_per_s"] = row["bytes"] / spread.median * 1e-6 if row["bytes"] else None
    row["percent_of_ceiling"] = 100 * row["predicted_ms"] / spread.median if row["predicted_ms"] else None
    return row
