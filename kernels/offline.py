"""What the compiler makes of every kernel, for a chip that is not there.

    TRITON_INTERPRET=0 python -m megatron_evolve.kernels.offline sm_90a     # or sm_100: one JSON line a kernel

Triton needs no GPU to compile, only a driver that names one, so the real ops run here, forward and backward, on
tensors without storage (torch's `meta` device), and each launch stops after the compilation. What is compiled is
therefore what a GPU would run, with the same specialisation on widths and alignment. The compiler's own tool then tells
the registers, spills and shared memory of each. This proves neither numbers (the interpreter's tests do) nor speed.

Compilations are kept in Triton's cache (`~/.triton/cache`, or TRITON_CACHE_DIR) by a hash of source, options and chip.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from megatron_evolve.kernels import fc1, grouped_product, matrices, route_plan, tiles

CHIPS = {"sm_90a": 90, "sm_100": 100}  # H100 and H200; B200
MAX_SHARED_BYTES = 232_448  # 227 KiB a block, on both
MAX_REGISTERS = 65_536  # a block's, all threads together
NANO_WIDTH, NANO_HIDDEN, NANO_CHOSEN = 2688, 1856, 6  # Nemotron-3-Nano; 1856 is 14.5 x 128
NUM_EXPERTS = 4  # no kernel is compiled for it


class Compiled(NamedTuple):
    """One kernel as compiled for one chip."""

    kernel: str
    constants: dict[str, int]  # tile, warps, stages and switches
    registers: int  # a thread's
    threads: int
    spilled_bytes: int  # stack and local memory
    shared_bytes: int
    tensor_core: str  # the matrix instruction found: wgmma (sm_90), tcgen05 (sm_100), mma.sync (any), or none
    products: bool  # whether the source multiplies matrices


class _Offline:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(chip: str) -> Iterator[list[Compiled]]:
    """Inside, a kernel launch compiles for `chip` and appends what came of it instead of running.

    One chip a process: a kernel keeps what it was compiled for.
    """
    found: dict[tuple, Compiled] = {}
    results: list[Compiled] = []
    launch = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        compiled = launch(kernel, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in found:
            constants = {name: value for name, value in options.items() if isinstance(value, int)}
            found[compiled.hash] = _read(kernel, constants, compiled)
            results.append(found[compiled.hash])

    driver.set_active(_Offline(CHIPS[chip]))
    JITFunction.run = compile_only
    try:
        yield results
    finally:
        JITFunction.run = launch


def _read(kernel: JITFunction, constants: dict[str, int], compiled) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        told = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout)}
    instructions = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync"}
    seen = [name for name, text in instructions.items() if text in compiled.asm["ptx"]]
    return Compiled(
        kernel=kernel.__name__.lstrip("_"),
        constants=constants,
        registers=usage["REG"],
        threads=32 * compiled.metadata.num_warps,
        spilled_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        tensor_core=seen[0] if seen else "none",
        products="tt.dot" in compiled.asm["ttir"],
    )


def compile_all(chip: str) -> list[Compiled]:
    """Every kernel at Nano's widths in bfloat16, once for each row of the tile tables."""
    with compiling(chip) as results, torch.device("meta"):
        for most, _ in tiles.ROW_TILES:
            _experts(NUM_EXPERTS * (most or 512))
    return results


def _experts(num_rows: int) -> None:
    T, K, E, H, F = num_rows // NANO_CHOSEN, NANO_CHOSEN, NUM_EXPERTS, NANO_WIDTH, NANO_HIDDEN
    x_TH, W1_EFH = torch.empty(T, H, dtype=torch.bfloat16), torch.empty(E, F, H, dtype=torch.bfloat16)
    plan = route_plan.route_plan(torch.empty(T, K, dtype=torch.int32), E)
    tiling = tiles.tiling(plan.counts_E, T * K)
    rows = grouped_product.rows(x_TH, plan.choice_of_row_M, K)
    fc1.fc1_squared_relu(rows, torch.empty(T, K), matrices.matrices(W1_EFH), tiling)


if __name__ == "__main__":
    for line in compile_all(sys.argv[1]):
        print(json.dumps(line._asdict()))
