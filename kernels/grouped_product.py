"""Every row times the matrix of its own expert, for rows sorted by expert: the product that all ops here share.

    out[m, o] = scale * sum_i x[row(m), i] W_e[o, i]   +   sum_r u[m, r] B_e[o, r]        e = expert of row m

The second sum is a low-rank adapter (u = scale x A_e^T, made before by this same product): the loop over i goes on
over r with other pointers, into one float32 accumulator, so base and adapter are never rounded apart. `W.transposed`
turns the forward product into the input gradient. `row(m)` is m, or the token of a choice, so that rows need not be
gathered in memory first.

Letters: M rows, I and O input and output width, R adapter rank; BM, BN, BK the block of rows, columns and depth.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from megatron_evolve.kernels.matrices import Matrices
from megatron_evolve.kernels.precision import check, dot, narrow
from megatron_evolve.kernels.tile_table import NARROW, Tile
from megatron_evolve.kernels.tiles import Tiling, launch_order


class Rows(NamedTuple):
    """Rows as a kernel reads them: row m is `base[m]`, or `base[choice[m] // num_chosen]`, the token of the choice."""

    base: Tensor
    stride: int
    choice_of_row: Tensor | None
    num_chosen: int


class Adapter(NamedTuple):
    """The low-rank term of a product: scaled projections u (M, R) and the matrices that widen them."""

    u: Rows
    B: Matrices


def rows(x: Tensor, choice_of_row_M: Tensor | None = None, num_chosen: int = 1) -> Rows:
    """(M, I), or (T, I) with the choice of each row."""
    check(x, "rows")
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Rows(x, x.stride(0), choice_of_row_M, num_chosen)


@triton.jit
def offset_of_row(x, m, live_M):
    """Where row m starts, in elements; int64, for 200,000 rows of 5,120 pass 2^31 at Ultra's width."""
    if x.choice_of_row is not None:
        m = tl.load(x.choice_of_row + m, mask=live_M, other=0) // x.num_chosen
    return m.to(tl.int64) * x.stride


@triton.jit
def add_product(acc, x, m, live_M, W, e, o, BK: tl.constexpr, EVEN: tl.constexpr):
    """acc[m, o] + sum_i x[row(m), i] W_e[o, i]; rows and columns beyond the edge count as zeros.

    EVEN: the sum has a whole number of blocks, so that the loop checks no edge.
    """
    k = tl.arange(0, BK)
    matrix = W.base + tl.load(W.offset_E + e) * W.unit
    x_at = x.base + offset_of_row(x, m, live_M)[:, None] + k[None, :]
    w_at = matrix + k[:, None] * W.column_stride + o[None, :] * W.row_stride
    live_N = o < W.rows
    for first in range(0, W.columns, BK):
        if EVEN:
            x_block = tl.load(x_at, mask=live_M[:, None], other=0.0)
            w_block = tl.load(w_at, mask=live_N[None, :], other=0.0)
        else:
            live_K = k < W.columns - first
            x_block = tl.load(x_at, mask=live_M[:, None] & live_K[None, :], other=0.0)
            w_block = tl.load(w_at, mask=live_K[:, None] & live_N[None, :], other=0.0)
        acc = dot(x_block, w_block, acc)
        x_at += BK
        w_at += BK * W.column_stride
    return acc


@triton.jit
def block_of_program(tiles, num_columns, BM: tl.constexpr, BN: tl.constexpr):
    """Expert (-1: none), first row, which rows are the expert's, columns and column block of this program."""
    tile, column = launch_order(tl.program_id(0), tiles.num_tiles, tl.cdiv(num_columns, BN))
    e = tl.load(tiles.expert_of_tile + tile)
    first = tl.load(tiles.row_of_tile + tile)
    live_M = first + tl.arange(0, BM) < tl.load(tiles.start_E1 + e + 1)  # e = -1 reads the first entry: no row is live
    return e, first, live_M, column * BN + tl.arange(0, BN), column


@triton.jit
def block_at(base, first, o, num_columns, BM: tl.constexpr):
    """Pointers to a block of a contiguous (M, num_columns) tensor: one 64-bit start, 32-bit steps from there.

    With 64-bit steps the epilogue of `fc2_gradient`, which has three such blocks, spilled 56 to 120 bytes a thread.
    """
    return base + first.to(tl.int64) * num_columns + (tl.arange(0, BM)[:, None] * num_columns + o[None, :])


