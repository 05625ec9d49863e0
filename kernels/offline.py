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

from megatron_evolve.kernels import fused, gated_norm, linear_cross_entropy, tiles
from megatron_evolve.kernels.tile_table import Entry, entries, mean_rows

CHIPS = {"sm_90a": 90, "sm_100": 100}  # H100 and H200; B200
MAX_SHARED_BYTES = 232_448  # 227 KiB a block, on both
MAX_REGISTERS = 65_536  # a block's, all threads together
NANO_WIDTH, NANO_HIDDEN, NANO_CHOSEN = 2688, 1856, 6  # Nemotron-3-Nano; 1856 is 14.5 x 128
LORA_RANK, LARGE_RANK = 32, 64  # an adapter's operands loaded early, and in steps
CLAMP = 10.0
OTHER_SHAPE = "2688x1024"  # Nemotron-3-Super's
VOCABULARY = 131_072
NUM_EXPERTS = 4  # no kernel is compiled for it
FLOAT32_ROWS = (32, 512)  # mean rows an expert: the tile deepest for its rows, and the largest


class Compiled(NamedTuple):
    """One kernel as compiled for one chip."""

    kernel: str  # file.function
    constants: dict[str, int]  # tile, warps, stages and switches
    registers: int  # a thread's
    threads: int
    spilled_bytes: int  # stack and local memory
    shared_bytes: int
    tensor_core: str  # the matrix instruction found: wgmma (sm_90), tcgen05 (sm_100), mma.sync (any), or none
    copy_engine: bool  # blocks fetched by it (TMA)
    clamped: bool  # the activation has a soft bound
    operands: str  # dtype of the matrices that the source multiplies, as bf16; empty where it multiplies none

    @property
    def products(self) -> bool:
        return bool(self.operands)


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
            named = dict(zip(kernel.arg_names, args, strict=False))
            found[compiled.hash] = _read(kernel, constants, compiled, clamped=named.get("clamp") is not None)
            results.append(found[compiled.hash])

    driver.set_active(_Offline(CHIPS[chip]))
    JITFunction.run = compile_only
    try:
        yield results
    finally:
        JITFunction.run = launch


def _read(kernel: JITFunction, constants: dict[str, int], compiled, *, clamped: bool) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        told = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout)}
    instructions = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync"}
    dots = re.search(r"tt\.dot [^\n]*: tensor<\d+x\d+x(\w+)>", compiled.asm["ttir"])
    seen = [name for name, text in instructions.items() if text in compiled.asm["ptx"]]
    return Compiled(
        kernel=f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__.lstrip('_')}",
        constants=constants,
        registers=usage["REG"],
        threads=32 * compiled.metadata.num_warps,
        spilled_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        tensor_core=seen[0] if seen else "none",
        copy_engine="cp.async.bulk.tensor" in compiled.asm["ptx"],
        clamped=clamped,
        operands=dots[1] if dots else "",
    )


def compile_all(chip: str) -> list[Compiled]:
    """Every kernel in bfloat16, once for each entry of the tile table; two tiles in float32 too.

    Nano's largest tiles once more with a bounded activation and adapters of rank 64, where registers are shortest.

    Tensors without storage also prove that nothing is read back to the host: it would raise here.
    """
    with compiling(chip) as results, torch.device("meta"):
        for entry in entries():
            # registers run short where blocks are large: small ones are compiled with each switch, large ones with
            # each pair of switches (127 s of CPU for both chips with all pairs of all tiles)
            num_rows, large = mean_rows(entry) * NUM_EXPERTS, entry.tiles.fc1.rows
            _experts(num_rows, pairs=large >= 64, widths=widths(entry))
            if large >= 128 and entry.shape is not None:
                _experts(num_rows, pairs=False, widths=widths(entry), rank=LARGE_RANK, clamp=CLAMP)
        for rows in FLOAT32_ROWS:
            _experts(NUM_EXPERTS * rows, pairs=False, dtype=torch.float32)
        _rest()
    return results


def widths(entry: Entry) -> tuple[int, int]:
    """Model and hidden width that the entry is for; Super's stand for any other."""
    hidden, model = (int(n) for n in (entry.shape or OTHER_SHAPE).split("x"))
    return model, hidden


def _experts(
    num_rows: int,
    *,
    pairs: bool,
    widths: tuple[int, int] = (NANO_WIDTH, NANO_HIDDEN),
    dtype: torch.dtype = torch.bfloat16,
    rank: int = LORA_RANK,
    clamp: float | None = None,
) -> None:
    """By both doors: trained whole, into main gradients from tokens; and frozen, with adapters."""
    T, K, E, (H, F) = num_rows // NANO_CHOSEN, NANO_CHOSEN, NUM_EXPERTS, widths

    def leaf(*shape: int, trained: bool = True) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, requires_grad=trained)

    plan = fused.route_plan(torch.empty(T, K, dtype=torch.int32), E)
    tokens = leaf(T, H), torch.empty(T, K, requires_grad=True), plan
    rows = leaf(T * K, H), plan.counts_E, torch.empty(T * K, requires_grad=True)
    trained = leaf(E, F, H), leaf(E, H, F)
    main_grads = torch.empty(E, F, H), torch.empty(E, H, F)
    fused.routed_experts(*tokens, *trained, main_grads=main_grads, clamp=clamp).sum().backward()
    if pairs:
        fused.grouped_experts(*rows, *trained).sum().backward()

    frozen = leaf(E, F, H, trained=False), leaf(E, H, F, trained=False)
    loras = [fused.GroupedLora(leaf(E, rank, n), leaf(E, m, rank), 1.0) for n, m in ((H, F), (F, H))]
    fused.grouped_experts(*rows, *frozen, *loras, clamp=clamp).sum().backward()
    if pairs:
        fused.routed_experts(*tokens, *frozen, *loras).sum().backward()


def _rest() -> None:
    """Ops without a tile of the table: routers of 128 and 512 experts, permutation, the norm, the loss."""
    for num_experts, num_chosen, width in ((128, NANO_CHOSEN, NANO_WIDTH), (512, 22, 4096)):
        x_TH = torch.empty(256, width, dtype=torch.bfloat16, requires_grad=True)
        W_EH = torch.empty(num_experts, width, dtype=torch.bfloat16)
        idx_TK, p_TK = fused.router_from_tokens(x_TH, W_EH, torch.empty(num_experts), num_chosen, 1.0)
        plan = fused.route_plan(idx_TK, num_experts)
        tiles.tiling(plan.counts_E, idx_TK.numel(), (NANO_HIDDEN, NANO_WIDTH))
        rows, _ = fused.permute(x_TH, p_TK, plan)
        fused.unpermute(rows, plan).sum().backward()
        logits_TE = torch.empty(256, num_experts, requires_grad=True)
        fused.router(logits_TE, torch.empty(num_experts), num_chosen, 1.0)[1].sum().backward()
    for width in (512, 2048):  # groups of Mamba's norm in Nano and in Ultra
        y_TD = torch.empty(256, 8 * width, dtype=torch.bfloat16, requires_grad=True)
        gated_norm.gated_rms_norm(y_TD, y_TD, torch.empty(8 * width, requires_grad=True), 8).sum().backward()
    head_VH, target_T = torch.empty(VOCABULARY, NANO_WIDTH, dtype=torch.bfloat16), torch.empty(256, dtype=torch.int64)
    x_TH = torch.empty(256, NANO_WIDTH, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy.linear_cross_entropy(x_TH, head_VH, target_T).sum().backward()


if __name__ == "__main__":
    for line in compile_all(sys.argv[1]):
        print(json.dumps(line._asdict()))
