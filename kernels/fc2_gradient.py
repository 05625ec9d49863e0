"""The gradient through fc2 and the squared ReLU in one kernel, from dy to dh and dp.

    da[m] = W2_e^T dy[m]  (+ adapter)      dh[m] = 2 p[m] relu(h[m]) da[m]      dp[m] = sum_f relu(h[m, f])^2 da[m, f]

da lives in the accumulator and is never written. Megatron writes da, reads it for dh, and reads it and the activation
again for dp. The sum over f crosses programs, so each writes its own column block's part, and a second pass adds
them up in order (15 numbers a row at F = 1856): no atomics, the same bits every time. Where W2 or its adapter wants a
gradient the kernel also writes a = p relu(h)^2, which was not kept. With a clamp s, g = s tanh(relu(h) / s) stands for
relu(h) in all three, and dh is multiplied by its slope (`clamp`).

Letters as in `reference`: M rows sorted by expert, H model width, F hidden width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_evolve.kernels.clamp import soft_clamp, soft_clamp_slope
from megatron_evolve.kernels.grouped_product import (
    Adapter,
    Rows,
    adapter_blocks,
    add_adapter,
    add_rows,
    block_at,
    block_of_program,
    fetched_blocks,
    in_halves,
    launch,
)
from megatron_evolve.kernels.matrices import Matrices
from megatron_evolve.kernels.precision import narrow, relu
from megatron_evolve.kernels.tiles import Tiling


@triton.jit
def _activation(da, p_M, clamp, h_MF, first, live_M, f, F, dh_MF, dp_NM, part, num_rows, a_MF, BM: tl.constexpr):
    """One block of da (BM, columns) to dh, to this block's part of dp, and to a where it is wanted."""
    # Beyond F, in the half tile of 1856, da and h are zeros: dp takes nothing from there.
    live = live_M[:, None] & (f < F)[None, :]
    r = relu(tl.load(block_at(h_MF, first, f, F, BM), mask=live, other=0.0).to(tl.float32))
    if clamp is not None:
        r = soft_clamp(r, clamp)
    if a_MF is not None:
        a = narrow(p_M[:, None] * r * r, a_MF.dtype.element_ty)
        tl.store(block_at(a_MF, first, f, F, BM), a, mask=live)
    rda = r * da
    m = first + tl.arange(0, BM)
    tl.store(dp_NM + part.to(tl.int64) * num_rows + m, tl.sum(r * rda, 1), mask=live_M)
    dh = (2.0 * p_M)[:, None] * rda
    if clamp is not None:
        # h is read a second time: a block of slopes that waits in registers since the first spilled 104 to 184 bytes
        r = relu(tl.load(block_at(h_MF, first, f, F, BM), mask=live, other=0.0).to(tl.float32))
        dh *= soft_clamp_slope(r, clamp)
    dh = narrow(dh, dh_MF.dtype.element_ty)
    tl.store(block_at(dh_MF, first, f, F, BM), dh, mask=live)


@triton.jit
def _fc2_gradient(
    dy, W, W_blocks, u, B, p, choice_of_row, clamp, h_MF, tiles, dh_MF, dp_NM, a_MF, num_rows,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, EVEN: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    e, first, live_M, f, column = block_of_program(tiles, W.rows, BM, BN)
    if e < 0:
        return
    m = first + tl.arange(0, BM)
    early = adapter_blocks(u, B, m, live_M, e, f, BR)
    da = add_rows(tl.zeros([BM, BN], tl.float32), dy, m, live_M, W, W_blocks, e, column, BN, BK, EVEN, True)
    da = add_adapter(da, early, u, B, m, live_M, e, f, BR)
    choice = m if choice_of_row is None else tl.load(choice_of_row + m, mask=live_M, other=0)
    p_M = tl.load(p + choice, mask=live_M, other=0.0).to(tl.float32)
    if HALVES:
        half: tl.constexpr = BN // 2
        da_0, da_1 = tl.split(tl.permute(tl.reshape(da, (BM, 2, half)), (0, 2, 1)))
        f = column * BN + tl.arange(0, half)
        part = 2 * column
        _activation(da_0, p_M, clamp, h_MF, first, live_M, f, W.rows, dh_MF, dp_NM, part, num_rows, a_MF, BM)
        f += half
        _activation(da_1, p_M, clamp, h_MF, first, live_M, f, W.rows, dh_MF, dp_NM, part + 1, num_rows, a_MF, BM)
    else:
        _activation(da, p_M, clamp, h_MF, first, live_M, f, W.rows, dh_MF, dp_NM, column, num_rows, a_MF, BM)


def fc2_gradient(
    dy: Rows,
    p: Tensor,
    h_MF: Tensor,
    W: Matrices,
    tiling: Tiling,
    adapter: Adapter | None = None,
    clamp: float | None = None,
    *,
    choice_of_row: Tensor | None = None,
    keep_a: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dh (M, F) in the dtype of h, dp (M,) float32, and a (M, F) where it is wanted; W is E x (F, H), fc2 transposed.

    p is (M,), or (T, K) with the choice of each row.
    """
    grid, constants = launch(tiling, tiling.tiles.fc2_gradient, W, adapter)
    dh_MF = h_MF.new_empty(h_MF.shape)
    a_MF = h_MF.new_empty(h_MF.shape) if keep_a else None
    halves = in_halves(constants)
    num_parts = -(-W.rows // constants["BN"]) * (2 if halves else 1)
    dp_NM = p.new_empty(num_parts, tiling.num_rows, dtype=torch.float32)
    if h_MF.numel():
        operands = (dy, W, fetched_blocks(tiling.tiles.fc2_gradient, W, constants, transposed=True))
        given = (*(adapter or (None, None)), p.contiguous(), choice_of_row, clamp, h_MF, tiling.map)
        _fc2_gradient[grid](*operands, *given, dh_MF, dp_NM, a_MF, tiling.num_rows, HALVES=halves, **constants)
    return dh_MF, dp_NM.sum(0), a_MF