@triton.jit
def _product(
    x, W, u, B, scale, tiles, out,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    e, first, live_M, o, _ = block_of_program(tiles, W.rows, BM, BN)
    if e < 0:
        return
    m = first + tl.arange(0, BM)
    acc = tl.zeros([BM, BN], tl.float32)
    acc = add_product(acc, x, m, live_M, W, e, o, BK, EVEN) * scale
    if BR > 0:
        acc = add_product(acc, u, m, live_M, B, e, o, BR, False)
    live = live_M[:, None] & (o < W.rows)[None, :]
    tl.store(block_at(out, first, o, W.rows, BM), narrow(acc, out.dtype.element_ty), mask=live)


def depth_of(adapter: Adapter | None) -> int:
    """The step over an adapter's rank: all of it at once, 16 at least for the tensor cores; 0 without one."""
    return 0 if adapter is None else max(16, triton.next_power_of_2(adapter.B.columns))


def launch(tiling: Tiling, tile: Tile, W: Matrices, adapter: Adapter | None) -> tuple[tuple[int], dict[str, int]]:
    """Grid and compile-time constants of a product with as many columns as W has rows.

    An adapter, being narrow, gets narrow blocks. Numbers of four bytes go half as deep: 32 rows and 128 deep would take
    240 KiB of shared memory; a block has 227.
    """
    columns = min(tile.columns, max(16, triton.next_power_of_2(W.rows)))
    depth = tile.depth * 2 // W.base.element_size()
    constants = {"BM": tile.rows, "BN": columns, "BK": depth, "BR": depth_of(adapter), "EVEN": W.columns % depth == 0}
    constants |= {"num_warps": tile.warps, "num_stages": tile.stages}
    return (tiling.map.num_tiles * triton.cdiv(W.rows, columns),), constants


def product(x: Rows, W: Matrices, tiling: Tiling, adapter: Adapter | None = None, scale: float = 1.0) -> Tensor:
    """(M, O) in the dtype of the rows; W is E x (O, I). `scale` multiplies the first sum."""
    out_MO = x.base.new_empty(tiling.num_rows, W.rows)
    tile = tiling.tiles.adapter if W.rows <= NARROW else tiling.tiles.product
    grid, constants = launch(tiling, tile, W, adapter)
    if out_MO.numel():
        _product[grid](x, W, *(adapter or (None, None)), scale, tiling.map, out_MO, **constants)
    return out_MO


@triton.jit
def _weight_gradient(
    dy, x, start_E1, out, ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """out_e[o, i] (+)= sum over the rows of e of dy[m, o] x[m, i]; one program sums its block in row order."""
    e = tl.program_id(1)
    i_block, o_block = launch_order(tl.program_id(0), tl.cdiv(out.columns, BN), tl.cdiv(out.rows, BM))
    o, i = o_block * BM + tl.arange(0, BM), i_block * BN + tl.arange(0, BN)
    start, end = tl.load(start_E1 + e), tl.load(start_E1 + e + 1)
    acc = tl.zeros([BM, BN], tl.float32)
    for first in range(start, end, BK):
        m = first + tl.arange(0, BK)
        live_M = m < end
        dy_at = dy.base + offset_of_row(dy, m, live_M)[None, :] + o[:, None]
        x_at = x.base + offset_of_row(x, m, live_M)[:, None] + i[None, :]
        dy_block = tl.load(dy_at, mask=(o < out.rows)[:, None] & live_M[None, :], other=0.0)
        x_block = tl.load(x_at, mask=live_M[:, None] & (i < out.columns)[None, :], other=0.0)
        acc = dot(dy_block, x_block, acc)
    at = out.base + tl.load(out.offset_E + e) * out.unit + o[:, None] * out.row_stride + i[None, :] * out.column_stride
    live = (o < out.rows)[:, None] & (i < out.columns)[None, :]
    if ACCUMULATE:
        if start == end:
            return
        acc += tl.load(at, mask=live, other=0.0)
    tl.store(at, narrow(acc, out.base.dtype.element_ty), mask=live)


def weight_gradient(dy: Rows, x: Rows, tiling: Tiling, out: Matrices, *, accumulate: bool) -> None:
    """Write dW_e = dy_e^T x_e, E x (O, I), into `out`, or add it there (a float32 main gradient, in place).

    An expert without rows gets zeros, or is not touched when adding.
    """
    E, tile = tiling.map.start_E1.numel() - 1, tiling.tiles.weight_gradient
    bm, bn = (
        min(most, max(16, triton.next_power_of_2(n)))
        for most, n in ((tile.rows, out.rows), (tile.columns, out.columns))
    )
    _weight_gradient[triton.cdiv(out.rows, bm) * triton.cdiv(out.columns, bn), E](
        dy,
        x,
        tiling.map.start_E1,
        out,
        ACCUMULATE=accumulate,
        BM=bm,
        BN=bn,
        BK=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
