"""What a layer of routed experts costs the host: Python, autograd, and Triton's look at the arguments of its launches.

    megatron-evolve bench host
    megatron-evolve bench host --beside OTHER_CHECKOUT       # the same of another state of this source, in turns

Few tokens keep the host busy for longer than the GPU: at 2,048 tokens on one of eight ranks with adapters that is the
layer's time. No GPU is needed to see it: tensors have no storage (torch's `meta` device), kernels are compiled for
Hopper, and a launch ends where the driver would be called. So the driver's part and the filling of tensor descriptors
are missing, and torch's `new_empty` of such a tensor is 5 us slower than a real one. CPU time of the process, the least
of many runs, since others on the machine only add to it; even so only ratios taken in turns say anything.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

# Nano on one of eight ranks, and on one: 16 and 128 experts, each as one stack of matrices
CASES = tuple((mode, experts) for experts in (16, 128) for mode in ("frozen", "full", "lora"))
TOKENS, CHOSEN, WIDTH, HIDDEN, RANK = 2048, 6, 2688, 1856, 32
ROUNDS, WARM = 60, 5
OWN = Path(__file__).resolve().parents[2]


@contextmanager
def short_of_the_driver() -> Iterator[Callable[[], int]]:
    """Inside, kernels are compiled for Hopper and launched into nothing; the value counts launches.

    In a process of its own: a kernel keeps what it was compiled for, and Triton its driver.
    """
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.driver import driver

    from megatron_evolve.kernels import offline

    launches = 0

    def launch(*_) -> None:
        nonlocal launches
        launches += 1

    def handles(kernel: CompiledKernel) -> None:
        kernel.module, kernel.function, kernel._run = True, 0, launch

    before, CompiledKernel._init_handles = CompiledKernel._init_handles, handles
    driver.set_active(offline._Offline(offline.CHIPS["sm_90a"]))
    try:
        yield lambda: launches
    finally:
        CompiledKernel._init_handles = before


def layer(mode: str, num_experts: int) -> Callable[[], object]:
    """Forward and backward of one layer, tokens to tokens, on tensors without storage."""
    import torch

    from megatron_evolve.kernels import fused

    def new(*shape: int, wants: bool = False, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=wants)

    trained = mode == "full"
    x_TH, p_TK = new(TOKENS, WIDTH, wants=True), new(TOKENS, CHOSEN, wants=True, dtype=torch.float32)
    W1, W2 = (new(num_experts, *shape, wants=trained) for shape in ((HIDDEN, WIDTH), (WIDTH, HIDDEN)))
    loras = ()
    if mode == "lora":
        loras = tuple(
            fused.GroupedLora(new(num_experts, RANK, i, wants=True), new(num_experts, o, RANK, wants=True), 0.5)
            for i, o in ((WIDTH, HIDDEN), (HIDDEN, WIDTH))
        )
    plan = fused.route_plan(new(TOKENS, CHOSEN, dtype=torch.int32), num_experts)
    dout_TH = new(TOKENS, WIDTH)
    leaves = [x_TH, p_TK, *((W1, W2) if trained else ()), *(tensor for lora in loras for tensor in lora[:2])]

    def run() -> object:
        out = fused.routed_experts(x_TH, p_TK, plan, W1, W2, *loras)
        return torch.autograd.grad(out, leaves, dout_TH)

    return run


def rows(rounds: int = ROUNDS) -> Iterator[dict]:
    """A row for each case: launches, and milliseconds of the host."""
    with short_of_the_driver() as num_launches:
        runs = {case: layer(*case) for case in CASES}
        launched, times = {}, {case: [] for case in CASES}
        for turn in range(WARM + rounds):
            for case, run in runs.items():
                before, start = num_launches(), time.process_time()
                run()
                spent_ms = (time.process_time() - start) * 1e3
                launched[case] = num_launches() - before
                if turn >= WARM:
                    times[case].append(spent_ms)
    for (mode, num_experts), spent in times.items():
        shape = {"model": "nano", "tokens": TOKENS, "experts": num_experts, "mode": mode}
        row = {"op": "host", "pass": "both", "shape": shape, "launches": launched[mode, num_experts]}
        yield row | {"median_ms": round(median(spent), 4), "least_ms": round(min(spent), 4)}


def checked(checkout: Path) -> Path:
    if not (checkout / "kernels" / "fused.py").is_file():
        raise ValueError(f"expected a checkout with kernels/ in {checkout}; got none: name the folder of one")
    return checkout.resolve()


def apart(checkout: Path = OWN) -> Iterator[dict]:
    """Rows of this source, or of another checkout's, measured in a process of its own by this file."""
    root = checked(checkout)
    command = [sys.executable, str(Path(__file__).resolve())]
    env = os.environ | {"PYTHONPATH": str(root), "TRITON_INTERPRET": "0"}
    told = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=False)
    if told.returncode:
        lines = told.stderr.strip().splitlines() or ["no message"]
        raise ValueError(
            f"expected rows from {root}; got status {told.returncode}, {lines[-1]}: run {command[1]} there"
        )
    yield from (json.loads(line) for line in told.stdout.splitlines())


def beside(checkout: Path, turns: int) -> Iterator[dict]:
    """Rows of this source and of another, in turns, then how many times as long the other takes, least by least."""
    roots = {"this": OWN, "other": checked(checkout)}
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(turns):
        for name, root in roots.items():
            for row in apart(root):
                yield row | {"checkout": name}
                found.setdefault(json.dumps(row["shape"]), {}).setdefault(name, []).append(row["least_ms"])
    for shape, by_name in found.items():
        ratio = median(by_name["other"]) / median(by_name["this"])
        yield {"op": "host", "shape": json.loads(shape), "ratio_to": {"other": round(ratio, 4)}}


if __name__ == "__main__":
    # A script's own folder comes first in its path, and holds files named like other people's packages.
    sys.path.pop(0)
    for found_row in rows():
        print(json.dumps(found_row), flush=True)
