"""The first half of an expert in one kernel: gather, product, squared ReLU, probability.

    h[m] = W1_e x[token(m)]  (+ adapter)        a[m] = p[m] relu(h[m])^2

Megatron runs this as a permutation (x is copied K times), a grouped product and an elementwise pass, and keeps the
permuted rows, h and a for the backward pass. Here rows are read by the index of their token, the activation happens on
the accumulator, and h alone is kept: `a` serves the second product and is made again from h when gradients need it.
The activation is taken of h as rounded, so that forward and backward see the same h. With a clamp s, relu(h) is bounded
softly first (`clamp`); without one the kernel is compiled as if there were none.

Letters as in `reference`: T tokens, K chosen, M rows sorted by expert, H model width, F hidden width.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_evolve.kernels.clamp import soft_clamp
from megatron_evolve.kernels.grouped_product import (
    Adapter,
    Rows,
    adapter_blocks,
    add_adapter,
    add_rows,
    block_at,
    block_of_program,
    fetched_blocks,
    launch,
)
from megatron_evolve.kernels.matrices import Matrices
from megatron_evolve.kernels.precision import narrow, relu
from megatron_evolve.kernels.tiles import Tiling


@triton.jit
def _fc1(
    x, W, W_blocks, u, B, p, clamp, tiles, h_MF, a_MF,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    e, first, live_M, f, column = block_of_program(tiles, W.rows, BM, BN)
    if e < 0:
        return
    m = first + tl.arange(0, BM)
    early = adapter_blocks(u, B, m, live_M, e, f, BR)
    h = add_rows(tl.zeros([BM, BN], tl.float32), x, m, live_M, W, W_blocks, e, column, BN, BK, EVEN, False)
    h = add_adapter(h, early, u, B, m, live_M, e, f, BR)
    h = narrow(h, h_MF.dtype.element_ty)
    live = live_M[:, None] & (f < W.rows)[None, :]
    tl.store(block_at(h_MF, first, f, W.rows, BM), h, mask=live)
    choice = m if x.choice_of_row is None else tl.load(x.choice_of_row + m, mask=live_M, other=0)
    p_M = tl.load(p + choice, mask=live_M, other=0.0).to(tl.float32)
    r = relu(h.to(tl.float32))
    if clamp is not None:
        r = soft_clamp(r, clamp)
    a = narrow(p_M[:, None] * r * r, a_MF.dtype.element_ty)
    tl.store(block_at(a_MF, first, f, W.rows, BM), a, mask=live)


def fc1_squared_relu(
    x: Rows, p: Tensor, W: Matrices, tiling: Tiling, adapter: Adapter | None = None, clamp: float | None = None
) -> tuple[Tensor, Tensor]:
    """h and a, both (M, F) in the dtype of x; p is (M,), or (T, K) where x is read by choice."""
    h_MF = x.base.new_empty(tiling.num_rows, W.rows)
    a_MF = h_MF.new_empty(h_MF.shape)
    grid, constants = launch(tiling, tiling.tiles.fc1, W, adapter)
    if h_MF.numel():
        operands = (x, W, fetched_blocks(tiling.tiles.fc1, W, constants), *(adapter or (None, None)))
        _fc1[grid](*operands, p.contiguous(), clamp, tiling.map, h_MF, a_MF, **constants)
    return h_MF, a_MF
