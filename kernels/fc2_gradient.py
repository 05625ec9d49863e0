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
    add_product,
    block_at,
    block_of_program,
    depth_of,
    launch_shape,
)
from megatron_evolve.kernels.matrices import Matrices
from megatron_evolve.kernels.precision import narrow, relu
from megatron_evolve.kernels.tiles import Tiling


@triton.jit
def _fc2_gradient(
    dy, W, u, B, p, clamp, h_MF, tiles, dh_MF, dp_NM, a_MF, num_rows,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    e, first, live_M, f, column = block_of_program(tiles, W.rows, BM, BN)
    if e < 0:
        return
    m = first + tl.arange(0, BM)
    # Beyond F, in the half tile of 1856, W and h load as zeros: dp takes nothing from there.
    da = add_product(tl.zeros([BM, BN], tl.float32), dy, m, live_M, W, e, f, BK)
    if BR > 0:
        da = add_product(da, u, m, live_M, B, e, f, BR)
    live = live_M[:, None] & (f < W.rows)[None, :]
    choice = m if dy.choice_of_row is None else tl.load(dy.choice_of_row + m, mask=live_M, other=0)
    p_M = tl.load(p + choice, mask=live_M, other=0.0).to(tl.float32)
    r = relu(tl.load(block_at(h_MF, first, f, W.rows, BM), mask=live, other=0.0).to(tl.float32))
    if clamp is not None:
        r = soft_clamp(r, clamp)
    if a_MF is not None:
        a = narrow(p_M[:, None] * r * r, a_MF.dtype.element_ty)
        tl.store(block_at(a_MF, first, f, W.rows, BM), a, mask=live)
    rda = r * da
    tl.store(dp_NM + column.to(tl.int64) * num_rows + m, tl.sum(r * rda, 1), mask=live_M)
    if clamp is not None:
        # h is read a second time: a block of slopes that waits in registers since the first spilled 104 to 184 bytes
        r = relu(tl.load(block_at(h_MF, first, f, W.rows, BM), mask=live, other=0.0).to(tl.float32))
        rda *= soft_clamp_slope(r, clamp)
    dh = narrow(2.0 * p_M[:, None] * rda, dh_MF.dtype.element_ty)
    tl.store(block_at(dh_MF, first, f, W.rows, BM), dh, mask=live)


def fc2_gradient(
    dy: Rows,
    p: Tensor,
    h_MF: Tensor,
    W: Matrices,
    tiling: Tiling,
    adapter: Adapter | None = None,
    clamp: float | None = None,
    *,
    keep_a: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dh (M, F) in the dtype of h, dp (M,) float32, and a (M, F) where it is wanted; W is E x (F, H), fc2 transposed.

    p is (M,), or (T, K) where dy is read by choice.
    """
    grid, tile = launch_shape(tiling, W)
    dh_MF = h_MF.new_empty(h_MF.shape)
    a_MF = h_MF.new_empty(h_MF.shape) if keep_a else None
    dp_NM = p.new_empty(triton.cdiv(W.rows, tile.columns), tiling.num_rows, dtype=torch.float32)
    if h_MF.numel():
        _fc2_gradient[grid](
            dy,
            W,
            *(adapter or (None, None)),
            p.contiguous(),
            clamp,
            h_MF,
            tiling.map,
            dh_MF,
            dp_NM,
            a_MF,
            tiling.num_rows,
            BM=tile.rows,
            BN=tile.columns,
            BK=tile.depth,
            BR=depth_of(adapter),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return dh_MF, dp_NM.sum(0), a_MF
