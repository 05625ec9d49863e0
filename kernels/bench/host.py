"""What a layer of routed experts costs the host: Python, autograd, and Triton's look at the arguments of its launches.

    megatron-evolve bench host
    megatron-evolve bench host --beside OTHER_CHECKOUT       # the same of another state of this source, in turns

Few tokens keep the host busy for longer than the GPU: at 2,048 tokens on one of eight ranks with adapters that is the
layer's time. No GPU is needed to see it: tensors have no storage (torch's `meta` device), kernels are compiled for
Hopper, and a launch ends where the driver would be called. So the driver's part and the filling of tensor descriptors
are missing, and torch's `new_empty` of such a tensor is 5 us slower than a real one. CPU time of the process; on a busy
machine only ratios taken run by run say anything: whole processes in turns once differed by 8 % either way.
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


def answer() -> None:
    """In a process of its own: for each line that comes, one run of each case, its launches and milliseconds."""
    with short_of_the_driver() as num_launches:
        runs = {case: layer(*case) for case in CASES}
        for _ in sys.stdin:
            told = []
            for run in runs.values():
                before, start = num_launches(), time.process_time()
                run()
                told.append((num_launches() - before, (time.process_time() - start) * 1e3))
            print(json.dumps(told), flush=True)


def checked(checkout: Path) -> Path:
    if not (checkout / "kernels" / "fused.py").is_file():
        raise ValueError(f"expected a checkout with kernels/ in {checkout}; got none: name the folder of one")
    return checkout.resolve()


def _asked(checkout: Path) -> subprocess.Popen:
    """A process that answers with that checkout's kernels: this file, whichever it is."""
    env = os.environ | {"PYTHONPATH": str(checkout), "TRITON_INTERPRET": "0"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    return subprocess.Popen([sys.executable, str(Path(__file__).resolve())], env=env, cwd=checkout, **pipes)


def rows(beside: Path | None = None, rounds: int = ROUNDS) -> Iterator[dict]:
    """A row for each case and checkout: launches, and milliseconds of the host. Checkouts take turns run by run.

    `ratio_to` is the median over the rounds of how many times as long the other took. Raises ValueError where `beside`
    is no checkout, RuntimeError where its kernels did not answer.
    """
    roots = {"this": OWN} | ({} if beside is None else {"other": checked(beside)})
    asked = {name: _asked(root) for name, root in roots.items()}
    found: dict[str, list[list]] = {name: [] for name in roots}
    try:
        for turn in range(WARM + rounds):
            for name, process in asked.items():
                process.stdin.write("\n")
                line = process.stdout.readline()
                if not line:
                    raise RuntimeError(f"the kernels in {roots[name]} did not answer: what they said stands above")
                if turn >= WARM:
                    found[name].append(json.loads(line))
    finally:
        for process in asked.values():
            process.communicate()
    for n, (mode, num_experts) in enumerate(CASES):
        shape = {"model": "nano", "tokens": TOKENS, "experts": num_experts, "mode": mode}
        spent = {name: [told[n][1] for told in rounds_of] for name, rounds_of in found.items()}
        for name in roots:
            row = {"op": "host", "pass": "both", "shape": shape, "checkout": name, "launches": found[name][-1][n][0]}
            row |= {"median_ms": round(median(spent[name]), 4), "least_ms": round(min(spent[name]), 4), "ratio_to": {}}
            if name == "this" and beside is not None:
                pairs = zip(spent["other"], spent["this"], strict=True)
                row["ratio_to"] = {"other": round(median(other / this for other, this in pairs), 4)}
            yield row


if __name__ == "__main__":
    # A script's own folder comes first in its path, and holds files named like other people's packages.
    sys.path.pop(0)
    answer()
