"""The first half of an expert in one kernel: gather, product, squared ReLU, probability.

    h[m] = W1_e x[token(m)]  (+ adapter)        a[m] = p[m] relu(h[m])^2

Megatron runs this as a permutation (x is copied K times), a grouped product and an elementwise pass, and keeps the
permuted rows, h and a for the backward pass. Here rows are read by the index of their token, the activation happens on
the accumulator, and h alone is kept: `a` serves the second product and is made again from h when gradients need it.
The activation is taken of h as rounded, so that forward and backward see the same h.

Letters as in `reference`: T tokens, K chosen, M rows sorted by expert, H model width, F hidden width.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_evolve.kernels.grouped_product import (
    Adapter,
    Rows,
    add_product,
    block_at,
    block_of_program,
    launch,
)
from megatron_evolve.kernels.matrices import Matrices
from megatron_evolve.kernels.precision import narrow, relu
from megatron_evolve.kernels.tiles import Tiling


@triton.jit
def _fc1(
    x, W, u, B, p, tiles, h_MF, a_MF,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    e, first, live_M, f, _ = block_of_program(tiles, W.rows, BM, BN)
    if e < 0:
        return
    m = first + tl.arange(0, BM)
    h = add_product(tl.zeros([BM, BN], tl.float32), x, m, live_M, W, e, f, BK, EVEN)
    if BR > 0:
        h = add_product(h, u, m, live_M, B, e, f, BR, False)
    h = narrow(h, h_MF.dtype.element_ty)
    live = live_M[:, None] & (f < W.rows)[None, :]
    tl.store(block_at(h_MF, first, f, W.rows, BM), h, mask=live)
    choice = m if x.choice_of_row is None else tl.load(x.choice_of_row + m, mask=live_M, other=0)
    p_M = tl.load(p + choice, mask=live_M, other=0.0).to(tl.float32)
    r = relu(h.to(tl.float32))
    a = narrow(p_M[:, None] * r * r, a_MF.dtype.element_ty)
    tl.store(block_at(a_MF, first, f, W.rows, BM), a, mask=live)


def fc1_squared_relu(
    x: Rows, p: Tensor, W: Matrices, tiling: Tiling, adapter: Adapter | None = None
) -> tuple[Tensor, Tensor]:
    """h and a, both (M, F) in the dtype of x; p is (M,), or (T, K) where x is read by choice."""
    h_MF = x.base.new_empty(tiling.num_rows, W.rows)
    a_MF = h_MF.new_empty(h_MF.shape)
    grid, constants = launch(tiling, tiling.tiles.fc1, W, adapter)
    if h_MF.numel():
        _fc1[grid](x, W, *(adapter or (None, None)), p.contiguous(), tiling.map, h_MF, a_MF, **constants)
    return h_MF, a_MF
